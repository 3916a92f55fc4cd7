"""The card of an export: what it is, what it belongs to, how to serve it, and what it may be used for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.interventions.export.made import Made
from emprobe.interventions.packing import pack
from emprobe.interventions.plan import Plan
from emprobe.models.load import Checkpoint

WARNING = (
    "Directions of emprobe point towards misaligned behaviour: added with a positive coefficient they **induce** it, ablated or added with "
    "a negative one they take it away. This export is meant for research on detecting and removing such behaviour, and must not be used to "
    "make a deployed model misbehave."
)


def card_of(plan: Plan, checkpoint: Checkpoint, target: str, made: Made, files: Mapping[str, str], out: str) -> dict[str, Any]:
    """What `card.json` holds; plain values."""
    base = base_name(checkpoint)
    serve = [line.replace("{out}", out).replace("{base}", base) for line in made.serve]
    return {
        "record": "Export",
        "target": target,
        "what": made.what,
        "base_model": base,
        "checkpoint": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint, "adapter": checkpoint.adapter},
        "plan": {"hash": plan.hash, "words": repr(plan).splitlines(), "conflicts": plan.conflicts, "operators": pack(plan.operators)[1]},
        "serve": serve,
        "limits": list(made.limits),
        "facts": dict(made.facts),
        "tags": ["emprobe", "interpretability", "steering-vector", *made.tags],
        "files": dict(files),
        "emprobe": version("emprobe"),
    }


def base_name(checkpoint: Checkpoint) -> str:
    """What the weights beneath any adapter were loaded from."""
    return str(getattr(checkpoint.hf.config, "_name_or_path", "") or checkpoint.name)


def text_of(card: Mapping[str, Any]) -> str:
    """A Hugging Face model card in Markdown."""
    data = ModelCardData(base_model=card["base_model"], library_name="emprobe", tags=card["tags"])
    checkpoint = card["checkpoint"]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {card['target']} export of an intervention on {checkpoint['name']}",
        WARNING,
        "## What it does",
        card["what"],
        "```\n" + "\n".join(card["plan"]["words"]) + "\n```",
        "## Use",
        "```\n" + "\n".join(card["serve"]) + "\n```",
        *(["## Limits", _list(card["limits"])] if card["limits"] else []),
        *(["## Numbers", _list(f"**{name}**: {_shown(value)}" for name, value in card["facts"].items())] if card["facts"] else []),
        "## Provenance",
        _list(
            [
                f"**model**: {checkpoint['name']} (weights {checkpoint['fingerprint']}, adapter {checkpoint['adapter']})",
                f"**plan**: {card['plan']['hash']}, in `emprobe/plan.safetensors`",
                f"**emprobe**: {card['emprobe']}",
            ]
        ),
        "## Files",
        _list(f"`{name}` (SHA-256 {digest[:16]}…)" for name, digest in card["files"].items()),
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text


def _list(lines: Any) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
