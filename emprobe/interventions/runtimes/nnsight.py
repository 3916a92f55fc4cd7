"""The runtime `nnsight`: a plan inside a trace, at every decoding step, here or on NDIF's servers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.interventions.plan import Plan
from emprobe.interventions.receipt import Line, Receipt
from emprobe.interventions.runtimes.base import Runtime
from emprobe.interventions.runtimes.program import Chain, Program
from emprobe.interventions.runtimes.proof import deviation
from emprobe.interventions.tally import Totals
from emprobe.interventions.tokens import Prompts
from emprobe.interventions.when import When
from emprobe.models.blocks import decoder_of
from emprobe.models.decoding import neutral_decoding, plain_decoding
from emprobe.models.load import Checkpoint
from emprobe.models.sites import hidden_of, input_of, taps_of, with_hidden
from emprobe.models.traced import check_remote, import_nnsight, ndif_failure, remote_model, shipped_by_value, traced_model
from emprobe.types import Site

ASKED = "runtime='nnsight'"
ALLOWED = 1e-5
"""The modules are the model's own, so what runs in a trace is bit-equal where nothing is amiss."""

Stop = tuple[str, str, Chain]
"""The path of a module, on which side of it (`input`, `output`), and what is done there."""


class NNsight(Runtime):
    """See `Runtime`. nnsight is wrapped round a twin of the model that shares its weights.

    With `remote=True` the trace is sent to NDIF together with the code of the plan's writes, which runs there unchanged; ids, logits
    and the receipt's sums travel back. The model runs as it lies on the hub, in the dtype in which it was deployed. The weights need
    not be here for plans at `resid_pre` and `resid_post`; there is no sampler.

    Args:
        checkpoint: The model.
        plan: What is done.
        remote: Run on NDIF.

    Raises:
        MissingExtraError: If nnsight is not installed.
        EmprobeError: If what runs in a trace differs from the hooks (seen on a few tokens), if there is an intervention on the model or
            its weights are not plain ones on one device; with `remote`, if there is no NDIF key, or model or adapter are not on the hub.

    Source: nnsight 0.8, `TransformersModel`, `tracer.iter`.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, *, remote: bool = False) -> None:
        if remote:
            check_remote(checkpoint, _sites(plan, checkpoint.n_layers))
        super().__init__(checkpoint, plan)
        self.paths = {module: path for path, module in checkpoint.hf.named_modules()}
        self.decoder = self.paths[decoder_of(checkpoint.hf)]
        self.nnsight = import_nnsight(ASKED)
        self.remote = remote_model(checkpoint, ASKED) if remote else None
        if not remote:
            self._prove()

    def _prove(self) -> None:
        try:
            off, where = deviation(self.checkpoint, self.edits, self._trace)
            why = f"{where} is off by {off:.2g} of its norm (allowed {ALLOWED:.0e})"
        except self.nnsight.intervention.interleaver.OutOfOrderError as error:
            off, why = float("inf"), f"the model does not come to the places in order: {str(error).strip().splitlines()[0]}"
        if not off <= ALLOWED:
            raise EmprobeError(f"{ASKED} was asked for {self.checkpoint.name!r}, but in a trace {why}. Use runtime='hooks'.")

    def _logits(self, given: dict[str, Any], prompts: Prompts) -> tuple[Tensor, Receipt]:
        if self.remote is None:
            program = Program(self.edits, prompts, self._special_ids)
            return self._trace(program, given), Receipt(program.lines, self.checkpoint.adapter, prompts)
        logits, counts = self._trace_remote(self._portable(prompts), given)
        return logits, self._told(prompts, counts)

    def _generate(self, given: dict[str, Any], prompts: Prompts, decoding: dict[str, Any]) -> tuple[Tensor, Receipt]:
        if self.remote is None:
            program = Program(self.edits, prompts, self._special_ids)
            return self._decode(program, given, decoding), Receipt(program.lines, self.checkpoint.adapter, prompts)
        ids, counts = self._decode_remote(self._portable(prompts), given, decoding)
        return ids.to(self.checkpoint.device), self._told(prompts, counts)

    def _portable(self, prompts: Prompts) -> Program:
        """A program that travels: of a condition's direction only what a pass needs, since its class would take half of emprobe along."""
        edits = [replace(edit, when=edit.when and _portable(edit.when)) for edit in self.edits]
        return Program(edits, prompts, self._special_ids)

    def _told(self, prompts: Prompts, counts: Sequence[dict[str, Any]]) -> Receipt:
        """The receipt of what was counted elsewhere."""
        lines = Program(self.edits, prompts, self._special_ids).lines
        counted: list[Any] = [_Counted(Totals(**count)) for count in counts]
        told = [Line(line.edit, 0, tally) for line, tally in zip(lines, counted, strict=True)]
        return Receipt(told, self.checkpoint.adapter, prompts)

    def _trace(self, program: Program, given: dict[str, Any]) -> Tensor:
        model, stops, nnsight = traced_model(self.checkpoint, ASKED), self._stops(program), self.nnsight
        decoder = model.get(self.decoder)
        with model.trace(**given):
            program.begin(*decoder.inputs)
            _pass(model, stops)
            logits = nnsight.save(model.output.logits)
        return logits  # type: ignore[no-any-return]  # noqa: RET504 - nnsight puts the value there when the trace ends

    def _decode(self, program: Program, given: dict[str, Any], decoding: dict[str, Any]) -> Tensor:
        model, stops, nnsight = traced_model(self.checkpoint, ASKED), self._stops(program), self.nnsight
        decoder = model.get(self.decoder)
        with plain_decoding(model._module, **decoding) as settings, warnings.catch_warnings():
            # The loop over steps has no end of its own: nnsight warns that decoding's end cut it.
            warnings.simplefilter("ignore")
            with model.generate(**settings) as tracer:
                with tracer.invoke(**given):
                    for _ in tracer.iter[:]:
                        program.begin(*decoder.inputs)
                        _pass(model, stops)
                # What stands behind the loop is cut with it, so the answer is taken in an invoke of its own.
                with tracer.invoke():
                    ids = nnsight.save(tracer.result)
        return ids  # type: ignore[no-any-return]

    def _trace_remote(self, program: Program, given: dict[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
        model, stops, nnsight, path = self.remote, self._stops(program), self.nnsight, self.decoder
        assert model is not None
        try:
            with shipped_by_value(), torch.no_grad(), model.trace(**_on_cpu(given), remote=True):
                program.begin(*model.get(path).inputs)
                _pass(model, stops)
                logits = nnsight.save(model.output.logits.detach().cpu())
                counts = nnsight.save(_counts(program))
        except Exception as error:
            raise ndif_failure(self.checkpoint, error) from error
        return logits, counts

    def _decode_remote(self, program: Program, given: dict[str, Any], decoding: dict[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
        if decoding.pop("sampler") is not None:
            raise EmprobeError("remote=True was asked for with a sampler, but on NDIF the largest logit is taken. Leave sampler out.")
        model, stops, nnsight, path = self.remote, self._stops(program), self.nnsight, self.decoder
        assert model is not None
        try:
            with warnings.catch_warnings(), shipped_by_value(), torch.no_grad():
                warnings.simplefilter("ignore")
                with model.generate(**neutral_decoding(**decoding), remote=True) as tracer:
                    with tracer.invoke(**_on_cpu(given)):
                        for _ in tracer.iter[:]:
                            program.begin(*model.get(path).inputs)
                            _pass(model, stops)
                    with tracer.invoke():
                        ids = nnsight.save(tracer.result.cpu())
                        counts = nnsight.save(_counts(program))
        except Exception as error:
            raise ndif_failure(self.checkpoint, error) from error
        return ids, counts

    def _stops(self, program: Program) -> list[Stop]:
        taps = [(taps_of(self.checkpoint, site, [layer])[0], write) for (layer, site), write in program.stops()]
        return [(self.paths[tap.module], tap.side, write) for tap, write in taps]


def _pass(model: Any, stops: Sequence[Stop]) -> None:
    """Inside a trace: the writes of one forward pass."""
    for path, side, write in stops:
        envoy = model.get(path)
        if side == "output":
            output = envoy.output
            envoy.output = with_hidden(output, write(hidden_of(output)))
        else:
            args, kwargs = envoy.inputs
            hidden = write(input_of(args, kwargs))
            envoy.inputs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _counts(program: Program) -> list[dict[str, Any]]:
    """The receipt's sums as plain values, which travel."""
    return [asdict(line.tally.totals()) for line in program.lines]


@dataclass(frozen=True)
class _Counted:
    """A tally whose sums were formed elsewhere."""

    sums: Totals

    def totals(self, plan: int = 0) -> Totals:
        """See `Tally`."""
        return self.sums


def _portable(when: When) -> When:
    direction: Any = SimpleNamespace(layer=when.direction.layer, site=when.direction.site, vector=when.direction.vector)
    return replace(when, direction=direction)


def _on_cpu(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.items()}


def _sites(plan: Plan, n_layers: int) -> list[Site]:
    edits = plan.edits(n_layers)
    return [*(edit.site for edit in edits), *(edit.when.direction.site for edit in edits if edit.when)]
