"""Keys and values of a shared opening: kept once, and lent to every row of a batch."""

from __future__ import annotations

import copy
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from emprobe.models.load import Checkpoint


def empty_cache(checkpoint: Checkpoint) -> Any | None:
    """A cache for this model, or None if it keeps other state than keys and values (recurrent layers)."""
    cache = DynamicCache(config=checkpoint.hf.config.get_text_config(decoder=True))
    return cache if all(isinstance(layer, DynamicLayer) for layer in cache.layers) else None


def lent_cache(cache: Any, rows: int) -> Any:
    """The same keys and values for every row of a batch, as views: a cache grows by concatenation and never writes into them."""
    lent = copy.copy(cache)
    lent.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in lent.layers:
        if layer.is_initialized:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
    return lent
