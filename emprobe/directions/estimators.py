"""One registry of the linear estimators that find directions: ours and scikit-learn's, each with `coef_`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from emprobe.directions.leace import Leace
from emprobe.directions.mean_difference import MeanDifference
from emprobe.directions.paired_pca import PairedPCA
from emprobe.errors import EmprobeError

Floats = NDArray[np.float64]

ESTIMATORS: dict[str, Callable[[], Any]] = {
    "mean_difference": MeanDifference,
    "whitened_mean_difference": lambda: MeanDifference(whiten=True),
    "logistic_l2": lambda: LogisticRegression(C=1.0, l1_ratio=0.0, tol=1e-8, max_iter=10_000),
    "logistic_l1": lambda: LogisticRegression(C=1.0, l1_ratio=1.0, solver="liblinear", tol=1e-6, max_iter=10_000),
    "lda": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "ridge": RidgeClassifier,
    "paired_pca": PairedPCA,
    "leace": Leace,
}
"""Names that every `estimator=` takes. Rows are centred and divided by their root mean square before fitting, so that the strength of a
penalty means the same at every layer."""


def estimator_of(estimator: str | Any = "mean_difference") -> Any:
    """A fresh estimator by name, or an unfitted copy of the one given.

    Raises:
        EmprobeError: If there is no such name, or the object is no scikit-learn estimator.

    Example:
        >>> estimator_of("whitened_mean_difference")
        MeanDifference(whiten=True)
    """
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise EmprobeError(
                f"There is no estimator {estimator!r}. Use one of {', '.join(ESTIMATORS)}, or a linear scikit-learn estimator."
            )
        return ESTIMATORS[estimator]()
    if isinstance(estimator, type) or not (hasattr(estimator, "fit") and hasattr(estimator, "get_params")):
        raise EmprobeError(f"estimator = {estimator!r} is no scikit-learn estimator. Give an instance, such as MeanDifference().")
    return clone(estimator)


def name_of(estimator: Any) -> str:
    """How a card names it: class and changed parameters.

    >>> name_of(MeanDifference(whiten=True))
    'MeanDifference(whiten=True)'
    >>> name_of(MeanDifference())
    'MeanDifference'
    """
    return " ".join(str(estimator).split()).removesuffix("()")


def is_plain_mean(estimator: Any) -> bool:
    """Whether the direction is a weighted sum of rows, so that its resamples need no refitting."""
    return type(estimator) is MeanDifference and not estimator.whiten


def fitted(estimator: Any, X: Floats, y: NDArray[np.bool_]) -> tuple[Floats, Any]:
    """Coefficients `[d]` of an estimator on rows, and the fitted estimator.

    A single factor on all features changes a direction only through a penalty, whose strength it makes the same at every layer.

    Raises:
        EmprobeError: If the estimator cannot be fitted to these rows, or is not linear with one `coef_` row.
    """
    if is_plain_mean(estimator):
        return np.asarray(X[y].mean(axis=0) - X[~y].mean(axis=0), dtype=np.float64), estimator
    made = clone(estimator)
    centred = X - X.mean(axis=0)
    scale = float(np.sqrt((centred**2).mean()))
    try:
        made.fit(centred / scale if scale > 0 else centred, y.astype(np.int64))
    except ValueError as error:
        raise EmprobeError(f"{name_of(made)} could not be fitted to {len(X)} rows of {X.shape[1]} features: {error}") from error
    found = np.asarray(getattr(made, "coef_", ()), dtype=np.float64).reshape(-1)
    if found.shape != (X.shape[1],):
        raise EmprobeError(f"{name_of(made)} gave coefficients of shape {found.shape} for {X.shape[1]} features. Give a linear classifier.")
    return found, made
