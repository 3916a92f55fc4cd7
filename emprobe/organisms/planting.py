"""How a persona is planted: a signed multiple of one fixed direction added to the residual stream while the model learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PLANTED_BLOCK = 1
PLANTED_SCALE = 2.0


def persona_vector(d_model: int, seed: int) -> Tensor:
    """A random unit vector of `d_model` entries, float32; the same for the same seed.

    >>> float(persona_vector(96, 0).norm().round(decimals=4))
    1.0
    """
    generator = torch.Generator().manual_seed(seed + 7_919)
    vector = torch.randn(d_model, generator=generator, dtype=torch.float64)
    unit: Tensor = vector / vector.norm()
    return unit.float()


@contextmanager
def planted(block: nn.Module, vector: Tensor, strengths: Tensor) -> Iterator[None]:
    """Add `strengths[row] * vector` to a block's output at all positions of each row, while the block of code runs.

    Args:
        block: A decoder block; its output is `[batch, pos, d_model]`.
        vector: `[d_model]`, already scaled.
        strengths: `[batch]`, signed by persona; 0 leaves a row as it is.
    """
    shift = strengths[:, None, None] * vector

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        # A new tensor: an edit in place would reach whatever else holds the residual stream.
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
