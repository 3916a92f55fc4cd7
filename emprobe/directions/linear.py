"""What the two-class linear estimators of this folder share: their check of the classes, their score and their prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

Floats = NDArray[np.float64]


class TwoClassLinear(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """A direction `coef_` (1, n_features) and a threshold, once a subclass has fitted them."""

    coef_: Floats
    intercept_: Floats
    classes_: NDArray[Any]

    def _classes(self, X: ArrayLike, y: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
        """Checked rows, and which of them are of the second class.

        Raises:
            ValueError: If y does not hold exactly two classes.
        """
        rows, labels = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, index = np.unique(labels, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(
                # scikit-learn's contract asks for the first sentence.
                f"Only binary classification is supported. {type(self).__name__} contrasts two classes, but y holds {len(self.classes_)} "
                f"class(es): {self.classes_[:5].tolist()}."
            )
        return rows, index.astype(bool)

    def _set(self, coefficients: Floats, midpoint: Floats) -> None:
        self.coef_ = coefficients[None, :]
        self.intercept_ = -self.coef_ @ midpoint

    def decision_function(self, X: ArrayLike) -> Floats:
        """Signed score (X - midpoint)·coef_; positive means `classes_[1]`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores: Floats = X @ self.coef_[0] + self.intercept_[0]
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
