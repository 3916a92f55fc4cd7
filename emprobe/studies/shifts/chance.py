"""What a subspace would hold by chance, and at best: random subspaces, activation components, and the other half of the training rows."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.errors import EmprobeError
from emprobe.overlap.frames import FrameLaw
from emprobe.overlap.measures import row_measures
from emprobe.overlap.spans import SpanError
from emprobe.stats import null_of
from emprobe.studies.shifts.measures import Components, ShiftSpan, defined_rows, shift_measures

Floats = NDArray[np.float64]
NULLED = ("projection_fraction", "reconstruction_cosine")
"""Measures that stand beside their nulls; explained L2 is the square of the first."""


def random_fractions(rows: Floats, law: FrameLaw, k: int, draws: int, seed: int, mean: Floats | None = None) -> dict[str, Floats]:
    """Measures of every row in random subspaces of k dimensions, `[draws, n]`.

    Args:
        rows: `[n, d_model]`, about the mean if there is one.
        law: Of the subspaces.
        k: Their dimensions.
        draws: How many.
        seed: Same seed, same subspaces.
        mean: What was subtracted; for the cosine of the reconstruction, in which it counts as known.

    Raises:
        EmprobeError: If the law has fewer than k dimensions.
    """
    targets = rows if mean is None else np.concatenate([rows, mean[None, :]])
    parts: list[dict[str, Floats]] = []
    for images in law.images(targets, k, draws, seed):
        mean_image = None if mean is None else images[:, :, -1]
        parts.append(row_measures(rows, images[:, :, : len(rows)].mT, mean, mean_image))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def nulls_of(
    values: Mapping[str, float], rows: Floats, span: ShiftSpan, laws: Mapping[str, FrameLaw], draws: int, seed: int
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """By measure and law, the means over rows that random subspaces of the span's dimensions give; and what could not be drawn.

    Args:
        values: The means found, by measure.
        rows: `[n, d_model]`, as they are.
        span: That was found.
        laws: By name.
        draws: Of each.
        seed: Same seed, same draws.
    """
    own = rows - span.mean if span.centred else rows
    found: dict[str, dict[str, Any]] = {name: {} for name in NULLED}
    missing = []
    for law_name, law in laws.items():
        try:
            drawn = random_fractions(own, law, span.k, draws, seed, span.mean if span.centred else None)
        except EmprobeError as error:
            missing.append(f"no null {law_name} of {span.k} dimensions: {error}")
            continue
        for name in NULLED:
            found[name][law_name] = null_of(law_name, values[name], drawn[name].mean(axis=1)).as_dict()
    return found, missing


def halves(
    train: Floats,
    evaluation: Floats,
    families: Sequence[Hashable],
    k: int,
    *,
    centred: bool,
    splits: int,
    seed: int,
    rounding: float = 0.0,
) -> dict[str, float]:
    """What the subspace of one half of the training families holds of the other half (`ceiling`), and of evaluation rows (`evaluation`).

    Both are of the same halves, so that they differ by what the prompts are and not by how many there were: where evaluation rows come
    from the same distribution, they are equal but for noise. Half the rows make a poorer subspace, so all of them hold more.

    Args:
        train: Rows `[n, d_model]`.
        evaluation: Rows `[m, d_model]`.
        families: Of each training row; a half holds whole families.
        k: Dimensions of the subspace; a half of lower rank gives what it has.
        centred: As in `Components.of`.
        splits: Random divisions; each half of each is used once.
        seed: Same seed, same divisions.
        rounding: As in `Components.of`.

    Returns:
        `ceiling`, `evaluation`, `difference` (evaluation - ceiling), means over halves; `spread`, the standard deviation of the
        difference over divisions; `k`, the mean number of dimensions.

    Raises:
        EmprobeError: With fewer than two families.
        SpanError: If a half's rows are all equal.
    """
    codes = np.unique([str(name) for name in families], return_inverse=True)[1]
    count = int(codes.max()) + 1
    if count < 2:
        raise EmprobeError(f"A ceiling was asked of {len(train)} training rows of one family, which has no halves. Give more families.")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        first = (rng.permutation(count) < count // 2)[codes]
        both = []
        for part in (first, ~first):
            components = Components.of(train[part], centred=centred, what="shifts of a half", rounding=rounding)
            span = components.cut(min(k, components.rank))
            both.append((_mean_fraction(train[~part], span, rounding), _mean_fraction(evaluation, span, rounding), float(span.k)))
        found.append(np.mean(both, axis=0))
    table = np.array(found)
    differences = table[:, 1] - table[:, 0]
    return {
        "ceiling": float(table[:, 0].mean()),
        "evaluation": float(table[:, 1].mean()),
        "difference": float(differences.mean()),
        "spread": float(differences.std(ddof=1)) if splits > 1 else 0.0,
        "k": float(table[:, 2].mean()),
    }


def _mean_fraction(rows: Floats, span: ShiftSpan, rounding: float) -> float:
    kept = rows[defined_rows(rows, span, rounding)]
    if not len(kept):
        raise SpanError(f"All {len(rows)} rows are nothing but the mean shift of a half.", "There is no ceiling.")
    return float(shift_measures(kept, span, rounding=rounding)["projection_fraction"].mean())
