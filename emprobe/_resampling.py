"""The machinery under `emprobe.stats`: rows summed by cluster, clusters drawn with replacement, quantiles scaled for few clusters."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from emprobe.errors import EmprobeError, MismatchError
from emprobe.types import Estimate

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

_CELLS = 1_000_000  # drawn clusters held in memory at once


def usable_rows(values: ArrayLike) -> Floats:
    """Rows as float64 `[n]`.

    Raises:
        EmprobeError: If there are none, they are not one-dimensional, or one is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1:
        raise EmprobeError(f"An estimate was asked of an array of shape {x.shape}; give one number a row.")
    if len(x) == 0:
        raise EmprobeError("An estimate was asked of no rows: nothing can be said of nothing. Check the filter that led here.")
    if not np.isfinite(x).all():
        raise EmprobeError(
            f"An estimate was asked of {len(x)} rows, and {int((~np.isfinite(x)).sum())} are NaN or infinite. "
            "Missing scores are counted by their status; leave them out of the values."
        )
    return x


def cluster_codes(*columns: Sequence[Hashable], rows: Sequence[int]) -> tuple[list[Codes], int]:
    """Numbers 0..k-1 for the clusters of several columns, the same name having the same number in each; and k.

    Raises:
        MismatchError: If a column is not as long as its rows.
    """
    for column, n in zip(columns, rows, strict=True):
        if len(column) != n:
            raise MismatchError(f"There are {n} rows and {len(column)} cluster names. Give one cluster name a row.")
    # Sorted, so that the order of the rows does not change the draws.
    names = sorted({name for column in columns for name in column}, key=lambda name: (type(name).__name__, str(name)))
    number = {name: i for i, name in enumerate(names)}
    return [np.fromiter((number[name] for name in column), np.int64, len(column)) for column in columns], len(names)


def totals(values: Floats, codes: Codes, k: int) -> Floats:
    """Sum and number of rows of each cluster, `[k, 2]`."""
    return np.stack([np.bincount(codes, values, k), np.bincount(codes, minlength=k).astype(np.float64)], axis=1)


def resample(table: Floats, draws: int, seed: int) -> Floats:
    """Column sums over k clusters drawn with replacement from `table[k, c]`, once a draw: `[draws, c]`."""
    if draws < 1:
        raise EmprobeError(f"A bootstrap of {draws} draws was asked for; it needs at least one, and 2000 for an interval.")
    k = len(table)
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // k)
    parts = []
    for start in range(0, draws, step):
        picks = rng.integers(k, size=(min(step, draws - start), k), dtype=np.int32)
        parts.append(np.stack([column[picks].sum(axis=1) for column in np.ascontiguousarray(table.T)], axis=1))
    return np.concatenate(parts)


def normal_quantile(level: float) -> float:
    """Two-sided normal quantile, 1.96 for 0.95.

    Raises:
        EmprobeError: If level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise EmprobeError(f"An interval at level {level} was asked for; give a share between 0 and 1, such as 0.95.")
    return float(stats.norm.ppf(0.5 + level / 2))


def scaled_quantiles(value: float, drawn: Floats, k: int, level: float) -> tuple[float, float]:
    """Percentile interval of bootstrap draws, its deviations from `value` scaled for k clusters."""
    scale = float(stats.t.ppf(0.5 + level / 2, k - 1)) / normal_quantile(level) * np.sqrt(k / (k - 1))
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    # A skewed set of draws may lie wholly on one side of the value; the interval still holds it.
    return float(min(value, value + scale * (low - value))), float(max(value, value + scale * (high - value)))


def is_proportion(values: Floats) -> bool:
    """Whether every value is 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def ratio_interval(top: Estimate, bottom: Estimate) -> tuple[float, float]:
    """MOVER interval of top / bottom, two independent rates whose Wilson intervals never reach 0 unless the rate is 0."""
    product = top.value * bottom.value

    def end(numerator: float, denominator: float, sign: int) -> float:
        under = denominator * (2 * bottom.value - denominator)
        root = product**2 - numerator * (2 * top.value - numerator) * under
        return (product + sign * float(np.sqrt(max(root, 0.0)))) / under if under > 0 else 0.0

    return end(top.low, bottom.high, -1), end(top.high, bottom.low, 1)


def effective_n(values: ArrayLike, clusters: Sequence[Hashable]) -> float:
    """Rows of 0 and 1 over their design effect, with one more imagined cluster of the rarer value.

    The design effect is 1 + (m - 1) r, where m is the row-weighted mean cluster size and r the intra-cluster correlation by
    analysis of variance. Without the imagined cluster, rows that are all equal would show r = 0, as if they proved that questions
    agree; with it each question counts once.

    Example:
        >>> round(effective_n([0] * 12, ["a"] * 3 + ["b"] * 3 + ["c"] * 3 + ["d"] * 3), 6)
        4.0
    """
    x = usable_rows(values)
    (codes,), k = cluster_codes(clusters, rows=(len(x),))
    table = totals(x, codes, k)
    sizes = np.append(table[:, 1], table[:, 1].mean())
    sums = np.append(table[:, 0], sizes[-1] if x.mean() < 0.5 else 0.0)
    n, groups = sizes.sum(), len(sizes)
    if n - groups < 1e-9:
        return float(len(x))
    means, grand = sums / sizes, sums.sum() / n
    between = float((sizes * (means - grand) ** 2).sum() / (groups - 1))
    within = float((sizes * means * (1 - means)).sum() / (n - groups))
    typical = (n - (sizes**2).sum() / n) / (groups - 1)
    correlation = np.clip((between - within) / (between + (typical - 1) * within), 0.0, 1.0)
    weighted = float((table[:, 1] ** 2).sum() / table[:, 1].sum())
    return float(len(x) / (1 + (weighted - 1) * correlation))


@dataclass(frozen=True, eq=False)
class Pair:
    """Two conditions on the same clusters: their rows, and the codes of a common numbering."""

    a: Floats
    b: Floats
    codes_a: Codes
    codes_b: Codes
    clusters: int

    @classmethod
    def of(cls, a: ArrayLike, b: ArrayLike, clusters_a: Sequence[Hashable], clusters_b: Sequence[Hashable] | None) -> Pair:
        """Check and number both conditions.

        Raises:
            MismatchError: If lengths differ or no cluster is in both.
        """
        x, y = usable_rows(a), usable_rows(b)
        if clusters_b is None and len(x) != len(y):
            raise MismatchError(
                f"Two conditions of {len(x)} and {len(y)} rows were given with one list of clusters. Give the second its own clusters."
            )
        (codes_a, codes_b), k = cluster_codes(clusters_a, clusters_a if clusters_b is None else clusters_b, rows=(len(x), len(y)))
        if not set(codes_a) & set(codes_b):
            raise MismatchError("The two conditions share no question, so they cannot be compared question by question.")
        return cls(x, y, codes_a, codes_b, k)

    @property
    def n(self) -> int:
        """Rows of both."""
        return len(self.a) + len(self.b)

    @property
    def means(self) -> tuple[float, float]:
        """Mean of each condition."""
        return float(self.a.mean()), float(self.b.mean())

    def drawn_means(self, draws: int, seed: int) -> tuple[Floats, Floats]:
        """Means of both conditions over the same drawn clusters, `[<= draws]`; draws that leave one condition empty are left out."""
        table = np.concatenate([totals(self.a, self.codes_a, self.clusters), totals(self.b, self.codes_b, self.clusters)], axis=1)
        sums = resample(table, draws, seed)
        sums = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
        return sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]

    def method(self, draws: int) -> str:
        """How an interval over both is made, in words."""
        return "one cluster only" if self.clusters == 1 else f"bootstrap over {self.clusters} matched clusters, t-scaled, {draws} draws"
