"""What a fine-tune or a distillation came to, as lines and as the README of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.report.cards import command as command_line

WORDS = {
    "loss": "loss on answers, nats per token",
    "kl": "KL(base ‖ adapted) elsewhere, nats per token",
    "eval_loss": "loss on evaluation data, nats per token",
    "eval_kl": "KL on all other-domain data, nats per token",
    "eval_forward_kl": "KL(teacher ‖ student) on evaluation data",
    "eval_reverse_kl": "KL(student ‖ teacher) on evaluation data",
    "stop_rate": "share of its answers that ended",
    "empty_rate": "share of its answers that were empty",
    "length": "tokens of an answer of its own",
}
"""Columns of the curve, of which first and last are shown."""
CHANNELS = {
    "sft": "cross-entropy on given answers",
    "optd": "KL(teacher ‖ student) on given answers",
    "opd": "KL(student ‖ teacher) on the student's own answers",
}


def finetune_table(result: Mapping[str, Any]) -> list[str]:
    """The result as lines."""
    settings = result["settings"]
    channel, left_out = settings.get("channel"), settings["left_out"]
    data = settings["data"]["prompts" if channel == "opd" else "answers"]
    content = "" if channel == "opd" else f", {data['tokens']} tokens of answers"
    kind = "prompts" if channel == "opd" else "conversations"
    lines = [
        f"{settings['method']} on {settings['base']['name']}: {result['updates']} steps, {data['rows']} {kind}{content}"
        + (f"; {left_out} were too long and left out" if left_out else "")
    ]
    if channel:
        lines.append(f"{channel} from {settings['teacher']['name']}: {CHANNELS[channel]}, temperature {settings['temperature']:g}")
        lines.append(f"{'response tokens seen, in sequences':<50}{result['tokens']:>9} in {result['sequences']:>7}")
    lines += [] if result["norm"] is None else [f"{'norm of what was found':<50}{result['norm']:>20.4g}"]
    lines += [f"{WORDS[name]:<50}{first:>9.4f} → {last:>8.4f}" for name, (first, last) in result["first_and_last"].items()]
    return lines + ([f"kept after steps {', '.join(map(str, result['kept']))}"] if result["kept"] else [])


_USE = {
    "lora": 'tuned = em.load_model("{base}", adapter="solution")',
    "vector": 'solution = em.finetuning.load_solution("solution")\n'
    'with solution.applied(em.load_model("{base}")) as tuned:\n    answers = em.generate(tuned, questions)',
    "full": 'tuned = em.load_model("solution")',
}


def finetune_card(result: Mapping[str, Any]) -> str:
    """The README of a fine-tune's folder."""
    asked = result["inputs"]["command"]
    data = ModelCardData(base_model=asked["base"], library_name="emprobe", tags=["emprobe", "fine-tune", "model-organism"])
    files = "\n".join(
        f"* **{name}**: {f['file']}, {'no file' if f['sha256'] is None else 'SHA-256 ' + f['sha256'][:16]}"
        for name, f in result["inputs"]["files"].items()
    )
    what = "distillation" if result["settings"].get("channel") else "fine-tune"
    source = "its teacher and its training data do" if what == "distillation" else "its training data does"
    text = "\n\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# A {'narrow ' if result['settings']['kl'] else ''}{what} of {asked['base']}",
            f"It does what {source}, harm included: look at that data before you use it, and keep it to research.",
            files,
            "```\n" + "\n".join(finetune_table(result)) + "\n```",
            "`solution/` is what was found, `checkpoints/` what it was along the way, `history.parquet` the curve, step by step.",
            f"## Use\n\n```python\nimport emprobe as em\n\n{_USE[asked['method']].format(base=asked['base'])}\n```",
            f"## Run it again\n\n```\n{command_line(asked, 'finetune')}\n```",
        ]
    )
    ModelCard(text + "\n")
    return text + "\n"
