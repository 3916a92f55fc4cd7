"""One rate for each trained and evaluated cell: what decompositions and correlations take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.score_table import ScoreTable

TRAINED, ASKED = ("train_domain", "train_task"), ("eval_domain", "eval_task")
Cell = tuple[str, ...]
"""Domain and task."""


@dataclass(frozen=True)
class CellRate:
    """What one trained cell's fine-tunes do when asked of one cell.

    Attributes:
        trained: Domain and task that were trained.
        asked: Domain and task of the questions.
        n: Answers of the criterion's denominator.
        rate: Misaligned ones among them, 0..1; NaN if n is 0.
    """

    trained: Cell
    asked: Cell
    n: int
    rate: float

    @property
    def relation(self) -> str:
        """How both relate."""
        return relation(self.trained, self.asked)


def relation(trained: Cell, asked: Cell) -> str:
    """How two cells relate.

    >>> relation(("medical", "tutor"), ("sports", "tutor"))
    'same_task'
    """
    same = trained[0] == asked[0], trained[1] == asked[1]
    return {(True, True): "same_cell", (False, True): "same_task", (True, False): "same_domain", (False, False): "neither"}[same]


def cell_rates(table: ScoreTable, criterion: Criterion) -> list[CellRate]:
    """The rate of every combination that occurs, also of those without scores.

    Args:
        table: Judged answers with the columns of both cells.
        criterion: Thresholds and denominator.
    """
    columns = [table.columns[name] for name in (*TRAINED, *ASKED)]
    combinations, inverse = np.unique(np.stack([column.codes for column in columns], axis=1), axis=0, return_inverse=True)
    inverse = inverse.ravel()
    coherent = criterion.coherent(table.coherence)
    counted = {"all": np.ones(len(table), dtype=np.bool_), "judged": table.judged, "coherent": table.judged & coherent}
    whole = np.bincount(inverse, counted[criterion.denominator], len(combinations))
    hits = np.bincount(inverse, criterion.misaligned(table.alignment, table.coherence), len(combinations))
    found = []
    for codes, n, hit in zip(combinations, whole, hits, strict=True):
        names = [str(column.values[code]) for column, code in zip(columns, codes, strict=True)]
        found.append(CellRate(tuple(names[:2]), tuple(names[2:]), int(n), float(hit / n) if n else float("nan")))
    return found
