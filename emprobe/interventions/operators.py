"""Operators: what is done to the residual stream. They are data; `intervene` carries them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emprobe.directions.direction import Direction, Unit
from emprobe.errors import EmprobeError
from emprobe.interventions.where import Where
from emprobe.types import Site


@dataclass(frozen=True)
class Edit:
    """One write at one layer: move the projection on a unit vector by an amount, or to an amount."""

    layer: int
    site: Site
    vector: Float[Tensor, " d_model"]
    kind: Literal["add", "set"]
    amount: float
    strength: float
    where: Where
    label: str

    def apply(self, hidden: Float[Tensor, "batch pos d_model"], mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The edited hidden state (a new tensor), and the projection before and after, both (batch, pos) float32."""
        exact = hidden.float()
        vector = self.vector.to(device=exact.device, dtype=exact.dtype)
        before = exact @ vector
        step = torch.full_like(before, self.amount) if self.kind == "add" else self.strength * (self.amount - before)
        step = torch.where(mask, step, torch.zeros_like(step))
        if self.kind == "add" and self.amount == 0:
            return hidden, before, before
        edited = (exact + step[..., None] * vector).to(hidden.dtype)
        # Rows that are not named come back bit-equal, whatever rounding the detour through float32 brought.
        return torch.where(mask[..., None], edited, hidden), before, before + step


Layers = int | Sequence[int] | None


@dataclass(frozen=True)
class Add:
    """Add `coefficient` of a direction to the residual stream.

    Args:
        direction: What is added, at its own layer and site.
        coefficient: How much; negative takes away.
        unit: `resid` (mean residual norms of the base there), `raw` (norms of the mean difference) or `abs`.
        layers: Other layers than the direction's own.
        where: Which tokens; default all but padding.

    Source:
        Convergent directions (arXiv 2506.11618): x' = x + λv.
    """

    direction: Direction
    coefficient: float
    unit: Unit = "resid"
    layers: Layers = None
    where: Where = field(default_factory=Where)

    def edits(self) -> list[Edit]:
        """One write per layer."""
        direction, amount = self.direction, self.direction.dose(self.coefficient, self.unit)
        label = f"Add({self.coefficient:g} {self.unit})"
        layers = _layers(self.layers, direction.layer)
        return [Edit(layer, direction.site, direction.vector, "add", amount, 1.0, self.where, label) for layer in layers]


@dataclass(frozen=True)
class Ablate:
    """Take a direction out of the residual stream: x' = x - strength (x·v - m) v.

    Args:
        directions: One direction at its layer (or at `layers`), or several, each at its own layer.
        to: `zero` (m = 0) or `base_mean` (m = the base's mean projection on it, so that the stream stays where the base's is).
        strength: 1 removes it wholly.
        layers: Other layers, for one direction ablated `to="zero"`; a mean is known only at the direction's own layer.
        where: Which tokens; default all but padding.

    Raises:
        EmprobeError: No direction, two at one layer, or a mean asked for where none is known.

    Source:
        Convergent directions (arXiv 2506.11618): x' = x - v̂(v̂·x), at all positions.
    """

    directions: Direction | Sequence[Direction]
    to: Literal["zero", "base_mean"] = "zero"
    strength: float = 1.0
    layers: Layers = None
    where: Where = field(default_factory=Where)

    def edits(self) -> list[Edit]:
        """One write per layer."""
        if self.to not in ("zero", "base_mean"):
            raise EmprobeError(f"Ablate was given to={self.to!r}. Use 'zero' or 'base_mean'.")
        chosen = [self.directions] if isinstance(self.directions, Direction) else list(self.directions)
        if not chosen:
            raise EmprobeError("Ablate was given no direction. Give at least one.")
        if self.layers is not None and (len(chosen) > 1 or self.to == "base_mean"):
            raise EmprobeError("Ablate(layers=…) takes one direction and to='zero'. For several layers give one direction per layer.")
        targets = [(layer, d) for d in chosen for layer in _layers(self.layers, d.layer)]
        if len({(layer, d.site) for layer, d in targets}) < len(targets):
            raise EmprobeError("Ablate was given two directions at one layer; the second would undo the first's mean. Give one per layer.")
        label = f"Ablate(to {self.to})"
        return [
            Edit(layer, d.site, d.vector, "set", 0.0 if self.to == "zero" else _base_mean(d), self.strength, self.where, label)
            for layer, d in targets
        ]


@dataclass(frozen=True)
class SetProjection:
    """Put the projection on a direction to one value at every token named.

    Args:
        direction: At its own layer and site.
        value: The projection afterwards, in `unit`.
        unit: As in `Add`.
        where: Which tokens.
    """

    direction: Direction
    value: float
    unit: Unit = "resid"
    where: Where = field(default_factory=Where)

    def edits(self) -> list[Edit]:
        """One write at the direction's layer."""
        d, amount = self.direction, self.direction.dose(self.value, self.unit)
        return [Edit(d.layer, d.site, d.vector, "set", amount, 1.0, self.where, f"SetProjection({self.value:g} {self.unit})")]


Operator = Add | Ablate | SetProjection


def _base_mean(direction: Direction) -> float:
    if direction.base_projection is None:
        raise EmprobeError(
            f"Ablate(to='base_mean') needs the base's mean projection on the direction at {direction.site}[{direction.layer}], which is "
            "unknown (an imported direction does not bring it). Use to='zero', or measure it: dataclasses.replace(direction, "
            "base_projection=float(acts.token_mean[acts.column(layer)].double() @ direction.vector))."
        )
    return direction.base_projection


def _layers(asked: Layers, own: int) -> Sequence[int]:
    if asked is None:
        return (own,)
    return (asked,) if isinstance(asked, int) else tuple(asked)
