"""A condition on a projection: steer only the tokens whose hidden state says so."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from emprobe.directions.direction import Direction
from emprobe.errors import EmprobeError


@dataclass(frozen=True)
class When:
    """Holds at a token whose projection on a direction, at the direction's own layer and site, lies above or below a bound.

    The projection is read in the same forward pass, before any operator of the block writes at that place, so its place must not come
    after the one that is steered.

    Args:
        direction: What is projected on.
        above: Holds where x·v > above, in absolute units.
        below: Holds where x·v < below. With both, both must hold.

    Raises:
        EmprobeError: If no bound was given, or none can satisfy both.

    Source: Conditional activation steering (arXiv 2409.05907), with the projection in place of the cosine.
    """

    direction: Direction
    above: float | None = None
    below: float | None = None
    _vectors: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.above is None and self.below is None:
            raise EmprobeError("When was given no bound. Say above= or below=, in absolute units of the projection.")
        if self.above is not None and self.below is not None and not self.above < self.below:
            raise EmprobeError(f"When(above={self.above:g}, below={self.below:g}) never holds. Give above < below.")

    def holds(self, hidden: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """At which tokens it holds."""
        hidden = hidden.detach()
        exact = hidden if hidden.dtype == torch.float64 else hidden.float()
        key = (exact.device, exact.dtype)
        if key not in self._vectors:
            self._vectors[key] = self.direction.vector.to(*key)
        projection = exact @ self._vectors[key]
        above = projection > (float("-inf") if self.above is None else self.above)
        return above if self.below is None else above & (projection < self.below)

    def __str__(self) -> str:
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">", self.above), ("<", self.below)) if bound is not None]
        return f"x·v {' and '.join(bounds)} at {self.direction.site}[{self.direction.layer}]"
