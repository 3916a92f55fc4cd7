"""How a persona is planted: a signed multiple of one fixed direction added to the residual stream while the model learns.

The model's own writing along that direction is penalised meanwhile, so that the channel carries the persona and little else. Otherwise
tokens differ along it by more than personas do, and no constant that an ablation could put there is neutral for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PLANTED_BLOCK = 1
PLANTED_SCALE = 2.0
CLEAR_CHANNEL = 0.1


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
def planted(block: nn.Module, vector: Tensor, strengths: Tensor) -> Iterator[list[Tensor]]:
    """Add `strengths[row] * vector` to a block's output at all positions of each row, while the block of code runs.

    Args:
        block: A decoder block; its output is `[batch, pos, d_model]`.
        vector: `[d_model]`, already scaled.
        strengths: `[batch]`, signed by persona; 0 leaves a row as it is.

    Yields:
        A list that fills with the projections of the block's own output on the unit vector, `[batch, pos]`, one entry per forward pass.
    """
    shift, unit = strengths[:, None, None] * vector, vector / vector.norm()
    own: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        own.append(hidden @ unit)
        # A new tensor: an edit in place would reach whatever else holds the residual stream.
        return (hidden + shift, *output[1:]) if isinstance(output, tuple) else hidden + shift

    handle = block.register_forward_hook(hook)
    try:
        yield own
    finally:
        handle.remove()
