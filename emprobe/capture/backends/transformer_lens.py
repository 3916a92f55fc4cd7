"""The backend `transformer_lens`: TransformerLens' `TransformerBridge`, checked against the model it bridges."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emprobe.capture.backends import Read
from emprobe.capture.backends.hooks import Hooks
from emprobe.capture.backends.twin import inputs_of, wrapped_twin
from emprobe.capture.plan import Batch
from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.models.blocks import probe_ids
from emprobe.models.load import Checkpoint
from emprobe.types import Site

HOOK_NAMES: dict[Site, str] = {
    "resid_pre": "hook_in",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_out",
}
"""TransformerLens' names within `blocks.<layer>.`; its attn_out and mlp_out lie behind a norm of their own where the model has one."""

# How far the bridge may be off from the model, as a share of the hidden state's norm. Its attention is the eager kernel, whose sums
# run in another order; what it gets wrong (an adapter inside a fused matrix that it splits, another meaning of a site) is off by about 1.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2


class TransformerLens:
    """Reads by a `TransformerBridge` round the loaded model; see `Backend`.

    The bridge is built on a twin of the model (`twin_of`), so the model itself keeps its modules, its attention kernel, its tokenizer
    and its adapters; weights are shared, but for the fused query-key-value matrix of GPT-NeoX, which the bridge copies. Built once per
    model and adapter state. Attention is eager, whatever the model's own kernel.

    Args:
        checkpoints: One or two.
        sites: Sites to read.
        layers: 0-based blocks.

    Raises:
        MissingExtraError: If transformer-lens is not installed.
        EmprobeError: If it has no bridge for the model, if the bridge computes something else than the model at a wanted place (seen on
            a few tokens), or if there is an intervention on the model or its weights are not plain ones on one device.

    Source: TransformerLens 4, `TransformerBridge.boot_transformers`.
    """

    shares_prefix = False

    def __init__(self, checkpoints: Sequence[Checkpoint], sites: Sequence[Site], layers: Sequence[int]) -> None:
        self.places = [(site, layer) for site in sites for layer in layers]
        self.devices = [checkpoint.device for checkpoint in checkpoints]
        # The sites must exist in the model itself, which says better than TransformerLens what is missing.
        own = [Hooks([checkpoint], sites, layers) for checkpoint in checkpoints]
        bridge, self.stop = _import()
        self.bridges = [wrapped_twin(c, "transformer_lens", partial(_boot, bridge, c)) for c in checkpoints]
        for index, checkpoint in enumerate(checkpoints):
            self._check(index, checkpoint, own[index])

    def run(self, batch: Batch, reads: Sequence[Read], past: Any = None) -> None:
        """One batch through every checkpoint."""
        for index, read in enumerate(reads):
            self._forward(index, batch, read)

    def run_prefix(self, batch: Batch, reads: Sequence[Read]) -> None:
        """Nothing: the bridge's blocks keep no cache that could be lent."""

    def _forward(self, index: int, batch: Batch, read: Read) -> None:
        missing = set(self.places)
        hooks = [(f"blocks.{layer}.{HOOK_NAMES[site]}", self._reader((site, layer), read, missing)) for site, layer in self.places]
        given: dict[str, Any] = {**inputs_of(batch, self.devices[index]), "use_cache": False}
        with torch.no_grad():
            self.bridges[index].run_with_hooks(given.pop("input_ids"), fwd_hooks=hooks, return_type=None, **given)
        if missing:
            site, layer = min(missing)
            raise EmprobeError(
                f"TransformerLens gave nothing for {site!r} at layer {layer} (and {len(missing) - 1} more places): its bridge for this "
                "model does not pass there. Use backend='hooks'."
            )

    def _reader(self, place: tuple[Site, int], read: Read, missing: set[tuple[Site, int]]) -> Callable[..., None]:
        def hear(hidden: Tensor, hook: Any) -> None:
            read(*place, hidden)
            missing.discard(place)
            if not missing:
                # The bridge's own way to end a forward early; here after the last place, so that even the head is left out.
                raise self.stop(hidden)

        return hear

    def _check(self, index: int, checkpoint: Checkpoint, own: Hooks) -> None:
        """Compare with the model on a few tokens: names do not tell what a bridge computes."""
        batch = _probe(checkpoint)
        wanted: dict[tuple[Site, int], Tensor] = {}
        found: dict[tuple[Site, int], Tensor] = {}
        own.run(batch, [lambda site, layer, hidden: wanted.__setitem__((site, layer), hidden.double())])
        try:
            self._forward(index, batch, lambda site, layer, hidden: found.__setitem__((site, layer), hidden.double()))
        except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
            raise EmprobeError(_refusal(checkpoint, f"it stops: {str(error).strip().splitlines()[0]}")) from error
        allowed = TOLERANCES.get(checkpoint.hf.dtype, HALF_TOLERANCE)
        for (site, layer), hidden in wanted.items():
            off = float((found[site, layer] - hidden).norm() / hidden.norm())
            if not off <= allowed:
                why = f"{site!r} at layer {layer} is off by {off:.2g} of its norm (allowed {allowed:.0e})"
                adapter = ", as where an adapter lies in a fused matrix that it splits" if checkpoint.adapter == "on" else ""
                raise EmprobeError(_refusal(checkpoint, why + adapter))


def _refusal(checkpoint: Checkpoint, why: str) -> str:
    return (
        f"backend='transformer_lens' was asked for {checkpoint.name!r} ({type(checkpoint.hf).__name__}, adapter {checkpoint.adapter}), but "
        f"TransformerLens does not compute what the model does: {why}. Use backend='hooks'."
    )


def _probe(checkpoint: Checkpoint) -> Batch:
    ids = probe_ids(checkpoint.hf)
    none = torch.zeros(ids.shape, dtype=torch.float64)
    return Batch((0,), ids, torch.ones_like(ids), none[None], none, past=0, padding="right")


def _import() -> tuple[Any, type[Exception]]:
    """`TransformerBridge` and the exception that ends its forwards, without what importing it does to transformers' log."""
    log = logging.getLogger("transformers")
    level = log.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformer_lens.model_bridge import TransformerBridge
            from transformer_lens.model_bridge.exceptions import StopAtLayerException
    except ImportError as error:
        raise MissingExtraError("transformer-lens", "transformer-lens", "backend='transformer_lens'") from error
    finally:
        log.setLevel(level)
    return TransformerBridge, StopAtLayerException


def _boot(bridge: Any, checkpoint: Checkpoint, twin: Any) -> Any:
    """A bridge round the twin, with a tokenizer of its own (it sets padding and special tokens on it)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bridge.boot_transformers(
                checkpoint.name, hf_model=twin, tokenizer=copy.deepcopy(checkpoint.tokenizer), device=checkpoint.device, dtype=twin.dtype
            )
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise EmprobeError(
            f"backend='transformer_lens' was asked for {checkpoint.name!r}, but TransformerLens cannot bridge a "
            f"{type(checkpoint.hf).__name__}: {str(error).strip().splitlines()[0]} Use backend='hooks'."
        ) from error
