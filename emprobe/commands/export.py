"""`emprobe export`: an intervention as files that other programs serve without emprobe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emprobe.commands.planning import PlanFlags, plan_of, summary_of
from emprobe.errors import EmprobeError
from emprobe.files import read_json, write_json
from emprobe.interventions.export import Exported, export
from emprobe.models import Checkpoint, load_model


@dataclass(frozen=True, kw_only=True)
class Export(PlanFlags):
    """Write an intervention as files that other programs serve: what a target cannot express is refused by name.

    Attributes:
        model: Directory or hub id of the model.
        target: lora (ablation of every write as a PEFT adapter), weights (the same as an ordinary checkpoint), bias (addition as an
            ordinary checkpoint), lm_eval (lm-eval's steered model), easysteer or vllm_lens (requests), gguf or gguf_lora (llama.cpp).
        out: Output folder.
        adapter: PEFT adapter that is on the model. lora gives one adapter for the same base, weights and bias merge it in.
        dtype: As stored (auto) or float32, bfloat16.
        device_map: As in transformers; none means the CPU.
    """

    model: str
    target: str
    out: str
    adapter: str | None = None
    dtype: str = "auto"
    device_map: str | None = None


def run_export(command: Export) -> list[str]:
    """Write the target's files, `card.json`, `README.md` and `result.json`; returns the lines to print.

    The same command finds its folder done and writes nothing.

    Raises:
        EmprobeError: Unusable flags or files, a model that cannot be loaded, or what the target cannot express; nothing is written then.
    """
    plan = plan_of(command)
    checkpoint = load_model(command.model, adapter=command.adapter, dtype=command.dtype, device_map=command.device_map)
    identity = {"target": command.target, "plan": plan.hash, "fingerprint": checkpoint.fingerprint}
    out = Path(command.out).expanduser()
    done = _done(out, identity)
    if done is None:
        exported = export(plan, checkpoint, command.target, out)
        write_json(out / "result.json", {**identity, "export": dict(exported.card)})
    else:
        exported = Exported(command.target, out, done)
    return [*summary_of(plan), "", *_said(exported, checkpoint)]


def _done(out: Path, identity: dict[str, str]) -> dict[str, object] | None:
    """The card of the same export, if that is what the folder holds."""
    if not (out / "result.json").is_file():
        return None
    result = read_json(out / "result.json")
    different = [name for name, value in identity.items() if result.get(name) != value]
    if different:
        raise EmprobeError(f"The output folder {out} holds another export: {', '.join(different)} differ. Give another folder.")
    return dict(result["export"])


def _said(exported: Exported, checkpoint: Checkpoint) -> list[str]:
    card = exported.card
    facts = [f"  {name}: {value:.3g}" if isinstance(value, float) else f"  {name}: {value}" for name, value in card["facts"].items()]
    limits = [f"  {limit}" for limit in card["limits"]]
    return [
        f"{card['what']}",
        *facts,
        f"Made for {checkpoint.name} (weights {checkpoint.fingerprint}).",
        *(["", "Know this first:", *limits] if limits else []),
        "",
        "Use it:",
        *(f"  {line}" for line in exported.serve),
        "",
        f"Everything is in {exported.folder}: {', '.join(card['files'])}, card.json, README.md, result.json.",
    ]
