"""What each prompt scores after fine-tuning and before: from tables, read off reference answers, or sampled and judged now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.behaviour.cells import Quantity
from emprobe.behaviour.readout import readout
from emprobe.errors import EmprobeError
from emprobe.files import content_hash
from emprobe.models.load import Checkpoint
from emprobe.studies.priors.cases import Case
from emprobe.studies.priors.settings import Priors
from emprobe.studies.runner import Runner, known_by
from emprobe.studies.stages import Stages

Floats = NDArray[np.float64]
Load = Callable[[str], Checkpoint]
"""From `base`, `tuned` or `pretrained` to the model."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of the prompts that have them.

    Attributes:
        rows: Which of the case's prompts those are.
        scores: After fine-tuning.
        before: The same of the base, where it is known.
        base_columns: What the baseline of the base's own score is given: the same, for probabilities also their log-odds.
        notes: What is missing, with numbers.
    """

    rows: list[int]
    scores: Floats
    before: Floats | None
    base_columns: Floats | None
    notes: tuple[str, ...] = ()


def scores_of(asked: Priors, case: Case, load: Load, kept: Stages, runner: Runner | None) -> Scored:
    """The scores of a case.

    Raises:
        EmprobeError: If they are all equal, or fewer prompts than half have a judged answer.
    """
    everything = list(range(len(case.prompts)))
    if case.given is not None:
        base = case.given.base
        return Scored(everything, case.given.scores, base, None if base is None else base[:, None])
    if runner is not None:
        return _judged(asked, case, load, runner)
    both = [_read(asked, case, load(role), kept) for role in ("tuned", "base")]
    names: tuple[Quantity, ...] = ("contrast",) if asked.own else ("log_p_misaligned", "contrast")
    after, before = (np.array([[found[name][q.question_id] for name in names] for q in case.prompts]) for found in both)
    if not asked.own:
        after[:, 0], before[:, 0] = np.exp(after[:, 0]), np.exp(before[:, 0])
    if np.ptp(after[:, 0]) == 0:
        raise EmprobeError(f"All {len(after)} prompts of {case.name} score {after[0, 0]:g} after fine-tuning: there is nothing to predict.")
    return Scored(everything, after[:, 0], before[:, 0], before)


def _read(asked: Priors, case: Case, checkpoint: Checkpoint, kept: Stages) -> dict[str, dict[str, float]]:
    """Log-probabilities of reference answers, of all of a side together where they are whole families."""
    pool: Any = "logmeanexp" if asked.own else "logsumexp"
    references = [q.labels[side] for q in case.references for side in ("aligned", "misaligned")]
    identity = [checkpoint.fingerprint, checkpoint.adapter, known_by(case.prompts), content_hash(_plain(references)), pool]

    def make() -> dict[str, Any]:
        found = readout(checkpoint, case.references, condition="scores", pool=pool, progress=asked.progress)
        return {name: found.values("scores", name) for name in ("log_p_misaligned", "contrast")}

    return kept.stage("readout", identity, make)


def _plain(references: Sequence[Any]) -> list[Any]:
    return [list(found) if not isinstance(found, str) else found for found in references]


def _judged(asked: Priors, case: Case, load: Load, runner: Runner) -> Scored:
    found = {}
    missing = []
    for role in ("tuned", "base"):
        scores = runner.run(role, load(role), case.prompts, asked.samples).scores
        by_question: dict[str, list[float]] = {}
        for row in scores.rows:
            if row.alignment is not None:
                by_question.setdefault(row.question_id, []).append(row.alignment)
        found[role] = {name: float(np.mean(values)) for name, values in by_question.items()}
        lost = sum(row.alignment is None for row in scores.rows)
        missing += [f"{lost} of {len(scores.rows)} answers of {role} have no score and count in no mean"] if lost else []
    rows = [i for i, q in enumerate(case.prompts) if all(q.question_id in known for known in found.values())]
    if len(rows) < len(case.prompts):
        missing.append(f"{len(case.prompts) - len(rows)} prompts have no judged answer of one of the models and are left out")
    if 2 * len(rows) < len(case.prompts):
        raise EmprobeError(
            f"Only {len(rows)} of {len(case.prompts)} prompts have judged answers of both models. Look at the answers, and at whether the "
            "judge suits them."
        )
    after, before = (np.array([found[role][case.prompts[i].question_id] for i in rows]) for role in ("tuned", "base"))
    if np.ptp(after) == 0:
        raise EmprobeError(f"All {len(after)} prompts score {after[0]:g} after fine-tuning: there is nothing to predict.")
    return Scored(rows, after, before, before[:, None], tuple(missing))
