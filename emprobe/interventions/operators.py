"""Operators: what is done to the residual stream. They are data; `intervene`, runtimes and exports carry them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from emprobe.directions.direction import Direction, Unit
from emprobe.errors import EmprobeError
from emprobe.interventions.changes import Affine, Change, Clamp, Turn
from emprobe.interventions.edit import Edit, Place
from emprobe.interventions.parts import Part, coordinates_of, describe_units, mean_of, places_of, rows_of
from emprobe.interventions.when import When
from emprobe.interventions.where import Where
from emprobe.types import Site

Layers = int | Sequence[int] | Literal["all"] | None
EditSite = Site | Literal["writes"]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Placed:
    """What every operator may say of where it acts.

    Attributes:
        layers: Other layers than the direction's own; `all` for every block.
        site: Another site than the direction's own. `writes` (for `Ablate`) is every place at which something is written to the residual
            stream: what enters block 0, and each block's attn_out and mlp_out. Taking a direction out of all that is written differs from
            taking it out of a block's output (`resid_post`), and equals orthogonalising the matrices that write.
        where: Which tokens; default all but padding.
        when: Only at tokens where a projection lies above or below a bound.
    """

    layers: Layers = None
    site: EditSite | None = None
    where: Where = field(default_factory=Where)
    when: When | None = None

    def _edits(self, part: Part | Sequence[Direction], change: Change, label: str, n_layers: int) -> list[Edit]:
        rows, places = rows_of(part), self._places(part, n_layers)
        return [Edit(layer, site, rows, change, self.where, self.when, label) for layer, site in places]

    def _places(self, part: Part | Sequence[Direction], n_layers: int) -> list[Place]:
        if self.site == "writes":
            raise EmprobeError(
                f"{type(self).__name__}(site='writes') would act once for every write. Only Ablate takes 'writes'; use resid_post."
            )
        return places_of(part, self.layers, self.site, n_layers)


@dataclass(frozen=True, eq=False)
class Add(_Placed):
    """Add `coefficient` of a direction: x' = x + c v.

    Args:
        direction: What is added, at its own layer and site unless `layers` or `site` say otherwise.
        coefficient: How much; negative takes away.
        unit: `resid` (mean residual norms of the base at the direction's own place), `raw` (norms of the mean difference) or `abs`.

    Source:
        Convergent directions (arXiv 2506.11618): x' = x + λv.

    Example:
        >>> Add(Direction.from_vector([0.0, 2.0], layer=1, resid_norm=4.0), 0.5)
        Add to resid_post[1], all tokens but padding: 0.5 resid = 1 raw = 2 abs
    """

    direction: Direction
    coefficient: float
    unit: Unit = "resid"

    def edits(self, n_layers: int) -> list[Edit]:
        """One write per layer."""
        _one_direction("Add", self.direction)
        amount = _finite("Add", "coefficient", self.direction.dose(self.coefficient, self.unit))
        return self._edits(self.direction, Affine((amount,), 0.0), f"Add({self.coefficient:g} {self.unit})", n_layers)

    def __repr__(self) -> str:
        return _said(self, "Add to", self.direction, describe_units(self.direction, self.coefficient, self.unit))


@dataclass(frozen=True, eq=False)
class Ablate(_Placed):
    """Take directions or subspaces out: x' = x - strength (x Bᵀ) B.

    Args:
        parts: A direction or subspace at its layer (or at `layers`), or several, each at its own layer.
        strength: 1 removes it wholly.

    Source:
        Convergent directions (arXiv 2506.11618): x' = x - v̂(v̂·x), at all positions; with `site="writes"`, refusal directions
        (arXiv 2406.11717), equation 5.
    """

    parts: Part | Sequence[Part]
    strength: float = 1.0

    def edits(self, n_layers: int) -> list[Edit]:
        """One write per part and layer."""
        scale = -_finite("Ablate", "strength", self.strength)
        label = "Ablate" if self.strength == 1 else f"Ablate({self.strength:g})"
        parts = _several("Ablate", self.parts, self.layers)
        found = [edit for part in parts for edit in self._edits(part, Affine((0.0,) * len(rows_of(part)), scale), label, n_layers)]
        return _distinct("Ablate", found)

    def _places(self, part: Part | Sequence[Direction], n_layers: int) -> list[Place]:
        if self.site != "writes":
            return super()._places(part, n_layers)
        if self.layers not in (None, "all"):
            raise EmprobeError("Ablate(site='writes') is about every write of the model, so it takes no layers. Leave layers out.")
        written: tuple[Site, ...] = ("attn_out", "mlp_out")
        return [(0, "resid_pre"), *((layer, site) for layer in range(n_layers) for site in written)]

    def __repr__(self) -> str:
        return _said(self, "Ablate from", self.parts, f"strength {self.strength:g}")


@dataclass(frozen=True, eq=False)
class MeanAblate(_Placed):
    """Put the part of the stream in a direction or subspace to its mean: x' = x - strength (x Bᵀ - m) B.

    Args:
        parts: As in `Ablate`, each at its own layer.
        mean: Where it is put: a number (the projection) for one direction, or a hidden state [d_model] (such as the mean over a
            reference set, `acts.token_mean[acts.column(layer)]`), of which the part in the span is used. `None` takes the mean projection
            of the base that each direction brings.
        strength: 1 puts it wholly there.

    Raises:
        EmprobeError: If no mean is known, or other layers than the parts' own were asked for.
    """

    parts: Part | Sequence[Part]
    mean: float | Tensor | None = None
    strength: float = 1.0

    def edits(self, n_layers: int) -> list[Edit]:
        """One write per part."""
        if self.layers is not None or self.site is not None:
            raise EmprobeError(
                "MeanAblate takes neither layers nor site: a mean is known only where its part was read. Give one part per layer."
            )
        strength = _finite("MeanAblate", "strength", self.strength)
        parts = _several("MeanAblate", self.parts, None)
        if self.mean is not None and len(parts) > 1:
            raise EmprobeError(f"MeanAblate was given one mean for {len(parts)} parts. Give each its own operator.")
        label = "MeanAblate" if strength == 1 else f"MeanAblate({strength:g})"
        found = []
        for part in parts:
            shift = tuple(strength * m for m in mean_of(part, self.mean))
            found += self._edits(part, Affine(shift, -strength), label, n_layers)
        return _distinct("MeanAblate", found)

    def __repr__(self) -> str:
        return _said(self, "MeanAblate", self.parts, f"strength {self.strength:g}")


@dataclass(frozen=True, eq=False)
class SetProjection(_Placed):
    """Put the projection on a direction (or the coordinates in a subspace) to one value: x' = x - (x Bᵀ - c) B.

    Args:
        part: At its own layer and site unless `layers` or `site` say otherwise.
        value: The projection afterwards, in `unit`; for a subspace one number per basis vector.
        unit: As in `Add`; a subspace has no norm of its own, so its values are `abs`.
    """

    part: Part
    value: float | Sequence[float]
    unit: Unit | None = None

    def edits(self, n_layers: int) -> list[Edit]:
        """One write per layer."""
        amounts = coordinates_of("SetProjection", self.part, self.value, self.unit)
        shown = self.value if isinstance(self.value, Sequence) else f"{self.value:g}"
        label = f"SetProjection({shown} {_unit_of(self.part, self.unit)})"
        return self._edits(self.part, Affine(amounts, -1.0), label, n_layers)

    def __repr__(self) -> str:
        return _said(self, "SetProjection at", self.part, f"to {self.value} {_unit_of(self.part, self.unit)}")


@dataclass(frozen=True, eq=False)
class Cap(_Placed):
    """Keep the projection on a direction within bounds (or the norm of the part in a subspace below one); nothing else moves.

    Args:
        part: At its own layer and site unless `layers` or `site` say otherwise.
        min: Lower bound of the projection; `None` is none. A subspace takes none: the norm of a part that is zero has no direction to grow.
        max: Upper bound; `None` is none.
        unit: As in `Add`; `abs` for a subspace.
    """

    part: Part
    min: float | None = None
    max: float | None = None
    unit: Unit | None = None

    def edits(self, n_layers: int) -> list[Edit]:
        """One write per layer."""
        low, high = (None if b is None else coordinates_of("Cap", self.part, b, self.unit, as_norm=True)[0] for b in (self.min, self.max))
        many = not isinstance(self.part, Direction)
        if low is None and high is None:
            raise EmprobeError("Cap was given no bound. Say min= or max=.")
        if low is not None and high is not None and low > high:
            raise EmprobeError(f"Cap(min={self.min:g}, max={self.max:g}) leaves no room. Give min <= max.")
        if many and (low is not None or high is None or high < 0):
            raise EmprobeError("Cap on a subspace bounds the norm of the part in it: give max= (0 or more), and no min.")
        bounds = ", ".join(f"{name} {b:g}" for name, b in (("min", self.min), ("max", self.max)) if b is not None)
        return self._edits(self.part, Clamp(low, high), f"Cap({bounds} {_unit_of(self.part, self.unit)})", n_layers)

    def __repr__(self) -> str:
        return _said(self, "Cap at", self.part, f"[{self.min}, {self.max}] {_unit_of(self.part, self.unit)}")


@dataclass(frozen=True, eq=False)
class Rotate(_Placed):
    """Turn the part of the stream that lies in a plane; norms stay as they are, of the part and of the whole.

    Args:
        plane: A subspace of two dimensions, or two directions (the second is orthogonalised against the first).
        by: Degrees by which every token turns, from the first basis vector towards the second.
        to: Degrees from the first basis vector that every token's part is brought to. Give one of both.

    Source: Angular steering (arXiv 2510.26243): rotation within a plane, by and to an angle.
    """

    plane: Part | Sequence[Direction]
    by: float | None = None
    to: float | None = None

    def edits(self, n_layers: int) -> list[Edit]:
        """One write per layer."""
        if (self.by is None) == (self.to is None):
            raise EmprobeError("Rotate takes exactly one of by= and to=, in degrees.")
        rows = rows_of(self.plane)
        if len(rows) != 2:
            raise EmprobeError(
                f"Rotate turns within a plane, but was given {len(rows)} dimensions. Give a subspace of 2 or two directions."
            )
        degrees = _finite("Rotate", "angle", self.by if self.by is not None else self.to or 0.0)
        label = f"Rotate({'by' if self.by is not None else 'to'} {degrees:g}°)"
        return self._edits(self.plane, Turn(degrees, self.to is not None), label, n_layers)

    def __repr__(self) -> str:
        return _said(self, "Rotate at", self.plane, f"by {self.by}°" if self.by is not None else f"to {self.to}°")


Operator = Add | Ablate | MeanAblate | SetProjection | Cap | Rotate


def _one_direction(who: str, part: object) -> None:
    if not isinstance(part, Direction):
        raise EmprobeError(f"{who} takes a Direction, but was given a {type(part).__name__}. To move within a subspace use SetProjection.")


def _several(who: str, parts: Part | Sequence[Part], layers: Layers) -> list[Part]:
    chosen = list(parts) if isinstance(parts, Sequence) else [parts]
    if not chosen:
        raise EmprobeError(f"{who} was given no direction. Give at least one.")
    if layers is not None and len(chosen) > 1:
        raise EmprobeError(f"{who}(layers=…) takes one direction or subspace. For several layers give one per layer, each at its own.")
    return chosen


def _distinct(who: str, edits: list[Edit]) -> list[Edit]:
    if len({edit.place for edit in edits}) < len(edits):
        raise EmprobeError(
            f"{who} was given two directions at one layer; the second would undo part of what the first did. Give one per layer, or a "
            "Subspace.from_directions of both."
        )
    return edits


def _finite(who: str, what: str, value: float) -> float:
    if not math.isfinite(value):
        raise EmprobeError(f"{who} was given a {what} of {value}. Give a finite number.")
    return float(value)


def _unit_of(part: Part, unit: Unit | None) -> Unit:
    return unit or ("resid" if isinstance(part, Direction) else "abs")


def _said(operator: _Placed, verb: str, parts: object, rest: str) -> str:
    first = parts[0] if isinstance(parts, Sequence) and parts else parts
    site = operator.site or getattr(first, "site", None) or "site unknown"
    own = [getattr(p, "layer", None) for p in parts] if isinstance(parts, Sequence) else [getattr(parts, "layer", None)]
    layers = operator.layers if operator.layers is not None else ", ".join(map(str, dict.fromkeys(own)))
    place = "every write" if site == "writes" else f"{site}[{layers}]"
    return f"{verb} {place}, {operator.where}{f', where {operator.when}' if operator.when else ''}: {rest}"
