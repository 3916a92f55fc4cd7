"""The four-way summary: rates in the trained cell, at the same task, in the same domain and elsewhere, with ratios and differences."""

from __future__ import annotations

from typing import Any

import numpy as np

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.rate_table import GroupRates, rate_table
from emprobe.behaviour.score_table import CELLS, PROMPTS, Floats, ScoreTable
from emprobe.behaviour.sensitivity import coherence_rule
from emprobe.clusters import Draws, Resampling, Statistic
from emprobe.errors import EmprobeError
from emprobe.studies.transfer.judged import RELATIONS
from emprobe.types import Estimate

REFERENCE, TASKS = RELATIONS[0], "tasks"
DIFFERENCES = (("same_task", "same_domain"), ("same_task", "neither"), ("same_domain", "neither"))


def over_cells(estimate: Estimate | None) -> dict[str, Any] | None:
    """Plain values whose low and high are those over trained cells, or over prompts where one cell was trained."""
    if estimate is None:
        return None
    made, cells = estimate.as_dict(), estimate.intervals.get(CELLS)
    if cells is not None:
        made |= {name: value for name, value in cells.as_dict().items() if name in ("low", "high", "clusters", "method")}
    return made | {"over": "trained cells" if cells is not None else "prompts"}


def four_way(table: ScoreTable, criterion: Criterion, how: Resampling) -> dict[str, Any]:
    """Rates of the four relations and their ratios to the trained cell's own.

    All answers of a relation are pooled. `low` and `high` are over trained cells, drawn jointly for numerator and denominator and
    scaled for their small number; `intervals` holds those over prompts, both at once, `tasks` (trained tasks drawn whole: what other
    tasks might give) and `percentile` (trained cells without the scaling, as the paper has it).

    Returns:
        `summary` and `ratios` by relation, as fractions; `None` where no such cell was evaluated or the ratio has no denominator. A
        rate carries the other three rates, since coherence can make or hide it, and its counts; a ratio carries the same ratio among
        coherent answers, and under other thresholds.

    Source: arXiv 2605.12798: rows pooled first, bootstrap over the trained cells. The scaling is `emprobe.clusters.Draws`'.
    """
    found = rate_table(table, ("relation",), criterion, ratio_to=REFERENCE if _has(table, REFERENCE) else None, how=how)
    groups = {one.name: one for one in found}
    extra = _Extra(table, criterion, how)
    spoken = _Extra(table, criterion.of("coherent"), how) if (table.judged & criterion.coherent(table.coherence)).any() else None
    summary, ratios = {}, {}
    for name in RELATIONS:
        one = groups.get(name)
        summary[name] = None if one is None or one.rates is None else rate_of(one)
        if name != REFERENCE:
            ratios[name] = None if one is None or one.ratio is None else extra.ratio(name, one, groups[REFERENCE], spoken)
    return {"summary": summary, "ratios": ratios}


def rate_of(one: GroupRates) -> dict[str, Any]:
    """A group's misaligned rate with the three other rates, and its counts by status."""
    assert one.rates is not None
    made = over_cells(one.rates.misaligned)
    assert made is not None
    return made | {
        "coherent": over_cells(one.rates.coherent),
        "misaligned_given_coherent": over_cells(one.rates.misaligned_given_coherent),
        "misaligned_any_coherence": over_cells(one.rates.misaligned_any_coherence),
        "counts": {status: count for status, count in one.counts.items() if count},
        "sensitivity": {rule: dict(rates) for rule, rates in one.sensitivity.items()},
    }


def differences(table: ScoreTable, criterion: Criterion, how: Resampling) -> dict[str, Any]:
    """Differences of rates between relations, with the same intervals as `four_way`'s ratios; `None` where one of them is missing.

    `same_task - same_domain` above 0: task similarity carries more than domain similarity. The others: whether either carries anything
    beyond what reaches cells that share neither.
    """
    extra = _Extra(table, criterion, how)
    found: dict[str, Any] = {}
    for one, other in DIFFERENCES:
        a, b = RELATIONS.index(one), RELATIONS.index(other)
        found[f"{one} - {other}"] = extra.difference(a, b) if extra.there[a] and extra.there[b] else None
    return found


def by_replicate(table: ScoreTable, column: str, criterion: Criterion, how: Resampling) -> dict[str, Any]:
    """Four-way rates and ratios, without their details, for every value of a column such as `organism`; one without rates says `why`."""
    found = {}
    values = table.columns[column]
    for value in values.found:
        rows = values.codes == (values.values.index(value) if value is not None else -1)
        try:
            made = four_way(table.take(rows), criterion, how)
        except EmprobeError as error:  # one fine-tune whose answers were all lost does not take the others' numbers
            found[str(value)] = {"summary": dict.fromkeys(RELATIONS), "ratios": dict.fromkeys(RELATIONS[1:]), "why": str(error)}
            continue
        found[str(value)] = {part: {name: _ends(one) for name, one in ones.items()} for part, ones in made.items()}
    return found


def _ends(one: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if one is None else {name: one[name] for name in ("value", "low", "high", "n", "over")}


def _has(table: ScoreTable, name: str) -> bool:
    return name in table.column("relation").found


def _ratio_of(i: int) -> Statistic:
    """A relation's rate over the trained cell's own, of the sums of `_Extra`."""
    return lambda s: s[..., 2 * i] * s[..., 1] / (s[..., 2 * i + 1] * s[..., 0])


class _Extra:
    """Draws of whole cells, prompts and tasks that ratios and differences share."""

    def __init__(self, table: ScoreTable, criterion: Criterion, how: Resampling) -> None:
        rows = table.counted(criterion)
        related = table.column("relation")
        place = np.array([RELATIONS.index(name) for name in related.values])[related.codes][rows]
        misaligned = criterion.misaligned(table.alignment, table.coherence)[rows].astype(np.float64)
        columns = np.zeros((len(place), 2 * len(RELATIONS)))
        columns[np.arange(len(place)), 2 * place] = misaligned
        columns[np.arange(len(place)), 2 * place + 1] = 1.0
        codes = {name: found[rows] for name, found in table.clusterings(table.clustered((PROMPTS, CELLS))).items()}
        self.criterion = criterion
        self.there = [bool((place == i).any()) for i in range(len(RELATIONS))]
        self.any_of_reference = bool(columns[:, 0].any())
        self.draws = Draws(columns, codes, how)
        self.tasks = Draws(columns, {TASKS: table.column("train_task").codes[rows]}, how)

    def ratio(self, name: str, one: GroupRates, own: GroupRates, spoken: _Extra | None) -> dict[str, Any]:
        """The ratio with all intervals, among coherent answers, and under other thresholds."""
        i = RELATIONS.index(name)
        made = over_cells(one.ratio)
        assert made is not None
        made.setdefault("intervals", {})
        made["intervals"] |= self.others(_ratio_of(i), (0.0, np.inf))
        rule = coherence_rule(float(self.criterion.min_coherence), bool(self.criterion.strict_coherence))
        pairs = {at: (rate, own.sensitivity[rule][at]) for at, rate in one.sensitivity[rule].items()}
        made["thresholds"] = {at: rate / under if rate is not None and under else None for at, (rate, under) in pairs.items()}
        has = spoken is not None and spoken.there[i] and spoken.any_of_reference
        made["given_coherent"] = over_cells(spoken.draws.estimate(_ratio_of(i), (0.0, np.inf))) if spoken is not None and has else None
        return made

    def difference(self, a: int, b: int) -> dict[str, Any]:
        """One relation's rate minus another's."""

        def statistic(sums: Floats) -> Floats:
            return np.asarray(sums[..., 2 * a] / sums[..., 2 * a + 1] - sums[..., 2 * b] / sums[..., 2 * b + 1])

        made = over_cells(self.draws.estimate(statistic, (-1.0, 1.0)))
        assert made is not None
        made.setdefault("intervals", {})
        made["intervals"] |= self.others(statistic, (-1.0, 1.0))
        return made

    def others(self, statistic: Statistic, bounds: tuple[float, float]) -> dict[str, Any]:
        """Percentiles over trained cells, and the scaled interval over trained tasks, where there are several."""
        found: dict[str, Any] = {}
        if CELLS in self.draws.ways:
            low, high = self.draws.percentiles(statistic, CELLS)
            found["percentile"] = {"low": low, "high": high, "clusters": self.draws.ways[CELLS][1], "method": "percentiles, unscaled"}
        if TASKS in self.tasks.ways:
            with np.errstate(divide="ignore", invalid="ignore"):
                made = self.tasks.estimate(statistic, bounds).intervals[TASKS].as_dict()
            found[TASKS] = {name: made[name] for name in ("low", "high", "clusters", "method")}
        return found
