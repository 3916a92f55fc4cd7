"""How much of each row a subspace of other rows holds, about their mean and as they are: pure functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emprobe.errors import EmprobeError
from emprobe.overlap import mahalanobis
from emprobe.overlap.measures import row_measures
from emprobe.overlap.spans import Span, SpanError, principal_span

Floats = NDArray[np.float64]
Size = int | float
"""Of a subspace: a number of dimensions (int), or the share of the rows' variance that they hold (float)."""


def label_of(size: Size) -> str:
    """What a size is called.

    >>> label_of(0.95), label_of(8)
    ('95 %', 'k = 8')
    """
    return f"k = {size}" if isinstance(size, int) else f"{100 * size:g} %"


@dataclass(frozen=True, eq=False)
class ShiftSpan:
    """Principal components of rows.

    Attributes:
        basis: Orthonormal `[k, d_model]`, the largest first.
        variances: Of the rows along each, `[k]`.
        mean: Of the rows, `[d_model]`.
        centred: Whether components are about the mean; if not, `variances` are mean squares.
    """

    basis: Floats
    variances: Floats
    mean: Floats
    centred: bool

    @property
    def k(self) -> int:
        """Number of components."""
        return len(self.basis)

    def cut(self, k: int) -> ShiftSpan:
        """The first k of them, or all where there are fewer."""
        return ShiftSpan(self.basis[:k], self.variances[:k], self.mean, self.centred)


@dataclass(frozen=True, eq=False)
class Components:
    """All components of rows that are more than rounding, decomposed once and cut to any size."""

    span: Span
    whole: ShiftSpan

    @classmethod
    def of(cls, rows: Floats, *, centred: bool, what: str = "shifts", rounding: float = 0.0) -> Components:
        """Decompose rows `[n, d_model]`.

        Raises:
            SpanError: If they are all equal (centred) or all zero but for rounding.
        """
        span = principal_span(rows, k=None, share=1.0, centred=centred, what=what, rounding=rounding)
        n = len(rows) - 1 if centred else len(rows)
        return cls(span, ShiftSpan(span.basis, span.share * span.total / n, np.asarray(rows.mean(axis=0)), centred))

    @property
    def rank(self) -> int:
        """How many there are."""
        return self.whole.k

    def cut(self, size: Size) -> ShiftSpan:
        """The leading k, or as few as hold the share.

        Raises:
            SpanError: If k is above the rank.
        """
        if isinstance(size, int):
            if size > self.rank:
                raise SpanError(f"{size} components were asked of rows of rank {self.rank}.", f"Ask for at most {self.rank}.")
            return self.whole.cut(size)
        held = np.cumsum(self.span.share)
        return self.whole.cut(min(int(np.searchsorted(held, size * (1 - 1e-12))) + 1, self.rank))


def defined_rows(rows: Floats, span: ShiftSpan, rounding: float = 0.0) -> NDArray[np.bool_]:
    """Which rows have a direction of their own: about the mean where the span is centred, and longer than rounding."""
    own = rows - span.mean if span.centred else rows
    return np.asarray(np.linalg.norm(own, axis=1) > max(rounding, 1e-12 * float(np.abs(rows).max(initial=0.0))))


def shift_measures(rows: Floats, span: ShiftSpan, *, rounding: float = 0.0) -> dict[str, Floats]:
    """Every measure of each row `[n]`.

    * `projection_fraction`: ‖P x‖ / ‖x‖, a norm and not a square; x about the mean of the span's rows where it is centred. Of a
      uniformly random subspace about sqrt(k / d_model).
    * `explained_l2`: its square, the share of the squared norm that is held.
    * `reconstruction_cosine`: cosine of mean + P (x - mean) with x; uncentred, the same as the projection fraction.
    * `mahalanobis`: sqrt(Σ z_j² / variance_j) of the coordinates in the span.

    Args:
        rows: `[n, d_model]`.
        span: Of other rows.
        rounding: Norm below which a row is nothing but rounding.

    Raises:
        EmprobeError: If a row has no direction of its own; nothing can be said of it.

    Source: arXiv 2606.20814, comparison of training and evaluation deltas by PCA.

    Example:
        >>> span = ShiftSpan(np.array([[1.0, 0.0]]), np.array([4.0]), np.array([0.0, 1.0]), True)
        >>> found = shift_measures(np.array([[3.0, 5.0]]), span)
        >>> [round(float(found[name][0]), 6) for name in ("projection_fraction", "explained_l2", "mahalanobis")]
        [0.6, 0.36, 1.5]
    """
    fits = defined_rows(rows, span, rounding)
    if not fits.all():
        raise EmprobeError(
            f"{int((~fits).sum())} of {len(rows)} rows are nothing but the mean shift, so no share of what they are beside it exists. "
            "Leave them out (`defined_rows`), or take the uncentred measure."
        )
    mean = span.mean if span.centred else None
    own = rows - span.mean if span.centred else rows
    found = row_measures(own, own @ span.basis.T, mean, None if mean is None else span.basis @ mean)
    fraction = found["projection_fraction"]
    return {
        "projection_fraction": fraction,
        "explained_l2": fraction**2,
        "reconstruction_cosine": found["reconstruction_cosine"],
        "mahalanobis": mahalanobis(rows, span.basis, span.variances, mean),
    }


def along_mean(rows: Floats, mean: Floats) -> dict[str, Floats]:
    """Cosine of each row with the mean shift, and its scalar projection on that direction, `[n]`; a row of zeros has cosine 0.

    Raises:
        EmprobeError: If the mean is zero.

    Example:
        >>> {name: found.tolist() for name, found in along_mean(np.array([[3.0, 4.0]]), np.array([2.0, 0.0])).items()}
        {'mean_cosine': [0.6], 'mean_projection': [3.0]}
    """
    size = float(np.linalg.norm(mean))
    if size == 0:
        raise EmprobeError("The mean shift is zero, so nothing lies along it. Are base and tuned the same on these prompts?")
    projection = rows @ (mean / size)
    norms = np.linalg.norm(rows, axis=1)
    return {"mean_cosine": projection / np.where(norms > 0, norms, 1.0), "mean_projection": projection}
