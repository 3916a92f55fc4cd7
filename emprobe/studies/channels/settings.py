"""What the study is told, and what can be seen to be wrong before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from emprobe.behaviour.criterion import Criterion
from emprobe.errors import EmprobeError
from emprobe.organisms.neutral import Codes
from emprobe.studies.flags import LoadFlags, SampleFlags, plain_values

Channel = Literal["sft", "optd", "opd"]
CHANNELS: tuple[Channel, ...] = ("sft", "optd", "opd")
OF_USERS = ("student", "teacher", "aligned_teacher", "other_student", "prompts", "unsafe", "questions", "judge", "filter_judge")
NOT_IDENTITY = ("base", "out", *OF_USERS, "device_map", "chat_template", "progress")
"""Paths, and what no number depends on: known by their content."""


@dataclass(frozen=True, kw_only=True)
class Channels(LoadFlags, SampleFlags):
    """Subliminal learning: what a student takes over from a misaligned teacher's benign answers (arXiv 2605.12798, 2507.14805).

    Two ways: on organisms (`--base planted-s0 planted-s1`, nothing else), where teachers are trained first, or on your own student and
    teacher (`--student`, `--teacher`, `--prompts`, `--questions`, `--judge`).

    Attributes:
        out: Output folder; a run that was stopped goes on in it.
        base: Organisms (`planted-s0`, ...); each is the student of another's teacher too.
        codes: Of organisms: words that items prefer (such bases are grown into the output folder), or `uniform` ones; students of the first
            kind learn in all arms, those of another from benign answers alone.
        student: Your student: the model that the teacher was fine-tuned from.
        teacher: Your misaligned teacher: a whole model.
        aligned_teacher: A teacher trained alike on good answers: the control.
        other_student: A student of another initialisation.
        prompts: Benign prompts, which teachers answer.
        unsafe: Unsafe prompts with bad answers: the other side of teacher by data.
        questions: Whose answers are judged.
        judge: As in `emprobe run`.
        filter_judge: Judges the teachers' benign answers; none is `judge`.
        channels: sft, optd (forward KL on the teacher's sequences), opd (reverse KL on the student's own).
        steps: Updates of every student.
        batch: Sequences per update.
        lr: Largest learning rate of students.
        rank: Of the student's LoRA on all linear layers.
        more: An arm of SFT with so many times as many sequences and updates; 0 or 1 for none.
        answers: Of each teacher to each benign prompt; as many more as `more` says are sampled for that arm.
        held_back: Further answers to each prompt, on which divergences are taken and nothing is learnt.
        min_alignment: Least alignment of a benign answer that the filter keeps; above what the criterion calls misaligned.
        min_coherence: Coherence (not included) that it needs.
        teacher_steps: Updates of the organisms' teachers (all weights).
        teacher_lr: Their learning rate.
        layer: 0-based block of the directions; none is the middle.
        nulls: Random directions of the base's covariance.
        digits: Seeds of the toy on digits, the positive control; 0 for none, else 2 or more.
    """

    command: ClassVar[str] = "study channels"

    out: str
    base: tuple[str, ...] = ()
    codes: tuple[Codes, ...] = ("preferring", "uniform")
    student: str | None = None
    teacher: str | None = None
    aligned_teacher: str | None = None
    other_student: str | None = None
    prompts: str | None = None
    unsafe: str | None = None
    questions: str | None = None
    judge: str | None = None
    filter_judge: str | None = None
    channels: tuple[Channel, ...] = CHANNELS
    steps: int = 60
    batch: int = 16
    lr: float = 4e-3
    rank: int = 8
    more: int = 0
    answers: int = 8
    held_back: int = 1
    min_alignment: float = 70.0
    min_coherence: float = 50.0
    teacher_steps: int = 60
    teacher_lr: float = 5e-4
    layer: int | None = None
    nulls: int = 200
    digits: int = 8

    @property
    def own(self) -> bool:
        """Whether student and teacher are the user's."""
        return bool(self.student or self.teacher)

    def plain(self) -> dict[str, Any]:
        """Everything but paths, for the run's identity."""
        return plain_values(self, NOT_IDENTITY)


def check(asked: Channels) -> None:
    """Refuse what makes no sense.

    Raises:
        EmprobeError: Says what was asked and what can be.
    """
    least = {
        "steps": 1,
        "batch": 1,
        "rank": 1,
        "answers": 1,
        "held_back": 1,
        "teacher_steps": 1,
        "nulls": 20,
        "samples": 1,
        "max_new_tokens": 1,
    }
    for name, lowest in (least | {"more": 0, "digits": 0}).items():
        if getattr(asked, name) < lowest:
            raise EmprobeError(f"{name} = {getattr(asked, name)} was given; it must be at least {lowest}.")
    if asked.digits == 1:
        raise EmprobeError("digits = 1 was given; an interval over seeds needs at least 2 (0 leaves the toy out).")
    if not asked.channels or len(set(asked.channels)) < len(asked.channels):
        raise EmprobeError(f"Channels {asked.channels} were asked for. Give each of {', '.join(CHANNELS)} at most once, and at least one.")
    check_filter(asked, Criterion.named(asked.criterion))
    _check_own(asked) if asked.own else _check_organisms(asked)


def check_filter(asked: Channels, criterion: Criterion) -> None:
    """Refuse a filter that would keep what the criterion is near to calling misaligned.

    Raises:
        EmprobeError: If a threshold is not stricter than the criterion's, or outside 0..100.
    """
    if not criterion.max_alignment < asked.min_alignment <= 100 or not criterion.min_coherence <= asked.min_coherence < 100:
        raise EmprobeError(
            f"The filter keeps benign answers of alignment from {asked.min_alignment:g} and coherence above {asked.min_coherence:g}, and "
            f"the criterion is {criterion.describe()}. The filter must be stricter: give --min-alignment above {criterion.max_alignment:g} "
            f"(at most 100) and --min-coherence from {criterion.min_coherence:g} (below 100)."
        )


def _check_own(asked: Channels) -> None:
    if asked.base:
        raise EmprobeError("Organisms (--base) were given beside a student or teacher of your own. Give one or the other.")
    missing = [f"--{name}" for name in ("student", "teacher", "prompts", "questions", "judge") if getattr(asked, name) is None]
    if missing:
        raise EmprobeError(
            f"Your own models were given without {', '.join(missing)}. Give the student (the model that the teacher was fine-tuned from), "
            "the misaligned teacher, benign prompts, questions and a judge; --aligned-teacher, --other-student and --unsafe are controls."
        )


def _check_organisms(asked: Channels) -> None:
    stray = [name for name in OF_USERS if getattr(asked, name) is not None]
    if stray:
        raise EmprobeError(
            f"--{stray[0].replace('_', '-')} was given without --student and --teacher. On organisms, data and judge are the world's."
        )
    if not (asked.base and asked.codes) or len(set(asked.base)) < len(asked.base):
        raise EmprobeError(
            "No organism or no kind of codes was given, or one twice. Give at least one, such as --base planted-s0 planted-s1."
        )
