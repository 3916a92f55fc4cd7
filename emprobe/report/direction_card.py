"""The card of a folder that `emprobe direction` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.directions.profile import certainty_lines
from emprobe.report.cards import WARNING
from emprobe.report.profiles import choice_line

READING = """* **split-half**: mean cosine between directions from two random halves of the questions, uncorrected.
* **cosine with the truth**: what the resamples' noise leaves of 1, with its 95 % interval.
* **held-out AUROC**: tuned from base rows (or True from False labels) by a direction fitted to other questions; 95 % interval.
* **p**, **q**: share of relabellings that reach it, and the same under false-discovery control over the layers.
* **top 5**: share of the squared norm in the five largest dimensions. **bf16**: what storing both means in bf16 would change."""


def direction_card(result: Mapping[str, Any]) -> str:
    """A Hugging Face model card in Markdown."""
    d, inputs = result["direction"], result["inputs"]
    checkpoint = inputs.get("base") or inputs["checkpoint"]
    data = ModelCardData(base_model=checkpoint["name"], library_name="emprobe", tags=["emprobe", "steering-vector", "interpretability"])
    facts = {name: value for name, value in d.items() if name not in ("provenance", "record")}
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# Direction {d['contrast']} of {(inputs.get('tuned') or checkpoint)['name']}",
        WARNING,
        choice_line(result),
        "## Layers",
        "![held-out AUROC and certainty by layer](profile.png)",
        "```\n" + "\n".join(certainty_lines(result)) + "\n```",
        READING,
        "## Direction",
        "\n".join(f"* **{name.replace('_', ' ')}**: {value:.4g}" if isinstance(value, float) else f"* **{name.replace('_', ' ')}**: {value}"
                  for name, value in facts.items()),
        "## Provenance",
        "\n".join(f"* **{name}**: {value['name']} ({value['fingerprint']})" for name, value in inputs.items()),
    ]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text
