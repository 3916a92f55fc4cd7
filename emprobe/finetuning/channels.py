"""Three channels from teacher to student, with one book-keeping: given sequences, a teacher's distributions on them, or on one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from emprobe.finetuning.losses import Kind, cross_entropies, divergences, hidden_at_targets, reverse_kl_and_gradient
from emprobe.finetuning.measures import response_loss
from emprobe.finetuning.methods import Full, Method, Recipe, Vector
from emprobe.finetuning.mounting import Mounted, plain_config
from emprobe.finetuning.objectives import batch_of
from emprobe.finetuning.rollouts import Rollouts
from emprobe.finetuning.rows import Batch, Row
from emprobe.finetuning.solution import LoRASolution
from emprobe.finetuning.step import micro_batches
from emprobe.finetuning.teaching import Teacher, divergences_beside, reverse, tempered
from emprobe.models.load import Checkpoint

Channel = Literal["sft", "optd", "opd"]
Estimator = Literal["full", "sampled"]


@dataclass(frozen=True, eq=False)
class ChannelGradient:
    """Leaves the gradient of a channel's loss in what is mounted: summed over tokens, divided by all tokens of the update.

    Attributes:
        mounted: The student.
        teacher: Not looked at by `sft`.
        channel: Cross-entropy (`sft`), KL(teacher ‖ student) (`optd`), KL(student ‖ teacher) (`opd`).
        micro: Sequences per forward pass.
        temperature: Of both distributions.
        estimator: Of `opd`: over the whole vocabulary, or of the sampled token alone.
    """

    mounted: Mounted
    teacher: Teacher
    channel: Channel
    micro: int
    temperature: float = 1.0
    estimator: Estimator = "full"

    def of(self, rows: Sequence[Row]) -> float:
        """Add the gradient of one update and return the loss per response token, in nats.

        Raises:
            EmprobeError: If a KL is negative.
        """
        with self.mounted.tuned.active() as model:
            return sum(self._part(model, batch, tokens) for batch, tokens in micro_batches(self.mounted.tuned, rows, self.micro))

    def _part(self, model: Any, batch: Batch, tokens: int) -> float:
        teacher = None if self.channel == "sft" else self.teacher.hidden(batch)
        hidden = hidden_at_targets(model, batch)
        if teacher is None:
            losses = cross_entropies(hidden, batch.targets, self.mounted.head, 1 / tokens)
        else:
            heads = tempered(self.mounted.head, self.temperature), tempered(self.teacher.head, self.temperature)
            losses = divergences(hidden, teacher, *heads, 1 / tokens, kind=self._kind(batch))
        return float(losses.double().sum()) / tokens

    def _kind(self, batch: Batch) -> Kind | None:
        if self.channel == "optd":
            return None
        return reverse if self.estimator == "full" else partial(sampled, batch.targets)


def sampled(targets: Tensor, log_p: Tensor, log_q: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p), and a gradient that has its gradient as expectation over tokens sampled from q.

    It is (log q - log p)(x) · (1_x - q) at the sampled token x: a policy gradient with advantage log p - log q, which is held fixed.
    """
    ids = targets[part].to(log_q.device)[:, None]
    cost = log_q.gather(-1, ids) - log_p.gather(-1, ids)
    gradient = log_q.exp().mul_(-cost).scatter_add_(-1, ids, cost)
    return reverse_kl_and_gradient(log_p, log_q)[0], gradient


@dataclass(frozen=True, eq=False)
class Distilling:
    """A channel, as the loop sees it; see `Objective`.

    Attributes:
        gradient: Of the channel.
        rows: Given sequences, or with rollouts prompts.
        recipe: The numbers.
        rollouts: How the student answers; `None` where sequences are given.
        evaluation: Given sequences on which student and teacher are compared along the way.
        change: How far the student is from where it started.
    """

    gradient: ChannelGradient
    rows: Sequence[Row]
    recipe: Recipe
    rollouts: Rollouts | None
    evaluation: Sequence[Row]
    change: Callable[[], float]

    @property
    def mounted(self) -> Mounted:
        """What moves."""
        return self.gradient.mounted

    def update(self, step: int) -> dict[str, float]:
        """Loss per response token, response tokens and sequences of this update, and what its answers were like."""
        rows = batch_of(self.rows, self.recipe.batch, step, self.recipe.seed)
        shown: dict[str, float] = {}
        if self.rollouts is not None:
            rows, shown = self.rollouts.of(self.mounted.tuned, rows, step)
        loss = self.gradient.of(rows)
        return {"loss": loss, "tokens": float(sum(len(row.predicted) for row in rows)), "sequences": float(len(rows)), **shown}

    def watched(self, entry: Mapping[str, float]) -> float:
        """The loss."""
        return entry["loss"]

    def standing(self, evaluate: bool) -> dict[str, float]:
        """Norm of the change; and on the evaluation's sequences loss and both KLs to the teacher, per token."""
        found = {"change_norm": self.change()}
        if not evaluate or not self.evaluation:
            return found
        student, head, teacher = self.mounted.tuned, self.mounted.head, self.gradient.teacher
        apart = divergences_beside(student, head, teacher, self.evaluation, self.gradient.temperature)
        loss = response_loss(student, self.evaluation).mean
        return found | {"eval_loss": loss, "eval_forward_kl": apart.forward.mean, "eval_reverse_kl": apart.reverse.mean}


def change_of(mounted: Mounted, method: Method, base: Checkpoint) -> Callable[[], float]:
    """Gives the norm of what is mounted, as `Solution.norm`; of a full fine-tune, the norm of all weights' changes together."""
    if isinstance(method, Vector):
        return lambda: float(mounted.parameters["vector"].detach().double().norm())
    if isinstance(method, Full):
        with mounted.base() as frozen:
            before = dict(frozen.named_parameters())
        moved = mounted.parameters
        return lambda: float(sum((p.detach().double() - before[n].double()).square().sum() for n, p in moved.items())) ** 0.5
    config = plain_config(mounted.tuned.model.peft_config["default"], base.name)

    def norm() -> float:
        with torch.no_grad():
            return LoRASolution(mounted.parameters, config).norm

    return norm
