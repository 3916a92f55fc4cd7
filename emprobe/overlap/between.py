"""The overlap of two subspaces, or of a direction with one: every measure at once, each beside its nulls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emprobe.activations import Activations, PairActivations
from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap.measures import Floats, Side, measures
from emprobe.overlap.nulls import Analytic, FrameLaw, analytic, drawn_nulls, haar
from emprobe.overlap.resampling import Source, common_coordinates, interval, left_out, numbered
from emprobe.overlap.spans import SpanError, matrix_of
from emprobe.overlap.subspace import DirectionLike, Subspace
from emprobe.types import Estimate, Null

BY_NAME: Mapping[str, Callable[[], Analytic | FrameLaw]] = {"analytic": analytic, "haar": haar}
NULLS: tuple[str, ...] = ("haar", "analytic")


@dataclass(frozen=True, eq=False)
class Overlap:
    """What `overlap` found; every measure an `Estimate` whose `null` is the first that was asked.

    Attributes:
        a: The first subspace, in words.
        b: The second.
        k: Their dimensions.
        d_model: The width they lie in.
        layer: The layer of both, where they agree.
        measures: By name: `angle_1` … (radians, ascending), `mean_squared_cosine`, `grassmann_distance`, `explained_l2`,
            `projection_fraction`, with rows of b also `reconstruction_cosine`, for two vectors also `cosine`.
        nulls: For each measure, every null that was asked, by name.
        note: What makes the intervals doubtful, if anything.
    """

    a: str
    b: str
    k: tuple[int, int]
    d_model: int
    layer: int | None
    measures: Mapping[str, Estimate]
    nulls: Mapping[str, Mapping[str, Null]] = field(default_factory=dict)
    note: str = ""

    def __getattr__(self, name: str) -> Estimate:
        found: Estimate | None = self.__dict__.get("measures", {}).get(name)
        if found is None:
            raise AttributeError(f"This overlap has no measure {name!r}; it has {', '.join(self.__dict__.get('measures', {}))}.")
        return found

    @property
    def angles(self) -> tuple[Estimate, ...]:
        """Principal angles in radians, ascending."""
        return tuple(found for name, found in self.measures.items() if name.startswith("angle_"))

    def __repr__(self) -> str:
        lines = [f"Overlap of {self.a}", f"    with {self.b}"]
        shown = [name for name in self.measures if not name.startswith("angle_")]
        for name in shown:
            nulls = "; ".join(str(null) for null in self.nulls.get(name, {}).values())
            lines.append(f"  {name:<22} {self.measures[name]!s:<24} {nulls}")
        angles = ", ".join(f"{np.degrees(angle.value):.2f}" for angle in self.angles[:8])
        lines.append(f"  angles (degrees)       {angles}{', …' if len(self.angles) > 8 else ''}")
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "record": "Overlap",
            "a": self.a,
            "b": self.b,
            "k": list(self.k),
            "d_model": self.d_model,
            "layer": self.layer,
            "measures": {name: found.as_dict() for name, found in self.measures.items()},
            "note": self.note,
            "nulls": {name: {null.name: null.as_dict() for null in found.values()} for name, found in self.nulls.items()},
        }


def overlap(
    a: Subspace | DirectionLike | Tensor | NDArray[Any],
    b: Subspace | DirectionLike | Tensor | NDArray[Any],
    *,
    nulls: Sequence[str | Analytic | FrameLaw] = NULLS,
    rows_a: Any = None,
    rows_b: Any = None,
    groups_a: Sequence[Hashable] | None = None,
    groups_b: Sequence[Hashable] | None = None,
    draws: int = 1000,
    resamples: int = 400,
    seed: int = 0,
) -> Overlap:
    """How far b lies in a: every measure of overlap, with its interval where there are rows, beside its nulls.

    Args:
        a: The subspace that holds; a direction or vector is a subspace of one dimension.
        b: The subspace that is held.
        nulls: `haar`, `analytic`, or laws from `emprobe.nulls` that need rows, such as `nulls.covariance_matched(rows)`. A random
            subspace takes a's place; b stays. The first one named stands beside each estimate.
        rows_a: The rows `[n, d_model]` that a was made from, or the activations, of which its layer's rows (a pair's deltas) and their
            questions are taken. With them its interval is found by making it again without each group; without rows on either side
            there is no interval, since two bases show no doubt.
        rows_b: The rows that b was made from; explained L2 and its kin are then of these rows instead of b's basis.
        groups_a: The group (question) of each of `rows_a`; groups of one name on both sides are left out together.
        groups_b: The same for `rows_b`.
        draws: Draws of each null.
        resamples: How often a side is made again at most, each a decomposition of its rows: once without each group or, if there are
            more of them, without each of that many blocks of groups. 0 for no interval.
        seed: Same seed, same result.

    Raises:
        MismatchError: If d_model differs, also of rows, or the rows of a side do not give its span.
        EmprobeError: Unusable rows, or a null that is unknown or needs rows.

    Example:
        >>> import torch
        >>> found = overlap(torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]), nulls=["analytic"])
        >>> round(found.mean_squared_cosine.value, 6), found.mean_squared_cosine.null.mean
        (0.36, 0.5)
    """
    first, second = (_as_subspace(side) for side in (a, b))
    _check_belong(first, second)
    laws = [_law(null) for null in ([nulls] if isinstance(nulls, str) else nulls)]
    rows_a, groups_a = _rows_and_groups(rows_a, groups_a, first, "rows_a")
    rows_b, groups_b = _rows_and_groups(rows_b, groups_b, second, "rows_b")
    rows = [_fitting_rows(r, s, which) for r, s, which in ((rows_a, first, "rows_a"), (rows_b, second, "rows_b"))]
    whole = Side(first.basis.double().numpy(), _mean(first)), Side(second.basis.double().numpy(), None, rows[1])
    values = measures(*whole)
    found: dict[str, dict[str, Null]] = {name: {} for name in values}
    for law in laws:
        if isinstance(law, Analytic):
            by_name = law.nulls(values, first.k, second.k, first.d_model, rows=rows[1] is not None)
        else:
            by_name = drawn_nulls(law, values, first.k, whole[1], whole[0].mean, draws, seed)
        for name, null in by_name.items():
            found[name][null.name] = null
    estimates, note = _estimates(values, (first, second), rows, (groups_a, groups_b), whole, resamples, seed)
    beside = {name: next(iter(found[name].values()), None) for name in values}
    return Overlap(
        a=repr(first),
        b=repr(second),
        k=(first.k, second.k),
        d_model=first.d_model,
        layer=first.layer if first.layer == second.layer else None,
        measures={name: _with_null(estimates[name], beside[name]) for name in values},
        nulls=found,
        note=note,
    )


def _estimates(
    values: Mapping[str, float],
    spaces: tuple[Subspace, Subspace],
    rows: Sequence[Floats | None],
    groups: Sequence[Sequence[Hashable] | None],
    whole: tuple[Side, Side],
    resamples: int,
    seed: int,
) -> tuple[dict[str, Estimate], str]:
    """Values with their intervals, in coordinates of what rows and bases span; and what makes these doubtful."""
    n = sum(space.n for space in spaces)
    known = [i for i in (0, 1) if rows[i] is not None]
    if not known or not resamples:
        why = "not resampled" if known else "two bases without the rows behind them, which show no doubt"
        return {name: Estimate.point(value, n=n, method=why) for name, value in values.items()}, ""
    parts: list[Floats] = [whole[0].basis, whole[1].basis, *([] if whole[0].mean is None else [whole[0].mean[None, :]])]
    coordinates = common_coordinates([*parts, *(found for i in known if (found := rows[i]) is not None)])
    of_rows = dict(zip(known, coordinates[len(parts) :], strict=True))
    codes, counts = numbered([groups[i] for i in known], [len(of_rows[i]) for i in known])
    if min(counts) < 2:
        raise EmprobeError("An interval was asked of rows in one group, which show no doubt. Give two groups or more, or resamples=0.")
    numbers = dict(zip(known, codes, strict=True))
    sides: list[Source | Side] = []
    for i, space in enumerate(spaces):
        mean = coordinates[2][0] if i == 0 and whole[0].mean is not None else None
        again = i in of_rows
        sides.append(Source(of_rows[i], numbers[i], coordinates[i], space.mean is not None) if again else Side(coordinates[i], mean))
    for i in known:
        _check_source(sides[i], f"rows_{'ab'[i]}")
    without = left_out(sides[0], sides[1], resamples, seed)
    clusters = min(counts)
    which = " and ".join("ab"[i] for i in known)
    made = " and ".join(str(len(found["angle_1"])) for found in without)
    words = f"jackknife over {' and '.join(map(str, counts))} groups, {which} made again without each of {made} blocks of them"
    total = sum(len(found) for found in of_rows.values())
    estimates = {
        name: Estimate(value, *interval(name, value, [found[name] for found in without]), total, clusters, words)
        for name, value in values.items()
    }
    return estimates, _note(sides)


def _note(sides: Sequence[Source | Side]) -> str:
    blurred = [f"{len(side.basis)} of {'ab'[i]}" for i, side in enumerate(sides) if isinstance(side, Source) and side.blurred()]
    if not blurred:
        return ""
    return f"Component {' and '.join(blurred)} cannot be told from the next one by so few groups: intervals are rough. Try another k."


def _check_source(side: Source | Side, which: str) -> None:
    """Refuse rows from which the subspace cannot be made again: few dimensions above rounding, or other rows."""
    assert isinstance(side, Source)
    k = len(side.basis)
    try:
        if measures(side.again(), Side(side.basis))["mean_squared_cosine"] >= 1 - 1e-6:
            return
    except SpanError:
        if side.rank() >= k:
            raise
    if side.rank() < k:
        raise SpanError(
            f"{which} are of rank {side.rank()} but for parts below 1e-5 of the largest, and without any group rounding makes the rest "
            f"of {k} dimensions anew.",
            f"Ask for at most {side.rank()}, or give resamples=0 for no interval.",
        )
    raise MismatchError(
        f"{which} do not give the subspace again by their {k} leading components, so making it again from some of them "
        "would say nothing of it. Give the very rows that Subspace.from_deltas was given, or resamples=0 for no interval."
    )


def _with_null(estimate: Estimate, null: Null | None) -> Estimate:
    return Estimate(estimate.value, estimate.low, estimate.high, estimate.n, estimate.clusters, estimate.method, estimate.level, null)


def _as_subspace(side: Subspace | DirectionLike | Tensor | NDArray[Any]) -> Subspace:
    return side if isinstance(side, Subspace) else Subspace.from_directions([side], made_from="one direction")


def _mean(space: Subspace) -> Floats | None:
    return None if space.mean is None else np.asarray(space.mean.double().numpy())


def _law(null: str | Analytic | FrameLaw) -> Analytic | FrameLaw:
    if not isinstance(null, str) and (isinstance(null, Analytic) or hasattr(null, "images")):
        return null
    if not isinstance(null, str) or null not in BY_NAME:
        raise EmprobeError(
            f"The null {null!r} was asked for by name; by name alone there are {', '.join(BY_NAME)}. Those that need rows are given "
            "with them, such as nulls.covariance_matched(rows)."
        )
    return BY_NAME[null]()


def _rows_and_groups(rows: Any, groups: Sequence[Hashable] | None, space: Subspace, which: str) -> tuple[Any, Sequence[Hashable] | None]:
    """Rows as given or, of activations, those of the subspace's layer with their questions as groups."""
    if not isinstance(rows, Activations | PairActivations):
        return rows, groups
    if space.layer is None:
        raise EmprobeError(
            f"{which} are activations of layers {', '.join(map(str, rows.layers))}, and the subspace names none. Give .at(layer)."
        )
    return rows.at(space.layer), rows.questions if groups is None else groups


def _fitting_rows(rows: Any, space: Subspace, which: str) -> Floats | None:
    if rows is None:
        return None
    found = np.asarray(matrix_of(rows, which), dtype=np.float64)
    if found.shape[1] != space.d_model:
        raise MismatchError(f"{which} have d_model {found.shape[1]}, the subspaces {space.d_model}. Give the rows it was made from.")
    if len(found) < space.k:
        raise EmprobeError(f"{which} are {len(found)} rows for a subspace of {space.k} dimensions. Give the rows it was made from.")
    return found


def _check_belong(a: Subspace, b: Subspace) -> None:
    if a.d_model != b.d_model:
        raise MismatchError(
            f"Subspaces of d_model {a.d_model} and {b.d_model} have no overlap. Take both from one model, or compare activations of the "
            "same texts by linear_cka."
        )
