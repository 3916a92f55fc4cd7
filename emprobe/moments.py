"""Streaming moments: count, mean and scatter of rows that never have to be in memory together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emprobe.errors import EmprobeError, MismatchError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and summed squared deviations of rows, in float64; parts merge to what the whole would give.

    Args:
        n: Rows seen.
        mean: Their mean, `[d]`.
        scatter: Sum of squared deviations from the mean: `[d]` (per dimension) or `[d, d]` (full).

    Source: Chan, Golub & LeVeque (1983), The American Statistician 37, 242-247.

    Example:
        >>> half = Moments.from_rows([[0.0], [2.0]])
        >>> whole = half.merge(Moments.from_rows([[4.0], [6.0]]))
        >>> whole.n, whole.mean.tolist(), whole.scatter.tolist()
        (4, [3.0], [20.0])
    """

    n: int
    mean: Floats
    scatter: Floats

    @classmethod
    def from_rows(cls, rows: ArrayLike, *, full: bool = False) -> Moments:
        """Moments of `rows[n, d]`; `full` keeps the whole `[d, d]` scatter.

        Raises:
            EmprobeError: If there are no rows, they are not two-dimensional, or a value is not finite.
        """
        x = np.asarray(rows, dtype=np.float64)
        if x.ndim != 2 or len(x) == 0:
            raise EmprobeError(f"Moments were asked of an array of shape {x.shape}; give rows of shape [n, d] with n >= 1.")
        if not np.isfinite(x).all():
            raise EmprobeError(f"Moments were asked of {len(x)} rows, and {int((~np.isfinite(x)).any(axis=1).sum())} hold NaN or infinity.")
        mean = x.mean(axis=0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred if full else (centred**2).sum(axis=0))

    def merge(self, other: Moments) -> Moments:
        """Moments of both parts' rows together.

        Raises:
            MismatchError: If dimensions differ, or one part kept the full scatter and the other did not.
        """
        if self.scatter.shape != other.scatter.shape:
            raise MismatchError(f"Moments with scatter of shapes {self.scatter.shape} and {other.scatter.shape} cannot be merged.")
        n = self.n + other.n
        gap = other.mean - self.mean
        square = np.outer(gap, gap) if self.scatter.ndim == 2 else gap**2
        return Moments(n, self.mean + gap * (other.n / n), self.scatter + other.scatter + square * (self.n * other.n / n))

    @property
    def variance(self) -> Floats:
        """Unbiased variance per dimension, `[d]`.

        Raises:
            EmprobeError: With fewer than two rows.
        """
        sums = self.scatter.diagonal() if self.scatter.ndim == 2 else self.scatter
        return np.asarray(sums / self._degrees())

    @property
    def covariance(self) -> Floats:
        """Unbiased covariance, `[d, d]`.

        Raises:
            EmprobeError: With fewer than two rows, or if only the diagonal was kept.
        """
        if self.scatter.ndim != 2:
            raise EmprobeError("The covariance was asked of moments that kept variances only. Use Moments.from_rows(rows, full=True).")
        return np.asarray(self.scatter / self._degrees())

    def _degrees(self) -> int:
        if self.n < 2:
            raise EmprobeError(f"A variance needs two rows, and there was {self.n}.")
        return self.n - 1
