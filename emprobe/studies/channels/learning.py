"""One student: trained on its sequences through its channel, or read back if it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emprobe.files import content_hash
from emprobe.finetuning import LoRA, Recipe, Solution, distill
from emprobe.studies.channels.arms import Arm
from emprobe.studies.channels.cases import Case
from emprobe.studies.channels.sequences import hash_of
from emprobe.studies.channels.settings import Channels
from emprobe.types import Conversation

SCALE = 2.0
"""Of every student's LoRA, whatever its rank."""


@dataclass(frozen=True)
class Learnt:
    """A student and what it cost.

    Attributes:
        solution: To be put on where it started.
        books: `sequences` there were, `updates`, response `tokens` and sequences `seen`, `change_norm`, `first_loss` and `last_loss`.
    """

    solution: Solution
    books: dict[str, Any]


def learnt(arm: Arm, case: Case, found: Sequence[Conversation], asked: Channels, folder: Path) -> Learnt:
    """Train a student; a finished one is read back, and one that was stopped goes on.

    Args:
        arm: Channel, teacher, where it starts.
        case: Models.
        found: What it learns from.
        asked: Recipe.
        folder: Of students, each in a folder of its own by what it depends on.

    Raises:
        EmprobeError: As `distill`.
    """
    start = case.inits[arm.init]
    # sft learns text and looks at no teacher: its author may even speak other tokens.
    teacher = start if arm.channel == "sft" or arm.teacher is None else case.teachers[arm.teacher]
    recipe = Recipe(
        lr=asked.lr, steps=asked.steps * arm.times, batch=asked.batch, warmup=0, weight_decay=0.0, seed=asked.seed, overlong="drop"
    )
    method = LoRA(asked.rank, alpha=SCALE * asked.rank)
    known = [arm.as_dict(), start.fingerprint, teacher.fingerprint, hash_of(found), recipe.as_dict(), method.as_dict()]
    made = distill(
        start,
        teacher,
        found,
        channel=arm.channel,
        method=method,
        recipe=recipe,
        max_new_tokens=asked.max_new_tokens,
        out=folder / content_hash([known, asked.max_new_tokens]),
        progress=False,
    )
    history = made.history
    last = history.iloc[-1]
    books = {
        "sequences": len(found),
        "updates": len(history),
        "tokens": int(last["tokens"]),
        "seen": int(last["sequences"]),
        "change_norm": float(last["change_norm"]),
        "first_loss": float(history["loss"].iloc[0]),
        "last_loss": float(last["loss"]),
    }
    return Learnt(made.solution, books)
