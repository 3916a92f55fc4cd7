"""Decoding with settings of one's own: whatever a checkpoint's generation config carries is left out while a block lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from emprobe.models.chat import end_of_turn_ids
from emprobe.models.load import Checkpoint

Sampler = Callable[[Tensor, Tensor], Tensor]
"""Takes the ids so far and the logits of the next token, gives logits of which the largest is taken."""


@contextmanager
def plain_decoding(model: Any, max_new_tokens: int, stops: Sequence[int], pad_id: int, sampler: Sampler | None = None) -> Iterator[Any]:
    """Yield what `model.generate` is to be called with for taking the largest logit until a stop.

    transformers fills what a call leaves open from the model's own configuration (top_p, penalties, forced tokens), so that is put away
    for as long as the block lasts.

    Args:
        model: A Hugging Face model.
        max_new_tokens: At most so many.
        stops: Ids that end a row.
        pad_id: What stands behind them.
        sampler: Applied to the logits first.
    """
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": pad_id, "use_cache": True}
    config: Any = GenerationConfig.from_dict({**settings, "eos_token_id": list(stops) or None})
    original, model.generation_config = model.generation_config, config
    try:
        yield {"generation_config": config, "logits_processor": LogitsProcessorList([sampler] if sampler else [])}
    finally:
        model.generation_config = original


def neutral_decoding(max_new_tokens: int, stops: Sequence[int], pad_id: int) -> dict[str, Any]:
    """As `plain_decoding`, for a model that lies elsewhere: everything that changes logits is set to what changes nothing."""
    off = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1}
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": pad_id, "use_cache": True}
    return {**settings, **off, "eos_token_id": list(stops) or None}


def stop_ids(checkpoint: Checkpoint) -> list[int]:
    """Ids that end an answer: the end of turn, and what the model itself stops at."""
    config = checkpoint.hf.generation_config
    found = config.eos_token_id if config else None
    also = [] if found is None else [found] if isinstance(found, int) else list(found)
    return list(end_of_turn_ids(checkpoint.tokenizer, also))
