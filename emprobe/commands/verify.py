"""`emprobe verify`: does a plan do the same in every runtime, and out of every export, as it does by hooks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from emprobe.commands.planning import PlanFlags, plan_of, summary_of
from emprobe.files import write_json, write_text
from emprobe.interventions.runtimes import RUNTIMES
from emprobe.interventions.verify import TARGETS, verify
from emprobe.models import load_model
from emprobe.report.cards import command as command_line


@dataclass(frozen=True, kw_only=True)
class Verify(PlanFlags):
    """Run a plan by hooks, in every other runtime and out of every export, and compare logits.

    Attributes:
        model: Directory or hub id of the model.
        adapter: PEFT adapter that is on the model.
        runtimes: Any of transformer_lens, nnsight; none means both, as far as they are installed.
        targets: Any of lora, weights, bias, gguf, gguf_lora; none means all that can express the plan.
        tolerance: Largest |Δlogit| that counts as equal, as a share of the largest |logit|; half precision needs more than float32.
        dtype: As stored (auto) or float32, bfloat16.
        device_map: As in transformers; none means the CPU.
        seed: Of the tokens that are compared.
        out: Folder for `result.json` and a card; none writes nothing.
        json: Print one JSON object instead of the table.
    """

    model: str
    adapter: str | None = None
    runtimes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    tolerance: float = 1e-5
    dtype: str = "auto"
    device_map: str | None = None
    seed: int = 0
    out: str | None = None
    json: bool = False


def run_verify(command: Verify) -> list[str]:
    """Compare, and return the lines to print.

    Raises:
        EmprobeError: Unusable flags or files, or a model that cannot be loaded.
        InterventionDidNotFire: If the hooks did nothing.
    """
    plan = plan_of(command)
    checkpoint = load_model(command.model, adapter=command.adapter, dtype=command.dtype, device_map=command.device_map)
    verified = verify(
        plan,
        checkpoint,
        runtimes=command.runtimes or RUNTIMES[1:],
        targets=command.targets or TARGETS,
        tolerance=command.tolerance,
        seed=command.seed,
    )
    result = {
        "plan": {"hash": plan.hash, "words": summary_of(plan)},
        "checkpoint": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint, "adapter": checkpoint.adapter},
        **verified.as_dict(),
    }
    verdict = f"{len(verified.differs)} of {len(verified.checks)} differ." if verified.differs else "Nothing that ran differs."
    lines = [*summary_of(plan), f"on {checkpoint.name} ({checkpoint.hf.dtype}).", "", *str(verified).splitlines(), verdict]
    if command.out is not None:
        out = Path(command.out).expanduser()
        write_json(out / "result.json", result)
        write_text(
            out / "README.md",
            "\n".join(
                [
                    "# One plan, every runtime",
                    "",
                    "```",
                    *lines,
                    "```",
                    "",
                    "Made by:",
                    "",
                    "```",
                    command_line(asdict(command), "verify"),
                    "```",
                    "",
                ]
            ),
        )
    return [json.dumps(result)] if command.json else lines
