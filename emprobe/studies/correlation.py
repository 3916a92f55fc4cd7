"""Correlation of two numbers per row, where rows come in clusters: an interval over clusters, and clusters shuffled for chance."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from emprobe.clusters import Draws, Resampling
from emprobe.errors import EmprobeError, MismatchError
from emprobe.types import Estimate, Null

Floats = NDArray[np.float64]


def clustered_correlation(
    x: ArrayLike,
    y: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    kind: Literal["pearson", "spearman"] = "pearson",
    draws: int = 2000,
    permutations: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Pearson's or Spearman's correlation over rows, with a bootstrap interval over clusters.

    Its null shuffles which cluster's mean of y goes with which cluster's mean of x, since rows of one cluster resemble each other; p is
    two-sided, and of the correlation of these means.

    Args:
        x: One finite number a row.
        y: The same.
        clusters: The cluster (prompt family, run) of each row; none if every row is its own.
        kind: `spearman` takes ranks of all rows.
        draws: Of the bootstrap.
        permutations: Of the null.
        seed: Same seed, same result.

    Raises:
        EmprobeError: Fewer than three clusters, a number that is not finite, or numbers that are all equal.
        MismatchError: Unequal lengths.

    Source: Phipson & Smyth (2010), Statistical Applications in Genetics and Molecular Biology 9, article 39 (p).

    Example:
        >>> round(clustered_correlation([1, 2, 3, 4], [1, 3, 2, 4]).value, 3)
        0.8
    """
    both = [np.asarray(side, dtype=np.float64) for side in (x, y)]
    names = list(range(len(both[0]))) if clusters is None else list(clusters)
    _check(both, names)
    codes = np.unique([str(name) for name in names], return_inverse=True)[1].astype(np.int64)
    if codes.max() < 2:
        raise EmprobeError(f"A correlation was asked over {codes.max() + 1} clusters, which show no doubt. Give three or more.")
    ranked = [np.asarray(rankdata(side), dtype=np.float64) for side in both] if kind == "spearman" else both
    a, b = ((side - side.mean()) / side.std() for side in ranked)
    columns = np.stack([a, b, a * a, b * b, a * b, np.ones(len(a))], axis=1)
    found = Draws(columns, {"clusters": codes}, Resampling(draws=draws, seed=seed)).estimate(_pearson, (-1.0, 1.0))
    return replace(found, null=_shuffled(a, b, codes, permutations, seed), intervals={})


def _check(both: Sequence[Floats], names: Sequence[Hashable]) -> None:
    x, y = both
    if x.ndim != 1 or x.shape != y.shape or len(names) != len(x):
        raise MismatchError(f"A correlation was asked of arrays of shapes {x.shape} and {y.shape}, and {len(names)} cluster names.")
    for side in both:
        if not np.isfinite(side).all():
            raise EmprobeError(f"A correlation was asked of {len(side)} rows, of which {int((~np.isfinite(side)).sum())} are not finite.")
        if not len(side) or np.ptp(side) <= 1e-12 * np.abs(side).max():
            raise EmprobeError(f"A correlation was asked of {len(side)} numbers that are all equal: there is none.")


def _pearson(sums: Floats) -> Floats:
    """From sums of x, y, x², y², xy and 1."""
    x, y, xx, yy, xy, n = (sums[..., i] for i in range(6))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y)))


def _shuffled(a: Floats, b: Floats, codes: NDArray[np.int64], permutations: int, seed: int) -> Null:
    sizes = np.bincount(codes)
    means = [np.bincount(codes, side) / sizes for side in (a, b)]
    x, y = (side - side.mean() for side in means)
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    if size <= 1e-12 * len(x):
        raise EmprobeError(f"The means of all {len(x)} clusters are equal, so they do not correlate. Is the cluster the right one?")
    rng = np.random.default_rng(seed)
    drawn = np.array([float(x @ rng.permutation(y)) for _ in range(permutations)]) / size
    # The same sum in another order must count as the same, so a little less is as much.
    reached = int((np.abs(drawn) >= abs(float(x @ y)) / size - 1e-12).sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = (1 + reached) / (1 + permutations)
    return Null("permutation", permutations, float(drawn.mean()), float(low), float(high), 1 - p, p)
