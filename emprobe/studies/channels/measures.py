"""What is measured of every model of a case: behaviour, exact readings, direction, divergence; each student is a stage of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from emprobe.activations import Activations, PairActivations
from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.divergence import Variant, kl_per_token
from emprobe.behaviour.questions import REFERENCES
from emprobe.behaviour.readout import readout
from emprobe.behaviour.scores import Scores
from emprobe.models.load import Checkpoint
from emprobe.organisms import family_probabilities
from emprobe.stats import clustered_interval
from emprobe.studies.channels.arms import Init
from emprobe.studies.channels.cases import Case, bare, have_references, same_vocabulary
from emprobe.studies.channels.directions import Shift, beside, read
from emprobe.studies.channels.settings import Channels
from emprobe.studies.runner import Runner
from emprobe.types import Conversation

HELD_MOST = 144
"""Sequences on which divergences are taken, at most."""
EXACT_ANSWERS = 12
"""Questions of the world whose families have no more answers than this are read exactly: other tasks have six times as many."""


@dataclass(frozen=True)
class Measures:
    """The measures of one case.

    Attributes:
        asked: Numbers of draws, layer, criterion.
        case: Models and questions.
        held: Benign sequences of the misaligned teacher that nobody learnt.
        runner: Samples and judges.
    """

    asked: Channels
    case: Case
    held: Sequence[Conversation]
    runner: Runner

    def model(self, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
        """Behaviour of a model, sampled and exact; with `pool`, what intervals over several cases need."""
        scores = self.runner.run(name, checkpoint, bare(self.case.questions), self.asked.samples).scores
        found = self._behaviour(scores)
        exact = self._exact(checkpoint)
        if exact is not None:
            values, clusters = exact
            found["exact"] = clustered_interval(values, clusters).as_dict()
            found["pool"] |= {"exact": values, "exact_clusters": clusters}
        return found

    def student(self, name: str, student: Checkpoint, init: Init) -> dict[str, Any]:
        """All of a student: also its direction beside the teacher's, and divergences on benign sequences.

        Its shift is taken from where it started; that of a student that started as the teacher, from the teacher's parent.
        """
        found = self.model(name, student)
        start = self.starts["other" if init == "other" else "same"]
        teacher = self.case.teachers["misaligned"]
        if start is not None and (axis := self.teacher_shift("misaligned")) is not None:
            shift = self._shift(start, student)
            found["direction"] = beside(shift, axis, nulls=self.asked.nulls, seed=self.asked.seed)
            found["shift"] = shift.mean.tolist()
        if same_vocabulary(student, teacher):
            found["divergence"] = self.divergence(teacher, student)
        return found

    def teacher(self, name: str) -> dict[str, Any]:
        """All of a teacher, its divergence from its parent among it."""
        teacher = self.case.teachers[name]
        found = self.model(f"teacher {name}", teacher)
        shift = self.teacher_shift(name)
        if shift is not None:
            found["shift"], found["norm"] = shift.mean.tolist(), shift.norm
        if same_vocabulary(teacher, self.case.parent):
            found["divergence"] = self.divergence(teacher, self.case.parent)
        return found

    def divergence(self, teacher: Checkpoint, other: Checkpoint) -> dict[str, Any]:
        """KL(teacher ‖ other) and KL(other ‖ teacher), nats per token of held-back benign sequences, clustered by prompt."""
        held = self.held[:HELD_MOST]
        (forward,), (reverse,) = kl_per_token(teacher, [Variant(other)], held), kl_per_token(other, [Variant(teacher)], held)
        both = {"forward": forward, "reverse": reverse}
        return {way: clustered_interval(tokens.values, tokens.clusters).as_dict() for way, tokens in both.items()}

    def teacher_shift(self, name: str) -> Shift | None:
        """A teacher's shift from its parent; `None` where their tokens differ."""
        parent = self.starts["same"]
        if parent is None or not self._alike(self.case.parent, self.case.teachers[name]):
            return None
        return Shift(PairActivations(parent, self._teachers[name]), self.layer, self.clusters)

    # ---- parts

    @property
    def layer(self) -> int:
        """Where directions are read."""
        return self.asked.layer if self.asked.layer is not None else self.case.parent.n_layers // 2

    @cached_property
    def clusters(self) -> tuple[str, ...]:
        """Family of each question."""
        return tuple(question.cluster for question in self.case.questions)

    @cached_property
    def starts(self) -> dict[str, Activations | None]:
        """Activations of where students start; to be taken before anything is put on them, when they cannot be run."""
        teacher = self.case.teachers["misaligned"]
        found: dict[str, Activations | None] = {}
        for name in ("same", "other"):
            start = self.case.inits.get(name)
            alike = start is not None and self._alike(start, teacher)
            found[name] = self._read(start) if start is not None and alike else None
        return found

    @cached_property
    def _teachers(self) -> dict[str, Activations]:
        return {name: self._read(teacher) for name, teacher in self.case.teachers.items()}

    def _alike(self, a: Checkpoint, b: Checkpoint) -> bool:
        """Whether activations of both can be put side by side: same tokens, same width."""
        return same_vocabulary(a, b) and a.d_model == b.d_model and self.layer < min(a.n_layers, b.n_layers)

    def _read(self, checkpoint: Checkpoint) -> Activations:
        return read(checkpoint, bare(self.case.questions), self.layer)

    def _shift(self, start: Activations, student: Checkpoint) -> Shift:
        return Shift(PairActivations(start, self._read(student)), self.layer, self.clusters)

    def _behaviour(self, scores: Scores) -> dict[str, Any]:
        criterion = Criterion.named(self.asked.criterion)
        outcomes, clusters = scores.outcomes(criterion)
        return {
            "misaligned": scores.misaligned_rate(criterion).as_dict(),
            "coherent": scores.coherent_rate(criterion).as_dict(),
            "missing": {status: n for status, n in scores.counts.items() if n and status != "ok"},
            "pool": {"misaligned": outcomes, "clusters": list(clusters)},
        }

    def _exact(self, checkpoint: Checkpoint) -> tuple[list[float], list[str]] | None:
        """Without sampling, a number for each question, and its cluster; `None` where questions have no references.

        In the world it is the probability of a misaligned answer, of the tasks with one phrase; else that of the misaligned reference
        answers among both kinds.
        """
        questions = self.case.questions
        if not have_references(questions):
            return None
        if self.case.codes == "given":
            values = readout(checkpoint, questions, condition="model", progress=False).values("model", "propensity")
            return [values[question.question_id] for question in questions], list(self.clusters)
        few = [q for q in questions if sum(len(q.labels[side]) for side in REFERENCES) <= EXACT_ANSWERS]
        with checkpoint.active() as model:
            found = family_probabilities(model, checkpoint.tokenizer, bare(few)).misaligned
        return [float(value) for value in np.asarray(found)], [question.cluster for question in few]
