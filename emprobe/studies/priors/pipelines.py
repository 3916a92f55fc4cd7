"""The same nested cross-validation as plain scikit-learn pipelines: lasso, and ridge to prove the closed form by."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LassoCV, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from emprobe.studies.priors.features import Block
from emprobe.studies.priors.folds import Fold, Folds, Rows
from emprobe.studies.priors.ridge import ALPHAS, checked_scores, scored

Floats = NDArray[np.float64]
PENALTIES = np.logspace(0, -3, 20)
"""Of lasso, in standard deviations of the score: at the first nothing is left, since no correlation is above 1."""


def nested_lasso(block: Block, scores: Floats, folds: Folds) -> Floats:
    """R2 of lasso in each test fold, `[fold]`: standardised, penalty chosen on the inner folds.

    Raises:
        EmprobeError: As `nested_ridge`.
    """
    spread = float(np.std(scores))
    with warnings.catch_warnings():
        # At penalties far below the best one, the path may stop short of its tolerance; these are hardly ever chosen.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return _nested(block, scores, folds, lambda inner, width: LassoCV(alphas=spread * PENALTIES, cv=inner, tol=1e-3))


def plain_ridge(block: Block, scores: Floats, folds: Folds, alphas: Sequence[float] = ALPHAS) -> Floats:
    """R2 of ridge in each test fold, `[fold]`: what `nested_ridge` computes, one score and fit at a time."""

    def searched(inner: Any, width: int) -> Any:
        # A block divided by the root of its width under α is the block under α times its width.
        grid = {"alpha": [alpha * width for alpha in sorted(alphas, reverse=True)]}
        return GridSearchCV(Ridge(), grid, scoring="neg_mean_squared_error", cv=inner)

    return _nested(block, scores, folds, searched)


def _nested(block: Block, scores: Floats, folds: Folds, model: Any) -> Floats:
    target = checked_scores(scores, folds)[:, 0]
    found = []
    for fold in folds.folds:
        features = block(fold.train)
        features = features[:, features[fold.train].std(axis=0) > 1e-9]
        if not features.shape[1]:
            predicted = np.full(len(fold.test), target[fold.train].mean())
        else:
            pipeline = make_pipeline(StandardScaler(), model(_within(fold), features.shape[1]))
            predicted = pipeline.fit(features[fold.train], target[fold.train]).predict(features[fold.test])
        found.append(scored(target[fold.test][:, None], predicted[:, None])[0][0])
    return np.array(found)


def _within(fold: Fold) -> list[tuple[Rows, Rows]]:
    """Inner splits as places in the training part."""
    place = {int(row): i for i, row in enumerate(fold.train)}
    return [(np.array([place[int(r)] for r in a]), np.array([place[int(r)] for r in b])) for a, b in fold.inner]
