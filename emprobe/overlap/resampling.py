"""Doubt about an overlap from the rows behind it: subspaces made again from resampled groups, and from halves of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, stats

from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap.measures import Side, measures
from emprobe.overlap.spans import matrix_of, principal_span
from emprobe.types import Estimate

Floats = NDArray[np.float64]
SPLITS = 20
"""Random halves that the ceiling is a mean of."""


@dataclass(frozen=True, eq=False)
class Source:
    """Rows that a side is made from again in each draw: in common coordinates, with their group's number."""

    rows: Floats
    groups: NDArray[np.int64]
    k: int
    centred: bool

    def again(self, counts: Floats) -> Side:
        """The side that rows counted `counts` times give."""
        weights = counts[self.groups]
        there = weights > 0
        rows, weights = self.rows[there], weights[there]
        mean = weights @ rows / weights.sum() if self.centred else None
        scaled = (rows if mean is None else rows - mean) * np.sqrt(weights)[:, None]
        return Side(_leading(scaled, self.k), mean, rows, weights)


def common_coordinates(parts: Sequence[Floats]) -> list[Floats]:
    """The same arrays in an orthonormal basis of what they span together, if that has fewer dimensions than d_model."""
    stacked = np.concatenate(parts)
    if len(stacked) < stacked.shape[1]:
        stacked = linalg.qr(stacked.T, mode="r", check_finite=False)[0][: len(stacked)].T
    return np.split(stacked, np.cumsum([len(part) for part in parts])[:-1])


def bootstrap(a: Source | Side, b: Source | Side, draws: int, seed: int) -> dict[str, Floats]:
    """Every measure over subspaces made from groups drawn with replacement; a side without rows stays as it is.

    Groups that both sides have are drawn together; where they share none, each side's are drawn for itself.
    """
    rng = np.random.default_rng(seed)
    sources = [side for side in (a, b) if isinstance(side, Source)]
    codes = [np.unique(source.groups) for source in sources]
    together = len(codes) == 1 or bool(np.isin(codes[0], codes[1]).any())
    pools = [np.unique(np.concatenate(codes))] if together else codes
    top = int(max(c.max() for c in codes)) + 1
    found: list[dict[str, float]] = []
    for _ in range(draws):
        counts = np.zeros(top)
        for pool in pools:
            np.add.at(counts, rng.choice(pool, size=len(pool)), 1.0)
        made = [side.again(counts) if isinstance(side, Source) else side for side in (a, b)]
        if all(len(side.basis) == (s.k if isinstance(s, Source) else len(s.basis)) for side, s in zip(made, (a, b), strict=True)):
            found.append(measures(made[0], made[1]))
    if len(found) < draws / 2:
        raise EmprobeError(
            f"Of {draws} resamples only {len(found)} had rows enough for the subspaces' dimensions. Give more groups, or a smaller k."
        )
    return {name: np.array([draw[name] for draw in found]) for name in found[0]}


def interval(name: str, value: float, drawn: Floats, groups: int, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval with the bias taken out: value - (median of draws - value), plus and minus t times their standard deviation.

    Estimated spans overlap less than the true ones, and resampled spans less again, by about as much; percentiles would count it twice
    (they covered 60 % in simulation with 60 rows in 40 dimensions, this interval 92 %). Deviations are scaled for few groups, the ends
    lie in the measure's range, and the value is inside. Near equal spans angles cannot be covered: noise never makes them smaller.

    Source: Efron & Tibshirani (1993), chapters 10 (bias) and 12 (t).
    """
    half = float(stats.t.ppf(0.5 + level / 2, groups - 1) * np.sqrt(groups / (groups - 1)) * np.std(drawn))
    corrected = 2 * value - float(np.median(drawn))
    least, most = _range(name)
    return float(np.clip(min(corrected - half, value), least, most)), float(np.clip(max(corrected + half, value), least, most))


def ceiling(
    rows: object, *, k: int, centred: bool = True, groups: Sequence[Hashable] | None = None, splits: int = SPLITS, seed: int = 0
) -> Estimate:
    """The noise ceiling: mean squared cosine of a subspace with itself, each made from one half of the groups.

    An overlap near it is as much as noise lets be seen. Halves have half the rows, so for all of them the ceiling lies higher: an overlap
    may exceed this one, also where both sides hold the same noise (differences from the same base rows).

    Returns:
        Mean over random halves, without an interval, since splits of the same rows are not independent.

    Raises:
        EmprobeError: With fewer than two groups, or too few rows in a half for k.

    Example:
        >>> ceiling([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]], k=1).value
        1.0
    """
    found = matrix_of(rows).astype(np.float64)
    codes, count = numbered([groups], [len(found)])
    if count[0] < 2:
        raise EmprobeError(f"A noise ceiling was asked of {len(found)} rows in one group, which has no halves. Give two groups or more.")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(splits):
        first = (rng.permutation(count[0]) < count[0] // 2)[codes[0]]
        halves = [principal_span(found[part], k=k, share=None, centred=centred, what="rows of a half") for part in (first, ~first)]
        values.append(measures(Side(halves[0].basis), Side(halves[1].basis))["mean_squared_cosine"])
    return Estimate.point(float(np.mean(values)), n=len(found), method=f"mean squared cosine of {splits} random pairs of halves")


def numbered(groups: Sequence[Sequence[Hashable] | None], sizes: Sequence[int]) -> tuple[list[NDArray[np.int64]], list[int]]:
    """Numbers of the groups of each set of rows and how many there are; a name has one number everywhere, a row without one its own.

    Raises:
        MismatchError: If a set has not one group name a row.
    """
    number: dict[Hashable, int] = {}
    codes, counts = [], []
    for which, (names, n) in enumerate(zip(groups, sizes, strict=True)):
        if names is not None and len(names) != n:
            raise MismatchError(f"{n} rows came with {len(names)} group names. Give one a row.")
        keys: Sequence[Hashable] = [(which, row) for row in range(n)] if names is None else names
        codes.append(np.array([number.setdefault(key, len(number)) for key in keys], dtype=np.int64))
        counts.append(len(set(keys)))
    return codes, counts


def _leading(rows: Floats, k: int) -> Floats:
    """Leading right singular vectors by the smaller Gram matrix; as precise as a resample's noise asks, and several times faster."""
    n, d = rows.shape
    if min(n, d) < k:
        return np.zeros((0, d))
    if n > d:
        return np.asarray(linalg.eigh(rows.T @ rows, subset_by_index=(d - k, d - 1), check_finite=False)[1].T[::-1])
    values, left = linalg.eigh(rows @ rows.T, subset_by_index=(n - k, n - 1), check_finite=False)
    if values[0] <= values[-1] * 1e-13:
        return np.zeros((0, d))
    return np.asarray(linalg.qr(rows.T @ left[:, ::-1], mode="economic", check_finite=False)[0].T)


def _range(name: str) -> tuple[float, float]:
    if name.startswith("angle"):
        return 0.0, float(np.pi / 2)
    if name.startswith("grassmann"):
        return 0.0, float("inf")
    return (-1.0, 1.0) if name in ("cosine", "reconstruction_cosine") else (0.0, 1.0)
