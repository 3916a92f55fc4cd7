"""Fit directions: between two checkpoints on the same text, or within one between two kinds of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone

from emprobe.activations import Activations, PairActivations
from emprobe.directions.direction import Direction
from emprobe.directions.mean_difference import MeanDifference
from emprobe.errors import EmprobeError

SPLITS = 20
"""Random halves that the split-half cosine is a mean of."""


def fit_direction(
    acts: Activations | PairActivations,
    *,
    layer: int,
    contrast: str = "tuned-base",
    labels: Sequence[bool] | None = None,
    reference: Activations | None = None,
    estimator: Any = None,
    seed: int = 0,
) -> Direction:
    """The direction at one layer along which two groups of rows differ.

    Args:
        acts: A pair's activations for the contrast between models; one checkpoint's, with `labels`, for a contrast within it.
        layer: 0-based block; must have been captured.
        contrast: `tuned-base` (same tokens through both checkpoints), or a name for what `labels` separates.
        labels: One truth value per row; the direction points from the False to the True rows.
        reference: Whose residual norm and mean the direction is measured against; default the pair's base, or `acts` itself.
        estimator: A linear scikit-learn estimator with `coef_`; default `MeanDifference()`.
        seed: Draws the halves of the split-half cosine (by question).

    Raises:
        EmprobeError: Labels that do not fit, one empty group, a layer that was not captured, or no difference at all.

    Source:
        Convergent directions (arXiv 2506.11618) for the difference of means; persona vectors (arXiv 2507.21509) for tuned - base.
    """
    X, y, groups, own = _design(acts, layer, labels)
    reference = reference or own
    chosen = MeanDifference() if estimator is None else estimator
    coefficients = _coefficients(chosen, X, y)
    norm = float(np.linalg.norm(coefficients))
    if not norm > 1e-9 * max(float(reference.token_norm[reference.column(layer)]), 1e-300):
        raise EmprobeError(
            f"The two groups do not differ at layer {layer} (mean difference {norm:.3g}), so there is no direction. "
            "Are base and tuned the same weights, or does the fine-tune act only above this layer?"
        )
    vector = torch.from_numpy(coefficients / norm)
    column = reference.column(layer)
    return Direction(
        vector=vector,
        layer=layer,
        site=own.site,
        positions=own.positions,
        raw_norm=norm,
        resid_norm=float(reference.token_norm[column]),
        base_projection=float(reference.token_mean[column].double() @ vector),
        contrast=contrast,
        sign="positive is tuned" if labels is None else "positive is label True",
        estimator=type(chosen).__name__,
        split_half=_split_half(chosen, X, y, groups, seed),
        n=len(acts),
        questions=len(set(groups)),
        provenance=_provenance(acts, seed),
    )


def fit_directions(acts: Activations | PairActivations, **options: Any) -> dict[int, Direction]:
    """One direction per captured layer; layers at which nothing differs are left out.

    Raises:
        EmprobeError: If nothing differs at any layer.
    """
    reference = acts.base if isinstance(acts, PairActivations) else acts
    found: dict[int, Direction] = {}
    for layer in reference.layers:
        if isinstance(acts, PairActivations) and torch.equal(acts.base.at(layer), acts.tuned.at(layer)):
            continue
        found[layer] = fit_direction(acts, layer=layer, **options)
    if not found:
        raise EmprobeError(
            "Base and tuned have equal activations at every layer, so there is no direction between them. Are they the same weights?"
        )
    return found


def _design(
    acts: Activations | PairActivations, layer: int, labels: Sequence[bool] | None
) -> tuple[NDArray[np.float64], NDArray[np.int64], list[str], Activations]:
    """Rows, classes, question of each row, and the capture whose token statistics are the reference."""
    if isinstance(acts, PairActivations):
        if labels is not None:
            raise EmprobeError("labels= contrasts rows within one checkpoint. Give acts.base or acts.tuned, not the pair.")
        X = torch.cat([acts.base.at(layer), acts.tuned.at(layer)]).double().numpy()
        questions = [question for question, _ in acts.base.keys]
        return X, np.repeat([0, 1], len(acts)), questions * 2, acts.base
    if labels is None:
        raise EmprobeError("The contrast tuned-base needs a pair's activations. Give capture(pair, …), or labels= for one checkpoint.")
    y = np.asarray(labels)
    if len(y) != len(acts):
        raise EmprobeError(f"labels has {len(y)} entries for {len(acts)} rows. Give one per row.")
    positive = int(y.astype(bool).sum())
    if positive in (0, len(y)):
        raise EmprobeError(
            f"There is nothing to contrast: {positive} of {len(y)} rows carry the label (misaligned answers, for instance) and "
            f"{len(y) - positive} do not. Give rows of both kinds, or contrast tuned-base, which needs no labels."
        )
    return acts.at(layer).double().numpy(), y.astype(bool).astype(np.int64), [q for q, _ in acts.keys], acts


def _coefficients(estimator: Any, X: NDArray[np.float64], y: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(clone(estimator).fit(X, y).coef_, dtype=np.float64).reshape(-1)


def _split_half(estimator: Any, X: NDArray[np.float64], y: NDArray[np.int64], groups: Sequence[str], seed: int) -> float | None:
    """Mean cosine between the directions of two random halves of the questions; None where no split leaves both classes in both halves."""
    rng = np.random.default_rng(seed)
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    cosines = []
    for _ in range(SPLITS if len(names) > 1 else 0):
        first = rng.permutation(len(names)) < len(names) // 2
        halves = [first[index], ~first[index]]
        if any(len(np.unique(y[half])) < 2 for half in halves):
            continue
        a, b = (_coefficients(estimator, X[half], y[half]) for half in halves)
        cosines.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) or 1.0)))
    return float(np.mean(cosines)) if cosines else None


def _provenance(acts: Activations | PairActivations, seed: int) -> dict[str, Any]:
    captured = {"base": acts.base, "tuned": acts.tuned} if isinstance(acts, PairActivations) else {"checkpoint": acts}
    names: dict[str, Any] = {name: {"name": a.checkpoint, "fingerprint": a.fingerprint} for name, a in captured.items()}
    return {**names, "seed": seed}
