"""What every runtime does alike: requests checked, answers cut at the first stop, and a receipt that cannot be silent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.interventions.apply import special_ids
from emprobe.interventions.edit import Edit
from emprobe.interventions.plan import Plan
from emprobe.interventions.receipt import Receipt
from emprobe.interventions.tokens import Prompts
from emprobe.models.decoding import Sampler
from emprobe.models.load import Checkpoint


class Runtime(ABC):
    """Runs a model with a plan, by means of its own.

    Attributes:
        receipt: What the last call did; `None` before the first.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self.checkpoint, self.plan = checkpoint, plan
        self.edits: list[Edit] = plan.compiled(checkpoint)
        self.receipt: Receipt | None = None

    def logits(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        prompt_lengths: Int[Tensor, " batch"] | Sequence[int] | None = None,
    ) -> Float[Tensor, "batch pos vocab"]:
        """One forward pass, without gradient.

        Args:
            ids: Token ids, (batch, pos).
            mask: As large; 1 on real tokens, 0 on padding, on either side; `None`: all are real.
            prompt_lengths: Real tokens of each row's prompt, where the plan tells prompt from answer.

        Raises:
            EmprobeError: ids and mask of different shapes, or a plan that needs prompt_lengths.
            InterventionDidNotFire: If something asked for did not happen.
        """
        ids, mask = self._given(ids, mask)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        with torch.no_grad():
            found, self.receipt = self._logits(given, Prompts(lengths=prompt_lengths))
        self.receipt.check()
        return found

    def generate(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        stops: Sequence[int] = (),
        sampler: Sampler | None = None,
    ) -> Int[Tensor, "batch new"]:
        """New token ids of each row, the largest logit at every step.

        Args:
            ids: The prompts, (batch, pos).
            mask: As large; 1 on real tokens, 0 on padding, which stands on the left; `None`: all are real.
            max_new_tokens: At most so many.
            stops: Ids that end a row; behind the first of them stands the tokenizer's padding id (or the first stop's).
            sampler: Applied to the logits first; the behaviour package's sampler by inverse CDF makes this sampling.

        Raises:
            EmprobeError: ids and mask of different shapes, padding on the right, or a length below 1.
            InterventionDidNotFire: If something asked for did not happen.
        """
        ids, mask = self._given(ids, mask)
        if max_new_tokens < 1:
            raise EmprobeError(f"generate was asked for max_new_tokens={max_new_tokens}. It must be at least 1.")
        if not bool(mask[:, -1].all()):
            raise EmprobeError("generate was given prompts with padding at their end, where answers begin. Pad on the left.")
        pad = self.checkpoint.tokenizer.pad_token_id
        pad_id = int(pad) if pad is not None else (stops[0] if stops else 0)
        given = {"input_ids": ids, "attention_mask": mask}
        decoding = {"max_new_tokens": max_new_tokens, "stops": tuple(stops), "pad_id": pad_id, "sampler": sampler}
        with torch.no_grad():
            whole, self.receipt = self._generate(given, Prompts(width=ids.shape[1]), decoding)
        self.receipt.check()
        return whole[:, ids.shape[1] :]

    @abstractmethod
    def _logits(self, given: dict[str, Any], prompts: Prompts) -> tuple[Tensor, Receipt]: ...

    @abstractmethod
    def _generate(self, given: dict[str, Any], prompts: Prompts, decoding: dict[str, Any]) -> tuple[Tensor, Receipt]:
        """Ids of prompts and answers."""

    def _given(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
            given = "no mask" if mask is None else f"a mask of shape {tuple(mask.shape)}"
            raise EmprobeError(f"A runtime was given ids of shape {tuple(ids.shape)} and {given}. Give both as [batch, pos].")
        real = torch.ones_like(ids) if mask is None else mask.long()
        return ids.to(self.checkpoint.device), real.to(self.checkpoint.device)

    @property
    def _special_ids(self) -> tuple[int, ...]:
        return special_ids(self.checkpoint.tokenizer)
