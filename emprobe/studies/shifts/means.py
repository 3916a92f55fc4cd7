"""Evaluation shifts along the mean training shift, and evaluation prompts in the subspace of the training prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.overlap.frames import FrameLaw, Haar
from emprobe.stats import null_of
from emprobe.studies.shifts.chance import random_fractions
from emprobe.studies.shifts.measures import Components, along_mean, shift_measures
from emprobe.studies.shifts.place import Place, mean_over

Floats = NDArray[np.float64]


def mean_shift(place: Place) -> dict[str, Any]:
    """Evaluation shifts along the mean training shift; random directions, and other fine-tunes' mean shifts, in its place."""
    mean = place.own.train.mean(axis=0)
    each = along_mean(place.own.evaluation, mean)
    found: dict[str, Any] = mean_over(each, place.families[1])
    rows = place.own.evaluation[np.linalg.norm(place.own.evaluation, axis=1) > place.rounding]
    nulls = {}
    for name, law in (("haar", Haar()), ("base_covariance", place.of_base)):
        # A random direction has no sign, so its size is compared: the cosine of every shift with it, averaged, then without its sign.
        drawn = _random_cosines(rows, law, place.draws, place.seed)
        nulls[name] = null_of(name, abs(found["mean_cosine"]["value"]), drawn).as_dict()
    found["mean_cosine"]["nulls"] = nulls
    size = float(np.linalg.norm(mean))
    found["norms"] = {
        "mean_training_shift": size,
        "training_shift": float(np.linalg.norm(place.own.train, axis=1).mean()),
        "evaluation_shift": float(np.linalg.norm(place.own.evaluation, axis=1).mean()),
        "activation": float(np.linalg.norm(place.base.evaluation, axis=1).mean()),
    }
    found["others"] = {}
    for name, other in place.others.items():
        theirs = other.train.mean(axis=0)
        norm = float(np.linalg.norm(theirs))
        cosine = float(mean @ theirs) / (size * norm) if norm > 0 else None
        found["others"][name] = {"cosine_of_means": cosine, "norm_ratio": norm / size}
    return found


def _random_cosines(rows: Floats, law: FrameLaw, draws: int, seed: int) -> Floats:
    """Size of the mean cosine of rows with random directions, `[draws]`."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.concatenate([np.abs(images[:, 0].mean(axis=1)) for images in law.images(units, 1, draws, seed)])


def prompt_overlap(place: Place) -> tuple[dict[str, Any], Floats, dict[str, Floats]]:
    """How far evaluation prompts lie in the training prompts' activations, before; each prompt's number, and random subspaces' numbers."""
    components = Components.of(place.base.train, centred=True, what="training activations")
    span = components.cut(place.size)
    rows = place.base.evaluation
    each = shift_measures(rows, span)
    found: dict[str, Any] = {"k": span.k, "measures": mean_over(each, place.families[1])}
    drawn = {
        name: random_fractions(rows - span.mean, law, span.k, place.draws, place.seed)["projection_fraction"]
        for name, law in (("haar", Haar()), ("base_covariance", place.of_base))
    }
    value = found["measures"]["projection_fraction"]["value"]
    nulls = {name: null_of(name, value, one.mean(axis=1)).as_dict() for name, one in drawn.items()}
    found["measures"]["projection_fraction"]["nulls"] = nulls
    return found, each["projection_fraction"], drawn


def by_group(place: Place, columns: Mapping[str, Floats]) -> dict[str, Any]:
    """Means within each group of evaluation prompts."""
    groups, families = np.array(place.groups), np.array(place.families[1])
    found: dict[str, Any] = {}
    for name in dict.fromkeys(place.groups):
        here = groups == name
        found[name] = {"n": int(here.sum())} | mean_over({c: v[here] for c, v in columns.items()}, families[here].tolist())
    return found
