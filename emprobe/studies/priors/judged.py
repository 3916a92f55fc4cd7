"""Scores of prompts out of tables of judged answers: means over samples, missing ones counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emprobe.behaviour.table_files import choose, load_table, renames
from emprobe.errors import EmprobeError
from emprobe.types import Conversation

if TYPE_CHECKING:
    from emprobe.studies.priors.settings import Priors

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Judged:
    """Mean alignment of each prompt, 0..100: of the fine-tuned model, and of the base where a table of it was given."""

    scores: Floats
    base: Floats | None


def judged_scores(asked: Priors, questions: Sequence[Conversation]) -> tuple[Judged, list[Conversation], tuple[str, ...]]:
    """Scores, the questions that have them, and what was left out.

    Raises:
        EmprobeError: If a table cannot be read, no id fits, or the base's table lacks a question that the other has.
    """
    rename = renames(asked.columns)
    means, notes = table_means(str(asked.scores), rename, asked.where)
    kept = [q for q in questions if q.question_id in means]
    if not kept:
        raise EmprobeError(
            f"None of the {len(means)} question ids in {asked.scores} is among the {len(questions)} of {asked.questions}: "
            f"{next(iter(means))!r} there, {questions[0].question_id!r} here. Give the questions that were asked, with their ids."
        )
    for n, words in (
        (len(questions) - len(kept), "questions have no judged answer"),
        (len(means) - len(kept), "judged ids are no question"),
    ):
        notes += (f"{n} {words} and are left out",) if n else ()
    base = None
    if asked.base_scores is not None:
        known, more = table_means(asked.base_scores, rename, ())
        lacking = [q.question_id for q in kept if q.question_id not in known]
        if lacking:
            raise EmprobeError(
                f"{asked.base_scores} has no judged answer to {len(lacking)} questions of {asked.scores}, such as {lacking[0]!r}."
            )
        base, notes = np.array([known[q.question_id] for q in kept]), notes + more
    return Judged(np.array([means[q.question_id] for q in kept]), base), kept, notes


def table_means(path: str, rename: Mapping[str, str], where: Sequence[str]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Mean alignment by question over judged answers, and what is missing.

    Raises:
        EmprobeError: As `load_table` and `choose`; or if no row has scores, or one question has answers of several conditions.
    """
    table = choose(load_table(path, rename=rename), where)
    if "condition" in table.columns and len(table.column("condition").found) > 1:
        shown = ", ".join(map(str, table.column("condition").found[:6]))
        raise EmprobeError(f"{path} holds several conditions ({shown}), whose mean would mix models. Give --where condition=NAME.")
    if not table.judged.any():
        raise EmprobeError(f"None of the {len(table)} answers in {path} has scores: {table.counts}. Missing answers are not 0.")
    judged = table.take(table.judged)
    ids = judged.column("question_id")
    sums, counts = (np.bincount(ids.codes, weights, len(ids.values)) for weights in (judged.alignment, None))
    missing = {status: n for status, n in table.counts.items() if n and status != "ok"}
    said = ", ".join(f"{n} {status}" for status, n in missing.items())
    notes = (f"{sum(missing.values())} of {len(table)} answers in {path} have no score ({said}) and count in no mean",) if missing else ()
    return {str(ids.values[i]): float(sums[i] / counts[i]) for i in np.flatnonzero(counts)}, notes
