"""What operators do to a hidden state, seen in the span they act on.

Every operator moves a hidden state h only within the span of orthonormal rows B: h' = h + step(p) B with coordinates p = h Bᵀ. A change is
the function `step`, as data.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Change(Protocol):
    """How far coordinates move; nothing else of a hidden state does."""

    def step(self, p: Float[Tensor, "*at k"]) -> Float[Tensor, "*at k"]:
        """The move for coordinates p; may have any shape that broadcasts with theirs."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for hashing."""
        ...


@dataclass(frozen=True)
class Affine:
    """step(p) = shift + scale p: adds (scale 0), or goes a share -scale of the way to a point.

    Example:
        >>> Affine((3.0,), -1.0).step(torch.tensor([[5.0]]))
        tensor([[-2.]])
    """

    shift: tuple[float, ...]
    scale: float

    def step(self, p: Tensor) -> Tensor:
        """See the class."""
        if not any(self.shift):
            return p * self.scale
        shift = p.new_tensor(self.shift)
        return torch.add(shift, p, alpha=self.scale) if self.scale else shift.expand_as(p)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"change": "affine", **asdict(self)}


@dataclass(frozen=True)
class Clamp:
    """Bring one coordinate into [low, high], or (k > 1) their norm to at most high.

    Example:
        >>> Clamp(None, 1.0).step(torch.tensor([[3.0]])), Clamp(None, 1.0).step(torch.tensor([[3.0, 4.0]]))
        (tensor([[-2.]]), tensor([[-2.4000, -3.2000]]))
    """

    low: float | None
    high: float | None

    def step(self, p: Tensor) -> Tensor:
        """See the class."""
        if p.shape[-1] == 1:
            return p.clamp(self.low, self.high) - p
        assert self.high is not None
        norm = torch.linalg.vector_norm(p, dim=-1, keepdim=True)
        kept: Tensor = p * ((self.high / norm.clamp(min=torch.finfo(p.dtype).tiny)).clamp(max=1) - 1)
        return kept

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"change": "clamp", **asdict(self)}


@dataclass(frozen=True)
class Turn:
    """Turn two coordinates by an angle, or to one, in degrees from the first basis vector towards the second; their norm stays.

    Example:
        >>> Turn(90.0, absolute=False).step(torch.tensor([[1.0, 0.0]])).round(decimals=6) + 0.0
        tensor([[-1.,  1.]])
    """

    degrees: float
    absolute: bool

    def step(self, p: Tensor) -> Tensor:
        """See the class."""
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        if self.absolute:
            norm: Tensor = torch.linalg.vector_norm(p, dim=-1, keepdim=True)
            return norm * p.new_tensor([cos, sin]) - p
        return p @ p.new_tensor([[cos, sin], [-sin, cos]]) - p

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"change": "turn", **asdict(self)}
