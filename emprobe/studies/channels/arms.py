"""The arms: which student learns from which teacher on whose sequences, and what stays fixed while what changes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from emprobe.studies.channels.settings import Channel

Init = Literal["same", "other", "misaligned"]
Teacher = Literal["misaligned", "aligned"]
Data = Literal["benign by misaligned", "benign by aligned", "unfiltered by misaligned", "unfiltered by aligned", "unsafe"]
BENIGN: dict[Teacher, Data] = {"misaligned": "benign by misaligned", "aligned": "benign by aligned"}
UNFILTERED: dict[Teacher, Data] = {"misaligned": "unfiltered by misaligned", "aligned": "unfiltered by aligned"}


@dataclass(frozen=True)
class Arm:
    """One student.

    Attributes:
        channel: How it learns.
        teacher: Whose probabilities it learns; `None` where sft learns what no teacher wrote.
        data: Sequences by their author; opd takes their prompts only.
        init: Where it starts: the teacher's parent (`same`), another base (`other`), or the misaligned teacher itself.
        times: So many times the sequences and updates of the others.

    Example:
        >>> Arm("optd", "misaligned", "unsafe").name
        'optd, teacher misaligned, unsafe'
        >>> Arm("sft", "misaligned", "benign by misaligned", "other").name
        'sft, teacher misaligned, benign by misaligned, other init'
    """

    channel: Channel
    teacher: Teacher | None
    data: Data
    init: Init = "same"
    times: int = 1

    @property
    def name(self) -> str:
        """The arm in words, the same in every case."""
        start = {"same": "", "other": ", other init", "misaligned": ", from the misaligned teacher"}[self.init]
        return f"{self.channel}, teacher {self.teacher or 'none'}, {self.data}{start}{f', x{self.times}' if self.times > 1 else ''}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"name": self.name, **asdict(self)}


def same(channel: Channel, times: int = 1) -> Arm:
    """The subliminal arm: the teacher's parent learns from the misaligned teacher's benign answers."""
    return Arm(channel, "misaligned", BENIGN["misaligned"], times=times)


def control(channel: Channel, times: int = 1) -> Arm:
    """The same with the aligned teacher and its answers."""
    return Arm(channel, "aligned", BENIGN["aligned"], times=times)


def other(channel: Channel) -> Arm:
    """The subliminal arm with a student of another initialisation."""
    return Arm(channel, "misaligned", BENIGN["misaligned"], "other")


def unfiltered(channel: Channel, teacher: Teacher) -> Arm:
    """As many answers of a teacher to the same prompts, before the filter: what it keeps away."""
    return Arm(channel, teacher, UNFILTERED[teacher])


def unsafe(channel: Channel, teacher: Teacher) -> Arm:
    """Unsafe data scored by a teacher; for sft there is no teacher in them, and both are one arm."""
    return Arm(channel, None if channel == "sft" else teacher, "unsafe")


def reversal(channel: Channel) -> Arm:
    """A student that is the misaligned teacher learns from the aligned one on unsafe data (sft: from the unsafe sequences)."""
    return Arm(channel, None if channel == "sft" else "aligned", "unsafe", "misaligned")


def arms_of(channels: Sequence[Channel], *, aligned: bool, others: bool, unsafe_data: bool, more: int = 0) -> list[Arm]:
    """All arms for what there is, each once.

    Args:
        channels: Of the students.
        aligned: Whether there is an aligned teacher.
        others: Whether there is a student of another initialisation.
        unsafe_data: Whether there are unsafe sequences.
        more: Of the sft arm with more data; below 2 there is none.

    Example:
        >>> [len(arms_of(["sft", "optd", "opd"], aligned=True, others=True, unsafe_data=u)) for u in (False, True)]
        [15, 23]
    """
    found: list[Arm] = []
    for channel in channels:
        found += [same(channel), *([control(channel)] if aligned else []), *([other(channel)] if others else [])]
        if channel == "sft" and more > 1:
            found += [same(channel, more), *([control(channel, more)] if aligned else [])]
        if channel != "opd":
            # A student's own answers are never filtered, so that opd has no such arm.
            found += [unfiltered(channel, teacher) for teacher in (("misaligned", "aligned") if aligned else ("misaligned",))]
        if channel == "optd" and aligned:
            # Sequences held fixed while only the teacher changes, and the other way round.
            found += [Arm(channel, "aligned", BENIGN["misaligned"]), Arm(channel, "misaligned", BENIGN["aligned"])]
        if unsafe_data:
            found.append(unsafe(channel, "misaligned"))
            found += [unsafe(channel, "aligned"), reversal(channel)] if aligned else []
    return list(dict.fromkeys(found))


def authors(arms: Collection[Arm]) -> list[Teacher]:
    """Whose benign answers are needed."""
    return [teacher for teacher, data in BENIGN.items() if any(arm.data == data for arm in arms)]
