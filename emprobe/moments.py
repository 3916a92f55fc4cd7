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
        x = _checked_rows(rows)
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


@dataclass(frozen=True, eq=False)
class LowRankMoments:
    """Count, mean and a sketch of the scatter, for widths at which a `[d, d]` matrix does not fit; parts merge as `Moments` do.

    The sketch never overstates: for every unit x, 0 <= x (scatter - sketch' sketch) x <= `lost`. It is exact while at most 2 x rank
    rows were seen.

    Args:
        n: Rows seen.
        mean: Their mean, `[d]`, exact.
        sketch: Rows whose scatter about zero stands for the rows' scatter about their mean, `[at most 2 x rank, d]`.
        rank: Directions kept when the sketch is full.
        lost: Most that any direction's scatter is understated by.

    Source: Frequent directions: Liberty (2013), KDD, 581-588; merging: Ghashami et al. (2016), SIAM J. Comput. 45, section 3.

    Example:
        >>> made = LowRankMoments.from_rows([[0.0, 1.0], [2.0, 1.0]], rank=1)
        >>> made.n, made.mean.tolist(), (made.sketch.T @ made.sketch).tolist(), made.lost
        (2, [1.0, 1.0], [[2.0, 0.0], [0.0, 0.0]], 0.0)
    """

    n: int
    mean: Floats
    sketch: Floats
    rank: int
    lost: float = 0.0

    @classmethod
    def from_rows(cls, rows: ArrayLike, *, rank: int) -> LowRankMoments:
        """Moments of `rows[n, d]`.

        Raises:
            EmprobeError: If there are no rows, a value is not finite, or the rank is below 1.
        """
        if rank < 1:
            raise EmprobeError(f"Low-rank moments were asked for with rank {rank}. Give at least 1.")
        x = _checked_rows(rows)
        mean = x.mean(axis=0)
        return _shrunk(len(x), mean, x - mean, rank, 0.0)

    def merge(self, other: LowRankMoments) -> LowRankMoments:
        """Moments of both parts' rows together.

        Raises:
            MismatchError: If widths or ranks differ.
        """
        if (self.mean.shape, self.rank) != (other.mean.shape, other.rank):
            raise MismatchError(
                f"Low-rank moments of width {len(self.mean)}, rank {self.rank} and width {len(other.mean)}, rank {other.rank} "
                "cannot be merged."
            )
        n = self.n + other.n
        gap = other.mean - self.mean
        between = gap[None] * np.sqrt(self.n * other.n / n)
        rows = np.concatenate([self.sketch, other.sketch, between])
        return _shrunk(n, self.mean + gap * (other.n / n), rows, self.rank, self.lost + other.lost)

    @property
    def factor(self) -> Floats:
        """Rows whose product `factor.T @ factor` stands for the unbiased covariance.

        Raises:
            EmprobeError: With fewer than two rows.
        """
        if self.n < 2:
            raise EmprobeError(f"A covariance needs two rows, and there was {self.n}.")
        return np.asarray(self.sketch / np.sqrt(self.n - 1))


def _shrunk(n: int, mean: Floats, rows: Floats, rank: int, lost: float) -> LowRankMoments:
    """Once the sketch is full, keep `rank` directions and take from each what the first one dropped holds."""
    if len(rows) <= 2 * rank:
        return LowRankMoments(n, mean, rows, rank, lost)
    _, singular, axes = np.linalg.svd(rows, full_matrices=False)
    dropped = float(singular[rank] ** 2) if len(singular) > rank else 0.0
    kept = np.sqrt(np.maximum(singular[:rank] ** 2 - dropped, 0))
    return LowRankMoments(n, mean, kept[:, None] * axes[:rank], rank, lost + dropped)


def _checked_rows(rows: ArrayLike) -> Floats:
    x = np.asarray(rows, dtype=np.float64)
    if x.ndim != 2 or len(x) == 0:
        raise EmprobeError(f"Moments were asked of an array of shape {x.shape}; give rows of shape [n, d] with n >= 1.")
    if not np.isfinite(x).all():
        raise EmprobeError(f"Moments were asked of {len(x)} rows, and {int((~np.isfinite(x)).any(axis=1).sum())} hold NaN or infinity.")
    return x
