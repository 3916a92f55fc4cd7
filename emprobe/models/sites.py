"""Where to read and write: the sites of a decoder block, and the modules at which a given model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emprobe.errors import EmprobeError
from emprobe.models.blocks import blocks_of, decoder_of, hidden_of, input_of, with_hidden
from emprobe.models.proof import ATTENTION_NAMES, MLP_NAMES, Parts, parts_of
from emprobe.models.whole import whole
from emprobe.types import Site

__all__ = [
    "SITES",
    "Tap",
    "blocks_of",
    "check_layers",
    "check_site",
    "decoder_of",
    "hidden_of",
    "input_of",
    "taps_of",
    "with_hidden",
]

SITES: tuple[Site, ...] = get_args(Site)
"""Sites that can be read and steered, those inside a block where the model proves them."""


@dataclass(frozen=True)
class Tap:
    """Where in a block a site is read: the input or the output of a module."""

    module: nn.Module
    side: Literal["input", "output"]

    def listen(self, read: Callable[[Tensor], None]) -> RemovableHandle:
        """Hand every hidden state that passes here to `read`, until the handle is removed."""
        if self.side == "input":
            return self.module.register_forward_pre_hook(lambda _, args, kwargs: read(input_of(args, kwargs)), with_kwargs=True)
        return self.module.register_forward_hook(lambda _, args, output: read(hidden_of(output)))


def taps_of(source: Any, site: Site, layers: Sequence[int]) -> list[Tap]:
    """Where the model has a site, one tap per layer, in the order given.

    `resid_pre` and `resid_post` are a block's input and output. `attn_out` and `mlp_out` are what attention and MLP add to the residual
    stream (after a norm of their own, where the model has one), `resid_mid` is resid_pre + attn_out as the next module receives it;
    these three are proved on the model itself by one small forward pass, paid for once per model.

    Args:
        source: A `Checkpoint`, or the Hugging Face model in it; its adapter stays as it is.
        site: Any site.
        layers: 0-based blocks.

    Raises:
        EmprobeError: If a layer does not exist, or the site is not proved at one of them; says what was looked for and how far off it is.
    """
    model = getattr(source, "hf", source)
    check_site(site)
    blocks = blocks_of(model)
    chosen = check_layers(layers, len(blocks), "taps_of")
    if site in ("resid_pre", "resid_post"):
        return [Tap(blocks[layer], "input" if site == "resid_pre" else "output") for layer in chosen]
    parts = parts_of(model)
    refused = [layer for layer in chosen if not _proved(parts[layer], site)]
    if refused:
        worst = max(refused, key=lambda layer: _deviation(parts[layer], site))
        raise EmprobeError(_refusal(type(model).__name__, site, worst, parts[worst], len(refused), len(chosen)))
    side: Literal["input", "output"] = "input" if site == "resid_mid" else "output"
    return [Tap(blocks[layer].get_submodule(_child(parts[layer], site)), side) for layer in chosen]


def _child(parts: Parts, site: Site) -> str:
    name = parts.middle if site == "resid_mid" else parts.closest and parts.closest[site == "mlp_out"]
    assert name is not None
    return name


def _deviation(parts: Parts, site: Site) -> float:
    summed = parts.deviation <= parts.tolerance
    return parts.middle_deviation if site == "resid_mid" and summed else parts.deviation


def _proved(parts: Parts, site: Site) -> bool:
    return _deviation(parts, site) <= parts.tolerance


def _refusal(model: str, site: Site, layer: int, parts: Parts, n_refused: int, n_asked: int) -> str:
    where = f"{parts.block} {layer}" + (f" (and {n_refused - 1} more of {n_asked} layers)" if n_refused > 1 else "")
    off = f"off by {_deviation(parts, site):.2g} of what is added (allowed {parts.tolerance:.0e})"
    if parts.closest is None:
        found = "no two such modules"
    elif not parts.deviation <= parts.tolerance:
        found = f"the closest are {parts.closest[0]} and {parts.closest[1]}, {off}"
    elif parts.parallel:
        return (
            f"Site 'resid_mid' does not exist in {model}: in {where} attention and MLP run side by side (parallel residual), so nothing "
            "receives resid_pre + attn_out. Use resid_pre, attn_out, mlp_out or resid_post."
        )
    else:
        closest = f"the closest is {parts.middle}, {off}" if parts.middle else "none runs after the attention"
        return (
            f"Site 'resid_mid' is not proved in {model}: looked in {where} for a module that receives resid_pre + attn_out; {closest}. "
            "Use resid_pre, attn_out, mlp_out or resid_post."
        )
    return (
        f"Site {site!r} is not proved in {model}: looked in {where} for two modules, one with {' or '.join(ATTENTION_NAMES)} and one with "
        f"{' or '.join(MLP_NAMES)} in its name, whose outputs added to the block's input give its output; {found}. "
        "Use resid_pre or resid_post."
    )


def check_site(site: str) -> Site:
    """The site, if it is one.

    Raises:
        EmprobeError: If it is none.
    """
    for known in SITES:
        if site == known:
            return known
    raise EmprobeError(f"Site {site!r} is no site. Use one of: {', '.join(SITES)}.")


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
    try:
        chosen = tuple(map(whole, layers if isinstance(layers, Iterable) else (layers,)))
    except TypeError:
        raise EmprobeError(f"{asked_by} was given layers={layers!r}. Use 'all', a block number, or a list of block numbers.") from None
    bad = [layer for layer in chosen if not 0 <= layer < n_layers]
    if bad or not chosen:
        raise EmprobeError(
            f"{asked_by} asked for layer {', '.join(map(str, bad)) or '(none)'}, but the model has layers 0 to {n_layers - 1} "
            "(0-based blocks). Choose among these."
        )
    return chosen
