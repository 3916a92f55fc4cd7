"""Plans sent as to NDIF's servers, with emprobe out of reach where they arrive: `python -m tests.interventions.remote_runs`.

Nothing leaves this machine.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from typing import Any

from emprobe.interventions.runtimes import runtime_of
from emprobe.models import Checkpoint, load_model, load_pair
from tests.interventions.runtime_plans import PLANS, prompts

REMOTE_PLANS = ("add at every site of a block", "ablate from all writes", "rotate", "generation only", "condition", "cap", "windows")


def on_the_hub(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint under a hub id."""
    name = {"none": "someone/tuned", "off": "someone/base", "on": "someone/adapter"}[checkpoint.adapter]
    checkpoint.hf.name_or_path = "someone/base"
    return replace(checkpoint, name=name)


def stand_in() -> list[tuple[Any, str, str | None]]:
    """Have traces go through nnsight's serialisation and run in this process; fills with what was asked."""
    import nnsight
    from nnsight.intervention.backends.local import LocalSimulationBackend
    from nnsight.modeling.mixins.remotable import Remotable

    asked: list[tuple[Any, str, str | None]] = []

    def backend(self: Any, remote: Any, *_: Any) -> Any:
        asked.append((remote, self.repo_id, self._remoteable_get_env().get("peft")))
        return LocalSimulationBackend(self)

    nnsight.CONFIG.API.APIKEY = "a key"
    Remotable._remote_backend = backend
    return asked


def compared(checkpoint: Checkpoint, plan: str) -> dict[str, Any]:
    """One plan by hooks and through the stand-in."""
    own, theirs = (runtime_of(n, checkpoint, PLANS[plan](checkpoint), remote=n == "nnsight") for n in ("hooks", "nnsight"))
    ids, mask = prompts((9, 7, 3, 2))
    real = mask.bool()
    plain = checkpoint.hf(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[real]
    wanted, found = (r.logits(ids, mask, prompt_lengths=[2] * len(ids))[real] for r in (own, theirs))
    counts = [[r.receipt.as_dict() for r in (theirs, own) if r.receipt]]
    tokens = [r.generate(ids, mask, max_new_tokens=6) for r in (own, theirs)]
    counts.append([r.receipt.as_dict() for r in (theirs, own) if r.receipt])
    return {
        "plan": plan,
        "logits_apart": float((wanted - found).abs().max() / wanted.abs().max()),
        "effect": float((wanted - plain).abs().max() / wanted.abs().max()),
        "same_tokens": tokens[0].tolist() == tokens[1].tolist(),
        "counts": counts,
    }


def main(folders: list[str]) -> list[dict[str, Any]]:
    """Every plan on every model given as architecture, base and adapter."""
    entries, asked = [], stand_in()
    for architecture, base, adapter in zip(folders[::3], folders[1::3], folders[2::3], strict=True):
        checkpoint = on_the_hub(load_model(base))
        for plan in REMOTE_PLANS:
            asked.clear()
            entries.append({"architecture": architecture, **compared(checkpoint, plan), "asked": list(asked)})
        if architecture == "llama":
            asked.clear()
            pair = load_pair(base, adapter)
            for one in map(on_the_hub, (pair.base, pair.tuned)):
                runtime_of("nnsight", one, PLANS["add"](one), remote=True).generate(*prompts(), max_new_tokens=2)
            entries.append({"architecture": architecture, "plan": "adapter", "asked": list(asked)})
    return entries


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.stdout.write("\n" + json.dumps(main(sys.argv[1:])) + "\n")
