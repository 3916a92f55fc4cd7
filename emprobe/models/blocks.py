"""The decoder blocks of a model, found and counted, and the hidden states that go in and out of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from emprobe.errors import EmprobeError

BLOCK_NAMES = ("layers", "h", "blocks", "block")
PROBE_TOKENS = 8


def decoder_of(model: Any) -> nn.Module:
    """The inner model that holds the blocks and no language-model head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    found = decoder if isinstance(decoder, nn.Module) else getattr(model, model.base_model_prefix, model)
    assert isinstance(found, nn.Module)
    return found


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a model, in order; as many as its config says.

    Raises:
        EmprobeError: If the model is an encoder-decoder, or no list of that many blocks is found; names what was looked for.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise EmprobeError(
            f"{type(model).__name__} is an encoder-decoder: its decoder's residual stream also reads the encoder's, and a prompt has "
            "no place of its own in it. Give a decoder-only language model."
        )
    decoder = decoder_of(model)
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name in BLOCK_NAMES:
        blocks = getattr(decoder, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks) == wanted:
            return blocks
    lists = [f"{name} ({len(child)})" for name, child in decoder.named_modules() if isinstance(child, nn.ModuleList)]
    raise EmprobeError(
        f"The decoder blocks of {type(model).__name__} were not found: looked in {type(decoder).__name__} for a list of "
        f"{wanted} blocks named {', '.join(BLOCK_NAMES)}; found {', '.join(lists[:4]) or 'no list of modules'}. "
        "Is it a decoder-only language model?"
    )


def entrance_of(model: Any) -> torch.device:
    """Where token ids have to go. Offloaded weights are nowhere for the moment; what loads them also moves the ids."""
    device = torch.device(model.get_input_embeddings().weight.device)
    return torch.device("cpu") if device.type == "meta" else device


def probe_ids(model: Any) -> torch.Tensor:
    """A few token ids that any model can run on, to see what it does; one row."""
    ids = torch.arange(1, 1 + PROBE_TOKENS)[None] % len(model.get_input_embeddings().weight)
    return ids.to(entrance_of(model))


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state that a module was called with: its first argument, or the one called `hidden_states`."""
    hidden = args[0] if args else kwargs["hidden_states"]
    assert isinstance(hidden, torch.Tensor)
    return hidden


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state in a module's output: the tensor itself (transformers 5) or the first of a tuple (4)."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A module's output with its hidden state replaced; nothing is written in place."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
