"""The backend `nnsight`: the same places read inside an nnsight trace, here or on NDIF's servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emprobe.capture.backends import Read
from emprobe.capture.backends.inputs import inputs_of
from emprobe.capture.plan import Batch
from emprobe.models.load import Checkpoint
from emprobe.models.sites import decoder_of, hidden_of, input_of, taps_of
from emprobe.models.traced import check_remote, import_nnsight, ndif_failure, remote_model, traced_decoder
from emprobe.types import Site

ORDER: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""As a block passes them; a trace can only wait for what is still to come."""

Place = tuple[Site, int]
Stop = tuple[Place, str, str]
"""A place, the path of the module that has it, and on which side (`input`, `output`)."""


ASKED = "backend='nnsight'"


class NNsight:
    """Reads in a trace of the inner model that stops after the last place wanted; see `Backend`.

    nnsight is wrapped round a twin of the model (`twin_of`), so the model keeps its modules' own `forward`, and its tokenizer is not
    touched; weights are shared. Importing nnsight gives every Python object of the process a method `.save`, which is its way.

    With `remote=True` the same trace is sent to NDIF, which runs the model named by the checkpoint's hub id at the hub's default
    revision, in the dtype that it was deployed in; whole hidden states travel back, so ask for few layers. The weights need not be here:
    a checkpoint whose parameters are on the device `meta` will do, for `resid_pre` and `resid_post` (the other sites are proved by
    running the model). A PEFT adapter is named to NDIF by its hub id.

    Args:
        checkpoints: One or two.
        sites: Sites to read.
        layers: 0-based blocks.
        remote: Run on NDIF.

    Raises:
        MissingExtraError: If nnsight is not installed.
        EmprobeError: If a site is not there, if there is an intervention on the model or its weights are not plain ones on one device;
            with `remote`, if there is no NDIF key, or model or adapter are not on the hub.

    Source: nnsight 0.8, `NNsight`, `TransformersModel`.
    """

    shares_prefix = False

    def __init__(self, checkpoints: Sequence[Checkpoint], sites: Sequence[Site], layers: Sequence[int], *, remote: bool = False) -> None:
        self.checkpoints = list(checkpoints)
        self.remote = remote
        ordered = [site for site in ORDER if site in sites]
        if remote:
            for checkpoint in checkpoints:
                check_remote(checkpoint, ordered)
        self.stops = [_stops_of(checkpoint, ordered, sorted(layers), whole=remote) for checkpoint in checkpoints]
        self.nnsight = import_nnsight(ASKED)
        self.wrapped = [remote_model(c, ASKED) if remote else traced_decoder(c, ASKED) for c in checkpoints]

    def run(self, batch: Batch, reads: Sequence[Read], past: Any = None) -> None:
        """One batch through every checkpoint."""
        for index, read in enumerate(reads):
            if self.remote:
                self._run_remote(index, batch, read)
            else:
                self._run_local(index, batch, read)

    def run_prefix(self, batch: Batch, reads: Sequence[Read]) -> None:
        """Nothing: prefixes are not shared."""

    def _run_local(self, index: int, batch: Batch, read: Read) -> None:
        given: dict[str, Any] = {**inputs_of(batch, self.checkpoints[index].device), "use_cache": False}
        model = self.wrapped[index]
        envoys = {envoy.path: envoy for envoy in model.modules()}
        stops = [(place, envoys[f"{model.path}.{path}"], side) for place, path, side in self.stops[index]]
        missing = {place for place, _, _ in stops}
        with torch.no_grad(), model.trace(**given) as tracer:
            for place, envoy, side in stops:
                read(*place, hidden_of(envoy.output) if side == "output" else input_of(*envoy.inputs))
                missing.discard(place)
            tracer.stop()
        assert not missing, "a trace ended before every place was read"

    def _run_remote(self, index: int, batch: Batch, read: Read) -> None:
        """Only plain values may be named in the trace: its text is what is sent, and emprobe is not installed there."""
        given: dict[str, Any] = {**inputs_of(batch, torch.device("cpu")), "use_cache": False}
        model, nnsight = self.wrapped[index], self.nnsight
        stops = [(path, side) for _, path, side in self.stops[index]]
        seen: list[Tensor] = []
        try:
            with torch.no_grad(), model.trace(**given, remote=True) as tracer:
                seen = nnsight.save([])
                for path, side in stops:
                    value = model.get(path).output if side == "output" else model.get(path).input
                    seen.append((value[0] if isinstance(value, tuple) else value).detach().cpu())
                tracer.stop()
        except Exception as error:
            raise ndif_failure(self.checkpoints[index], error) from error
        for (place, _, _), hidden in zip(self.stops[index], seen, strict=True):
            read(*place, hidden)


def _stops_of(checkpoint: Checkpoint, sites: Sequence[Site], layers: Sequence[int], *, whole: bool) -> list[Stop]:
    """Every place in the order in which a forward passes it; paths within the inner model, or within the whole one."""
    root: nn.Module = checkpoint.hf if whole else decoder_of(checkpoint.hf)
    path_of = {module: path for path, module in root.named_modules()}
    found: dict[Place, Stop] = {}
    for site in sites:
        for layer, tap in zip(layers, taps_of(checkpoint, site, layers), strict=True):
            found[site, layer] = ((site, layer), path_of[tap.module], tap.side)
    return [found[site, layer] for layer in layers for site in sites]
