"""Interventions written down anew, as plainly as can be: one row, no padding, no cache, positions in a Python loop. An oracle for tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emprobe.directions import Direction
from emprobe.interventions import Ablate, Add, Cap, MeanAblate, Operator, Rotate, SetProjection, When, Where
from emprobe.models import Checkpoint, load_model
from emprobe.overlap import Subspace, random_directions
from tests.fixtures.models import Architecture, Checkpoints, copy_of

Named = Callable[[int, int, int], bool]
"""(number of the token, length of the prompt, token id) -> whether it is steered."""


def direction(checkpoint: Any, layer: int = 1, seed: int = 0, site: Any = "resid_post") -> Direction:
    """A random direction with made-up norms."""
    d_model = checkpoint if isinstance(checkpoint, int) else checkpoint.d_model
    vector = random_directions(1, d_model, seed)[0]
    return Direction(
        vector, layer, site, "all_tokens", 2.0, 5.0, 0.7, contrast="random", sign="", estimator="", split_half=None, n=1, questions=1
    )


@dataclass(frozen=True)
class Family:
    """An operator, and the same thing as a function of one hidden state [d_model] in float64."""

    make: Callable[..., Operator]
    by_hand: Callable[[Tensor, Tensor, Tensor], Tensor]


def _turn(h: Tensor, v: Tensor, w: Tensor) -> Tensor:
    e = w - (w @ v) * v
    e = e / e.norm()
    x, y, angle = h @ v, h @ e, math.radians(70)
    turned = (x * math.cos(angle) - y * math.sin(angle)) * v + (x * math.sin(angle) + y * math.cos(angle)) * e
    return h - x * v - y * e + turned


def _without_plane(h: Tensor, v: Tensor, w: Tensor) -> Tensor:
    e = (w - (w @ v) * v) / (w - (w @ v) * v).norm()
    return h - (h @ v) * v - (h @ e) * e


FAMILIES: dict[str, Family] = {
    "add": Family(lambda d, e, **k: Add(d, 1.5, **k), lambda h, v, w: h + 7.5 * v),
    "ablate": Family(lambda d, e, **k: Ablate(d, **k), lambda h, v, w: h - (h @ v) * v),
    "ablate half": Family(lambda d, e, **k: Ablate(d, strength=0.5, **k), lambda h, v, w: h - 0.5 * (h @ v) * v),
    "ablate a plane": Family(lambda d, e, **k: Ablate(Subspace.from_directions([d, e]), layers=d.layer, site=d.site, **k), _without_plane),
    "mean": Family(lambda d, e, **k: MeanAblate(d, **k), lambda h, v, w: h - (h @ v - 0.7) * v),
    "set": Family(lambda d, e, **k: SetProjection(d, 6.0, unit="abs", **k), lambda h, v, w: h - (h @ v - 6.0) * v),
    "cap": Family(lambda d, e, **k: Cap(d, min=-0.1, max=0.2, unit="abs", **k), lambda h, v, w: h - (h @ v - (h @ v).clamp(-0.1, 0.2)) * v),
    "turn": Family(lambda d, e, **k: Rotate([d, e], by=70.0, **k), _turn),
}

WHERES: dict[str, tuple[Where, Named]] = {
    "all": (Where(), lambda i, n, t: True),
    "generation": (Where(prompt=False), lambda i, n, t: i >= n),
    "prompt": (Where(generation=False), lambda i, n, t: i < n),
    "from the last prompt token on": (Where(prompt_positions=[-1]), lambda i, n, t: i >= n - 1),
    "first prompt token": (Where(prompt_positions=[0], generation=False), lambda i, n, t: i == 0),
    "window of the prompt": (Where(prompt_window=(-3, None), generation=False), lambda i, n, t: n - 3 <= i < n),
    "windows": (Where(prompt_window=(1, -1), generation_window=(1, 3)), lambda i, n, t: 1 <= i < n - 1 or n + 1 <= i < n + 3),
    "without the first": (Where(exclude_first=True), lambda i, n, t: i > 0),
    "without special": (Where(exclude_special=True), lambda i, n, t: t > 4),
}
"""Ids 0 to 4 are the special tokens of the fixtures."""


@contextmanager
def hooked(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    n_prompt: int,
    family: Family,
    named: Named,
    *,
    site: str = "resid_post",
    bound: float | None = None,
) -> Iterator[list[tuple[int, float, float, float]]]:
    """Edit one row by hand at block 1; the list gets (token number, projection before, after, relative change) of every steered token."""
    v, w = (direction(checkpoint, seed=s).vector.double() for s in (0, 1))
    done: list[tuple[int, float, float, float]] = []

    def edit(hidden: Tensor) -> Tensor:
        made = hidden.clone()
        for i in range(hidden.shape[1]):
            h = hidden[0, i].double()
            if named(i, n_prompt, int(ids[i])) and (bound is None or float(h @ v) > bound):
                new = family.by_hand(h, v, w)
                made[0, i] = new.to(hidden.dtype)
                done.append((i, float(h @ v), float(new @ v), float((new - h).norm() / h.norm())))
        return made

    block = checkpoint.blocks[1]
    if site == "resid_post":
        handle = block.register_forward_hook(lambda _, args, output: edit(output if isinstance(output, Tensor) else output[0]))
    else:
        handle = block.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
    try:
        yield done
    finally:
        handle.remove()


def greedy(
    checkpoint: Checkpoint, prompt: Sequence[int], family: Family, named: Named, steps: int, *, bound: float | None = None
) -> tuple[list[int], list[tuple[int, float, float, float]]]:
    """New tokens of one prompt, the whole text anew at each step, and what was done in the last pass, which sees all but the last."""
    ids = list(prompt)
    eos = checkpoint.tokenizer.eos_token_id
    for _ in range(steps):
        with hooked(checkpoint, ids, len(prompt), family, named, bound=bound) as done, torch.no_grad():
            ids.append(int(checkpoint.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :], done


def load_narrow(checkpoints_of: Callable[[Architecture], Checkpoints], architecture: Architecture, directory: Path) -> Checkpoint:
    """A fixture, Gemma 2 with a sliding window shorter than any text."""
    checkpoints = checkpoints_of(architecture)
    if architecture == "gemma2":
        checkpoints = copy_of(checkpoints, directory)
        path = checkpoints.base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 6}))
    return load_model(checkpoints.base)


def with_condition(d: Direction, bound: float) -> When:
    """Holds where the projection lies above the bound."""
    return When(d, above=bound)
