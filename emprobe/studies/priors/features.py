"""Features of prompts: projections of activations onto directions, which are fitted on training rows and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from emprobe.errors import EmprobeError
from emprobe.studies.priors.folds import Rows

Matrix = NDArray[np.float64]
"""Features, a row for each prompt."""
Block = Callable[[Rows], Matrix]
"""From the rows that may be seen to the features of all rows."""


def fixed(values: Any) -> Block:
    """Features that are not fitted: a column or a matrix, one row a prompt."""
    found = np.asarray(values, dtype=np.float64)
    found = found[:, None] if found.ndim == 1 else found
    return lambda train: found


@dataclass(frozen=True, eq=False)
class PCAProjections:
    """Projections onto the first principal directions of training activations, centred on their mean.

    Attributes:
        values: Activations, a row for each prompt.
        k: Directions.
        squared: Their squares. Centred projections are squared, so that a square holds nothing linear in the activations.
        corpus: Activations of other prompts (those trained on), whose directions and mean are taken instead; nothing is fitted then.
    """

    values: Float[NDArray[np.float64], "row d_model"]
    k: int
    squared: bool = False
    corpus: Float[NDArray[np.float64], "other d_model"] | None = None

    def __call__(self, train: Rows) -> Matrix:
        """Features of all rows."""
        seen = self.values[train] if self.corpus is None else self.corpus
        mean = seen.mean(axis=0)
        return _projected(self.values - mean, pca_directions(seen, self.k), self.squared)


@dataclass(frozen=True, eq=False)
class RandomProjections:
    """Projections onto random orthonormal directions, centred on the mean of training rows.

    Attributes:
        values: Activations, a row for each prompt.
        k: Directions.
        squared: As in `PCAProjections`.
        corpus: As in `PCAProjections`: whose mean is taken.
        seed: Of the directions, which are the same in all folds.
    """

    values: Float[NDArray[np.float64], "row d_model"]
    k: int
    squared: bool = False
    corpus: Float[NDArray[np.float64], "other d_model"] | None = None
    seed: int = 0

    def __call__(self, train: Rows) -> Matrix:
        """Features of all rows."""
        seen = self.values[train] if self.corpus is None else self.corpus
        return _projected(self.values - seen.mean(axis=0), random_directions(self.values.shape[1], self.k, self.seed), self.squared)


def pca_directions(seen: Float[NDArray[np.float64], "row d_model"], k: int) -> Float[NDArray[np.float64], "k d_model"]:
    """The first principal directions of centred rows; fewer than `k` where the rows span fewer.

    Example:
        >>> np.abs(pca_directions(np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), 1)).round(6).tolist()
        [[1.0, 0.0]]
    """
    most = min(k, len(seen) - 1, seen.shape[1])
    if most < 1 or not np.ptp(seen, axis=0).any():
        return np.zeros((0, seen.shape[1]))
    solver = "covariance_eigh" if seen.shape[1] <= len(seen) else "full"
    found = PCA(most, svd_solver=solver).fit(seen)
    # Directions along which nothing varies are noise of the arithmetic.
    real = found.explained_variance_ > 1e-10 * found.explained_variance_[0]
    return np.asarray(found.components_[real], dtype=np.float64)


def random_directions(d_model: int, k: int, seed: int) -> Float[NDArray[np.float64], "k d_model"]:
    """Orthonormal directions of a random subspace.

    Raises:
        EmprobeError: If there is no room for so many.
    """
    if not 1 <= k <= d_model:
        raise EmprobeError(f"{k} orthonormal directions were asked for in {d_model} dimensions. Give 1 to {d_model}.")
    draws = np.random.default_rng(seed).standard_normal((d_model, k))
    return np.asarray(np.linalg.qr(draws)[0].T)


def most_directions(n: int, d_model: int) -> int:
    """How many directions by default: a tenth of the prompts, and no more than there are dimensions.

    >>> most_directions(648, 96), most_directions(1414, 96)
    (64, 96)
    """
    return max(1, min(n // 10, d_model))


def _projected(centred: Matrix, directions: Matrix, squared: bool) -> Matrix:
    found = centred @ directions.T
    return np.asarray(found**2 if squared else found)
