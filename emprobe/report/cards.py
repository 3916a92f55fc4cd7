"""The card of a result folder: what it is, what was measured, what it may be used for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.report.tables import NAMES, SIDE_EFFECTS, percent, side_effect_rows

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
        *_nulls(result),
        *_convergence(result),
        *_side_effects(result),
        "## Direction",
        _facts({k: v for k, v in d.items() if not isinstance(v, dict)} | {f"ablation {k}": v for k, v in d["ablation"].items()}),
        "`direction.safetensors` holds the unit vector, `ablated-<layer>.safetensors` those that were ablated, `answers/` every answer.",
        "## Examples",
        "The first answer to evenly spread test questions, not picked by what they say.",
        *_examples(result),
        "## How it was chosen",
        f"{result['selection']['rule']}. {result['selection']['chosen_on']}.",
        "## Run it again",
        f"```\n{command(inputs['job'], inputs.get('command', 'run'))}\n```",
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
    >>> command({"lr": 1e-4, "threshold": 0.123456789})
    'emprobe run --lr 0.0001 --threshold 0.123456789 --out DIR'
    """
    words = ["emprobe", name]
    for argument, value in job.items():
        flag = argument.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        values = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        if values and argument != "out":
            words += [f"--{flag}", *(shlex.quote(f"{v:g}" if isinstance(v, float) and float(f"{v:g}") == v else str(v)) for v in values)]
    return " ".join([*words, "--out", "DIR"])


def _panel(result: Mapping[str, Any]) -> str:
    rows = ["| condition | misaligned | coherent | moved | n |", "|---|---|---|---|---|"]
    for name, shown in NAMES.items():
        found = result["panel"].get(name)
        if found:
            note = f" (95th percentile: {100 * found['p95']:.1f} %, {found['p95_of']})" if found.get("p95") is not None else ""
            moved = "-" if found.get("relative_change") is None else f"{found['relative_change']:.3f}"
            rates = f"{percent(found['misaligned'])} | {percent(found['coherent'])}"
            rows.append(f"| {shown}{note} | {rates} | {moved} | {found['misaligned']['n']} |")
    return "\n".join([*rows, "", "*moved*: mean ‖Δh‖ / ‖h‖ at steered positions, summed over layers."])


def _nulls(result: Mapping[str, Any]) -> list[str]:
    """Where the direction stands among each kind of control."""
    rows = [
        f"| {claim} | {kind.replace('_', '-')} | {null['draws']} | {100 * null['mean']:.1f} % | {100 * null['p95']:.1f} % | "
        f"{100 * null['percentile']:.1f} | {null['p']:.2g} |"
        for claim, kinds in (result.get("nulls") or {}).items()
        for kind, null in kinds.items()
    ]
    if not rows:
        return []
    head = "| claim | control directions | draws | mean | 95th percentile | percentile of this one | p |\n|---|---|---|---|---|---|---|"
    said = (
        "*sufficient* compares misaligned rates of the base with a direction added, *necessary* the share of tuned's misalignment that an "
        "ablation removes. p is the share of draws that do as much, the direction itself counted among them."
    )
    return ["## Against chance", "\n".join([head, *rows]), said]


def _side_effects(result: Mapping[str, Any]) -> list[str]:
    rows = [f"| {shown} | {' | '.join(cells)} |" for shown, cells in side_effect_rows(result)]
    if not rows:
        return []
    heads = [head for _, head, _ in SIDE_EFFECTS]
    table = [f"| condition | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *rows]
    said = (
        "KL: nats per token from the model that a condition was made of, over that model's own whole answers, full vocabulary; *from "
        "base*: from the base over the base's answers. CE change: cross-entropy in nats per token on neutral text, less that of the model "
        f"as it is ({result['side_effects']['neutral_text']}). Repeated: runs of four words said before. Of control directions the mean, "
        "with the middle 95 % of draws; other intervals are clustered by question or text."
    )
    return ["## Side effects", "\n".join(table), said]


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
