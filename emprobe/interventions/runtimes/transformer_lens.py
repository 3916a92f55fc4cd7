"""The runtime `transformer_lens`: a plan at the hook points of TransformerLens' `TransformerBridge`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from emprobe.interventions.plan import Plan
from emprobe.interventions.receipt import Receipt
from emprobe.interventions.runtimes.base import Runtime
from emprobe.interventions.runtimes.program import Chain, Program
from emprobe.interventions.runtimes.proof import deviation
from emprobe.interventions.tokens import Prompts
from emprobe.models.blocks import decoder_of
from emprobe.models.bridge import HOOK_NAMES, bridge_of, bridge_refusal, tolerance_of
from emprobe.models.decoding import plain_decoding
from emprobe.models.load import Checkpoint

ASKED = "runtime='transformer_lens'"


class TransformerLens(Runtime):
    """See `Runtime`. The bridge stands on a twin of the model that shares its weights; its attention is the eager kernel.

    Raises:
        MissingExtraError: If transformer-lens is not installed.
        EmprobeError: If it has no bridge for the model, if the bridge computes something else than the model (seen on a few tokens),
            or if there is an intervention on the model or its weights are not plain ones on one device.

    Source: TransformerLens 4, `TransformerBridge`.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        super().__init__(checkpoint, plan)
        try:
            off, where = deviation(checkpoint, self.edits, lambda program, given: self._run(program, _forward(given)))
        except (TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
            raise bridge_refusal(checkpoint, ASKED, f"it stops: {(str(error).strip() or repr(error)).splitlines()[0]}") from error
        allowed = tolerance_of(checkpoint.hf.dtype)
        if not off <= allowed:
            raise bridge_refusal(checkpoint, ASKED, f"{where} is off by {off:.2g} of its norm (allowed {allowed:.0e})")

    def _logits(self, given: dict[str, Any], prompts: Prompts) -> tuple[Tensor, Receipt]:
        program = Program(self.edits, prompts, self._special_ids)
        return self._run(program, _forward(given)), Receipt(program.lines, self.checkpoint.adapter, prompts)

    def _generate(self, given: dict[str, Any], prompts: Prompts, decoding: dict[str, Any]) -> tuple[Tensor, Receipt]:
        def run(bridge: Any) -> Tensor:
            # As `hf_generate` does, which would set a padding id of its own.
            with plain_decoding(bridge.original_model, **decoding) as settings:
                ids: Tensor = bridge.original_model.generate(**given, **settings)
                return ids

        program = Program(self.edits, prompts, self._special_ids)
        return self._run(program, run), Receipt(program.lines, self.checkpoint.adapter, prompts)

    def _run(self, program: Program, run: Callable[[Any], Tensor]) -> Tensor:
        bridge, _ = bridge_of(self.checkpoint, ASKED)
        hooks = [(f"blocks.{layer}.{HOOK_NAMES[site]}", _hook(write)) for (layer, site), write in program.stops()]
        decoder = decoder_of(bridge.original_model)
        begin = decoder.register_forward_pre_hook(lambda _, args, kwargs: program.begin(args, kwargs), with_kwargs=True)
        try:
            with bridge.hooks(fwd_hooks=hooks):
                return run(bridge)
        finally:
            begin.remove()


def _forward(given: dict[str, Any]) -> Callable[[Any], Tensor]:
    def run(bridge: Any) -> Tensor:
        named = dict(given)
        logits: Tensor = bridge(named.pop("input_ids"), return_type="logits", **named)
        return logits

    return run


def _hook(write: Chain) -> Callable[..., Tensor]:
    def hook(hidden: Tensor, hook: Any) -> Tensor:
        return write(hidden)

    return hook
