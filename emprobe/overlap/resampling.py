"""Doubt about an overlap from the rows behind it: subspaces made again without some of their groups, and from halves of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, stats

from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap.measures import SMALLER_IS_MORE, Side, measures
from emprobe.overlap.spans import SpanError, matrix_of, principal_span
from emprobe.types import Estimate

Floats = NDArray[np.float64]
SPLITS = 20
"""Random halves that the ceiling is a mean of."""


@dataclass(frozen=True, eq=False)
class Source:
    """Rows that a side's basis was made of, and is made of again: in common coordinates, with their group's number."""

    rows: Floats
    groups: NDArray[np.int64]
    basis: Floats
    centred: bool

    def again(self, without: Sequence[int] | NDArray[np.int64] = ()) -> Side:
        """The side that the rows give without those of some groups.

        Raises:
            SpanError: If what is left has too few dimensions.
        """
        rows, k = self.rows[~np.isin(self.groups, without)], len(self.basis)
        mean = rows.mean(axis=0) if self.centred and len(rows) else None
        # Equal rows leave rounding after centring, which is no dimension.
        basis = _leading(rows if mean is None else rows - mean, k, least=1e-28 * float((rows**2).sum()))
        if len(basis) < k:
            raise SpanError(
                f"An interval was asked for, but without one of their groups the {len(self.rows)} rows have fewer than {k} dimensions.",
                "Give more groups, a smaller k, or resamples=0.",
            )
        # A vector has a sign, and keeps it; a basis of several has none.
        return Side(basis if k > 1 else basis * np.sign(basis @ self.basis.T + 1e-300), mean, rows)

    def rank(self) -> int:
        """Dimensions that a Gram matrix tells from rounding: singular values above 1e-5 of the largest."""
        singular = linalg.svdvals(self.rows - self.rows.mean(axis=0) if self.centred else self.rows, check_finite=False)
        return int((singular > 1e-5 * singular[0]).sum())

    def blurred(self) -> bool:
        """Whether the last component lies so near the next that they cannot be told apart: within two errors of its eigenvalue, which is
        known to sqrt(2 / groups) of itself.

        Source: North et al. (1982), Monthly Weather Review 110, 699-706, equation 24.
        """
        rows, k = (self.rows - self.rows.mean(axis=0) if self.centred else self.rows), len(self.basis)
        gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
        if len(gram) <= k:
            return False
        following, last = linalg.eigvalsh(gram, subset_by_index=(len(gram) - k - 1, len(gram) - k), check_finite=False)
        return bool(last - following < 2 * last * np.sqrt(2 / len(np.unique(self.groups))))


def common_coordinates(parts: Sequence[Floats]) -> list[Floats]:
    """The same arrays in an orthonormal basis of what they span together, if that has fewer dimensions than d_model."""
    stacked = np.concatenate(parts)
    if len(stacked) < stacked.shape[1]:
        stacked = linalg.qr(stacked.T, mode="r", check_finite=False)[0][: len(stacked)].T
    return np.split(stacked, np.cumsum([len(part) for part in parts])[:-1])


def blocks(groups: NDArray[np.int64], most: int, seed: int) -> list[NDArray[np.int64]]:
    """The groups one by one or, if there are more than `most`, dealt at random to that many blocks.

    Raises:
        EmprobeError: If fewer than two blocks are asked for.
    """
    if most < 2:
        raise EmprobeError(f"An interval from {most} resamples was asked for. Give at least 2, better 100; or 0 for no interval.")
    return np.array_split(np.random.default_rng(seed).permutation(groups), min(len(groups), most))


def left_out(a: Source | Side, b: Source | Side, most: int, seed: int) -> list[dict[str, Floats]]:
    """Every measure over subspaces made again without each block of groups; a side without rows stays as it is.

    Groups that both sides have are left out of both at once; where they share none, of either side by itself, in a list of two.
    """
    sources = [side for side in (a, b) if isinstance(side, Source)]
    codes = [np.unique(source.groups) for source in sources]
    together = len(codes) == 1 or bool(np.isin(codes[0], codes[1]).any())
    whole = [side.again() if isinstance(side, Source) else side for side in (a, b)]
    found = []
    for pool in [np.unique(np.concatenate(codes))] if together else codes:
        drawn = []
        for block in blocks(pool, most, seed):
            touched = [isinstance(side, Source) and bool(np.isin(block, side.groups).any()) for side in (a, b)]
            made = [s.again(block) if t and isinstance(s, Source) else w for s, t, w in zip((a, b), touched, whole, strict=True)]
            drawn.append(measures(made[0], made[1]))
        found.append({name: np.array([draw[name] for draw in drawn]) for name in drawn[0]})
    return found


def interval(name: str, value: float, without: Sequence[Floats], level: float = 0.95) -> tuple[float, float]:
    """Jackknife interval: the value less its bias, plus and minus Student's t times the standard error, both from leaving groups out.

    Noise makes estimated spans overlap less than the true ones, which leaving groups out shows and takes away; resampling with
    replacement would add far more noise than it measures. Noise adds to the squares of angles, not to the angles, so the intervals of
    angles and of the Grassmann distance are made for their squares and mapped back; that of CKA, a correlation of Gram matrices, for
    its Fisher z. The ends lie in the measure's range, and the value is inside.

    In simulation (500 repetitions each; 20 to 60 questions, 1 to 4 rows each, in 6 to 128 dimensions) it covers 92 to 98 % for every
    measure, CKA too (400 repetitions). It covers more, 98 to 100 %, where noise opens an angle by a seventh or more of itself, as
    between nearly equal spans (.05 rad apart where rows show .17): leaving groups out counts the squares of noise about twice.
    And it covers less, 75 % and down to 46 %, where the last component lies near the next one, so that they change places (see
    `Source.blurred`, which `overlap` tells in its `note`).

    Args:
        name: Of the measure.
        value: From all rows.
        without: The measure without each block of groups; one array for each side whose groups are left out by themselves.
        level: Coverage aimed at.

    Source: Efron & Tibshirani (1993), chapter 11; Quenouille (1956), Biometrika 43, 353-360 (bias); Fisher (1921),
        Metron 1, 3-32 (z).

    Example:
        Of a mean it is the usual interval: for .11, .12 and .13 it is .12 plus and minus 4.303 x .01 / sqrt(3).

        >>> [round(end, 4) for end in interval("mean_squared_cosine", 0.12, [np.array([0.125, 0.12, 0.115])])]
        [0.0952, 0.1448]
    """
    there, back = _scale(name)
    low, high = (float(back(end)) for end in _jackknife(float(there(value)), [there(x) for x in without], level))
    least, most = _range(name)
    # The way back may miss the value by its last digit.
    return float(np.clip(min(low, value), least, most)), float(np.clip(max(high, value), least, most))


def _jackknife(value: float, without: Sequence[Floats], level: float) -> tuple[float, float]:
    variance = sum((len(x) - 1) / len(x) * float(((x - x.mean()) ** 2).sum()) for x in without)
    biases = [(len(x) - 1) * (float(x.mean()) - value) for x in without]
    # A bias is a mean of squares over the groups, and is known no better than one: to sqrt(2 / (n - 1)) of itself.
    variance += sum(2 / (len(x) - 1) * bias**2 for x, bias in zip(without, biases, strict=True))
    centre = value - sum(biases)
    half = float(stats.t.ppf(0.5 + level / 2, min(len(x) for x in without) - 1) * np.sqrt(variance))
    return min(centre - half, value), max(centre + half, value)


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
    if splits < 1:
        raise EmprobeError(f"A noise ceiling of {splits} splits was asked for. Give at least 1, better {SPLITS}.")
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


def _leading(rows: Floats, k: int, least: float) -> Floats:
    """Leading right singular vectors by the smaller Gram matrix, which is several times faster; none where one has no more than `least`."""
    n, d = rows.shape
    if min(n, d) < k:
        return np.zeros((0, d))
    gram = rows.T @ rows if n > d else rows @ rows.T
    values, vectors = linalg.eigh(gram, subset_by_index=(len(gram) - k, len(gram) - 1), check_finite=False)
    if values[0] <= max(values[-1] * 1e-13, least):
        return np.zeros((0, d))
    vectors = vectors[:, ::-1]
    return np.asarray((vectors if n > d else linalg.qr(rows.T @ vectors, mode="economic", check_finite=False)[0]).T)


def _scale(name: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Where a measure's noise adds or has an even spread, and the way back."""
    if name.startswith(SMALLER_IS_MORE):
        return np.square, lambda x: np.sqrt(np.maximum(x, 0.0))
    if name == "cka":
        return lambda x: np.arctanh(np.minimum(x, 1 - 1e-15)), np.tanh
    return (lambda x: x), (lambda x: x)


def _range(name: str) -> tuple[float, float]:
    if name.startswith(SMALLER_IS_MORE):
        return 0.0, float(np.pi / 2) if name.startswith("angle") else float("inf")
    return (-1.0, 1.0) if name in ("cosine", "reconstruction_cosine") else (0.0, 1.0)
