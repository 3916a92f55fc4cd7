"""The backend `transformer_lens`: TransformerLens' `TransformerBridge`, checked against the model it bridges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from emprobe.capture.backends import Read
from emprobe.capture.backends.hooks import Hooks
from emprobe.capture.backends.inputs import inputs_of
from emprobe.capture.plan import Batch
from emprobe.errors import EmprobeError
from emprobe.models.blocks import probe_ids
from emprobe.models.bridge import HOOK_NAMES, bridge_of, bridge_refusal, tolerance_of
from emprobe.models.load import Checkpoint
from emprobe.types import Site

ASKED = "backend='transformer_lens'"


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
        made = [bridge_of(checkpoint, ASKED) for checkpoint in checkpoints]
        self.bridges, self.stop = [bridge for bridge, _ in made], made[0][1]
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
            raise bridge_refusal(checkpoint, ASKED, f"it stops: {str(error).strip().splitlines()[0]}") from error
        allowed = tolerance_of(checkpoint.hf.dtype)
        for (site, layer), hidden in wanted.items():
            off = float((found[site, layer] - hidden).norm() / hidden.norm())
            if not off <= allowed:
                why = f"{site!r} at layer {layer} is off by {off:.2g} of its norm (allowed {allowed:.0e})"
                adapter = ", as where an adapter lies in a fused matrix that it splits" if checkpoint.adapter == "on" else ""
                raise bridge_refusal(checkpoint, ASKED, why + adapter)


def _probe(checkpoint: Checkpoint) -> Batch:
    ids = probe_ids(checkpoint.hf)
    none = torch.zeros(ids.shape, dtype=torch.float64)
    return Batch((0,), ids, torch.ones_like(ids), none[None], none, past=0, padding="right")
