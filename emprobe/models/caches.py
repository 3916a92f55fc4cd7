"""Keys and values that several rows share: kept once and lent to every row of a batch, or spread to rows that go on from them."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from transformers import DynamicCache, GenerationMixin
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


def steppable(checkpoint: Checkpoint) -> bool:
    """Whether a model can be stepped from here: it keeps keys and values only, and prepares its inputs as most models do."""
    model = type(checkpoint.hf)
    usual = getattr(model, "prepare_inputs_for_generation", None) is GenerationMixin.prepare_inputs_for_generation
    return usual and empty_cache(checkpoint) is not None


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


def spread_cache(cache: Any, rows: Any, room: int) -> Any:
    """The keys and values of a filled cache for other rows: row i of the new one is row `rows[i]` of the old, with room for more tokens.

    Args:
        cache: Of `empty_cache`, filled.
        rows: Which rows are taken, in order, any number of times.
        room: Tokens that are still to come.
    """
    spread = copy.copy(cache)
    spread.layers = [_taken(layer, rows, room) for layer in cache.layers]
    return spread


def _taken(layer: Any, rows: Any, room: int) -> Any:
    if isinstance(layer, RoomyLayer):
        return layer.taken(rows)
    if type(layer) is DynamicLayer and layer.is_initialized:
        return RoomyLayer.of(layer, rows, room)
    taken = copy.copy(layer)
    taken.batch_select_indices(rows)
    return taken


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values with room for what is to come: a step writes one column, where a layer that grows copies all it has."""

    @classmethod
    def of(cls, layer: Any, rows: Any, room: int) -> RoomyLayer:
        """Rows of another layer, and room for so many tokens more."""
        made = cls()
        made.dtype, made.device, made.is_initialized = layer.dtype, layer.device, True
        made._take(layer.keys, layer.values, rows, layer.keys.shape[-2] + room)
        return made

    def taken(self, rows: Any) -> RoomyLayer:
        """Some of the rows."""
        made = copy.copy(self)
        made._take(self.keys, self.values, rows, self._keys.shape[-2])
        return made

    def _take(self, keys: Any, values: Any, rows: Any, room: int) -> None:
        length = keys.shape[-2]
        rows = rows.to(keys.device)
        self._keys, self._values = (kept.new_empty(len(rows), kept.shape[1], room, kept.shape[3]) for kept in (keys, values))
        for whole, kept in ((self._keys, keys), (self._values, values)):
            whole[:, :, :length] = kept[rows]
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """See `DynamicLayer`."""
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        self._keys[:, :, start:stop] = key_states
        self._values[:, :, start:stop] = value_states
        self.keys, self.values = self._keys[:, :, :stop], self._values[:, :, :stop]
        return self.keys, self.values
