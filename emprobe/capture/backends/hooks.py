"""The default backend: forward hooks on the blocks, the head never computed, nothing run beyond the deepest layer wanted.

Where base and tuned are one set of weights and the adapter begins at block k, the blocks below k run once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from emprobe.capture.backends import Read
from emprobe.capture.backends.inputs import inputs_of
from emprobe.capture.plan import Batch
from emprobe.models.adapters import lowest_adapted_block
from emprobe.models.caches import empty_cache, lent_cache
from emprobe.models.load import Checkpoint
from emprobe.models.sites import Tap, decoder_of, hidden_of, input_of, taps_of
from emprobe.types import Site


class _AllRead(Exception):  # noqa: N818 - a signal, not an error: raised to leave out what nobody asked for
    pass


@dataclass
class _Trunk:
    """How the base entered each block from the first adapted one on: what the tuned model needs to go on from there."""

    hidden: Tensor | None = None
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    unbroken: bool = True
    last: Tensor | None = None


class Hooks:
    """Reads by PyTorch forward hooks; see `Backend`."""

    shares_prefix = True

    def __init__(self, checkpoints: Sequence[Checkpoint], sites: Sequence[Site], layers: Sequence[int]) -> None:
        self.checkpoints = list(checkpoints)
        self.taps: list[dict[tuple[Site, int], Tap]] = []
        for checkpoint in checkpoints:
            found = {(s, n): tap for s in sites for n, tap in zip(layers, taps_of(checkpoint, s, layers), strict=True)}
            self.taps.append(found)
        self.deepest = max(layers)
        self.fork = _first_difference(self.checkpoints)

    def run(self, batch: Batch, reads: Sequence[Read], past: Sequence[Any] | None = None) -> None:
        """One batch through every checkpoint."""
        caches = [lent_cache(cache, len(batch.ids)) for cache in past] if past else [None] * len(reads)
        self._forward(batch, reads, caches)

    def run_prefix(self, batch: Batch, reads: Sequence[Read]) -> list[Any] | None:
        """The shared opening; its keys and values, or None where the model keeps other state than these."""
        caches = [empty_cache(c) for c in self.checkpoints]
        if any(cache is None for cache in caches):
            return None
        self._forward(batch, reads, caches)
        return caches

    def _forward(self, batch: Batch, reads: Sequence[Read], caches: Sequence[Any]) -> None:
        if not self.fork:
            for index, read in enumerate(reads):
                self._whole(index, batch, dict.fromkeys(self.taps[index], read), caches[index])
            return
        base, tuned = reads
        below = {place for place in self.taps[0] if place[1] < self.fork}

        def both(site: Site, layer: int, hidden: Tensor) -> None:
            base(site, layer, hidden)
            tuned(site, layer, hidden)

        trunk = _Trunk()
        self._whole(0, batch, {place: both if place in below else base for place in self.taps[0]}, caches[0], trunk)
        if len(below) == len(self.taps[0]):
            return
        above = {place: tuned for place in self.taps[1] if place not in below}
        if trunk.unbroken:
            self._branch(trunk, above, caches)
        else:
            # Something happens between this model's blocks, so the tuned model is run from the start.
            self._whole(1, batch, above, caches[1])

    def _whole(self, index: int, batch: Batch, reads: Mapping[tuple[Site, int], Read], cache: Any, trunk: _Trunk | None = None) -> None:
        """The inner model on a batch, stopped once everything was read."""
        checkpoint = self.checkpoints[index]
        with checkpoint.active() as model, ExitStack() as stack, torch.no_grad(), suppress(_AllRead):
            if trunk is not None:
                _watch(trunk, checkpoint.blocks[self.fork : self.deepest + 1], self.fork, stack)
            self._listen(index, reads, stack)
            decoder_of(model)(**_inputs(batch, checkpoint.device, cache))

    def _branch(self, trunk: _Trunk, reads: Mapping[tuple[Site, int], Read], caches: Sequence[Any]) -> None:
        """The tuned model from the first adapted block on, entered as the base entered it."""
        checkpoint = self.checkpoints[1]
        hidden = trunk.hidden
        with checkpoint.active(), ExitStack() as stack, torch.no_grad(), suppress(_AllRead):
            self._listen(1, reads, stack)
            for layer, (args, kwargs) in sorted(trunk.calls.items()):
                # The base's keys and values are not the tuned model's.
                mine = [caches[1] if a is not None and a is caches[0] else a for a in args]
                named = {k: caches[1] if v is not None and v is caches[0] else v for k, v in kwargs.items()}
                hidden = hidden_of(checkpoint.blocks[layer](hidden, *mine, **named))

    def _listen(self, index: int, reads: Mapping[tuple[Site, int], Read], stack: ExitStack) -> None:
        """Hook every place, and stop once all were read: what lies beyond is not needed for later tokens either."""
        missing = set(reads)
        for place, read in reads.items():
            handle = self.taps[index][place].listen(_reader(place, read, missing))
            stack.callback(handle.remove)


def _reader(place: tuple[Site, int], read: Read, missing: set[tuple[Site, int]]) -> Callable[[Tensor], None]:
    def hear(hidden: Tensor) -> None:
        read(*place, hidden)
        missing.discard(place)
        if not missing:
            raise _AllRead

    return hear


def _watch(trunk: _Trunk, blocks: Iterable[nn.Module], first: int, stack: ExitStack) -> None:
    """Note how each block is entered, and whether each takes what the one below gave."""
    for layer, block in enumerate(blocks, start=first):

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layer: int = layer) -> None:
            hidden = input_of(args, kwargs)
            if layer == first:
                trunk.hidden = hidden
            elif hidden is not trunk.last:
                trunk.unbroken = False
            trunk.calls[layer] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})

        def leave(_: Any, args: tuple[Any, ...], output: Any) -> None:
            trunk.last = hidden_of(output)

        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(leave).remove)


def _inputs(batch: Batch, device: torch.device, cache: Any) -> dict[str, Any]:
    """What the inner model is called with: without a mask where it can be, for then attention takes its fast causal path."""
    given: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        given["past_key_values"] = cache
        given["position_ids"] = torch.arange(batch.past, batch.past + batch.ids.shape[1], device=device)[None]
    return given | inputs_of(batch, device)


def _first_difference(checkpoints: Sequence[Checkpoint]) -> int:
    """Below which block two checkpoints are the same computation; 0 where nothing is shared."""
    if len(checkpoints) != 2 or checkpoints[0].model is not checkpoints[1].model:
        return 0
    return lowest_adapted_block(checkpoints[1])
