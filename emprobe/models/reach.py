"""What a token of a row depends on beyond the tokens before it: later ones, or how long the row is."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from emprobe.errors import EmprobeError
from emprobe.models.blocks import blocks_of, decoder_of, probe_ids
from emprobe.models.proof import HALF_TOLERANCE, TOLERANCES, unhooked

logger = logging.getLogger(__name__)

MOST_OFFSET = 8
"""By how many rows a table of positions may be longer than there are positions (OPT's has two more)."""

_changed: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def changed_by_padding(model: Any, side: Literal["right", "left"]) -> bool:
    """Whether padding on that side changes what a real token holds; paid for once per model and side.

    On the right it does where a token sees later ones (bidirectional attention), since no mask is given there; on the left where
    something but attention carries earlier tokens on, which no mask stops (recurrent layers). Found on the model itself, by a small
    forward pass.
    """
    known = _changed.setdefault(model, {})
    if side not in known:
        decoder = decoder_of(model)
        with unhooked(decoder), torch.no_grad():
            one, other = (_padded_right if side == "right" else _padded_left)(decoder, probe_ids(model))
        off = (one.double() - other.double()).norm() / one.double().norm()
        known[side] = bool(off > TOLERANCES.get(one.dtype, HALF_TOLERANCE))
    return known[side]


def _padded_right(decoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same tokens before two different last ones."""
    both = ids.repeat(2, 1)
    both[1, -1] = ids[0, 0]
    one, other = decoder(input_ids=both, use_cache=False)[0][:, :-1]
    return one, other


def _padded_left(decoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens alone, and behind two that are masked."""
    padded = torch.cat([ids[:, -2:], ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    left = decoder(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    return decoder(input_ids=ids, use_cache=False)[0], left[:, 2:]


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


def most_tokens(model: Any) -> tuple[int | None, str]:
    """The most tokens of a row that is answered or scored, and why; None where nothing says so.

    Where the weights set no limit it is what the configuration says: beyond it a model was never trained, and its answers and
    probabilities are no longer its own. Servers refuse such rows, too.
    """
    lengths = lengths_of(model)
    if lengths.longest is not None:
        return lengths.longest, lengths.why
    return getattr(model.config.get_text_config(), "max_position_embeddings", None), "its configuration says that it was made for no more"


def check_room(checkpoint: Any, question: str, tokens: int, more: int) -> None:
    """Refuse a prompt that leaves no room for an answer; where positions are learned, for the whole answer that it may get.

    Elsewhere most answers end long before their limit, so that is told and not refused.

    Args:
        checkpoint: Who answers.
        question: Id of the question.
        tokens: Of its prompt.
        more: Tokens that the answer may have.

    Raises:
        EmprobeError: Names the question and the model's limit.
    """
    most, why = most_tokens(checkpoint.hf)
    if most is None or tokens + more <= most:
        return
    words = (
        f"Question {question!r} has {tokens} tokens and its answer may have {more}, and {checkpoint.name!r} takes {most} in "
        f"all: {why}. Shorten it, or give fewer max_new_tokens."
    )
    if tokens >= most or lengths_of(checkpoint.hf).longest is not None:
        raise EmprobeError(words)
    logger.warning("%s", words)


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of rotary positions: one for all layers, or one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    yield from (rope for rope in (given, *given.values()) if isinstance(rope, dict) and "rope_type" in rope)


def _tables(model: Any) -> list[int]:
    """Sizes of the embeddings outside the blocks that are not the tokens'."""
    inside = {id(module) for module in blocks_of(model).modules()} | {id(model.get_input_embeddings())}
    return [m.num_embeddings for m in decoder_of(model).modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
