"""What operators act on: a direction, a subspace, or two directions that span a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emprobe.directions.direction import UNITS, Direction, Unit
from emprobe.errors import EmprobeError
from emprobe.interventions.edit import Place
from emprobe.overlap.subspace import Subspace
from emprobe.types import Site

Part = Direction | Subspace


def rows_of(part: Part | Sequence[Direction]) -> Float[Tensor, "k d_model"]:
    """Orthonormal rows that span it, float64; the first of two directions comes first.

    Raises:
        EmprobeError: If it is neither direction nor subspace, or two directions point the same way.
    """
    if isinstance(part, Direction):
        return part.vector.double()[None]
    if isinstance(part, Subspace):
        return part.basis.double()
    if not isinstance(part, Sequence) or not all(isinstance(p, Direction) for p in part):
        raise EmprobeError(f"An operator acts on a Direction or a Subspace, but was given a {type(part).__name__}.")
    rows = torch.stack([p.vector.double() for p in part])
    q, r = torch.linalg.qr(rows.T)
    if float(r.diagonal().abs().min()) < 1e-6:
        raise EmprobeError("Two directions that point the same way span no plane. Give two different ones.")
    signed: Tensor = (q * r.diagonal().sign()).T.contiguous()
    return signed


def places_of(part: Part | Sequence[Direction], layers: int | Sequence[int] | str | None, site: Site | None, n_layers: int) -> list[Place]:
    """Where it acts: at its own layer and site, unless others were asked for.

    Raises:
        EmprobeError: If it has no layer or site of its own and none was asked for.
    """
    first = part[0] if isinstance(part, Sequence) else part
    where = site or first.site
    if where is None or (layers is None and first.layer is None):
        raise EmprobeError("A subspace made of arrays does not say where it belongs. Say layers= and site=.")
    if isinstance(layers, str):
        if layers != "all":
            raise EmprobeError(f"layers={layers!r} was asked for. Use 'all', a block number, or a list of block numbers.")
        return [(layer, where) for layer in range(n_layers)]
    own = first.layer if layers is None else layers
    return [(int(layer), where) for layer in ([own] if isinstance(own, int) else own or ())]


def coordinates_of(who: str, part: Part, value: float | Sequence[float], unit: Unit | None, *, as_norm: bool = False) -> tuple[float, ...]:
    """A value in absolute units, one number per basis vector (or one in all, for a norm).

    Raises:
        EmprobeError: If their number or the unit does not fit, or one is not finite.
    """
    values = (value,) if isinstance(value, int | float) else tuple(value)
    wanted = 1 if as_norm else len(rows_of(part))
    if len(values) != wanted:
        raise EmprobeError(f"{who} was given {len(values)} values for {wanted} dimensions. Give one per basis vector.")
    if isinstance(part, Direction):
        values = tuple(part.dose(v, unit or "resid") for v in values)
    elif unit not in (None, "abs"):
        raise EmprobeError(f"{who} on a subspace was given unit={unit!r}, but a subspace has no norm of its own. Use 'abs'.")
    if not all(map(math.isfinite, values)):
        raise EmprobeError(f"{who} was given {', '.join(map(str, values))}. Give finite numbers.")
    return tuple(map(float, values))


def mean_of(part: Part, mean: float | Tensor | None) -> tuple[float, ...]:
    """The coordinates of a mean, from a hidden state, from a number, or from what a direction brings.

    Raises:
        EmprobeError: If none is known or it does not fit.
    """
    rows = rows_of(part)
    if isinstance(mean, Tensor) and mean.ndim == 1:
        if len(mean) != rows.shape[1]:
            raise EmprobeError(f"MeanAblate was given a mean of d_model {len(mean)} for a span in d_model {rows.shape[1]}.")
        return tuple(map(float, rows @ mean.double().cpu()))
    if mean is not None:
        return coordinates_of("MeanAblate", part, float(mean), "abs")
    if not isinstance(part, Direction):
        raise EmprobeError(
            "MeanAblate of a subspace needs to know the mean. Give mean=, a hidden state such as acts.token_mean[acts.column(layer)]."
        )
    if part.base_projection is None:
        raise EmprobeError(
            f"MeanAblate needs the base's mean projection on the direction at {part.site}[{part.layer}], which is unknown (an imported "
            "direction does not bring it). Give mean=, such as acts.token_mean[acts.column(layer)], or use Ablate."
        )
    return (part.base_projection,)


def describe_units(direction: Direction, coefficient: float, unit: Unit) -> str:
    """A coefficient in all three units, as far as they are known.

    Example:
        >>> describe_units(Direction.from_vector([0.0, 2.0], layer=1, resid_norm=4.0), 2.0, "raw")
        '1 resid = 2 raw = 4 abs'
    """
    amount = direction.dose(coefficient, unit)
    norms = {"resid": direction.resid_norm, "raw": direction.raw_norm, "abs": 1.0}
    said = [(u, norms[u]) for u in UNITS]
    return " = ".join(f"{amount / norm:.4g} {u}" if norm else f"unknown {u}" for u, norm in said)
