"""A teacher beside a student: that both speak the same tokens, its hidden states of given sequences, and how far the student is from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emprobe.errors import EmprobeError, MismatchError
from emprobe.finetuning.losses import Head, divergences, head_of, hidden_at_targets, reverse_kl_and_gradient
from emprobe.finetuning.measures import TOKENS_AT_ONCE, PerRow, summed
from emprobe.finetuning.mounting import Mounted
from emprobe.finetuning.record import CARD, FOUND
from emprobe.finetuning.rows import Batch, Row
from emprobe.finetuning.solution import load_solution
from emprobe.models.adapters import is_adapter
from emprobe.models.load import Checkpoint, load_model
from emprobe.models.pair import CheckpointPair, check_tokenizers

MOST_KEPT = 2**29
"""Bytes of hidden states of given sequences that are kept rather than computed again."""


@dataclass(frozen=True, eq=False)
class Divergences:
    """How far a student is from its teacher on given sequences, in nats, over the whole vocabulary.

    Attributes:
        forward: KL(teacher ‖ student) of each row's tokens that count.
        reverse: KL(student ‖ teacher).
    """

    forward: PerRow
    reverse: PerRow


@dataclass(eq=False)
class Teacher:
    """What makes a teacher's distribution of the tokens that count in given sequences, whoever wrote them.

    Attributes:
        head: From its hidden states to logits.
        running: While its block lasts, the teacher: yields the model to run.
        device: Where that model's tokens go.
        own_base: Whether it is the student's own base.
        kept: Its hidden states of rows that were asked to be kept.
    """

    head: Head
    running: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    own_base: bool = False
    kept: dict[Row, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, mounted: Mounted, teacher: Checkpoint) -> Teacher:
        """A checkpoint of its own; where it has the student's own weights, the base on which the student is mounted."""
        if is_base(teacher, mounted.tuned):
            return cls(mounted.base_head, mounted.base, mounted.tuned.device, own_base=True)
        return cls(head_of(teacher.hf), teacher.active, teacher.device)

    def hidden(self, batch: Batch) -> Tensor:
        """Its last hidden states from which the tokens that count are predicted, row by row."""
        if self.kept and all(row in self.kept for row in batch.rows):
            return torch.cat([self.kept[row] for row in batch.rows])
        with torch.no_grad(), self.running() as model:
            return hidden_at_targets(model, batch.to(self.device))

    def keep(self, rows: Sequence[Row], checkpoint: Checkpoint, width: int) -> None:
        """Compute the hidden states of these rows once for all, if they fit into memory; not of the student's own base.

        They come from batches that depend on nothing but these rows, so a run that is taken up again finds the same. The own base is run
        beside the student instead, since only in the same batch is it the same to the last bit, and a student of itself should not move.

        Args:
            rows: Given sequences.
            checkpoint: Whose device and padding batches have.
            width: Bytes of one token's hidden state.
        """
        different = list(dict.fromkeys(rows))
        if self.own_base or width * sum(len(row.predicted) for row in different) > MOST_KEPT:
            return

        def keep(batch: Batch) -> list[Tensor]:
            parts = torch.split(self.hidden(batch), [len(row.predicted) for row in batch.rows])
            self.kept |= dict(zip(batch.rows, parts, strict=True))
            return []

        summed(different, checkpoint, TOKENS_AT_ONCE, keep)


def is_base(teacher: Checkpoint, student: Checkpoint) -> bool:
    """Whether a teacher's weights are those from which the student starts."""
    return teacher.hf is student.hf or (teacher.fingerprint == student.fingerprint and teacher.hf.dtype == student.hf.dtype)


def tempered(head: Head, temperature: float) -> Head:
    """A head whose softmax is that of the temperature."""
    return head if temperature == 1 else lambda hidden: head(hidden) / temperature


def teacher_divergences(
    student: Checkpoint, teacher: Checkpoint, rows: Sequence[Row], *, temperature: float = 1.0, token_budget: int = TOKENS_AT_ONCE
) -> Divergences:
    """Both KLs between a student and a teacher on given sequences, of checkpoints as they are (with their adapters).

    Args:
        student: Any checkpoint.
        teacher: One of the same vocabulary.
        rows: As of `response_rows`.
        temperature: Of both distributions.
        token_budget: Padded tokens per batch.

    Raises:
        EmprobeError: No rows.
        MismatchError: If the two have other tokens, chat templates or numbers of logits.
    """
    check_alike(student, teacher)
    beside = Teacher(head_of(teacher.hf), teacher.active, teacher.device)
    return divergences_beside(student, head_of(student.hf), beside, rows, temperature, token_budget)


def divergences_beside(
    student: Checkpoint, head: Head, teacher: Teacher, rows: Sequence[Row], temperature: float, token_budget: int = TOKENS_AT_ONCE
) -> Divergences:
    """As `teacher_divergences`, of a teacher that is at hand."""
    heads = tempered(head, temperature), tempered(teacher.head, temperature)

    def found(batch: Batch) -> list[Tensor]:
        base = teacher.hidden(batch)
        with student.active() as model:
            hidden = hidden_at_targets(model, batch)
        return [divergences(hidden, base, *heads), divergences(hidden, base, *heads, kind=reverse)]

    with torch.no_grad():
        return Divergences(*summed(rows, student, token_budget, found))


def reverse(log_p: Tensor, log_q: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """`reverse_kl_and_gradient` as a kind of divergence."""
    return reverse_kl_and_gradient(log_p, log_q)


def check_alike(student: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher that would read a text as other tokens, or has other logits.

    Raises:
        MismatchError: Says what differs, with both sizes.
    """
    check_tokenizers(CheckpointPair(student, teacher), ("student", "teacher"))
    sizes = [int(c.hf.get_output_embeddings().weight.shape[0]) for c in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise MismatchError(
            f"Student {student.name!r} has {sizes[0]} logits and teacher {teacher.name!r} has {sizes[1]} (with one tokenizer of "
            f"{len(student.tokenizer)} tokens), so their distributions cannot be compared. Bring both to one size with "
            "resize_token_embeddings, or give a teacher of the student's size."
        )


def check_teacher(student: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher that is not one of the student, or not as its weights say.

    Raises:
        EmprobeError: If an intervention is active on it.
        MismatchError: As `check_alike`; or if it shares the student's weights and is not its base.
    """
    if any(session.plans for session in teacher.interventions):
        raise EmprobeError(
            f"An intervention is active on the teacher {teacher.name!r}. Leave the intervene block: a teacher is a checkpoint as it is, or "
            "with its adapter."
        )
    if teacher.hf is student.hf and teacher.adapter == "on":
        raise MismatchError(
            f"The teacher {teacher.name!r} lives in the weights of the student {student.name!r}, on which the student is trained. Give the "
            "teacher as a path, or load it by itself."
        )
    check_alike(student, teacher)


@contextmanager
def opened(teacher: Checkpoint | str | Path, student: Checkpoint, options: dict[str, Any]) -> Iterator[Checkpoint]:
    """A teacher ready to run.

    Args:
        teacher: A checkpoint; or where one lies, or a PEFT adapter, a solution or a finished fine-tune of the student's base.
        student: The student's base.
        options: As in `load_model`; a revision is the student's.

    Raises:
        EmprobeError: If nothing usable lies there.
        MismatchError: If it was trained on other weights than the student's.
    """
    if isinstance(teacher, Checkpoint):
        yield teacher
        return
    folder = Path(teacher).expanduser()
    folder = folder / FOUND if (folder / CARD).is_file() else folder
    if not folder.is_dir() or (folder / "config.json").is_file():
        yield load_model(folder if folder.is_dir() else teacher, **{name: given for name, given in options.items() if name != "revision"})
        return
    if not Path(student.name).is_dir():
        raise EmprobeError(
            f"The teacher {str(teacher)!r} is a change of the student's base, which was given as {student.name!r}, no directory from which "
            "it could be loaded once more. Give the student as a path, or the teacher as a checkpoint."
        )
    if is_adapter(folder):
        _check_trained_on(folder, student)
        yield load_model(student.name, adapter=folder, **options)
        return
    with load_solution(folder).applied(load_model(student.name, **options)) as applied:
        yield applied


def _check_trained_on(folder: Path, student: Checkpoint) -> None:
    try:
        solution = load_solution(folder)
    except EmprobeError:
        return  # an adapter of PEFT's alone does not say on which weights
    solution.check_base(student)
