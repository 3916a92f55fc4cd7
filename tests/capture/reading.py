"""What the tests of the backends share: rows to read, and how far two readings are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from emprobe.capture.backends import Backend, backend_of
from emprobe.capture.plan import Batch, Padding, Row, row_batch
from emprobe.errors import EmprobeError
from emprobe.models import Checkpoint, load_model
from emprobe.models.sites import taps_of
from emprobe.types import Site
from tests.fixtures.models import Architecture, Checkpoints

PACKAGES = {"transformer_lens": "transformer-lens", "nnsight": "nnsight"}
SITES: tuple[Site, ...] = get_args(Site)
LENGTHS = (17, 9, 4, 12)
Of = Callable[[Architecture], Checkpoints]


def needs(backend: str) -> None:
    if not find_spec(backend):
        pytest.skip(f"{PACKAGES[backend]} is not installed")


def rows(lengths: Sequence[int] = LENGTHS) -> list[Row]:
    """Random token ids, each row read by three rules: its last token, the mean of the tokens after the first, and a span."""
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(5, 250, (n,), generator=generator).tolist()) for n in lengths]
    return [Row(i, ((len(i) - 1,), range(1, len(i)), (0, 2))) for i in ids]


def batch_of(padding: Padding = "right", lengths: Sequence[int] = LENGTHS) -> Batch:
    return row_batch(range(len(lengths)), rows(lengths), 0, padding)


def sites_of(checkpoint: Checkpoint) -> list[Site]:
    """The sites that the model itself proves at all its layers."""
    found: list[Site] = []
    for site in SITES:
        try:
            taps_of(checkpoint, site, range(checkpoint.n_layers))
        except EmprobeError:
            continue
        found.append(site)
    return found


def read(backend: Backend, batch: Batch, n: int) -> list[dict[tuple[Site, int], Tensor]]:
    """Hidden states of the real tokens, per checkpoint and place."""
    found: list[dict[tuple[Site, int], Tensor]] = [{} for _ in range(n)]
    keep = [lambda site, layer, x, f=f: f.__setitem__((site, layer), x[batch.mask.bool()].clone()) for f in found]
    backend.run(batch, keep)
    return found


def apart(left: dict[tuple[Site, int], Tensor], right: dict[tuple[Site, int], Tensor]) -> float:
    """The largest difference anywhere, in units of the layer's RMS."""
    assert left.keys() == right.keys()
    assert left, "nothing was read"
    return max(float((left[p] - right[p]).abs().max() / left[p].pow(2).mean().sqrt()) for p in left)


def both(name: str, checkpoints: Sequence[Checkpoint], batch: Batch | None = None, **options: Any) -> float:
    """How far a backend is from `hooks` on all sites and layers of some checkpoints."""
    batch = batch or batch_of()
    sites, layers = sites_of(checkpoints[0]), range(checkpoints[0].n_layers)
    own = read(backend_of("hooks", checkpoints, sites, layers), batch, len(checkpoints))
    theirs = read(backend_of(name, checkpoints, sites, layers, **options), batch, len(checkpoints))
    return max(apart(a, b) for a, b in zip(own, theirs, strict=True))


def weightless(checkpoints: Checkpoints) -> Checkpoint:
    """A checkpoint as one has it of a model that fits nowhere: modules on the device meta, and the tokenizer."""
    loaded = load_model(checkpoints.base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded.hf.config).eval()
    return Checkpoint(model, loaded.tokenizer, "someone/large", "")
