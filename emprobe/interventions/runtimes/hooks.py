"""The runtime `hooks`: `intervene` round the model's own forward and generate; what the others are held against."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emprobe.interventions.apply import intervene
from emprobe.interventions.receipt import Receipt
from emprobe.interventions.runtimes.base import Runtime
from emprobe.interventions.tokens import Prompts
from emprobe.models.decoding import plain_decoding


class Hooks(Runtime):
    """See `Runtime`."""

    def _logits(self, given: dict[str, Any], prompts: Prompts) -> tuple[Tensor, Receipt]:
        with intervene(self.checkpoint, self.plan) as receipt:
            receipt.prompt_lengths = prompts.lengths
            return self.checkpoint.hf(**given).logits, receipt

    def _generate(self, given: dict[str, Any], prompts: Prompts, decoding: dict[str, Any]) -> tuple[Tensor, Receipt]:
        model = self.checkpoint.hf
        with intervene(self.checkpoint, self.plan) as receipt, plain_decoding(model, **decoding) as settings:
            return model.generate(**given, **settings), receipt
