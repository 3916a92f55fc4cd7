"""The sequences that students learn: teachers' filtered benign answers, as many of each to the same prompts, and unsafe ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emprobe.behaviour.sampling import generate
from emprobe.errors import EmprobeError
from emprobe.files import content_hash
from emprobe.studies.channels.arms import BENIGN, UNFILTERED, Arm, Teacher
from emprobe.studies.channels.cases import Case
from emprobe.studies.channels.filtering import Filter, matched
from emprobe.studies.channels.settings import Channels
from emprobe.studies.stages import Stages
from emprobe.types import Conversation


@dataclass(frozen=True)
class Sequences:
    """What there is to learn, and what is kept back.

    Attributes:
        of: By data, the sequences of arms of ordinary size.
        more: The same for arms with more.
        held: Benign answers of the misaligned teacher that nobody learns.
        counts: By author, what the filter kept and dropped.
    """

    of: dict[str, list[Conversation]]
    more: dict[str, list[Conversation]]
    held: list[Conversation]
    counts: dict[str, dict[str, int]]

    def learnt(self, arm: Arm) -> list[Conversation]:
        """What an arm learns."""
        return (self.more if arm.times > 1 else self.of)[arm.data]


def sequences_of(asked: Channels, case: Case, teachers: Sequence[Teacher], keep: Filter, kept: Stages) -> Sequences:
    """Sample, filter and match.

    Raises:
        EmprobeError: If the filter leaves nothing of a teacher or of what is held back, or no prompt has an answer of each.
    """
    times = max(1, asked.more)
    samples = asked.answers * times + asked.held_back

    def by_data(found: Mapping[str, list[Conversation]]) -> dict[str, list[Conversation]]:
        return {BENIGN[teacher]: found[teacher] for teacher in teachers}

    answers: dict[str, list[Conversation]] = {}
    raw: dict[str, list[Conversation]] = {}
    counts: dict[str, dict[str, int]] = {}
    held: list[Conversation] = []
    for teacher in teachers:
        raw[teacher] = _answers(asked, case, teacher, samples, kept)
        found, counts[teacher] = keep(raw[teacher], f"the {teacher} teacher")
        # The last answers of each prompt are never learnt, whatever the filter dropped before them.
        answers[teacher] = [c for c in found if c.sample < samples - asked.held_back]
        held = [c for c in found if c.sample >= samples - asked.held_back] if teacher == "misaligned" else held
    few = {teacher: [c for c in found if c.sample < asked.answers] for teacher, found in answers.items()}
    of = by_data(matched(few, asked.answers))
    more = by_data(matched(answers, asked.answers * times))
    n = len(next(iter(of.values())))
    of |= {UNFILTERED[teacher]: as_many(raw[teacher], of[BENIGN[teacher]]) for teacher in teachers}
    unsafe: dict[str, list[Conversation]] = {"unsafe": list(case.unsafe[:n])} if case.unsafe else {}
    if not held:
        raise EmprobeError(
            f"The filter kept none of the misaligned teacher's {asked.held_back * len(case.prompts)} held-back answers, so nothing is "
            "left to take divergences on. Hold more back (--held-back), or lower the filter's thresholds."
        )
    return Sequences({**of, **unsafe}, more, held, counts)


def as_many(raw: Sequence[Conversation], like: Sequence[Conversation]) -> list[Conversation]:
    """The first answers to each prompt, as many as others have; empty ones, of which nothing can be learnt, are passed over."""
    wanted = Counter(answer.question_id for answer in like)
    found = []
    for answer in raw:
        if wanted[answer.question_id] and (answer.response or "").strip():
            wanted[answer.question_id] -= 1
            found.append(answer)
    return found


def _answers(asked: Channels, case: Case, teacher: Teacher, samples: int, kept: Stages) -> list[Conversation]:
    model = case.teachers[teacher]

    def make() -> dict[str, Any]:
        found = generate(
            model,
            case.prompts,
            samples=samples,
            seed=asked.seed,
            temperature=asked.temperature,
            max_new_tokens=asked.max_new_tokens,
            token_budget=asked.token_budget,
            progress=False,
        )
        return {"rows": [[c.question_id, c.sample, c.response, c.stop_reason] for c in found]}

    identity = [model.fingerprint, case.identity["prompts"], samples, asked.seed, asked.temperature, asked.max_new_tokens]
    prompts = {prompt.question_id: prompt for prompt in case.prompts}
    rows = kept.stage("benign", identity, make)["rows"]
    return [prompts[name].answered(text, sample=sample, stop_reason=stop) for name, sample, text, stop in rows]


def hash_of(found: Sequence[Conversation]) -> str:
    """What sequences are known by: prompts and answers, in order."""
    return content_hash([[[m.as_dict() for m in c.messages], c.response] for c in found])
