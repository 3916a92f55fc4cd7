"""Continuous batching (`generate_batch`): which request each packed token belongs to, and where its prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from emprobe.errors import EmprobeError


@dataclass(frozen=True)
class Packed:
    """What the tokens of one packed forward pass are; copies, for the runtime writes the next pass into the same memory.

    Attributes:
        index: Number of each token in its own text.
        lengths: Real tokens of the prompt that each token belongs to.
        rows: Number of its request.
        ids: Token ids.
        fresh: Whether these are the first tokens of the batch.
    """

    index: Int[Tensor, "1 pos"]
    lengths: Int[Tensor, "1 pos"]
    rows: Int[Tensor, " pos"]
    ids: Int[Tensor, "1 pos"]
    fresh: bool


@dataclass
class ContinuousBatch:
    """A continuous batch that began inside the block.

    Attributes:
        manager: What transformers runs it by.
        numbers: Prompts by their request's id, in the order in which they were first seen.
    """

    manager: Any
    numbers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, manager: Any, known: Sequence[ContinuousBatch | None]) -> ContinuousBatch:
        """Take over a batch before its first forward pass.

        CUDA graphs are switched off, since a replayed graph runs no hook. So is the sharing of cached openings between requests: one token
        may be steered in one text and not in another, and a manager that is kept would hand steered openings to unsteered requests. Neither
        changes a token.

        Raises:
            EmprobeError: If it cannot be steered exactly.
        """
        again = next((batch for batch in known if batch is not None and batch.manager is manager), None)
        if again is not None and all(batch is again for batch in known):
            return again
        if manager.batch_processor is not None:
            raise EmprobeError(
                "This continuous batch was kept from before the intervene block, with cached texts that were not steered as asked here. "
                "Call model.destroy_cached_continuous_batching_manager() first."
            )
        settings = manager.continuous_batching_config
        if settings.varlen_compile_config is not None or settings.decode_compile_config is not None:
            if manager._original_attn_impl is not None:  # The manager has put another attention in and would leave it there.
                manager.model.set_attn_implementation(manager._original_attn_impl)
            raise EmprobeError("Compiled continuous batching runs no hooks, so nothing would be steered. Leave out its compile settings.")
        settings.use_cuda_graph = (False, False)
        settings.allow_block_sharing = False
        return cls(manager)

    def packed(self, ids: Tensor, position_ids: Tensor) -> Packed:
        """What the tokens of the forward pass under way are."""
        io = self.manager.batch_processor.inputs_and_outputs
        if hasattr(io, "io_pairs"):
            io = io.io_pairs[io.current_pair].host_io
        requests, fresh = io.requests_in_batch, not self.numbers
        # A request that was evicted starts again with its answer so far as part of its prompt, and remembers where that began.
        lengths = [r.state._true_initial_tokens or len(r.state.initial_tokens) for r in requests]
        # Answers that fork from one prompt share its cache, and so its row.
        names = [r.state.request_id.partition("__child#")[0] for r in requests]
        rows = [self.numbers.setdefault(name, len(self.numbers)) for name in names]
        repeats = torch.tensor([r.query_length for r in requests])
        if int(repeats.sum()) != ids.shape[1]:
            raise EmprobeError(
                f"Continuous batching packed {ids.shape[1]} tokens, but its requests account for {int(repeats.sum())}. Use generate."
            )
        spread = (torch.tensor(numbers).repeat_interleave(repeats).to(ids.device) for numbers in (lengths, rows))
        length, row = spread
        return Packed(position_ids.clone().long(), length[None], row, ids.clone(), fresh)


def packed_of(kwargs: Any, batch: ContinuousBatch | None) -> Packed | None:
    """What continuous batching packed into this forward pass; `None` for any other forward pass.

    Raises:
        EmprobeError: If the batch began outside the block.
    """
    if "cu_seq_lens_q" not in kwargs or "write_index" not in kwargs:
        return None
    if batch is None or batch.manager.batch_processor is None or batch.manager.batch_processor.cache is not kwargs.get("cache"):
        raise EmprobeError(
            "This continuous batch began outside the intervene block, which does not know its requests, and what it has cached was not "
            "steered. Call generate_batch (or init_continuous_batching) inside the block."
        )
    return batch.packed(kwargs["input_ids"], kwargs["position_ids"])
