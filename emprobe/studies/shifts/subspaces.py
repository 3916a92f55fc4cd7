"""Evaluation shifts in the subspace of the training shifts: at one size with everything beside it, and over sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.overlap.spans import SpanError
from emprobe.studies.shifts.chance import halves, nulls_of
from emprobe.studies.shifts.measures import Components, ShiftSpan, Size, defined_rows, label_of, shift_measures
from emprobe.studies.shifts.place import OnPrompts, Place, mean_over, or_undefined

Floats = NDArray[np.float64]


def spanned(place: Place, *, centred: bool) -> dict[str, Any]:
    """Evaluation shifts in the training shifts' subspace: measures, nulls, ceiling, activation components, other fine-tunes."""
    components = place.components(place.own.train, centred=centred)
    span = components.cut(place.size)
    rows = place.own.evaluation
    fits = defined_rows(rows, span, place.rounding)
    if not fits.any():
        raise SpanError(f"All {len(rows)} evaluation shifts are nothing but the mean training shift.", "Take the uncentred measure.")
    rows, families = rows[fits], [f for f, fit in zip(place.families[1], fits, strict=True) if fit]
    each = shift_measures(rows, span, rounding=place.rounding)
    nulls, missing = nulls_of({n: float(v.mean()) for n, v in each.items()}, rows, span, place.laws, place.draws, place.seed)
    measured = mean_over(each, families)
    # The covariance's own eigenvalues make the mean square of this distance k on the training rows themselves.
    return {
        "k": span.k,
        "rank": components.rank,
        "left_out": int((~fits).sum()),
        "measures": {name: one | ({"nulls": nulls[name]} if name in nulls else {}) for name, one in measured.items()},
        "activation_components": _in_activation_components(place, rows, span),
        "halves": or_undefined(lambda: _halves(place, span.k, centred)),
        "others": {name: or_undefined(lambda o=other: _other(place, o, span, centred)) for name, other in place.others.items()},  # type: ignore[misc]
        "notes": missing,
    }


def _halves(place: Place, k: int, centred: bool) -> dict[str, Any]:
    own, families = place.own, place.families[0]
    how = {"splits": place.splits, "seed": place.seed}
    return dict(halves(own.train, own.evaluation, families, k, centred=centred, rounding=place.rounding, **how))


def _in_activation_components(place: Place, rows: Floats, span: ShiftSpan) -> dict[str, Any]:
    """The same shifts in as many leading components of the activations before, on training prompts."""
    whole = Components.of(place.base.train, centred=span.centred, what="activations")
    basis = whole.whole.cut(span.k).basis
    own = rows - span.mean if span.centred else rows
    fraction = np.linalg.norm(own @ basis.T, axis=1) / np.linalg.norm(own, axis=1)
    return {"projection_fraction": float(fraction.mean()), "k": len(basis)}


def _other(place: Place, other: OnPrompts, span: ShiftSpan, centred: bool) -> dict[str, Any]:
    """Another fine-tune's shifts, about their own mean, in this one's subspace and in their own; and this one's in theirs.

    Differences are taken prompt by prompt: this fine-tune's share in its subspace less the other's in it, and less the other's in its own.
    """
    theirs = place.components(other.train, centred=centred).whole.cut(span.k)
    moved = ShiftSpan(span.basis, span.variances, theirs.mean, centred)
    back = ShiftSpan(theirs.basis, theirs.variances, span.mean, centred)
    fits = defined_rows(other.evaluation, moved, place.rounding) & defined_rows(place.own.evaluation, span, place.rounding)
    if not fits.any():
        raise SpanError("No evaluation prompt moves in both fine-tunes beside their means.", "There is nothing to compare.")
    rows, own = other.evaluation[fits], place.own.evaluation[fits]
    columns = {
        "in_this": shift_measures(rows, moved)["projection_fraction"],
        "in_own": shift_measures(rows, theirs)["projection_fraction"],
        "this_in_it": shift_measures(own, back)["projection_fraction"],
    }
    ours = shift_measures(own, span)["projection_fraction"]
    columns |= {"this_above_it": ours - columns["in_this"], "this_above_its_own": ours - columns["in_own"]}
    found: dict[str, Any] = mean_over(columns, [f for f, fit in zip(place.families[1], fits, strict=True) if fit])
    squares = float(((span.basis @ theirs.basis.T) ** 2).sum())
    return found | {"k": theirs.k, "span_overlap": squares / min(span.k, theirs.k)}


def sizes_of(place: Place, sizes: Sequence[Size]) -> list[dict[str, Any]]:
    """The centred projection fraction over sizes, with the 97.5 % quantile of each null; sizes above the rank are not there."""
    try:
        components = place.components(place.own.train, centred=True)
    except SpanError:
        return []
    rows = place.own.evaluation[defined_rows(place.own.evaluation, components.whole, place.rounding)]
    found = []
    for size in (s for s in sizes if len(rows) and (not isinstance(s, int) or s <= components.rank)):
        span = components.cut(size)
        each = shift_measures(rows, span)
        values = {name: float(column.mean()) for name, column in each.items()}
        nulls, _ = nulls_of(values, rows, span, place.laws, place.draws, place.seed)
        high = {law: null["high"] for law, null in nulls["projection_fraction"].items()}
        found.append({"size": label_of(size), "k": span.k, "projection_fraction": values["projection_fraction"], "null_high": high})
    return found
