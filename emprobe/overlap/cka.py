"""Linear CKA: whether two sets of activations place the same texts alike, whatever their axes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap.resampling import blocks, interval, numbered
from emprobe.overlap.spans import matrix_of
from emprobe.stats import null_of
from emprobe.types import Estimate

Floats = NDArray[np.float64]


def linear_cka(
    x: Any, y: Any, *, groups: Sequence[Hashable] | None = None, draws: int = 1000, resamples: int = 400, seed: int = 0
) -> Estimate:
    """Linear centred kernel alignment of two activation sets with the same rows, 0 to 1.

    With more dimensions than rows it is high for unrelated sets too, which is why its null, rows of `y` shuffled, stands beside it. The
    interval takes that bias away, so it may lie mostly below the value. In simulation (20 to 100 questions of 1 to 4 rows in 32 to 256
    dimensions, true CKA .1 to .9; 400 repetitions each) it covers 92 to 97 %.

    Args:
        x: Activations `[n, d_x]`.
        y: Activations of the same texts `[n, d_y]`; d_y may differ.
        groups: The group (question) of each row, left out as a whole; `None` if every row is its own.
        draws: Shuffles of the null.
        resamples: Blocks of groups at most that are left out in turn; 0 for no interval.
        seed: Same seed, same result.

    Raises:
        EmprobeError: Fewer than three rows, NaN or infinity, or rows that are all equal.
        MismatchError: Unequal numbers of rows.

    Source: Kornblith et al. (arXiv 1905.00414), equation 6 in its Gram form ⟨K, L⟩ / (‖K‖ ‖L‖), K and L centred.

    Example:
        >>> round(linear_cka([[0.0], [1.0], [5.0]], [[0.0, 0.0], [0.0, 2.0], [0.0, 10.0]], draws=9, resamples=0).value, 6)
        1.0
    """
    left, right = matrix_of(x, "first activations"), matrix_of(y, "second activations")
    n = len(left)
    if len(right) != n:
        raise MismatchError(f"CKA was asked of {n} and {len(right)} rows. Give activations of the same texts, row by row.")
    if n < 3:
        raise EmprobeError(f"CKA was asked of {n} rows, which any two sets place alike. Give at least three, better hundreds.")
    (codes,), (count,) = numbered([groups], [n])
    grams = [_gram(rows, which) for rows, which in ((left, "first"), (right, "second"))]
    ones = np.ones(n)
    value = _alignment(grams[0], grams[1], ones)
    rng = np.random.default_rng(seed)
    shuffles = (rng.permutation(n) for _ in range(draws))
    null = null_of("rows shuffled", value, [_alignment(grams[0], grams[1][np.ix_(p, p)], ones) for p in shuffles])
    if not resamples or count < 2:
        return Estimate.point(value, n=n, method="linear CKA, not resampled", null=null)
    without = [
        _alignment(grams[0], grams[1], (~np.isin(codes, block)).astype(np.float64)) for block in blocks(np.arange(count), resamples, seed)
    ]
    low, high = interval("cka", value, [np.array(without)])
    return Estimate(value, low, high, n, count, f"linear CKA, jackknife over {count} groups in {len(without)} blocks", null=null)


def _gram(rows: NDArray[Any], which: str) -> Floats:
    centred = rows - rows.mean(axis=0, dtype=np.float64)
    if np.abs(centred).max() <= 1e-12 * np.abs(rows).max():
        raise EmprobeError(f"All {len(rows)} rows of the {which} activations are equal, so they place no text anywhere.")
    return np.asarray(centred @ centred.T)


def _alignment(k: Floats, l: Floats, weights: Floats) -> float:  # noqa: E741 - the source's letters
    """CKA of rows that count `weights` times: Gram matrices are centred about their weighted means."""
    share = weights / weights.sum()
    there = share > 0
    root = np.sqrt(np.outer(share[there], share[there]))
    found = []
    for gram in (k, l):
        part, w = gram[np.ix_(there, there)], share[there]
        mean = part @ w
        found.append((part - mean - mean[:, None] + w @ mean) * root)
    norms = np.linalg.norm(found[0]) * np.linalg.norm(found[1])
    return float(np.clip((found[0] * found[1]).sum() / norms, 0.0, 1.0)) if norms > 0 else 0.0
