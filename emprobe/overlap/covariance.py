"""Random subspaces with the covariance of given rows, drawn in the rows' own space, without a d_model x d_model matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import get_blas_funcs, get_lapack_funcs

from emprobe.errors import EmprobeError
from emprobe.overlap.frames import Floats, batches, fitting, orthonormalised, triangles, varying_rows

COLUMNS = 512
"""Dimensions of the rows, or reflectors of their Gram matrix, that are worked on at once."""
COARSE_FROM = 500
"""Rows from which the Gram matrix is tried in float32, at half the time and memory."""
FLAT = 1e-2
"""It serves if no pilot draw has a squared pivot below this share of its largest: float32 errs by 1e-5 of the largest at most."""
PILOT = 8


class CovarianceMatched:
    """Gaussian vectors with the covariance of given rows: gᵀ (rows - mean), g standard normal, one for each of k dimensions.

    The Gram matrix K of the centred rows is brought to tridiagonal form Q T Qᵀ once; Qᵀ g is as normal as g, so a draw needs g T gᵀ and
    g (Qᵀ rows targetsᵀ) only. With more rows than dimensions, the rows are first replaced by the triangle of their QR decomposition,
    which has the same scatter.

    These are k single vectors of the kind that the rows are. Leading components of many rows, as of `Subspace.from_deltas`, average out
    what single vectors hold of the small directions, so that two of them may beat this null by that alone.

    Args:
        rows: Activations `[n, d_model]` whose covariance counts, or differences of them.

    Raises:
        EmprobeError: If there are fewer than two rows, one is not finite, or all are equal.
    """

    name = "covariance_matched"

    def __init__(self, rows: object) -> None:
        self.rows = varying_rows(rows)

    def images(self, targets: Floats, k: int, draws: int, seed: int) -> Iterator[Floats]:
        """See `FrameLaw`."""
        rows = fitting(self.rows, targets)
        if k >= len(rows):
            raise EmprobeError(
                f"{len(rows)} rows span at most {len(rows) - 1} dimensions about their mean; {k} were asked. Give more rows."
            )
        space = _space(rows, targets, k)
        generator = torch.Generator().manual_seed(seed)
        for size in batches(draws, 5 * k * len(space.diagonal)):
            yield orthonormalised(*space.draw(size, k, generator))


@dataclass(frozen=True, eq=False)
class _RowSpace:
    """T by its diagonal and subdiagonal, and the targets seen from the same basis of the rows, `[n, m]`."""

    diagonal: NDArray[Any]
    beside: NDArray[Any]
    products: NDArray[Any]

    def draw(self, size: int, k: int, generator: torch.Generator) -> tuple[Floats, Floats]:
        """Gram matrices of drawn vectors, and their products with the targets; multiplied as precisely as T is known."""
        # Normal numbers of 24 bits: drawn four times faster, and no overlap sees the difference.
        g = torch.randn(size, k, len(self.diagonal), generator=generator).numpy().astype(self.diagonal.dtype, copy=False)
        half = g * (self.diagonal / 2)
        half[..., :-1] += g[..., 1:] * self.beside
        gram = (half @ g.mT).astype(np.float64)
        return gram + gram.mT, (g @ self.products).astype(np.float64)


def _space(rows: NDArray[Any], targets: Floats, k: int) -> _RowSpace:
    """In float32 where that is precise enough for k dimensions: a few dominant directions make the others' share of it too small."""
    rows = _few(rows)
    if len(rows) >= COARSE_FROM:
        space = _tridiagonal(*_centred_products(rows, targets, np.float32))
        pilot, _ = space.draw(PILOT, k, torch.Generator().manual_seed(0))
        if triangles(pilot, FLAT) is not None:
            return space
    return _tridiagonal(*_centred_products(rows, targets, np.float64))


def _few(rows: NDArray[Any]) -> NDArray[Any]:
    """At most 2 d_model rows with the same scatter about their mean."""
    n, d_model = rows.shape
    if n <= 2 * d_model:
        return rows
    mean = rows.mean(axis=0, dtype=np.float64)
    triangle: Floats = np.zeros((0, d_model))
    for start in range(0, n, d_model):
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, rows[start : start + d_model] - mean]), mode="r"))
    # Each row and its negative, at 1 / sqrt(2), have mean zero, so that centring once more changes nothing.
    return np.asarray(np.concatenate([triangle, -triangle]) / np.sqrt(2))


def _centred_products(rows: NDArray[Any], targets: Floats, dtype: Any) -> tuple[NDArray[Any], Floats]:
    """Gram matrix of the rows about their mean (lower half) and their products with the targets, COLUMNS dimensions at a time."""
    n, d_model = rows.shape
    gram = np.zeros((n, n), dtype, order="F")
    products = np.zeros((n, len(targets)))
    add = get_blas_funcs("syrk", dtype=dtype)
    # Means are exact to float64; only the products of deviations are coarse.
    for start in range(0, d_model, COLUMNS):
        block = rows[:, start : start + COLUMNS]
        deviations = np.subtract(block, block.mean(axis=0, dtype=np.float64), dtype=np.float64)
        products += deviations @ targets[:, start : start + COLUMNS].T
        gram = add(1.0, deviations.astype(dtype, copy=False).T, beta=1.0, c=gram, trans=1, lower=1, overwrite_c=1)
    return gram, products


def _tridiagonal(gram: NDArray[Any], products: Floats) -> _RowSpace:
    """T = Qᵀ K Q, and Qᵀ times the products; `gram` is overwritten.

    By LAPACK's own step, since eigenvalues and vectors would cost four times as much and a draw has no use for them.
    """
    n = len(gram)
    reduce, rotate = get_lapack_funcs(("sytrd", "ormqr"), (gram,))
    reflectors, diagonal, beside, scale, info = reduce(gram, lower=1, lwork=64 * n, overwrite_a=1)
    assert info == 0
    seen = np.array(products, dtype=gram.dtype, order="F")
    for start in range(0, n - 1, COLUMNS):
        # A slice of the reflectors has to be copied, so few are taken at a time.
        stop = min(start + COLUMNS, n - 1)
        turned, _, info = rotate("L", "T", reflectors[start + 1 :, start:stop], scale[start:stop], seen[start + 1 :], 64 * seen.shape[1])
        assert info == 0
        seen[start + 1 :] = turned
    return _RowSpace(diagonal, beside, seen)
