"""Ridge under nested grouped cross-validation, in closed form and for many targets at once: a permutation test is one more column each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from emprobe.errors import EmprobeError
from emprobe.studies.priors.features import Block, Matrix
from emprobe.studies.priors.folds import Fold, Folds, Rows

Floats = NDArray[np.float64]
ALPHAS = tuple(float(alpha) for alpha in np.logspace(-2, 4, 10))


@dataclass(frozen=True, eq=False)
class Measured:
    """What a predictor reached, fold by fold, for each target.

    Attributes:
        r2: 1 - squared error / squared deviation from the test fold's own mean: 0 is no better than that mean, 1 is perfect.
        r: Pearson correlation of prediction and score in the test fold; 0 where predictions are constant.
        rmse: Root mean squared error, in units of the score.
        chosen: Mean squared error on the inner folds of the penalty that was chosen: by this a place may be chosen too.
        alpha: The penalty chosen.
        weight: The weight of the last block that was chosen; 1 where there was no choice.
    """

    r2: Float[Floats, "fold target"]
    r: Float[Floats, "fold target"]
    rmse: Float[Floats, "fold target"]
    chosen: Float[Floats, "fold target"]
    alpha: Float[Floats, "fold target"]
    weight: Float[Floats, "fold target"]


def nested_ridge(
    blocks: Sequence[Block], scores: Floats, folds: Folds, *, alphas: Sequence[float] = ALPHAS, weights: Sequence[float] = (1.0,)
) -> Measured:
    """Fit on each training part, penalty chosen on its inner folds, and predict its test part.

    Every feature is standardised by training rows and divided by the root of its block's number of features, so that blocks weigh alike
    whatever their width. Equal to `plain_ridge`, a scikit-learn pipeline, column by column.

    Args:
        blocks: One or more; features are fitted on training rows alone.
        scores: `[row]`, or `[row, target]`.
        folds: The splits.
        alphas: Penalties; one is chosen for each fold and target, by mean squared error on the inner folds.
        weights: Factors on the last block, chosen together with the penalty: 0 leaves it out.

    Raises:
        EmprobeError: If scores are constant, not finite, or not one for each row.
    """
    targets = checked_scores(scores, folds)
    found = [_fold([block(fold.train) for block in blocks], targets, fold, np.asarray(alphas), weights) for fold in folds.folds]
    return Measured(*(np.stack(part) for part in zip(*found, strict=True)))


def checked_scores(scores: Floats, folds: Folds) -> Float[Floats, "row target"]:
    """Scores as columns.

    Raises:
        EmprobeError: If they are constant, not finite, or not one for each row.
    """
    targets = np.asarray(scores, dtype=np.float64)
    targets = targets[:, None] if targets.ndim == 1 else targets
    if len(targets) != len(folds.families):
        raise EmprobeError(f"{len(targets)} scores were given for {len(folds.families)} prompts. Give one for each.")
    if not np.isfinite(targets).all():
        raise EmprobeError(f"{int((~np.isfinite(targets)).sum())} scores are no numbers. Leave those prompts out.")
    for number, fold in enumerate(folds.folds):
        if (np.ptp(targets[fold.test], axis=0) == 0).any() or (np.ptp(targets[fold.train], axis=0) == 0).any():
            raise EmprobeError(
                f"All scores of a part of fold {number} are equal, so that there is nothing to predict there. Give graded scores "
                "(means over more samples, probabilities), more prompts, or fewer folds."
            )
    return targets


def design(parts: Sequence[Matrix], train: Rows) -> tuple[Matrix, Rows]:
    """Blocks side by side, standardised by training rows and balanced; and the number of each column's block."""
    made, owner = [], []
    for number, part in enumerate(parts):
        mean, deviation = part[train].mean(axis=0), part[train].std(axis=0)
        # What does not vary in training rows says nothing, and what is as small as rounding is rounding.
        moves = deviation > 1e-9 * np.maximum(1.0, np.abs(mean))
        scaled = (part[:, moves] - mean[moves]) / deviation[moves]
        made.append(scaled / np.sqrt(max(scaled.shape[1], 1)))
        owner += [number] * scaled.shape[1]
    return np.hstack(made), np.array(owner, dtype=np.int64)


def _fold(parts: Sequence[Matrix], targets: Floats, fold: Fold, alphas: Floats, weights: Sequence[float]) -> tuple[Floats, ...]:
    features, owner = design(parts, fold.train)
    last = owner == len(parts) - 1
    best: tuple[Floats, Floats, Floats, Floats] | None = None
    for weight in weights:
        weighed = _rotated(features * np.where(last, weight, 1.0), fold.train)
        errors = _inner_errors(weighed, targets, fold, alphas)
        # Of equal errors the largest penalty: the simplest prediction.
        choice = len(alphas) - 1 - errors[::-1].argmin(axis=0)
        chosen = errors[choice, np.arange(targets.shape[1])]
        predicted = _predicted(weighed, targets, fold.train, fold.test, alphas[choice])
        found = (predicted, chosen, alphas[choice], np.full(len(chosen), float(weight)))
        if best is None:
            best = found
        else:
            better = found[1] < best[1]
            best = tuple(np.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return (*scored(targets[fold.test], best[0]), *best[1:])


def _rotated(features: Matrix, train: Rows) -> Matrix:
    """The same for ridge in no more columns than there are training rows: what lies outside their span gets no coefficient."""
    if features.shape[1] <= len(train):
        return features
    span = np.linalg.svd(features[train], full_matrices=False)[2]
    return np.asarray(features @ span.T)


def _inner_errors(features: Matrix, targets: Floats, fold: Fold, alphas: Floats) -> Float[Floats, "alpha target"]:
    errors = np.zeros((len(alphas), targets.shape[1]))
    for fit, held in fold.inner:
        left, values, right, centre = _decomposed(features, targets, fit, held)
        for i, alpha in enumerate(alphas):
            miss = targets[held] - centre - left @ (right / (values + alpha)[:, None])
            errors[i] += np.einsum("rt,rt->t", miss, miss) / len(held) / len(fold.inner)
    return errors


def _predicted(features: Matrix, targets: Floats, fit: Rows, held: Rows, alphas: Floats) -> Float[Floats, "row target"]:
    left, values, right, centre = _decomposed(features, targets, fit, held)
    return np.asarray(centre + left @ (right / (values[:, None] + alphas[None, :])))


def _decomposed(features: Matrix, targets: Floats, fit: Rows, held: Rows) -> tuple[Floats, Floats, Floats, Floats]:
    """So that predictions of penalty α are centre + left @ (right / (values + α))."""
    mean, centre = features[fit].mean(axis=0), targets[fit].mean(axis=0)
    inside = features[fit] - mean
    values, vectors = np.linalg.eigh(inside.T @ inside)
    right = vectors.T @ (inside.T @ (targets[fit] - centre))
    return (features[held] - mean) @ vectors, np.maximum(values, 0.0), right, centre


def scored(truth: Float[Floats, "row target"], predicted: Float[Floats, "row target"]) -> tuple[Floats, Floats, Floats]:
    """R2, Pearson correlation and RMSE of each column."""
    miss, around = truth - predicted, truth - truth.mean(axis=0)
    told = predicted - predicted.mean(axis=0)
    error = (miss**2).mean(axis=0)
    sizes = np.sqrt((told**2).sum(axis=0) * (around**2).sum(axis=0))
    flat = np.ptp(predicted, axis=0) <= 1e-12 * np.maximum(1.0, np.abs(predicted).max(axis=0))
    r = np.where(flat, 0.0, (told * around).sum(axis=0) / np.where(flat, 1.0, sizes))
    return 1 - error / (around**2).mean(axis=0), r, np.sqrt(error)
