"""Fit directions: between two checkpoints on the same text, or within one between two kinds of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from emprobe.activations import Activations, PairActivations
from emprobe.directions.choose import choose
from emprobe.directions.design import Design, Source, design_of, layers_that_differ, reference_of
from emprobe.directions.direction import Direction
from emprobe.directions.estimators import estimator_of, fitted, name_of
from emprobe.directions.paired_pca import PairedPCA
from emprobe.errors import EmprobeError

Floats = NDArray[np.float64]
SPLITS = 20
"""Random halves that the split-half cosine is a mean of."""


def fit_direction(
    acts: Source,
    *,
    layer: int | Literal["auto"],
    contrast: str = "tuned-base",
    labels: Sequence[bool] | None = None,
    reference: Activations | None = None,
    estimator: Any = "mean_difference",
    seed: int = 0,
    permutations: int = 200,
) -> Direction:
    """The direction at one layer along which two groups of rows differ.

    Args:
        acts: A pair's activations for the contrast between models; one checkpoint's, with `labels`, for a contrast within it.
        layer: 0-based block that was captured; `auto` chooses it by held-out AUROC on two thirds of the questions, on which the
            direction is fitted too, and reports its AUROC on the last third in `provenance["choice"]`.
        contrast: `tuned-base` (same tokens through both checkpoints), or a name for what `labels` separates.
        labels: One truth value per row; the direction points from the False to the True rows.
        reference: Whose residual norm and mean the direction is measured against; default the pair's base, or `acts` itself.
        estimator: A name of `emprobe.directions.ESTIMATORS`, or a linear scikit-learn estimator with `coef_`.
        seed: Draws the halves of the split-half cosine (by question), and what `layer="auto"` draws.
        permutations: Relabellings under the null, for `layer="auto"`.

    Raises:
        EmprobeError: Labels that do not fit, one empty group, a layer that was not captured, rows that are all equal, or no difference.

    Source:
        Convergent directions (arXiv 2506.11618) for the difference of means; persona vectors (arXiv 2507.21509) for tuned - base.
    """
    provenance = _provenance(acts, seed)
    chosen = estimator_of(estimator)
    if layer == "auto":
        choice = choose({"acts": acts}, labels=labels, estimator=chosen, permutations=permutations, seed=seed)
        provenance["choice"], layer = choice.as_dict(), choice.layer
        rows = [i for i, (question, _) in enumerate(reference_of(acts).keys) if question in choice.dev_questions]
        acts, labels = select(acts, rows), None if labels is None else [labels[i] for i in rows]
    design = design_of(acts, layer, labels)
    own = reference_of(acts)
    reference = own if reference is None else reference
    column = reference.column(layer)
    unit, raw_norm, sign = _fit(design, chosen, float(reference.token_norm[column]))
    vector = torch.from_numpy(unit)
    return Direction(
        vector=vector,
        layer=layer,
        site=own.site,
        positions=own.positions,
        raw_norm=raw_norm,
        resid_norm=float(reference.token_norm[column]),
        base_projection=float(reference.token_mean[column].double() @ vector),
        contrast=contrast,
        sign=("positive is label True" if labels is not None else "positive is tuned") + sign,
        estimator=name_of(chosen),
        split_half=_split_half(chosen, design, seed),
        n=len(acts),
        questions=len(set(design.questions)),
        provenance=provenance,
    )


def fit_directions(acts: Source, **options: Any) -> dict[int, Direction]:
    """One direction per captured layer; layers at which nothing differs are left out.

    Raises:
        EmprobeError: If nothing differs at any layer.
    """
    return {layer: fit_direction(acts, layer=layer, **options) for layer in layers_that_differ(acts)}


def select(acts: Source, rows: list[int]) -> Source:
    """Only these rows of one checkpoint's activations, or of both of a pair's."""
    if isinstance(acts, PairActivations):
        return PairActivations(acts.base.select(rows), acts.tuned.select(rows))
    return acts.select(rows)


def _fit(design: Design, estimator: Any, resid_norm: float) -> tuple[Floats, float, str]:
    """Unit vector, how far the classes' means lie apart along it, and what its sign rule adds to be said.

    Raises:
        EmprobeError: If there is no difference to fit, or the estimator's direction points against it.
    """
    if not np.ptp(design.X, axis=0).any():
        raise EmprobeError(
            f"All {len(design.y)} rows are equal at layer {design.layer}: every feature is constant, so there is no direction. "
            "Were the activations of different texts captured, at a position that depends on them?"
        )
    difference = design.X[design.y].mean(axis=0) - design.X[~design.y].mean(axis=0)
    norm = float(np.linalg.norm(difference))
    if not norm > 1e-9 * max(resid_norm, 1e-300):
        raise EmprobeError(
            f"The two groups do not differ at layer {design.layer} (mean difference {norm:.3g}), so there is no direction. "
            "Are base and tuned the same weights, or does the fine-tune act only above this layer?"
        )
    if isinstance(estimator, PairedPCA) and not design.paired:
        raise EmprobeError("The estimator paired_pca needs rows in pairs. Give a pair's activations, or another estimator with labels=.")
    coefficients, made = fitted(estimator, design.X, design.y)
    length = float(np.linalg.norm(coefficients))
    along = float(coefficients @ difference) / length if length > 0 else 0.0
    if not along > 1e-9 * norm:
        raise EmprobeError(
            f"{name_of(estimator)} found coefficients of norm {length:.3g} at layer {design.layer}, along which the means of the groups "
            f"lie {along:.3g} apart (of {norm:.3g}), so they have no sign. Penalise less, or use another estimator."
        )
    sign = f"; mean projection {made.sign_t_:.1f} standard errors from 0" if isinstance(made, PairedPCA) else ""
    return coefficients / length, along, sign


def _split_half(estimator: Any, design: Design, seed: int) -> float | None:
    """Mean cosine between the directions of two random halves of the questions; None where no split leaves both classes in both halves."""
    rng = np.random.default_rng(seed)
    codes = design.codes
    k = int(codes.max()) + 1
    cosines = []
    for _ in range(SPLITS if k > 1 else 0):
        first = (rng.permutation(k) < k // 2)[codes]
        halves = [design.select(first), design.select(~first)]
        if any(half.y.all() or not half.y.any() for half in halves):
            continue
        a, b = (fitted(estimator, half.X, half.y)[0] for half in halves)
        cosines.append(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) or 1.0)))
    return float(np.mean(cosines)) if cosines else None


def _provenance(acts: Source, seed: int) -> dict[str, Any]:
    captured = {"base": acts.base, "tuned": acts.tuned} if isinstance(acts, PairActivations) else {"checkpoint": acts}
    names: dict[str, Any] = {name: {"name": a.checkpoint, "fingerprint": a.fingerprint} for name, a in captured.items()}
    return {**names, "seed": seed}
