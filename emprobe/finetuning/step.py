"""One update's gradient: the answers' loss, and the KL to the base on other-domain data, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emprobe.directions import Direction
from emprobe.errors import EmprobeError
from emprobe.finetuning.losses import cross_entropies, divergences, hidden_at_targets
from emprobe.finetuning.mounting import Mounted
from emprobe.finetuning.rows import Batch, Row, pad_id_of
from emprobe.finetuning.sharing import recorded, skipped
from emprobe.interventions import Plan, intervene
from emprobe.interventions.edit import Place
from emprobe.interventions.places import Hooked
from emprobe.models.load import Checkpoint
from emprobe.models.sites import taps_of


@dataclass(frozen=True, eq=False)
class During:
    """What is done to the model while it learns from answers, and not afterwards.

    Attributes:
        plan: Operators that act forward and backward: ablation (concept-ablation fine-tuning), or addition (preventative steering).
        anchored: Directions along which the model is held at the base: h' = h - ((h - h_base) · v) v at each one's place.

    Source:
        Concept-ablation fine-tuning: arXiv 2507.16795. Preventative steering: arXiv 2507.21509.
    """

    plan: Plan | None = None
    anchored: tuple[Direction, ...] = ()


@dataclass(frozen=True, eq=False)
class Gradient:
    """Leaves gradients in what is mounted.

    Attributes:
        micro: Conversations per forward pass.
        kl_weight: λ; 0 without an anchor.
    """

    mounted: Mounted
    during: During
    micro: int
    kl_weight: float

    def of(self, rows: Sequence[Row], anchor: Sequence[Row]) -> tuple[float, float]:
        """Add the gradient of one update and return the loss per response token and the KL per token (0 without an anchor), in nats.

        Raises:
            EmprobeError: If a KL is negative.
        """
        with self.mounted.tuned.active() as model:
            loss = sum(self._answers(model, batch, tokens) for batch, tokens in self._batches(rows))
            kl = sum(self._anchor(model, batch, tokens) for batch, tokens in self._batches(anchor))
        return loss, kl

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[Batch, int]]:
        yield from micro_batches(self.mounted.tuned, rows, self.micro)

    def _answers(self, model: Any, batch: Batch, tokens: int) -> float:
        with ExitStack() as stack:
            if self.during.anchored:
                stack.enter_context(self._held(batch))
            if self.during.plan is not None:
                receipt = stack.enter_context(intervene(self.mounted.tuned, self.during.plan))
                receipt.prompt_lengths = batch.prompt_lengths
            losses = cross_entropies(hidden_at_targets(model, batch), batch.targets, self.mounted.head, 1 / tokens)
        return float(losses.double().sum()) / tokens

    def _anchor(self, model: Any, batch: Batch, tokens: int) -> float:
        shared = self.mounted.tuned.blocks[: self.mounted.lowest]
        with torch.no_grad(), self.mounted.base() as base_model, recorded(shared[-1] if len(shared) else None) as below:
            base = hidden_at_targets(base_model, batch)
        with skipped(shared, below):
            hidden = hidden_at_targets(model, batch)
        kl = divergences(hidden, base, self.mounted.head, self.mounted.base_head, self.kl_weight / tokens)
        return float(kl.double().sum()) / tokens

    @contextmanager
    def _held(self, batch: Batch) -> Iterator[None]:
        """Hold the model at the base along some directions, on this batch."""
        tuned = self.mounted.tuned
        seen: dict[Place, Tensor] = {}
        places: dict[Place, list[Tensor]] = {}
        for direction in self.during.anchored:
            places.setdefault((direction.layer, direction.site), []).append(direction.vector)
        with torch.no_grad(), self.mounted.base() as model, ExitStack() as stack:
            if model is not tuned.hf:
                raise EmprobeError("A full fine-tune cannot be held at its base along a direction. Train a LoRA or a vector.")
            for layer, site in places:
                tap = taps_of(model, site, [layer])[0]
                stack.callback(tap.listen(partial(seen.__setitem__, (layer, site))).remove)
            hidden_at_targets(model, batch)
        with ExitStack() as stack:
            hooked = Hooked(tuned, stack, [session.hooked for session in tuned.interventions])
            for place, vectors in places.items():
                hooked.write(place, _Holding(seen[place], torch.stack(vectors)))
            yield


def micro_batches(checkpoint: Checkpoint, rows: Sequence[Row], size: int) -> Iterator[tuple[Batch, int]]:
    """Micro-batches of similar lengths, each with the number of tokens that count in the whole update."""
    tokens = sum(len(row.predicted) for row in rows)
    ordered = sorted(rows, key=lambda row: -len(row.ids))
    for start in range(0, len(rows), size):
        yield Batch.of(ordered[start : start + size], pad_id_of(checkpoint.tokenizer), checkpoint.device), tokens


class _Holding:
    """h' = h - ((h - h_base) Bᵀ) B, with B orthonormal rows that span the directions."""

    def __init__(self, base: Tensor, vectors: Tensor) -> None:
        self.base = base
        self.basis = torch.linalg.qr(vectors.double().T)[0].T.to(base.device, base.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        held: Tensor = hidden - ((hidden - self.base) @ self.basis.T) @ self.basis
        return held
