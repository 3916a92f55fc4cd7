"""How well a direction tells held-out rows apart: AUROC by cross-fitting over questions, its interval, and its null."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from emprobe._resampling import scaled_quantiles
from emprobe.directions.design import Bools, Design, Floats
from emprobe.directions.estimators import fitted, is_plain_mean
from emprobe.errors import EmprobeError
from emprobe.stats import wilson
from emprobe.types import Estimate

Codes = NDArray[np.int64]


def folds_of(codes: Codes, folds: int, seed: int) -> Codes:
    """Fold of each row, whole questions together, as equal in questions as can be; independent of the labels.

    Raises:
        EmprobeError: If there are fewer questions than folds.
    """
    k = int(codes.max()) + 1
    if not 2 <= folds <= k:
        raise EmprobeError(f"{folds} folds of {k} question(s) were asked for; give at least 2, and at most as many as there are questions.")
    return np.asarray((np.random.default_rng(seed).permutation(k) % folds)[codes])


def crossfit_scores(design: Design, folds: Codes, labels: Bools, estimator: Any) -> Floats:
    """Score of every row by the direction fitted to the other folds, for several labellings at once: `[labellings, rows]`.

    Scores of one fold compare with each other only. Where the other folds hold one class there is no direction, and scores are 0.
    """
    scores = np.zeros(labels.shape)
    centred = design.X - design.X.mean(axis=0)
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        if is_plain_mean(estimator):
            scores[:, test] = _mean_weights(labels[:, train]) @ centred[train] @ centred[test].T
            continue
        for draw, y in enumerate(labels[:, train]):
            if y.any() and not y.all():
                scores[draw, test] = centred[test] @ fitted(estimator, centred[train], y)[0]
    return scores


def _mean_weights(labels: Bools) -> Floats:
    """Weights `[labellings, rows]` that make the difference of the classes' means; all 0 where one class is empty."""
    high = labels.sum(axis=1, keepdims=True)
    low = labels.shape[1] - high
    weights = np.where(labels, 1 / np.maximum(high, 1), -1 / np.maximum(low, 1))
    return np.where((high > 0) & (low > 0), weights, 0.0)


def auroc_of(scores: Floats, labels: Bools, folds: Codes) -> Floats:
    """AUROC of each row of `scores[draws, rows]`, comparing rows of one fold only; 0.5 where no fold holds both classes.

    Example:
        >>> auroc_of(np.array([[0.1, 0.4, 0.35, 0.8]]), np.array([[False, False, True, True]]), np.zeros(4, int))
        array([0.75])
    """
    won, pairs = np.zeros(len(scores)), np.zeros(len(scores))
    for fold in np.unique(folds):
        y = labels[:, folds == fold]
        high = y.sum(axis=1)
        ranks = rankdata(scores[:, folds == fold], axis=1)
        won += (ranks * y).sum(axis=1) - high * (high + 1) / 2
        pairs += high * (y.shape[1] - high)
    return np.asarray(np.divide(won, pairs, out=np.full(len(scores), 0.5), where=pairs > 0))


def auroc_estimate(
    scores: Floats, y: Bools, questions: Sequence[str], folds: Codes | None = None, *, draws: int = 2000, seed: int = 0
) -> Estimate:
    """AUROC with an interval from resampling whole questions: share of (True, False) pairs of rows that scores order rightly.

    A drawn question brings all its rows. Ties count half, and a pair counts if both its rows were scored by one fold's direction.
    Draws are scaled for few questions as every interval of the project; near 0 or 1, where most draws are equal, the interval is
    widened by Wilson's for one trial a question.

    Args:
        scores: One a row.
        y: The class of each row.
        questions: The question of each row.
        folds: Which direction scored each row; all the same one if not given.
        draws: Bootstrap draws.
        seed: Same seed, same interval.

    Raises:
        EmprobeError: If no fold holds rows of both classes.

    Source: Obuchowski (1997), Biometrics 53, 567-578, for AUROC of clustered rows; resampled here instead of linearised.

    Example:
        >>> auroc_estimate(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]), ["a", "b", "a", "b"]).value
        0.75
    """
    names, codes = np.unique(np.asarray(questions), return_inverse=True)
    won, pairs = _concordance(scores, y, codes, np.zeros(len(y), dtype=np.int64) if folds is None else folds, len(names))
    if not pairs.sum() > 0:
        raise EmprobeError(f"An AUROC needs rows of both classes, but no fold of the {len(y)} rows holds both. Give more questions.")
    value, k = float(won.sum() / pairs.sum()), len(names)
    low, high = 0.0, 1.0
    if k > 1:
        weights = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), draws).astype(np.float64)
        top, bottom = (((weights @ table) * weights).sum(axis=1) for table in (won, pairs))
        low, high = scaled_quantiles(value, top[bottom > 0] / bottom[bottom > 0], k, 0.95)
    method = f"bootstrap over {k} questions, t-scaled, {draws} draws" if k > 1 else "one question only, which shows no doubt: 0 to 1"
    if k > 1 and min(value, 1 - value) * k < 5:
        ends = wilson(value * k, k)
        low, high = min(low, ends[0]), max(high, ends[1])
        method += f", widened by Wilson at {k} trials"
    return Estimate(value, max(low, 0.0), min(high, 1.0), len(y), k, method)


def _concordance(scores: Floats, y: Bools, codes: Codes, folds: Codes, k: int) -> tuple[Floats, Floats]:
    """Pairs rightly ordered, and pairs, between the True rows of question g and the False rows of question h: two `[k, k]`."""
    won, pairs = np.zeros((k, k)), np.zeros((k, k))
    for h in range(k):
        for fold in np.unique(folds[(codes == h) & ~y]):
            here = np.sort(scores[(codes == h) & ~y & (folds == fold)])
            against = y & (folds == fold)
            below = np.searchsorted(here, scores[against], "left") + np.searchsorted(here, scores[against], "right")
            won[:, h] += np.bincount(codes[against], weights=below / 2, minlength=k)
            pairs[:, h] += np.bincount(codes[against], minlength=k) * len(here)
    return won, pairs
