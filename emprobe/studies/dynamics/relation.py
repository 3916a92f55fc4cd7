"""How two columns of runs move together: Pearson, Spearman, with intervals from resampling whole runs.

Rows of one run are one cluster. Correlations are resampled on Fisher's scale (arctanh), where their draws spread evenly; deviations are
scaled for few runs as in `emprobe.clusters`. In simulations of 12 to 35 runs with 1 to 6 rows each, 95 % intervals of Pearson's r held the
truth in 91 to 96 % of cases.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emprobe._resampling import Codes, Floats, scaled_quantiles
from emprobe.errors import EmprobeError
from emprobe.stats import null_of
from emprobe.types import Estimate, Null

DRAWS = 2000
LEAST_RUNS = 4
ROUNDING = 1e-12
AT_ONCE = 500_000
"""Weights of rows that are held in memory at a time."""
Correlation = Callable[[Floats, Floats, Floats], Floats]


def pearson_of(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Weighted product-moment correlation, one for each row of weights `[draws, n]`; NaN where a column does not vary.

    Args:
        x: `[n]`, or `[draws, n]` where it differs between draws.
        y: The same.
        weights: How often each row counts.

    Example:
        >>> pearson_of(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0]), np.ones((1, 3))).round(6).tolist()
        [1.0]
    """
    total = weights.sum(axis=-1, keepdims=True)
    x = x - (weights * x).sum(axis=-1, keepdims=True) / total
    y = y - (weights * y).sum(axis=-1, keepdims=True) / total
    xx, yy, xy = ((weights * product).sum(axis=-1) for product in (x * x, y * y, x * y))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = xy / np.sqrt(xx * yy)
    return np.asarray(np.clip(np.where((xx > 0) & (yy > 0), found, np.nan), -1.0, 1.0))


def spearman_of(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Weighted rank correlation: rows are ranked anew in each draw, ties sharing their mean rank."""
    return pearson_of(midranks(x, weights), midranks(y, weights), weights)


def midranks(x: Floats, weights: Floats) -> Floats:
    """Ranks `[draws, n]` of values `[n]` that count `weights[draws, n]` times each; equal values share their mean rank.

    Example:
        >>> midranks(np.array([5.0, 7.0, 5.0]), np.ones((1, 3))).tolist()
        [[1.5, 3.0, 1.5]]
    """
    values, places = np.unique(x, return_inverse=True)
    mass = np.zeros((len(weights), len(values)))
    np.add.at(mass.T, places, weights.T)
    return np.asarray((np.cumsum(mass, axis=1) - mass / 2 + 0.5)[:, places])


STATISTICS: dict[str, Correlation] = {"pearson": pearson_of, "spearman": spearman_of}


def run_correlation(
    x: ArrayLike,
    y: ArrayLike,
    runs: ArrayLike,
    kind: str = "pearson",
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Correlation of two columns, with an interval from drawing whole runs with replacement.

    Where every run has one row, or all have equally many, the estimate's null is what shuffling the scores among runs gives (of |r|).

    Args:
        x: One number a row, such as a loss.
        y: Another, such as a score.
        runs: Which run each row is of.
        kind: `pearson` or `spearman`.
        draws: Of runs; 0 gives no interval.
        seed: Of the draws.
        level: Of the interval.

    Raises:
        EmprobeError: Fewer than four runs, a number that is not finite, or a column that does not vary.

    Example:
        >>> run_correlation([1.0, 2.0, 3.0, 5.0], [2.0, 4.0, 6.0, 10.0], ["a", "b", "c", "d"]).value
        1.0
    """
    a, b, codes, k = checked(x, y, runs)
    of = STATISTICS[kind]
    value = float(of(a, b, np.ones((1, len(a))))[0])
    drawn = np.concatenate([of(a, b, weights) for weights in _weights(codes, k, draws, seed)])
    usable = drawn[np.isfinite(drawn)]
    low, high = scaled_quantiles(_fisher(np.array(value)).item(), _fisher(usable), k, level)
    method = f"bootstrap over {k} runs on Fisher's scale, t-scaled, {len(usable)} draws"
    ends = (min(value, float(np.tanh(low))), max(value, float(np.tanh(high))))
    return Estimate(value, *ends, len(a), k, method, level, shuffled(a, b, codes, of, value, draws, seed))


def shuffled(x: Floats, y: Floats, codes: Codes, of: Correlation, value: float, draws: int, seed: int) -> Null | None:
    """|r| where runs' scores are dealt out anew among runs, whole; `None` where runs have unequal numbers of rows."""
    sizes = np.bincount(codes)
    if len(set(sizes.tolist())) > 1:
        return None
    places = np.argsort(codes, kind="stable").reshape(len(sizes), -1)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        dealt = np.empty_like(y)
        dealt[places] = y[places[rng.permutation(len(sizes))]]
        found.append(dealt)
    each = np.ones((1, len(x)))
    stacked = np.stack(found)
    if of is pearson_of:
        return null_of("scores shuffled among runs, |r|", abs(value), np.abs(pearson_of(x, stacked, each)))
    # Ranks move with their rows, so they are taken once.
    rank = midranks(y, each)[0]
    ranks = np.searchsorted(np.sort(np.unique(y)), stacked)
    by_value = np.array([rank[np.flatnonzero(y == value)[0]] for value in np.unique(y)])
    return null_of("scores shuffled among runs, |ρ|", abs(value), np.abs(pearson_of(midranks(x, each), by_value[ranks], each)))


def varies(values: Floats) -> bool:
    """Whether values differ by more than rounding."""
    return bool(np.ptp(values) > ROUNDING * np.abs(values).max())


def within(values: ArrayLike, groups: ArrayLike) -> Floats:
    """What is left of each value when its group's mean is taken away; rounding that is left of equal values is 0.

    Example:
        >>> within([1.0, 3.0, 10.0], ["a", "a", "b"]).tolist()
        [-1.0, 1.0, 0.0]
    """
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    x = np.asarray(values, dtype=np.float64)
    left = x - means_of(x, codes)[codes]
    return np.where(np.abs(left) > ROUNDING * np.abs(x).max(), left, 0.0)


def means_of(values: Floats, codes: Codes) -> Floats:
    """Mean of each group, in the order of their numbers."""
    return np.asarray(np.bincount(codes, values) / np.bincount(codes))


def checked(x: ArrayLike, y: ArrayLike, runs: ArrayLike) -> tuple[Floats, Floats, Codes, int]:
    """Columns as arrays, and the runs as numbers without gaps, with how many there are.

    Raises:
        EmprobeError: As in `run_correlation`.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    names, codes = np.unique(np.asarray(runs), return_inverse=True)
    if not (a.shape == b.shape == codes.shape and a.ndim == 1):
        raise EmprobeError(f"Columns of {a.shape}, {b.shape} and {codes.shape} rows were given. Give one number and one run for each row.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise EmprobeError("A correlation was asked for of numbers that are missing or infinite. Leave those rows out, and say how many.")
    if len(names) < LEAST_RUNS:
        raise EmprobeError(
            f"A relation over {len(names)} runs was asked for, and {LEAST_RUNS} are the fewest: rows of one run follow each other, so only "
            "runs are evidence. Give more runs."
        )
    for values, what in ((a, "loss"), (b, "score")):
        if not varies(values):
            raise EmprobeError(f"The {what} is {values[0]:g} in all {len(values)} rows, so nothing can vary with it. Give another column.")
    return a, b, codes.astype(np.int64), len(names)


def _weights(codes: Codes, k: int, draws: int, seed: int) -> list[Floats]:
    """How often each row counts in each draw, in parts of bounded size."""
    rng = np.random.default_rng(seed)
    parts, step = [], max(1, AT_ONCE // len(codes))
    for start in range(0, draws, step):
        counts = rng.multinomial(k, np.full(k, 1 / k), size=min(step, draws - start))
        parts.append(counts[:, codes].astype(np.float64))
    return parts


def _fisher(r: NDArray[np.float64]) -> Floats:
    """Arctanh, which is kept finite where the columns are exact functions of each other."""
    return np.asarray(np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)))
