"""Random k-frames seen from a few fixed vectors: what overlaps need of them, drawn without ever forming a frame in d_model.

A random subspace of k dimensions is orthonormalised rows Z `[k, d_model]`. Every overlap with fixed targets T `[m, d_model]` depends on
the image of its basis only, L⁻¹ (Z Tᵀ) with L Lᵀ = Z Zᵀ (Cholesky), up to a rotation of the basis that no overlap sees. So each law below
draws the small pair (Z Zᵀ, Z Tᵀ) itself, in exactly the joint law that full draws would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap.spans import matrix_of

Floats = NDArray[np.float64]

CELLS = 1_000_000
"""Numbers held at once in a batch of draws."""
SINGULAR = 1e-13
"""Squared Cholesky pivots below this share of the largest are rounding, not a dimension."""


class FrameLaw(Protocol):
    """A law of random subspaces, by name."""

    @property
    def name(self) -> str:
        """Its name in tables."""
        ...

    def images(self, targets: Floats, k: int, draws: int, seed: int) -> Iterator[Floats]:
        """Batches `[draws, k, m]` of coordinates of `targets[m, d_model]` in the bases of random k-subspaces."""
        ...


class Haar:
    """Every subspace alike likely: orthonormalised Gaussians.

    With V `[r, d_model]` an orthonormal basis of the targets' span, Z = [Z V, rest] where Z V is Gaussian `[k, r]` and the rest enters
    through its Gram matrix alone, which is Wishart with d_model - r degrees of freedom. So a draw costs k x r numbers, not k x d_model;
    the squared overlaps are those of a matrix-variate Beta(r / 2, (d_model - r) / 2).

    Source: Muirhead (1982), Aspects of Multivariate Statistical Theory, theorems 3.2.14 (Bartlett) and 3.3.1.
    """

    name = "haar"

    def images(self, targets: Floats, k: int, draws: int, seed: int) -> Iterator[Floats]:
        """See `FrameLaw`."""
        m, d_model = targets.shape
        if k > d_model:
            raise EmprobeError(f"A random subspace of {k} dimensions was asked for in d_model {d_model}. Give 1 <= k <= {d_model}.")
        frame, coordinates = np.linalg.qr(targets.T)
        r = frame.shape[1]
        rng = np.random.default_rng(seed)
        for size in batches(draws, k * (m + r + 2 * k)):
            inside = rng.standard_normal((size, k, r))
            yield orthonormalised(inside @ inside.mT + _wishart(rng, size, k, d_model - r), inside @ coordinates)


class ActivationDifferences:
    """Differences of random pairs of rows, k disjoint pairs a draw: directions that the model itself takes from one text to another."""

    name = "activation_differences"

    def __init__(self, rows: object) -> None:
        self.rows = varying_rows(rows)

    def images(self, targets: Floats, k: int, draws: int, seed: int) -> Iterator[Floats]:
        """See `FrameLaw`."""
        rows = fitting(self.rows, targets)
        n, d_model = rows.shape
        if 2 * k > n:
            raise EmprobeError(f"{k} differences of disjoint pairs need {2 * k} rows, and there are {n}. Give more rows.")
        rng = np.random.default_rng(seed)
        for size in batches(draws, 2 * k * d_model):
            pairs = np.stack([rng.choice(n, size=2 * k, replace=False) for _ in range(size)]).reshape(size, 2, k)
            z = rows[pairs[:, 0]].astype(np.float64) - rows[pairs[:, 1]]
            yield orthonormalised(z @ z.mT, z @ targets.T)


def batches(draws: int, cells: int) -> Iterator[int]:
    """Sizes of batches of draws that take `cells` numbers each.

    >>> list(batches(5, 400_000))
    [2, 2, 1]
    """
    if draws < 1:
        raise EmprobeError(f"A null of {draws} draws was asked for. Give at least one, and 1000 for a p below .01.")
    step = max(1, CELLS // max(cells, 1))
    for start in range(0, draws, step):
        yield min(step, draws - start)


def orthonormalised(gram: Floats, products: Floats) -> Floats:
    """L⁻¹ (Z Tᵀ) from Z Zᵀ = L Lᵀ, for a batch.

    Raises:
        EmprobeError: If the drawn vectors depend on each other.
    """
    lower = triangles(gram)
    if lower is None:
        raise EmprobeError(
            f"Random subspaces of {gram.shape[-1]} dimensions were asked of rows that span fewer. Give rows that vary in more directions, "
            "or a smaller k."
        )
    return np.asarray(np.linalg.solve(lower, products))


def triangles(gram: Floats, least: float = SINGULAR) -> Floats | None:
    """Cholesky triangles of a batch; `None` where a squared pivot is below this share of the largest entry."""
    try:
        lower = np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return None
    pivots = np.diagonal(lower, axis1=1, axis2=2).min(axis=1) ** 2
    return None if (pivots <= least * np.diagonal(gram, axis1=1, axis2=2).max(axis=1)).any() else np.asarray(lower)


def varying_rows(rows: object) -> NDArray[np.float32] | Floats:
    """Rows that a covariance can be taken of.

    Raises:
        EmprobeError: If there are fewer than two, one is not finite, or all are equal.
    """
    found = matrix_of(rows, "rows of the null")
    if len(found) < 2:
        raise EmprobeError("A null was asked of 1 row, which has no covariance. Give the rows of many texts.")
    if not any((row != found[0]).any() for row in found[1:]):
        raise EmprobeError(f"All {len(found)} rows of the null are equal, so they have no covariance. Give the rows of different texts.")
    return found


def fitting(rows: NDArray[np.float32] | Floats, targets: Floats) -> NDArray[np.float32] | Floats:
    """The rows, if they have the targets' d_model.

    Raises:
        MismatchError: If not.
    """
    if rows.shape[1] != targets.shape[1]:
        raise MismatchError(
            f"The null's rows have d_model {rows.shape[1]}, the subspaces {targets.shape[1]}. Take all from one model at one site."
        )
    return rows


def _wishart(rng: np.random.Generator, size: int, k: int, degrees: int) -> Floats:
    """Gram matrices of k standard normal vectors of `degrees` entries, by Bartlett's triangle where there are as many."""
    if degrees < k:
        z = rng.standard_normal((size, k, degrees))
        return np.asarray(z @ z.mT)
    triangle = np.tril(rng.standard_normal((size, k, k)), -1)
    diagonal = np.arange(k)
    triangle[:, diagonal, diagonal] = np.sqrt(rng.chisquare(degrees - diagonal, size=(size, k)))
    return np.asarray(triangle @ triangle.mT)
