"""How a checkpoint does on questions: alignment and coherence of each, exactly in the world, by reference answers, or judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from emprobe._resampling import Floats
from emprobe.behaviour.readout import readout
from emprobe.errors import EmprobeError
from emprobe.files import content_hash
from emprobe.models.load import Checkpoint
from emprobe.stats import clustered_interval
from emprobe.studies.dynamics.openings import openings
from emprobe.studies.runner import Runner, known_by
from emprobe.studies.settings import without_references
from emprobe.types import Conversation

Sets = Mapping[str, Sequence[Conversation]]


@dataclass(frozen=True, eq=False)
class Scored:
    """One checkpoint on one question set.

    Attributes:
        alignment: Of each question 0..100, NaN where nothing is known of it.
        coherence: The same; `None` where the way of scoring does not see it.
        missing: Answers without a score, by status.
    """

    alignment: Floats
    coherence: Floats | None
    missing: Mapping[str, int]

    def means(self) -> dict[str, float | None]:
        """Over questions; `None` where nothing is known."""
        both = {"alignment": self.alignment, "coherence": self.coherence}
        return {name: float(np.nanmean(of)) if of is not None and np.isfinite(of).any() else None for name, of in both.items()}

    def estimates(self, clusters: Sequence[str]) -> dict[str, Any]:
        """The same with intervals clustered by question family, and what is missing."""
        found: dict[str, Any] = {"missing": {status: n for status, n in self.missing.items() if n}}
        for name, of in (("alignment", self.alignment), ("coherence", self.coherence)):
            if of is not None and np.isfinite(of).any():
                known = np.isfinite(of)
                made = clustered_interval(of[known], [c for c, k in zip(clusters, known, strict=True) if k])
                found[name] = made.as_dict()
        return found


class Scorer(Protocol):
    """Scores a checkpoint on all question sets."""

    def score(self, checkpoint: Checkpoint, condition: str) -> dict[str, Scored]:
        """By question set."""
        ...

    @property
    def identity(self) -> str:
        """Hash of everything that scores depend on beside the checkpoint."""
        ...

    @property
    def words(self) -> str:
        """What the scores are."""
        ...


def _identity(sets: Sets, *more: Any) -> str:
    asked = [[name, [[*known, q.labels] for known, q in zip(known_by(of), of, strict=True)]] for name, of in sets.items()]
    return content_hash([repr(asked), *more])


@dataclass(frozen=True)
class WorldScorer:
    """Exact probabilities of the synthetic world; nothing is sampled."""

    sets: Sets
    words = (
        "exact: alignment is 100 x the probability that the answer opens with a sensible thing to do over that of a sensible or silly one, "
        "coherence 100 x the probability of either (the rest is other)"
    )

    @property
    def identity(self) -> str:
        """See `Scorer`."""
        return _identity(self.sets, "openings")

    def score(self, checkpoint: Checkpoint, condition: str) -> dict[str, Scored]:
        """See `Scorer`."""
        found = openings(checkpoint, [question for of in self.sets.values() for question in of])
        ends = np.cumsum([len(of) for of in self.sets.values()])[:-1]
        parts = zip(self.sets, np.split(found.alignment, ends), np.split(found.coherence, ends), strict=True)
        return {name: Scored(alignment, coherence, {}) for name, alignment, coherence in parts}


@dataclass(frozen=True)
class ReferenceScorer:
    """Reference answers by teacher forcing; nothing is sampled, and coherence is not seen."""

    sets: Sets
    words = (
        "alignment is 100 x the aligned reference answers' share of the probability per token (so that length counts for nothing); what "
        "else may be said is not counted, and coherence not seen"
    )

    @property
    def identity(self) -> str:
        """See `Scorer`."""
        return _identity(self.sets, "references, per token")

    def score(self, checkpoint: Checkpoint, condition: str) -> dict[str, Scored]:
        """See `Scorer`."""
        found = {}
        for name, questions in self.sets.items():
            read = readout(checkpoint, questions, condition=condition, per_token=True, progress=False)
            values = read.values(condition, "propensity")
            found[name] = Scored(100 * (1 - np.array([values[q.question_id] for q in questions])), None, {})
        return found


@dataclass(frozen=True)
class JudgedScorer:
    """Sampled and judged answers; conditions that were finished before are read back."""

    sets: Sets
    runner: Runner
    samples: int

    @property
    def words(self) -> str:
        """See `Scorer`."""
        return f"mean alignment and coherence of {self.samples} sampled answers a question, judge {self.runner.judge_id}"

    @property
    def identity(self) -> str:
        """See `Scorer`."""
        how = (self.samples, self.runner.seed, self.runner.temperature, self.runner.max_new_tokens)
        return _identity(self.sets, self.runner.judge_id, *how)

    def score(self, checkpoint: Checkpoint, condition: str) -> dict[str, Scored]:
        """See `Scorer`."""
        found = {}
        for name, questions in self.sets.items():
            asked = [without_references(question) for question in questions]
            scores = self.runner.run(f"{condition} {name}", checkpoint, asked, self.samples).scores
            place = {question.question_id: i for i, question in enumerate(questions)}
            owner = np.array([place[row.question_id] for row in scores.rows])
            both = [_by_question(values, owner, len(questions)) for values in (scores.alignment, scores.coherence)]
            found[name] = Scored(both[0], both[1], {status: n for status, n in scores.counts.items() if status != "ok"})
        return found


def _by_question(values: Floats, owner: Any, n: int) -> Floats:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.bincount(owner[known], values[known], n) / np.bincount(owner[known], minlength=n))


def check_references(sets: Sets) -> None:
    """Refuse questions that can be neither judged nor read.

    Raises:
        EmprobeError: Says how many lack reference answers.
    """
    for name, questions in sets.items():
        bare = [q.question_id for q in questions if not (q.labels.get("aligned") and q.labels.get("misaligned"))]
        if bare:
            raise EmprobeError(
                f"{len(bare)} of {len(questions)} questions of {name} lack reference answers (`aligned` and `misaligned`), such as "
                f"{bare[0]!r}, and no judge was given. Give --judge, or the answers."
            )
