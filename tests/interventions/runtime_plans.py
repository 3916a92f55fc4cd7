"""Plans that between them use all that a plan can say, and prompts to run them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from emprobe.directions import Direction
from emprobe.interventions import Ablate, Add, Cap, MeanAblate, Plan, Rotate, SetProjection, When, Where
from emprobe.interventions.runtimes import Runtime
from emprobe.models import Checkpoint
from emprobe.overlap import Subspace, random_directions
from tests.fixtures.models import Architecture, Checkpoints

PACKAGES = {"transformer_lens": "transformer-lens", "nnsight": "nnsight"}
LENGTHS = (9, 7, 2, 1)
Of = Callable[[Architecture], Checkpoints]


def along(checkpoint: Checkpoint, layer: int = 1, site: Any = "resid_post", seed: int = 0) -> Direction:
    vector = random_directions(1, checkpoint.d_model, seed)[0]
    return replace(Direction.from_vector(vector, layer=layer, site=site, resid_norm=4.0), base_projection=0.7)


def plane(checkpoint: Checkpoint, layer: int = 1) -> Subspace:
    return Subspace.from_directions([along(checkpoint, layer, seed=s) for s in (3, 4)])


PLANS: dict[str, Callable[[Checkpoint], Plan]] = {
    "add": lambda c: Plan.of(Add(along(c), 1.5)),
    "add at every site of a block": lambda c: Plan.of(
        *(Add(along(c, 1, s, i), 0.5) for i, s in enumerate(["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]))
    ),
    "ablate everywhere": lambda c: Plan.of(Ablate(along(c), layers="all")),
    "ablate from all writes": lambda c: Plan.of(Ablate(along(c), site="writes")),
    "mean": lambda c: Plan.of(MeanAblate([along(c, 0), along(c, 2, "resid_pre")])),
    "cap": lambda c: Plan.of(Cap(along(c, 1, "resid_mid"), min=-0.1, max=0.1, unit="abs"), Cap(plane(c, 2), max=0.2)),
    "rotate": lambda c: Plan.of(Rotate(plane(c), by=60.0), Rotate(plane(c, 2), to=10.0)),
    "set, then add": lambda c: Plan.of(SetProjection(along(c), 3.0, unit="abs"), Add(along(c, seed=5), 0.7)),
    "generation only": lambda c: Plan.of(Add(along(c), 2.5, where=Where(prompt=False)), Add(along(c, 0, "mlp_out"), 1.0)),
    "windows": lambda c: Plan.of(
        Add(along(c), 1.5, where=Where(prompt_positions=[-1], generation_window=(2, 4), exclude_special=True)),
        Ablate(along(c, 0), where=Where(generation=False, exclude_first=True, prompt_window=(-1, None))),
    ),
    "condition": lambda c: Plan.of(
        Add(along(c), 2.0, when=When(along(c, 0, "attn_out", 6), above=0.0)),
        Ablate(along(c, 2, seed=7), when=When(along(c, 1, "resid_mid", 8), below=0.1)),
    ),
}


def prompts(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Random token ids, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    width = max(lengths)
    ids = torch.randint(5, 250, (len(lengths), width), generator=generator)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return ids * mask, mask


def needs(runtime: str) -> None:
    if not find_spec(runtime):
        pytest.skip(f"{PACKAGES[runtime]} is not installed")


def counts(runtime: Runtime) -> list[dict[str, Any]]:
    assert runtime.receipt is not None
    return runtime.receipt.as_dict()


def assert_same_counts(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a == {k: pytest.approx(v, rel=1e-3, abs=1e-4) if isinstance(v, float) else v for k, v in b.items()}
