"""What the tokens of one forward pass are: padding or real, which number, of the prompt or of the answer, special or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from emprobe.errors import EmprobeError


@dataclass
class Prompts:
    """Where the prompts of the batch under way end, as far as somebody said.

    Attributes:
        width: Columns of the prompt, padding included, while the model's own `generate` runs.
        lengths: Real tokens of each row's prompt, for plain forward passes.
    """

    width: int | None = None
    lengths: Int[Tensor, " batch"] | Sequence[int] | None = None


@dataclass(frozen=True)
class Tokens:
    """What the tokens of one forward pass are; made once per pass and read by every hook.

    Attributes:
        real: False on padding.
        index: Number of the token among its row's real tokens, from 0, whatever the padding or the cache.
        prompt_lengths: Real tokens of each row's prompt (width 1), or of the prompt that each token of a packed batch belongs to (width
            pos); `None` where nobody said.
        ids: Token ids; `None` where embeddings were given.
        special_ids: Ids that count as special.
        fresh: Whether nothing came before in a KV cache, so that a batch begins here.
    """

    real: Bool[Tensor, "batch pos"]
    index: Int[Tensor, "batch pos"]
    prompt_lengths: Int[Tensor, "batch width"] | None = None
    ids: Int[Tensor, "batch pos"] | None = None
    special_ids: Sequence[int] = ()
    fresh: bool = True
    _named: dict[Any, Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def generated(self) -> Bool[Tensor, "batch pos"] | None:
        """True from the first token of the answer on; `None` where it is not known where prompts end."""
        return None if self.prompt_lengths is None else self.index >= self.prompt_lengths

    @property
    def special(self) -> Bool[Tensor, "batch pos"]:
        """Which tokens are special.

        Raises:
            EmprobeError: If the pass was given embeddings, so that nobody knows.
        """
        if self.ids is None:
            raise EmprobeError(
                "This intervention leaves out special tokens, but the model was called with embeddings, so which tokens are special is "
                "unknown. Call it with input_ids."
            )
        return torch.isin(self.ids, torch.tensor(list(self.special_ids), device=self.ids.device, dtype=self.ids.dtype))

    def named(self, where: Any, device: torch.device) -> Bool[Tensor, "batch pos"] | None:
        """The positions that a `Where` names, on a device, worked out once per pass; `None` where it names every one.

        Whether it names every one is only asked on a CPU: on an accelerator the answer would have to be waited for.
        """
        key = (where, device)
        if key not in self._named:
            mask = where.mask(self)
            everything = mask.device.type == "cpu" and bool(mask.all())
            self._named[key] = None if everything else mask.to(device)
        return self._named[key]

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], prompts: Prompts, special_ids: Sequence[int] = ()) -> Tokens:
        """Work out what each token is, from what the decoder was called with.

        Args:
            kwargs: `input_ids` or `inputs_embeds`; perhaps `attention_mask` (batch, seen + pos), `position_ids`, `past_key_values`.
            prompts: Where the prompts end.
            special_ids: Ids that count as special.
        """
        ids = kwargs.get("input_ids")
        given = ids if ids is not None else kwargs["inputs_embeds"]
        batch, width = given.shape[:2]
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        real, index, whole = _laid_out((batch, width), seen, kwargs.get("attention_mask"), kwargs.get("position_ids"), given.device)
        lengths = _lengths(prompts, whole, index, seen)
        return cls(real, index, lengths, ids, special_ids, fresh=seen == 0)


def _laid_out(
    shape: tuple[int, int], seen: int, mask: Any, position_ids: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which tokens are real, their numbers, and the mask over everything seen so far, where there is one."""
    batch, width = shape
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= seen + width:
        whole = mask.to(device).bool().expand(batch, -1)
        index = (whole.long().cumsum(dim=1) - 1)[:, seen : seen + width]
        return whole[:, seen : seen + width], index, whole
    if position_ids is not None:
        index = position_ids.to(device).expand(batch, width)
    else:
        index = torch.arange(seen, seen + width, device=device).expand(batch, width)
    return _attended(mask, shape, seen, device), index, None


def _attended(mask: Any, shape: tuple[int, int], seen: int, device: torch.device) -> Tensor:
    """Real tokens under a mask that is prepared already (static caches): those that may look at themselves."""
    ready = next((m for m in mask.values() if isinstance(m, Tensor)), None) if isinstance(mask, Mapping) else mask
    everything = torch.ones(shape, dtype=torch.bool, device=device)
    if not isinstance(ready, Tensor) or ready.ndim != 4 or ready.shape[-1] < seen + shape[1]:
        return everything
    own = ready[:, 0].diagonal(offset=seen, dim1=-2, dim2=-1)[..., : shape[1]].to(device)
    return (own if own.dtype == torch.bool else own == 0).expand(shape)


def _lengths(prompts: Prompts, whole: Tensor | None, index: Tensor, seen: int) -> Tensor | None:
    """Real tokens of each row's prompt, as a column."""
    if prompts.width is not None:
        # Inside generate every row's prompt ends at one column; what stands left of it is padding or prompt.
        if whole is not None:
            return whole[:, : prompts.width].sum(dim=1, keepdim=True)
        padding = seen + index.shape[1] - 1 - index[:, -1:]
        return prompts.width - padding
    if prompts.lengths is None:
        return None
    lengths = torch.as_tensor(prompts.lengths, device=index.device)
    if lengths.ndim != 1 or len(lengths) != len(index):
        raise EmprobeError(f"prompt_lengths has {lengths.numel()} entries, but the forward pass has {len(index)} rows. Give one per row.")
    return lengths[:, None]
