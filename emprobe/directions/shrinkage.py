"""Shrunk covariances, inverted in the row space where rows are fewer than features: no d x d matrix then."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, solve

Floats = NDArray[np.float64]


def check_shrinkage(asked: Literal["auto"] | float) -> float | None:
    """The number asked for, or `None` for `auto`.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(asked, str):
        if asked == "auto":
            return None
    elif 0 <= asked <= 1:
        return float(asked)
    raise ValueError(f"shrinkage = {asked!r} was given; it must be 'auto' or a number from 0 (none) to 1 (the identity alone).")


def ledoit_wolf_weight(residuals: Floats) -> float:
    """Ledoit and Wolf's weight of the identity for centred rows `[n, d]`, from the smaller of the two Gram matrices.

    scikit-learn's `ledoit_wolf_shrinkage` gives the same number in n d² steps; the sums of squares it needs are those of the n x n
    matrix of inner products, and its fourth moments those of the rows' norms.

    Source: Ledoit & Wolf (2004), Journal of Multivariate Analysis 88, 365-411, section 3.

    Example:
        >>> from sklearn.covariance import ledoit_wolf_shrinkage
        >>> rows = np.array([[1.0, 0, 2, 0], [0, 1, -1, 3], [-1, -1, -1, -3]])
        >>> bool(np.isclose(ledoit_wolf_weight(rows), ledoit_wolf_shrinkage(rows, assume_centered=True)))
        True
    """
    n, d = residuals.shape
    gram = residuals @ residuals.T if n < d else residuals.T @ residuals
    norms = np.einsum("ij,ij->i", residuals, residuals)
    mean = norms.sum() / (n * d)
    squares = float((gram**2).sum()) / n**2
    spread = squares / d - mean**2
    noise = (float((norms**2).sum()) / n - squares) / (d * n)
    return float(min(noise, spread) / spread) if noise > 0 and spread > 0 else 0.0


def whitened(difference: Floats, residuals: Floats, weight: float) -> Floats:
    """Inverse of the shrunk covariance of centred rows, times a vector; by Woodbury's identity where n < d.

    Raises:
        ValueError: If that covariance has no inverse.
    """
    n, d = residuals.shape
    if n >= d:
        return whitened_dense(difference, residuals.T @ residuals / n, weight)
    floor = weight * float((residuals**2).sum()) / (n * d)
    if not floor > 0:
        raise ValueError(_singular(n, d, weight))
    if weight == 1:
        return np.asarray(difference / floor)
    inner = residuals @ residuals.T + np.eye(n) * (floor * n / (1 - weight))
    return np.asarray((difference - residuals.T @ solve(inner, residuals @ difference, assume_a="pos")) / floor)


def whitened_dense(difference: Floats, covariance: Floats, weight: float) -> Floats:
    """The same from a covariance `[d, d]`."""
    d = len(difference)
    shrunk = (1 - weight) * covariance + weight * covariance.trace() / d * np.eye(d)
    scale = float(shrunk.diagonal().max(initial=0.0))
    try:
        if not np.linalg.eigvalsh(shrunk)[0] > 1e-13 * scale:
            raise ValueError(_singular(None, d, weight))
        return np.asarray(solve(shrunk, difference, assume_a="pos"))
    except LinAlgError:
        raise ValueError(_singular(None, d, weight)) from None


def _singular(n: int | None, d: int, weight: float) -> str:
    rows = "" if n is None else f" from {n} rows"
    return (
        f"The covariance of {d} features{rows} with shrinkage {weight:g} has no inverse: some combination of features is constant within "
        "both classes. Give more rows, leave constant features out, or set shrinkage above 0."
    )
