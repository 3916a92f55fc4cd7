"""Orthonormal bases of what rows span: by singular values, with the rank said aloud and never a d_model x d_model matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg

from emprobe.errors import EmprobeError

Floats = NDArray[np.float64]


class SpanError(EmprobeError):
    """Rows have fewer dimensions than were asked of them; `found` is what they have, without what to do about it."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(f"{found} {advice}")
        self.found = found


def matrix_of(values: Any, what: str = "rows") -> NDArray[Any]:
    """Finite rows `[n, d_model]` as they are stored, float32 or float64; a vector is one row.

    Raises:
        EmprobeError: If there are none, they are not two-dimensional, or one is not finite (the first such row is named).

    Example:
        >>> matrix_of([3, 4]).tolist()
        [[3.0, 4.0]]
    """
    if isinstance(values, torch.Tensor):
        values = (values.float() if values.dtype in (torch.float16, torch.bfloat16) else values).detach().cpu().numpy()
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise EmprobeError(f"The {what} are no rows of numbers of one length ({error}). Give an array [n, d_model].") from None
    if found.dtype.kind not in "fiub" and values is not None:
        raise EmprobeError(f"The {what} are of type {found.dtype}, not real numbers. Give an array [n, d_model] of these.")
    if found.dtype != np.float32:
        found = found.astype(np.float64, copy=False)
    if found.ndim == 1 and found.size:
        found = found[None, :]
    if found.ndim != 2 or 0 in found.shape:
        raise EmprobeError(f"The {what} have shape {found.shape}, in which there is nothing to span. Give [n, d_model] with n >= 1.")
    # A sum is finite unless a member is not or it overflows; only then is every entry looked at.
    suspects = np.flatnonzero(~np.isfinite(found.sum(axis=1, dtype=np.float64)))
    for row in suspects:
        bad = int((~np.isfinite(found[row])).sum())
        if bad:
            raise EmprobeError(
                f"The {what} are not finite: row {row} of {len(found)} holds {bad} NaN or infinite value(s). Leave it out, or load the "
                "model with dtype='float32' or 'bfloat16' if it overflowed."
            )
    return found


@dataclass(frozen=True, eq=False)
class Span:
    """A basis and what it was cut from: `share[k]` of the rows' summed squared norm `total`, about `mean` where they were centred."""

    basis: Floats
    share: Floats
    total: float
    mean: Floats | None


def principal_span(values: Any, *, k: int | None, share: float | None, centred: bool, what: str = "rows", rounding: float = 0.0) -> Span:
    """The k leading right singular vectors of rows `[n, d_model]`, or as many as explain a share of their squared norm.

    Args:
        values: Rows; all of them count alike.
        k: How many; or
        share: the smallest number whose explained share reaches this, in (0, 1].
        centred: Whether the rows' mean is subtracted first; if not, it is part of what is explained, and often most of it.
        what: What the rows are called in an error.
        rounding: Singular values up to this are rounding of what the rows were made from, and count for no dimension.

    Raises:
        EmprobeError: Unless exactly one of k and share is given and makes sense.
        SpanError: If the rows have no such rank.

    Example:
        >>> found = principal_span([[3.0, 0.0], [0.0, 4.0]], k=1, share=None, centred=False)
        >>> found.basis.tolist(), found.share.tolist()
        ([[0.0, 1.0]], [0.64])
    """
    rows = matrix_of(values, what).astype(np.float64)
    _check_size(rows, k, share, what)
    mean = rows.mean(axis=0) if centred else None
    if mean is not None:
        _check_varies(rows, mean, what)
        rows -= mean
    rank, singular, vectors = _decomposed(rows)
    rank = min(rank, int((singular > rounding).sum()))
    if rank == 0 and mean is not None and np.linalg.norm(mean) * len(rows) ** 0.5 > rounding:
        raise _all_equal(rows, what, " but for rounding")
    if rank == 0:
        raise SpanError(f"All {len(rows)} {what} are zero, so they span nothing.", "Are base and tuned the same weights?")
    total = float((singular**2).sum())
    shares = singular**2 / total
    if share is not None:
        k = int(np.searchsorted(np.cumsum(shares[:rank]), share * (1 - 1e-12))) + 1
        k = min(k, rank)
    assert k is not None
    if k > rank:
        after = " after centring" if centred else ""
        raise SpanError(f"{k} components were asked of {what} of rank {rank}{after} ({len(rows)} rows).", f"Ask for at most {rank}.")
    return Span(_signed(vectors[:k]), shares[:k], total, mean)


def independent_span(values: Any, what: str) -> Span:
    """The whole span of rows `[k, d_model]` that must be linearly independent, such as directions or the columns of a LoRA's B.

    Raises:
        EmprobeError: If they are dependent; the message names the rank.
    """
    rows = matrix_of(values, what).astype(np.float64)
    rank, singular, vectors = _decomposed(rows)
    if rank < len(rows):
        raise EmprobeError(
            f"{len(rows)} {what} were given, but they span only {rank} dimension(s): some depend on the others. "
            f"Leave out {len(rows) - rank} of them, or take fewer components."
        )
    total = float((singular**2).sum())
    # One direction has a sign that means something; a basis of several has none.
    basis = rows / np.linalg.norm(rows) if len(rows) == 1 else _signed(vectors[:rank])
    return Span(basis, singular[:rank] ** 2 / total, total, None)


def _decomposed(rows: Floats) -> tuple[int, Floats, Floats]:
    """Numerical rank, singular values and right singular vectors `[min(n, d), d]`."""
    _, singular, vectors = linalg.svd(rows, full_matrices=False, overwrite_a=False, check_finite=False)
    floor = singular[0] * max(rows.shape) * np.finfo(np.float64).eps
    return int((singular > floor).sum()), singular, vectors


def _signed(basis: Floats) -> Floats:
    """Each vector with its largest entry positive: a singular vector has no sign of its own, and files should not differ by chance."""
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
    return np.asarray(basis * np.sign(largest))


def _check_size(rows: Floats, k: int | None, share: float | None, what: str) -> None:
    n, d_model = rows.shape
    if (k is None) == (share is None):
        raise EmprobeError(f"A subspace of {what} needs exactly one of k= (how many components) and share= (how much they explain).")
    if share is not None and not 0 < share <= 1:
        raise EmprobeError(f"share={share} was asked for; the explained share lies in (0, 1], such as 0.95.")
    if k is not None and not (isinstance(k, int | np.integer) and 1 <= k <= d_model):
        raise EmprobeError(
            f"A subspace of k = {k!r} dimensions was asked for in d_model {d_model}. Give 1 <= k <= {d_model}, a whole number."
        )
    if k is not None and k > n:
        raise EmprobeError(f"{k} components were asked of {n} {what}, which span at most {n}. Give more rows or a smaller k.")


def _check_varies(rows: Floats, mean: Floats, what: str) -> None:
    """Rows that are equal but for rounding have no centred span, only noise that looks like one."""
    spread, size = float(np.abs(rows - mean).max()), float(np.abs(rows).max())
    if size == 0:
        raise SpanError(f"All {len(rows)} {what} are zero, so they span nothing.", "Are base and tuned the same weights?")
    if spread <= 1e-12 * size:
        raise _all_equal(rows, what)


def _all_equal(rows: Floats, what: str, but: str = "") -> SpanError:
    return SpanError(
        f"All {len(rows)} {what} are equal{but}, so nothing is left after centring.",
        "Give rows that differ, or centred=False for the span of their mean.",
    )
