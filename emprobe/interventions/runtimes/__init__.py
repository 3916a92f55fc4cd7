"""The runtimes that can carry out a plan: one protocol, and what each cannot do refused by name before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from emprobe.errors import EmprobeError
from emprobe.interventions.operators import Operator
from emprobe.interventions.plan import Plan
from emprobe.interventions.runtimes.base import Runtime
from emprobe.models.load import Checkpoint

__all__ = ["RUNTIMES", "Runtime", "RuntimeName", "runtime_of"]

RuntimeName = Literal["hooks", "transformer_lens", "nnsight"]
RUNTIMES: tuple[RuntimeName, ...] = ("hooks", "transformer_lens", "nnsight")


def runtime_of(name: str, checkpoint: Checkpoint, plan: Plan | Operator | Sequence[Plan | Operator], *, remote: bool = False) -> Runtime:
    """The runtime of that name, made for a model and a plan.

    Args:
        name: `hooks` (what `intervene` does), `transformer_lens` or `nnsight`.
        checkpoint: The model.
        plan: What is done to it.
        remote: Run on NDIF's servers; `nnsight` only.

    Raises:
        EmprobeError: If there is none of that name, or it cannot do what was asked.
        MissingExtraError: If its package is not installed.
    """
    if remote and name != "nnsight":
        raise EmprobeError(
            f"remote=True was asked of the runtime {name!r}, and only 'nnsight' runs on NDIF's servers. Use runtime='nnsight'."
        )
    whole = Plan.of(*plan) if isinstance(plan, Sequence) else Plan.of(plan)
    match name:
        case "hooks":
            from emprobe.interventions.runtimes.hooks import Hooks

            return Hooks(checkpoint, whole)
        case "transformer_lens":
            from emprobe.interventions.runtimes.transformer_lens import TransformerLens

            return TransformerLens(checkpoint, whole)
        case "nnsight":
            from emprobe.interventions.runtimes.nnsight import NNsight

            return NNsight(checkpoint, whole, remote=remote)
        case _:
            raise EmprobeError(f"Runtime {name!r} does not exist. Use one of: {', '.join(RUNTIMES)}.")
