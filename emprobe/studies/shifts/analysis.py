"""One place's whole analysis: subspace, mean shift, prompt overlap and what it predicts, and activations predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from emprobe.errors import EmprobeError
from emprobe.overlap.cosine import covariance_directions, random_directions
from emprobe.overlap.spans import SpanError
from emprobe.stats import null_of
from emprobe.studies.correlation import clustered_correlation
from emprobe.studies.shifts.means import by_group, mean_shift, prompt_overlap
from emprobe.studies.shifts.measures import Size, along_mean, defined_rows, shift_measures
from emprobe.studies.shifts.place import Place, mean_over, or_undefined
from emprobe.studies.shifts.predicted import least_squares_dose, prediction, summed
from emprobe.studies.shifts.subspaces import sizes_of, spanned

Floats = NDArray[np.float64]
DOSES = (0.5, 1.0)
KINDS: tuple[Literal["pearson", "spearman"], ...] = ("pearson", "spearman")
LOWER_IS_BETTER = ("relative_error",)


def analyse(place: Place, sizes: Sequence[Size]) -> dict[str, Any]:
    """Everything at one rule and layer, as plain values; what does not exist there says why.

    Args:
        place: What was read.
        sizes: Of the subspace, at which the projection fraction is taken beside the place's own; none above the rank.
    """
    found: dict[str, Any] = {"positions": place.positions, "layer": place.layer, "d_model": place.base.train.shape[1]}
    longest = float(np.linalg.norm(place.own.train, axis=1).max())
    if longest <= place.rounding:
        return found | {"undefined": f"No training prompt moves at layer {place.layer}: the fine-tune acts behind it."}
    overlapping, prompts, drawn = prompt_overlap(place)
    similar = similarity(place)
    return found | {
        "mean_shift": mean_shift(place),
        "centred": or_undefined(lambda: spanned(place, centred=True)),
        "uncentred": or_undefined(lambda: spanned(place, centred=False)),
        "sizes": sizes_of(place, sizes),
        "prompt_overlap": overlapping,
        "correlations": {name: _correlated(place, prompts, drawn, values) for name, values in similar.items()},
        "predicted": or_undefined(lambda: predicted(place)),
        "prompts": {n: [float(x) if np.isfinite(x) else None for x in v] for n, v in {"prompt_overlap": prompts, **similar}.items()},
        "groups": by_group(place, {n: similar[n] for n in ("mean_cosine", "centred_fraction") if np.isfinite(similar[n]).all()}),
    }


def similarity(place: Place) -> dict[str, Floats]:
    """How like the training shifts each evaluation prompt's shift is, three ways; NaN where there is no such number."""
    found = {"mean_cosine": along_mean(place.own.evaluation, place.own.train.mean(axis=0))["mean_cosine"]}
    for name, centred in (("centred_fraction", True), ("uncentred_fraction", False)):
        found[name] = np.full(len(place.own.evaluation), np.nan)
        try:
            span = place.components(place.own.train, centred=centred).cut(place.size)
        except SpanError:
            continue
        fits = defined_rows(place.own.evaluation, span, place.rounding)
        if fits.any():
            found[name][fits] = shift_measures(place.own.evaluation[fits], span)["projection_fraction"]
    return found


def _correlated(place: Place, prompts: Floats, drawn: Mapping[str, Floats], values: Floats) -> dict[str, Any]:
    """Correlation of prompt overlap with shift similarity, over prompts and between families; and that of overlap with random subspaces.

    Over prompts, wording counts too: paraphrases of one request differ in both. Between families only what is asked does, and p is of that.
    """
    fits = np.isfinite(values)
    families = [f for f, fit in zip(place.families[1], fits, strict=True) if fit]
    try:
        found: dict[str, Any] = {
            kind: clustered_correlation(prompts[fits], values[fits], families, kind=kind, seed=place.seed).as_dict() for kind in KINDS
        }
        codes = np.unique(families, return_inverse=True)[1]
        x, y = (np.bincount(codes, column[fits]) / np.bincount(codes) for column in (prompts, values))
        found["families"] = clustered_correlation(x, y, seed=place.seed).as_dict()
    except EmprobeError as error:
        return {"undefined": str(error)}
    for kind in KINDS:
        del found[kind]["null"]
    centred = values[fits] - values[fits].mean()
    for name, overlaps in drawn.items():
        own = overlaps[:, fits] - overlaps[:, fits].mean(axis=1, keepdims=True)
        r = own @ centred / (np.linalg.norm(own, axis=1) * np.linalg.norm(centred))
        found.setdefault("random_subspaces", {})[name] = null_of(name, found["pearson"]["value"], r).as_dict()
    return found


def predicted(place: Place) -> dict[str, Any]:
    """Activations after, predicted by the mean training shift at several doses, beside random vectors and others' mean shifts.

    Raises:
        SpanError: If some evaluation prompts do not move, so that no error is relative to their shift.
    """
    before, shifts, mean = place.base.evaluation, place.own.evaluation, place.own.train.mean(axis=0)
    still = np.linalg.norm(shifts, axis=1) <= place.rounding
    if still.any():
        raise SpanError(f"{int(still.sum())} of {len(still)} evaluation prompts do not move here.", "No error is relative to their shift.")
    after, centre = before + shifts, place.base.train.mean(axis=0)
    best = least_squares_dose(place.own.train, place.families[0])
    doses = {"0": 0.0, **{f"{dose:g}": dose for dose in DOSES}, "least_squares": best}
    each = {name: prediction(before, after, dose * mean, centre) for name, dose in doses.items()}
    flat = {f"{name}/{measure}": values for name, found in each.items() for measure, values in found.items()}
    gains = {f"gain/{m}": each["1"][m] - each["0"][m] for m in each["1"]}
    estimates = mean_over(flat | gains, place.families[1])
    found: dict[str, Any] = {
        "least_squares_dose": best,
        "doses": {name: {m: estimates[f"{name}/{m}"] for m in each[name]} for name in doses},
        "gain": {m: estimates[f"gain/{m}"] for m in each["1"]},
    }
    size = float(np.linalg.norm(mean))
    found["nulls"] = _random_vectors(place, before, after, centre, size, {m: v["value"] for m, v in found["doses"]["1"].items()})
    found["others"] = {}
    for name, other in place.others.items():
        theirs = other.train.mean(axis=0)
        if (norm := float(np.linalg.norm(theirs))) > 0:
            found["others"][name] = {m: float(v) for m, v in summed(prediction(before, after, size / norm * theirs, centre)).items()}
    return found


def _random_vectors(
    place: Place, before: Floats, after: Floats, centre: Floats, size: float, values: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Random vectors of the mean shift's norm in its place; p is of doing as well, which for an error is as little."""
    rows = np.concatenate([place.base.train, place.base.evaluation])
    units = {
        "haar": random_directions(place.draws, before.shape[1], place.seed).numpy(),
        "base_covariance": covariance_directions(rows, place.draws, place.seed).numpy(),
    }
    found: dict[str, dict[str, Any]] = {}
    for law, directions in units.items():
        drawn = summed(prediction(before, after, size * directions, centre))
        for measure, means in drawn.items():
            sign = -1.0 if measure in LOWER_IS_BETTER else 1.0
            null = null_of(law, sign * values[measure], sign * means).as_dict()
            null |= {"mean": float(means.mean()), "low": float(np.quantile(means, 0.025)), "high": float(np.quantile(means, 0.975))}
            found.setdefault(measure, {})[law] = null
    return found
