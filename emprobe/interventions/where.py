"""Which tokens an intervention touches, named by what they are and never by prefill or decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from emprobe.errors import EmprobeError


@dataclass(frozen=True)
class Where:
    """All tokens but padding, unless narrowed.

    `prompt=False` (generation only) leaves the last prompt token as it was, and with it the first new token: its logits
    are computed there.

    Args:
        prompt: Tokens of the prompt, the template's among them.
        generation: Tokens of the answer.
        first_token: Position 0, an attention sink in many models.

    Raises:
        EmprobeError: If it names no tokens at all.
    """

    prompt: bool = True
    generation: bool = True
    first_token: bool = True

    def __post_init__(self) -> None:
        if not (self.prompt or self.generation):
            raise EmprobeError("Where(prompt=False, generation=False) names no tokens. Leave one of them on.")

    @property
    def needs_prompt_lengths(self) -> bool:
        """Whether it has to be known where each prompt ends."""
        return not (self.prompt and self.generation)

    def mask(self, tokens: Tokens) -> Bool[Tensor, "batch pos"]:
        """Which positions of one forward pass it names."""
        chosen = tokens.real.clone()
        if not self.first_token:
            chosen &= tokens.index > 0
        if self.needs_prompt_lengths:
            if tokens.generated is None:
                raise EmprobeError(
                    "This intervention names prompt or generated tokens only, but nobody said where each prompt ends. Generate with "
                    "emprobe.generate, or set receipt.prompt_lengths to one length per row before the forward pass."
                )
            chosen &= tokens.generated if self.generation else ~tokens.generated
        return chosen


@dataclass(frozen=True)
class Tokens:
    """What the tokens of one forward pass are.

    Attributes:
        real: False on padding.
        index: Number of the token among its row's real tokens, from 0, whatever the padding or the cache.
        generated: True from the first token of the answer on; `None` where prompt lengths are not known.
    """

    real: Bool[Tensor, "batch pos"]
    index: Int[Tensor, "batch pos"]
    generated: Bool[Tensor, "batch pos"] | None

    def to(self, device: torch.device) -> Tokens:
        """The same on another device (a model may be spread over several)."""
        generated = None if self.generated is None else self.generated.to(device)
        return Tokens(self.real.to(device), self.index.to(device), generated)

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        seen: int,
        prompt_lengths: Int[Tensor, " batch"] | None,
        device: torch.device,
    ) -> Tokens:
        """Work out what each position is, from the mask over everything seen so far.

        Args:
            shape: (batch, pos) of this forward pass.
            attention_mask: (batch, seen + pos), 1 on real tokens; `None` means all are.
            seen: Positions already in the KV cache.
            prompt_lengths: Real tokens of each row's prompt, if known.
            device: Where the hidden states are.
        """
        batch, width = shape
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= seen + width:
            whole = attention_mask.to(device).bool()
            if whole.shape[0] != batch:
                whole = whole.expand(batch, -1)
            index = (whole.long().cumsum(dim=1) - 1)[:, seen : seen + width]
            real = whole[:, seen : seen + width]
        else:
            real = torch.ones(batch, width, dtype=torch.bool, device=device)
            index = torch.arange(seen, seen + width, device=device).expand(batch, width)
        if prompt_lengths is None:
            return cls(real, index, None)
        if len(prompt_lengths) != batch:
            raise EmprobeError(
                f"prompt_lengths has {len(prompt_lengths)} entries, but the forward pass has {batch} rows. Give one per row."
            )
        return cls(real, index, index >= prompt_lengths.to(device)[:, None])
