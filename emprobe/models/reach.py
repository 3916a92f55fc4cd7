"""What a token of a row depends on beyond the tokens before it: later ones, or how long the row is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from emprobe.models.blocks import blocks_of, decoder_of, probe_ids
from emprobe.models.proof import HALF_TOLERANCE, TOLERANCES, unhooked

MOST_OFFSET = 8
"""By how many rows a table of positions may be longer than there are positions (OPT's has two more)."""

_sees_later: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def sees_later_tokens(model: Any) -> bool:
    """Whether a token's hidden state depends on tokens after it: then padding on the right changes it.

    Found on the model itself, by changing the last of a few tokens in one small forward pass; paid for once per model.
    """
    if model not in _sees_later:
        ids = probe_ids(model).repeat(2, 1)
        ids[1, -1] = ids[1, 0]
        decoder = decoder_of(model)
        with unhooked(decoder), torch.no_grad():
            one, other = decoder(input_ids=ids, use_cache=False)[0][:, :-1]
        off = (one.double() - other.double()).norm() / one.double().norm()
        _sees_later[model] = bool(off > TOLERANCES.get(one.dtype, HALF_TOLERANCE))
    return _sees_later[model]


@dataclass(frozen=True)
class Lengths:
    """How many tokens a row may have.

    Attributes:
        longest: The most tokens that a row can have, or None; `why` says what sets the limit.
        switch: Rows of more tokens are computed with other position frequencies from their first token on (longrope), so they must not
            share a batch or an opening with shorter ones; None where all rows are computed alike.
    """

    longest: int | None = None
    why: str = ""
    switch: int | None = None


def lengths_of(model: Any) -> Lengths:
    """What the model's positions allow."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    ropes = list(_ropes(config))
    if most is not None and any(0 <= n - most <= MOST_OFFSET for n in _tables(model)):
        return Lengths(most, "it has learned vectors for no more positions")
    if most is not None and any(rope["rope_type"] == "dynamic" for rope in ropes):
        return Lengths(most, "beyond them its dynamic RoPE depends on the longest row that was run before")
    switches = [rope["original_max_position_embeddings"] for rope in ropes if rope["rope_type"] == "longrope"]
    return Lengths(switch=min(switches, default=None))


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of rotary positions: one for all layers, or one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    yield from (rope for rope in (given, *given.values()) if isinstance(rope, dict) and "rope_type" in rope)


def _tables(model: Any) -> list[int]:
    """Sizes of the embeddings outside the blocks that are not the tokens'."""
    inside = {id(module) for module in blocks_of(model).modules()} | {id(model.get_input_embeddings())}
    return [m.num_embeddings for m in decoder_of(model).modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
