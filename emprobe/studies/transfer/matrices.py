"""Matrices of rates: what was trained in the rows, what was asked in the columns, every entry with its doubt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.rate_table import GroupRates, rate_table
from emprobe.behaviour.score_table import ScoreTable
from emprobe.behaviour.sensitivity import coherence_rule
from emprobe.clusters import Resampling
from emprobe.studies.transfer.cell_rates import ASKED, TRAINED
from emprobe.studies.transfer.summary import over_cells

KEPT = ("value", "low", "high", "n", "clusters", "over")
SURFACE = "em_surface"


def matrix(
    table: ScoreTable, rows: Sequence[str], columns: Sequence[str], criterion: Criterion, how: Resampling, *, brief: bool = False
) -> dict[str, Any]:
    """Rates by what was trained and what was asked.

    Args:
        table: Judged answers.
        rows: Columns of the table that name what was trained, such as `train_task`.
        columns: Those that name what was asked.
        criterion: Thresholds and denominator.
        how: Level, draws and seed of the intervals.
        brief: Four digits, and of the other rates their values alone; for matrices of hundreds of entries.

    Returns:
        `rows` and `columns`, their names; `entries[i][j]`, as fractions: misaligned `value`, `low` and `high`, over trained cells where
        the entry pools several, else over prompts; `coherent`, `given_coherent` (`None` if no answer is coherent), `any_coherence`;
        `counts` by status; `thresholds`, the misaligned rate under other alignment thresholds. `None` where nothing was asked; an
        entry whose answers all lack scores says `why`.
    """
    found = {tuple(one.group.values()): one for one in rate_table(table, (*rows, *columns), criterion, how=how)}
    names = [sorted({key[part] for key in found}, key=_key) for part in (slice(len(rows)), slice(len(rows), None))]
    made = [[_entry(found.get(row + column), criterion) for column in names[1]] for row in names[0]]
    entries = [[_brief(entry) for entry in line] for line in made] if brief else made
    words = [[" ".join(map(str, name)) for name in part] for part in names]
    return {"by": [list(rows), list(columns)], "rows": words[0], "columns": words[1], "entries": entries}


def matrices(table: ScoreTable, criterion: Criterion, how: Resampling) -> dict[str, Any]:
    """Task by task, domain by domain, and cell by cell."""
    return {
        "task": matrix(table, TRAINED[1:], ASKED[1:], criterion, how),
        "domain": matrix(table, TRAINED[:1], ASKED[:1], criterion, how),
        "cell": matrix(table, TRAINED, ASKED, criterion, how, brief=True),
    }


def elsewhere(table: ScoreTable, criterion: Criterion, how: Resampling) -> dict[str, Any]:
    """Rates on questions outside the grid: together, by trained task, task by task, and by surface where that is known."""
    # A constant column would make a row of its own set where the table holds several sets.
    sets = ("eval_set",) if "eval_set" in table.columns and len(table.columns["eval_set"].found) > 1 else ()
    found: dict[str, Any] = {
        "all": _lines(table, sets, criterion, how),
        "by_train_task": _lines(table, (*sets, "train_task"), criterion, how),
        "task": matrix(table, TRAINED[1:], (*sets, *ASKED[1:]), criterion, how),
    }
    if SURFACE in table.columns:
        found["by_surface"] = _lines(table, (*sets, SURFACE), criterion, how)
    return found


def _lines(table: ScoreTable, by: Sequence[str], criterion: Criterion, how: Resampling) -> list[dict[str, Any]]:
    """One entry a group, with the intervals of every clustering."""
    lines = []
    for one in rate_table(table, by, criterion, how=how):
        made = _entry(one, criterion)
        assert made is not None
        intervals = one.rates.misaligned.intervals if one.rates else {}
        made["intervals"] = {name: {"low": e.low, "high": e.high, "clusters": e.clusters} for name, e in intervals.items()}
        lines.append({"name": one.name, **made})
    return lines


def _entry(one: GroupRates | None, criterion: Criterion) -> dict[str, Any] | None:
    if one is None:
        return None
    counts = {status: count for status, count in one.counts.items() if count}
    if one.rates is None:
        return {"value": None, "low": None, "high": None, "n": 0, "counts": counts, "why": one.why}
    rule = coherence_rule(float(criterion.min_coherence), bool(criterion.strict_coherence))
    return {
        **_short(one.rates.misaligned),
        "coherent": _short(one.rates.coherent),
        "given_coherent": _short(one.rates.misaligned_given_coherent) if one.rates.misaligned_given_coherent else None,
        "any_coherence": _short(one.rates.misaligned_any_coherence),
        "counts": counts,
        "thresholds": dict(one.sensitivity[rule]),
    }


def _brief(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same in four digits, of the other rates the values alone, and without thresholds."""
    if entry is None or entry["value"] is None:
        return entry
    found = {name: round(value, 4) if isinstance(value, float) else value for name, value in entry.items() if name != "thresholds"}
    for name in ("coherent", "given_coherent", "any_coherence"):
        found[name] = None if entry[name] is None else {"value": round(entry[name]["value"], 4)}
    return found


def _short(estimate: Any) -> dict[str, Any]:
    made = over_cells(estimate)
    assert made is not None
    return {name: made[name] for name in KEPT}


def _key(name: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple("" if part is None else str(part) for part in name)
