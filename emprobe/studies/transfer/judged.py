"""The judged answers of a grid: which rows are the grid, which are other questions, and what a reader should know of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.score_table import ScoreTable
from emprobe.errors import EmprobeError
from emprobe.studies.transfer.cell_rates import ASKED, TRAINED, Cell, CellRate, cell_rates, relation

REPLICATES = ("organism", "seed", "model", "run", "base")
"""Columns that tell apart fine-tunes of the same cell."""
RELATIONS = ("same_cell", "same_task", "same_domain", "neither")
"""How the evaluated cell relates to the trained one: the same; same task, other domain; same domain, other task; both differ."""
NARROW = "narrow"
"""The `eval_set` of a grid's questions, unless another is named."""
UNEQUAL = 1.2
"""Cells whose numbers of answers differ by more than this factor are said to weigh unequally."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A grid's answers.

    Attributes:
        grid: Answers to the questions of the grid's cells.
        elsewhere: Answers to other questions, such as a general set; `None` if there are none.
        replicates: The columns that tell apart fine-tunes of one cell, with their values.
        missing: Cells of the grid without scores, as (trained, evaluated).
        warnings: What a reader should know.
    """

    grid: ScoreTable
    elsewhere: ScoreTable | None
    replicates: Mapping[str, tuple[Any, ...]]
    missing: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def judged(table: ScoreTable, criterion: Criterion, eval_set: str = NARROW) -> Judged:
    """Split a table into grid and other questions, and find what is missing.

    Args:
        table: Judged answers with `train_domain`, `train_task`, `eval_domain`, `eval_task`.
        criterion: Whose denominator tells which answers count.
        eval_set: The value of the column of that name whose questions are the grid. Unless one was named, a table without the column, or
            with one value in it, is all grid.

    Raises:
        EmprobeError: A lacking column, no row of that set, or no row that says what was trained.
    """
    lacking = [name for name in (*TRAINED, *ASKED) if name not in table.columns]
    if lacking:
        raise EmprobeError(
            f"A grid needs the columns {', '.join((*TRAINED, *ASKED))}; these scores lack {', '.join(lacking)} and have "
            f"{', '.join(table.columns)}. A column of another name is given as in --columns {lacking[0]}=NAME."
        )
    warnings = list(table.notes)
    named = np.all([table.columns[name].codes >= 0 for name in (*TRAINED, *ASKED)], axis=0)
    if not named.all():
        if not named.any():
            raise EmprobeError(f"None of {len(table)} answers names both a trained and an evaluated cell: nothing is known of transfer.")
        warnings.append(f"{int((~named).sum())} of {len(table)} answers name no trained or no evaluated cell, and are left out.")
        table = table.take(named)
    grid, elsewhere = _split(_plain_columns(table), eval_set)
    if elsewhere is None and "eval_set" in grid.columns and grid.columns["eval_set"].found != (eval_set,):
        warnings.append(f"All answers are of eval_set {grid.columns['eval_set'].found[0]}, and are taken for the grid.")
    replicates = {name: grid.columns[name].found for name in REPLICATES if name in grid.columns and len(grid.columns[name].found) > 1}
    cells = cell_rates(grid, criterion)
    missing = _missing(cells)
    warnings += _cautions(grid, cells, missing, replicates)
    return Judged(grid, elsewhere, replicates, tuple((" ".join(t), " ".join(a)) for t, a in missing), tuple(warnings))


def _plain_columns(table: ScoreTable) -> ScoreTable:
    """Domain and task alone name a cell; what else is said of the training tells replicates apart."""
    found = {}
    for name, column in table.columns.items():
        own = name in (*TRAINED, *ASKED) or not name.startswith(("train_", "eval_")) or name == "eval_set"
        plain = name if own else name.partition("_")[2] if name.startswith("train_") else f"asked_{name[5:]}"
        if plain in found or (plain != name and plain in table.columns):
            raise EmprobeError(f"The scores have both {name} and {plain}, which say the same of a fine-tune. Drop or rename one of them.")
        found[plain] = column
    return replace(table, columns=found)


def _split(table: ScoreTable, eval_set: str) -> tuple[ScoreTable, ScoreTable | None]:
    column = table.columns.get("eval_set")
    found = () if column is None else column.found
    if column is None or (len(found) == 1 and eval_set in (NARROW, found[0])):
        if not found and eval_set != NARROW:
            raise EmprobeError(f"The grid's questions were to be those of eval_set {eval_set!r}, and no column is called so. Leave it out.")
        return table, None
    if eval_set not in found:
        raise EmprobeError(
            f"The grid's questions were to be those of eval_set {eval_set!r}, and there is none; it holds {', '.join(map(str, found))}. "
            "Name one with --eval-set."
        )
    own = column.codes == column.values.index(eval_set)
    return table.take(own), table.take(~own)


def _missing(cells: list[CellRate]) -> tuple[tuple[Cell, Cell], ...]:
    trained, asked = (list(dict.fromkeys(getattr(cell, side) for cell in cells)) for side in ("trained", "asked"))
    there = {(cell.trained, cell.asked) for cell in cells if cell.n}
    return tuple((t, a) for t in trained for a in asked if (t, a) not in there)


def _cautions(
    grid: ScoreTable, cells: list[CellRate], missing: tuple[tuple[Cell, Cell], ...], replicates: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    warnings = []
    if missing:
        hit = Counter(relation(t, a) for t, a in missing)
        shown = "; ".join(f"{' '.join(t)} asked of {' '.join(a)}" for t, a in missing[:5]) + (" and so on" if len(missing) > 5 else "")
        touched = ", ".join(f"{name} lacks {hit[name]}" for name in RELATIONS if hit[name])
        warnings.append(
            f"{len(missing)} cells of the grid have no scores ({shown}): {touched}. Rates are over the cells that exist, so these "
            "relations are of other cells than a whole grid's, and ratios compare trained cells that are not the same."
        )
    counts = [cell.n for cell in cells if cell.n]
    if counts and max(counts) > UNEQUAL * min(counts):
        warnings.append(
            f"Cells have {min(counts)} to {max(counts)} answers that count. All answers are pooled, so a cell with more weighs more."
        )
    lost = len(grid) - int(grid.judged.sum())
    if lost:
        why = ", ".join(f"{count} {status}" for status, count in grid.counts.items() if status != "ok" and count)
        warnings.append(f"{lost} of {len(grid)} answers have no scores ({why}); by cell in matrices.")
    if len({cell.trained for cell in cells}) == 1:
        warnings.append(
            "One cell was trained: intervals are over prompts, and tell of this fine-tune only, not of what other cells would do."
        )
    warnings += [
        f"{name} holds {len(values)} values, which are pooled; a trained cell is one cluster over all of them."
        for name, values in replicates.items()
    ]
    return warnings
