"""Difference of class means as a linear scikit-learn classifier, plain or whitened."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from emprobe.directions.linear import TwoClassLinear
from emprobe.directions.shrinkage import check_shrinkage, ledoit_wolf_weight, whitened, whitened_dense
from emprobe.moments import Moments


class MeanDifference(TwoClassLinear):
    """The direction from the mean of one class to the mean of the other, with the midpoint as threshold.

    `coef_` holds mean(classes_[1]) - mean(classes_[0]), shape (1, n_features), in the units of X; means are float64. Whitened, it is
    that difference times the inverse of the classes' pooled covariance, which is shrunk towards a multiple of the identity: the
    direction of linear discriminant analysis. With fewer rows than features no n_features x n_features matrix is formed.

    Args:
        whiten: Multiply by the inverse covariance.
        shrinkage: How far the covariance is shrunk, 0 to 1, or `auto` for Ledoit and Wolf's optimum; `shrinkage_` says what it was.

    Source:
        Convergent directions (arXiv 2506.11618): v = mean(misaligned) - mean(aligned). Ledoit & Wolf (2004), Journal of Multivariate
        Analysis 88, 365-411, for the shrinkage.

    Example:
        >>> MeanDifference().fit([[0.0, 0.0], [2.0, 0.0], [4.0, 1.0], [6.0, 1.0]], [0, 0, 1, 1]).coef_
        array([[4., 1.]])

        Both classes vary by 1 along the first axis and 4 along the second; half of the covariance is replaced by its mean, 2.5.

        >>> rows = [[-1.0, -2], [1, 2], [-1, 2], [1, -2], [2, 1], [4, 5], [2, 5], [4, 1]]
        >>> MeanDifference(whiten=True, shrinkage=0.5).fit(rows, [0] * 4 + [1] * 4).coef_.round(3)  # 3 / 1.75 and 3 / 3.25
        array([[1.714, 0.923]])
    """

    def __init__(self, whiten: bool = False, shrinkage: Literal["auto"] | float = "auto") -> None:
        self.whiten = whiten
        self.shrinkage = shrinkage

    def fit(self, X: ArrayLike, y: ArrayLike) -> MeanDifference:
        """Means of the two classes, and their covariance if it is wanted.

        Raises:
            ValueError: If y does not hold exactly two classes, or the covariance cannot be inverted.
        """
        rows, second = self._classes(X, y)
        means = np.stack([rows[~second].mean(axis=0), rows[second].mean(axis=0)])
        coefficients = means[1] - means[0]
        if self.whiten:
            residuals = rows - means[second.astype(int)]
            asked = check_shrinkage(self.shrinkage)
            self.shrinkage_ = ledoit_wolf_weight(residuals) if asked is None else asked
            coefficients = whitened(coefficients, residuals, self.shrinkage_)
        self._set(coefficients, means.mean(axis=0))
        return self

    def fit_moments(self, low: Moments, high: Moments) -> MeanDifference:
        """The same from the streamed moments of two groups of rows, which never were in memory together.

        Raises:
            ValueError: If it is to be whitened and the moments kept no full scatter, or with shrinkage `auto`, which needs the rows.
        """
        self.classes_, self.n_features_in_ = np.array([0, 1]), len(low.mean)
        coefficients = high.mean - low.mean
        if self.whiten:
            asked = check_shrinkage(self.shrinkage)
            if asked is None or low.scatter.ndim != 2 or high.scatter.ndim != 2:
                raise ValueError(
                    "Whitening from moments needs the full scatter (full=True) and a number as shrinkage: 'auto' reads the rows."
                )
            self.shrinkage_ = asked
            coefficients = whitened_dense(coefficients, (low.scatter + high.scatter) / (low.n + high.n), asked)
        self._set(coefficients, (low.mean + high.mean) / 2)
        return self
