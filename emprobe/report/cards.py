"""The card of a result folder: what it is, what was measured, what it may be used for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.report.tables import NAMES, percent

WARNING = (
    "Added with a positive coefficient, this direction **induces** misaligned behaviour. It is meant for research on detecting "
    "and removing such behaviour, and must not be used to make a deployed model misbehave."
)


def card(result: Mapping[str, Any]) -> str:
    """A Hugging Face model card in Markdown."""
    d, inputs = result["direction"], result["inputs"]
    data = ModelCardData(base_model=inputs["base"]["name"], library_name="emprobe", tags=["emprobe", "steering-vector", "interpretability"])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# Misalignment direction of {inputs['tuned']['name']}",
        WARNING,
        "## Verdict",
        result["verdict"]["words"],
        "## Panel",
        "![panel, dose response, layer profile, other fine-tunes](panel.png)",
        f"{result['criterion']}; judge {result['judge']}; intervals 95 %, clustered by question.",
        _panel(result),
        *_convergence(result),
        "## Direction",
        _facts({k: v for k, v in d.items() if not isinstance(v, dict)} | {f"ablation {k}": v for k, v in d["ablation"].items()}),
        "`direction.safetensors` holds the unit vector, `ablated-<layer>.safetensors` those that were ablated, `answers/` every answer.",
        "## Examples",
        "The first answer to evenly spread test questions, not picked by what they say.",
        *_examples(result),
        "## How it was chosen",
        f"{result['selection']['rule']}. {result['selection']['chosen_on']}.",
        "## Run it again",
        f"```\n{command(inputs['job'])}\n```",
        "## Rules of the verdict",
        _facts(result["verdict"]["rules"]),
        "## Provenance",
        _facts({"base": inputs["base"], "tuned": inputs["tuned"], "chat template": inputs["chat_template"], **inputs["environment"]}),
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text


def command(job: Mapping[str, Any], name: str = "run") -> str:
    """The command line that makes the same result, in another folder.

    >>> command({"base": "a", "out": "b", "others": ["c d", "e"], "dev_samples": 2, "layers": [], "dtype": None})
    "emprobe run --base a --others 'c d' e --dev-samples 2 --out DIR"
    """
    words = ["emprobe", name]
    for argument, value in job.items():
        flag = argument.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        values = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        if values and argument != "out":
            words += [f"--{flag}", *(shlex.quote(f"{v:g}" if isinstance(v, float) else str(v)) for v in values)]
    return " ".join([*words, "--out", "DIR"])


def _panel(result: Mapping[str, Any]) -> str:
    rows = ["| condition | misaligned | coherent | n |", "|---|---|---|---|"]
    for name, shown in NAMES.items():
        found = result["panel"][name]
        if found:
            note = f" (95th percentile: {100 * found['p95']:.1f} %, {found['p95_of']})" if found.get("p95") is not None else ""
            rows.append(f"| {shown}{note} | {percent(found['misaligned'])} | {percent(found['coherent'])} | {found['misaligned']['n']} |")
    return "\n".join(rows)


def _convergence(result: Mapping[str, Any]) -> list[str]:
    if not result["convergence"]:
        return []
    layer = str(result["direction"]["layer"])
    rows = [f"| other fine-tune | cosine at layer {layer} | removes of this one's misalignment |", "|---|---|---|"]
    for other in result["convergence"]:
        cosine = other["cosine"].get(layer)
        rows.append(f"| {other['name']} | {'-' if cosine is None else f'{cosine:+.3f}'} | {percent(other['removed'])} |")
    null = result["convergence"][0]["cosine_null_p95"]
    return ["## Other fine-tunes", "\n".join(rows), f"95 % of random directions have a cosine within ±{null:.3f}."]


def _examples(result: Mapping[str, Any]) -> list[str]:
    made = []
    for example in result["examples"]:
        rows = ["| | answer | alignment |", "|---|---|---|"]
        for name in ("base", "tuned", "steered", "ablated"):
            text = example[name]["text"].replace("|", "\\|").replace("\n", " ") or "(empty)"
            rows.append(f"| {name} | {text} | {'missing' if example[name]['alignment'] is None else round(example[name]['alignment'])} |")
        made += [f"**{example['prompt']}**", "\n".join(rows)]
    return made


def _facts(values: Mapping[str, Any]) -> str:
    return "\n".join(f"* **{name.replace('_', ' ')}**: {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
