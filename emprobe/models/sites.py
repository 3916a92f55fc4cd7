"""Where to read and write: the decoder blocks of a model, found and proved, and their inputs and outputs."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import nn

from emprobe.errors import EmprobeError
from emprobe.types import Site

BLOCK_NAMES = ("layers", "h", "blocks", "block")
SUPPORTED_SITES: tuple[Site, ...] = ("resid_pre", "resid_post")


def decoder_of(model: Any) -> nn.Module:
    """The inner model that holds the blocks and no language-model head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    found = decoder if isinstance(decoder, nn.Module) else getattr(model, model.base_model_prefix, model)
    assert isinstance(found, nn.Module)
    return found


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a model, in order; as many as its config says.

    Raises:
        EmprobeError: If no list of that many blocks is found; names what was looked for.
    """
    decoder = decoder_of(model)
    wanted = int(model.config.get_text_config().num_hidden_layers)
    for name in BLOCK_NAMES:
        blocks = getattr(decoder, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks) == wanted:
            return blocks
    raise EmprobeError(
        f"The decoder blocks of {type(model).__name__} were not found: looked in {type(decoder).__name__} for a list of "
        f"{wanted} blocks named {', '.join(BLOCK_NAMES)}. Is it a decoder-only language model?"
    )


def check_site(site: str) -> Site:
    """The site, if it can be read and steered.

    Raises:
        EmprobeError: If it is no site, or not one that is supported.
    """
    if site not in SUPPORTED_SITES:
        known = "is no site" if site not in get_args(Site) else "is not supported yet"
        raise EmprobeError(f"Site {site!r} {known}. Use one of: {', '.join(SUPPORTED_SITES)}.")
    return site


def check_layers(layers: Any, n_layers: int, asked_by: str) -> tuple[int, ...]:
    """Layers as a tuple of 0-based blocks; `all` means every block.

    Raises:
        EmprobeError: If one does not exist or none was given.

    Example:
        >>> check_layers("all", 3, "capture")
        (0, 1, 2)
    """
    if isinstance(layers, str):
        if layers != "all":
            raise EmprobeError(f"{asked_by} was given layers={layers!r}. Use 'all', a block number, or a list of block numbers.")
        return tuple(range(n_layers))
    chosen = (layers,) if isinstance(layers, int) else tuple(int(layer) for layer in layers)
    bad = [layer for layer in chosen if not 0 <= layer < n_layers]
    if bad or not chosen:
        raise EmprobeError(
            f"{asked_by} asked for layer {', '.join(map(str, bad)) or '(none)'}, but the model has layers 0 to {n_layers - 1} "
            "(0-based blocks). Choose among these."
        )
    return chosen


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state in a block's output: the tensor itself (transformers 5) or the first of a tuple (4)."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """The block's output with its hidden state replaced; nothing is written in place."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
