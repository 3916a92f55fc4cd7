"""Keys and values of a shared opening: kept once, and lent to every row of a batch."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from emprobe.models.blocks import decoder_of
from emprobe.models.load import Checkpoint


def empty_cache(checkpoint: Checkpoint) -> Any | None:
    """A cache for this model, or None if it keeps other state than keys and values (recurrent layers)."""
    if "past_key_values" not in inspect.signature(decoder_of(checkpoint.hf).forward).parameters:
        return None
    cache = DynamicCache(config=checkpoint.hf.config.get_text_config(decoder=True))
    # Not isinstance: a layer that keeps a recurrent state beside its keys is a DynamicLayer too.
    return cache if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers) else None


def lent_cache(cache: Any, rows: int) -> Any:
    """The same keys and values for every row of a batch, as views: a cache grows by concatenation and never writes into them.

    What a block adds is seen by that block and not kept, since nothing comes after the batch: the opening's keys, copied for every row,
    are in memory for one block at a time.
    """
    lent = copy.copy(cache)
    lent.layers = [_lent_layer(layer, rows) for layer in cache.layers]
    return lent


def _lent_layer(layer: Any, rows: int) -> Any:
    wide = copy.copy(layer)
    if layer.is_initialized:
        wide.keys, wide.values = (kept.expand(rows, -1, -1, -1) for kept in (layer.keys, layer.values))
    lent = copy.copy(wide)
    lent.update = lambda *args, **kwargs: copy.copy(wide).update(*args, **kwargs)
    return lent
