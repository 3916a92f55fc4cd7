"""Difference of class means as a linear scikit-learn classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data


class MeanDifference(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """The direction from the mean of one class to the mean of the other, with the midpoint as threshold.

    `coef_` holds mean(classes_[1]) - mean(classes_[0]), shape (1, n_features), in the units of X; means are float64.

    Source:
        Convergent directions (arXiv 2506.11618): v = mean(misaligned) - mean(aligned).

    Example:
        >>> MeanDifference().fit([[0.0, 0.0], [2.0, 0.0], [4.0, 1.0], [6.0, 1.0]], [0, 0, 1, 1]).coef_
        array([[4., 1.]])
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> MeanDifference:
        """Means of the two classes.

        Raises:
            ValueError: If y does not hold exactly two classes.
        """
        rows: NDArray[np.float64]
        rows, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(
                f"MeanDifference contrasts two classes, but y holds {len(self.classes_)} class(es): {list(self.classes_[:5])}."
            )
        low, high = rows[index == 0].mean(axis=0), rows[index == 1].mean(axis=0)
        self.coef_ = (high - low)[None, :]
        self.intercept_ = -self.coef_ @ ((high + low) / 2)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Signed score (X - midpoint)·coef_; positive means `classes_[1]`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores: NDArray[np.float64] = X @ self.coef_[0] + self.intercept_[0]
        return scores

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The class on whose side of the midpoint each row lies."""
        above = self.decision_function(X) > 0
        labels: NDArray[Any] = self.classes_[above.astype(int)]
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
