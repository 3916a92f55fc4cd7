"""The card and the printed table of activation shifts on training and on evaluation prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.files import atomic_path, write_text
from emprobe.report.cards import command
from emprobe.report.shifts_plots import shifts_figure
from emprobe.report.shifts_tables import (
    against_table,
    beside_table,
    correlations_table,
    counts,
    group_tables,
    others_table,
    predicted_table,
    signs_table,
)

WORLD = (
    "The organisms are half a million parameters in a synthetic world. Where they agree with the paper they check the tool, and not its "
    "claim about language models. Their prompts are made of twelve wordings and sixty items, so training and evaluation prompts share "
    "their wordings where the fine-tune was on all four tasks: shifts that depend on the wording then overlap by that alone. A fine-tune "
    "on one task (`gardening.plan-...`) is asked of three wordings, and the groups with other tasks have new ones."
)
PROTOTYPE = (
    "A prototype of this world, with other code and settings, had found: shifts overlap by .89 to 1.0, random subspaces hold at most .09, "
    "components of activations at most .39."
)
READING = (
    "*Share*: the projection fraction ‖P x‖ / ‖x‖, a norm, of evaluation shifts x about the mean training shift. Random subspaces have as "
    "many dimensions; those of the shifts' own covariance are beaten by construction, since leading components hold more than random "
    "mixtures of them. *Other half*: what the subspace of one half of the training prompts holds of the other half and, in "
    "brackets, of the evaluation prompts. *Control*: a fine-tune on good answers, about its own mean. A high share in the control's own "
    "subspace says that train and evaluation shifts share a subspace in any fine-tune, misaligned or not. Ranges are over layers."
)
CORRELATION = (
    "Correlation over prompts of how far a prompt's activation before lies in the training prompts' components with how its shift "
    "resembles the training shifts; between families, of their means. *Random*: prompt overlap with random subspaces instead (of no "
    "structure, or of the covariance of activations, whichever reaches further); the ends of 95 % of their correlations. Paper, with the "
    "mean cosine: last token .85, .89, .61 (layer 32) and .29, .26, .17 (layer 64), a random subspace .42 and -.11; mean over tokens -.18 "
    "to -.56."
)
PREDICTION = (
    "Before + mean training shift against the true activations after; *centred* about the mean before on training prompts, since raw "
    "cosines are of one large common part. The relative error is 1 where nothing is added. The least-squares amount is found on training "
    "prompts, family by family from the others. Random vectors (of the covariance of activations) have the norm of the mean shift. "
    "Paper, raw cosine: .797 to .934, .777 to .858, .835 to .803, .779 to .713."
)


def shifts_lines(result: Mapping[str, Any]) -> list[str]:
    """What was found beside what the paper says, as lines to print."""
    lines = []
    for tuned, rule in dict.fromkeys((sign["tuned"], sign["positions"]) for sign in result["signs"]):
        cases = sum(case["tuned"] == tuned for case in result["cases"])
        lines.append(f"{tuned}, {rule}: holds / fails / open over layers of {cases} case{'s' if cases > 1 else ''}")
        lines += [
            f"  {sign['says']:<84}{counts(sign):<14}{sign['low']:+.3f} to {sign['high']:+.3f} ({sign['unit']})"
            for sign in result["signs"]
            if (sign["tuned"], sign["positions"]) == (tuned, rule)
        ]
        lines.append("")
    for case in result["cases"]:
        lines += [f"note, {case['name']}: {note}" for note in [*case["notes"], *_undefined(case)]]
    return lines if lines and lines[-1] else lines[:-1]


def shifts_card(result: Mapping[str, Any], paper: Sequence[Mapping[str, Any]]) -> str:
    """A Hugging Face model card in Markdown.

    Args:
        result: Of the study.
        paper: The paper's numbers, row by row.
    """
    names = [found["base"]["name"] for found in result["inputs"]["checkpoints"].values()]
    data = ModelCardData(base_model=None if result["world"] else names[0], library_name="emprobe", tags=["emprobe", "activations"])
    prompts = "; ".join(f"{c['name']}: {c['prompts']['train']} training, {c['prompts']['evaluation']} evaluation" for c in result["cases"])
    notes = [f"* {case['name']}: {note}" for case in result["cases"] for note in [*case["notes"], *_undefined(case)]]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# Activation shifts on training and on evaluation prompts",
        *([WORLD] if result["world"] else []),
        "## Does it hold here",
        signs_table(result),
        "Counted over layers and cases; *open*: the 95 % interval (over families of prompts) holds 0. Lines with dots are not the paper's: "
        "they are what its claim has to be told from.",
        "![share in the training shifts' subspace, sizes, mean shift, correlation, prediction](shifts.png)",
        "## Beside the paper's numbers",
        beside_table(result, paper),
        _size(result) + (f" {PROTOTYPE}" if result["world"] else ""),
        "## Against chance, the ceiling and other fine-tunes",
        against_table(result, "centred"),
        READING,
        "Uncentred, with the mean shift among what is held:",
        against_table(result, "uncentred"),
        "Fine-tune by fine-tune:",
        others_table(result),
        "*Spans overlap*: mean squared cosine of the two training subspaces, k / d_model for random ones.",
        "## Prompt overlap and shift",
        correlations_table(result),
        CORRELATION,
        "## Activations after, predicted",
        predicted_table(result),
        PREDICTION,
        *group_tables(result),
        "## What was measured",
        f"Prompts only, no answers. {prompts}. {result['draws']} draws of each null. `prompts.parquet` has every prompt's numbers.",
        *(["\n".join(notes)] if notes else []),
        f"## Run it again\n\n```\n{command(result['inputs']['command'], 'study shifts')}\n```",
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text


def write_shifts(folder: Path, result: Mapping[str, Any], paper: Sequence[Mapping[str, Any]]) -> None:
    """The figure and the card of a result folder."""
    if any("undefined" not in place for case in result["cases"] for place in case["places"]):
        with atomic_path(folder / "shifts.png") as path:
            shifts_figure(result).savefig(path, format="png", dpi=80, metadata={"Software": None})
    write_text(folder / "README.md", shifts_card(result, paper))


def _size(result: Mapping[str, Any]) -> str:
    size = result["size"]
    said = f"{size:g} of the variance" if size < 1 else f"{size:g} dimensions"
    return f"{said} here, .95 of the variance in the paper, whose random subspace is one draw (here the mean over draws)."


def _undefined(case: Mapping[str, Any]) -> list[str]:
    """What does not exist where, each said once."""
    said: dict[str, list[str]] = {}
    for place in case["places"]:
        for found in (place, *(place.get(part, {}) for part in ("centred", "uncentred", "predicted"))):
            if "undefined" in found:
                said.setdefault(found["undefined"], []).append(f"{place['positions']}[{place['layer']}]")
        for part in ("centred", "uncentred"):
            for note in place.get(part, {}).get("notes", []):
                said.setdefault(note, []).append(f"{place['positions']}[{place['layer']}]")
    return [f"{', '.join(dict.fromkeys(places))}: {why}" for why, places in said.items()]
