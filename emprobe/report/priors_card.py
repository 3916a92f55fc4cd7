"""The card and the printed table of what predicts alignment after fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.files import atomic_path, write_text
from emprobe.report.cards import command
from emprobe.report.priors_plots import priors_figure

WORLD = (
    "The organisms are half a million parameters in a synthetic world, whose prompts are a domain, a task and an item put into one of "
    "three sentences: labels tell nearly all that can be told of them, and so they should predict well. What is found here checks the "
    "tool; it says nothing for or against the paper's claim about language models."
)
PAPER = (
    ("finance -> 1,414 general prompts, 32B, lasso", "random directions", "R2 .39 to .47"),
    ("finance -> 320 harmful prompts, Coder 32B, lasso", "random directions", "R2 .456 to .544"),
    ("finance -> 320 harmful prompts, Coder 32B, lasso", "principal directions", "R2 .425 to .465"),
    ("insecure -> 320 harmful prompts, Coder 32B, lasso", "random directions", "R2 .22 to .38"),
    ("insecure -> 320 harmful prompts, Coder 32B, lasso", "principal directions", "R2 .236 to .385"),
)
READING = (
    "The paper squares 150 projections at layer 64 and compares with a mean and with permutations; no baseline knows the prompt. Its "
    "published results for a pretrained model repeat those of the instruct model, number by number, so that they test no other model: here "
    "both models' weights are recorded and must differ. An earlier prototype of this world, with nothing planted, reached correlations of "
    ".16 to .44 with ridge, .31 with domain and task, and .81 with these where one cell was trained."
)


def shown(estimate: Mapping[str, Any]) -> str:
    """Value and interval.

    >>> shown({"value": 0.5, "low": -0.25, "high": None})
    '+0.500'
    """
    if estimate["low"] is None or estimate["high"] is None:
        return f"{estimate['value']:+.3f}"
    return f"{estimate['value']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"


def priors_lines(result: Mapping[str, Any]) -> list[str]:
    """Every case: what was predicted, the predictors, and the verdict."""
    lines = []
    for case in result["cases"]:
        lines += [f"{case['name']}: {_what(case)}", *(f"  note: {note}" for note in case["notes"])]
        lines += [f"  {'predictor':<52}{'R2 (ridge, held-out families)':<34}{'r':>7}{'RMSE':>10}{'p':>8}"]
        for row in _main(case):
            p = f"{row['null']['p']:.2g}" if "null" in row else "-"
            lines.append(f"  {row['name']:<52}{shown(row['r2']):<34}{row['r']['value']:>7.3f}{row['rmse']['value']:>10.4g}{p:>8}")
        lines += [f"  {_gain_name(row):<52}{shown(row['r2']):<34} gain {shown(row['gain'])}" for row in case["gain"]]
        lines += [f"  * {sentence}" for sentence in case["verdict"]] + [""]
    return lines[:-1]


def priors_card(result: Mapping[str, Any]) -> str:
    """A Hugging Face model card in Markdown."""
    names = list(dict.fromkeys(case["models"]["base"]["name"] for case in result["cases"]))
    data = ModelCardData(base_model=None if result["world"] else names[0], library_name="emprobe", tags=["emprobe", "model-organism"])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# What predicts alignment after fine-tuning, before it",
        *([WORLD] if result["world"] else []),
        "## What it says",
        *(f"**{case['name']}**\n\n" + "\n".join(f"* {sentence}" for sentence in case["verdict"]) for case in result["cases"]),
        f"Rules: {result['rules']}",
        "![every predictor with its interval, and R2 by layer](priors.png)",
        "## Predictors",
        *(part for case in result["cases"] for part in _case(case)),
        "## Beside the paper",
        _paper(result),
        READING,
        "## How it was measured",
        _method(result),
        f"## Run it again\n\n```\n{command(result['inputs']['command'], 'study priors')}\n```",
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text


def write_priors(folder: Path, result: Mapping[str, Any]) -> None:
    """The figure and the card of a result folder."""
    with atomic_path(folder / "priors.png") as path:
        priors_figure(result).savefig(path, format="png", dpi=80, metadata={"Software": None})
    write_text(folder / "README.md", priors_card(result))


def _main(case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(row for row in case["predictors"] if row["group"] == "baseline"), *case["chosen"]]


def _what(case: Mapping[str, Any]) -> str:
    design, scores = case["design"], case["scores"]
    return (
        f"{design['n']} prompts in {design['families']} families, {design['k']} directions of {design['d_model']} dimensions; "
        f"{case['score']}, mean {scores['mean']:.3g}, sd {scores['sd']:.3g}, {100 * scores['between_families']:.0f} % of variance between "
        "families"
    )


def _gain_name(row: Mapping[str, Any]) -> str:
    return f"all baselines + {'PCA' if row['group'] == 'activations' else 'random'}: {row['source']}"


def _case(case: Mapping[str, Any]) -> list[str]:
    rows = ["| predictor | R2, ridge | r | RMSE | permuted R2, 95 % | p |", "|---|---|---|---|---|---|"]
    for row in _main(case):
        null = row.get("null")
        chance = f"{null['low']:+.3f} to {null['high']:+.3f} | {null['p']:.2g}" if null else "- | -"
        rows.append(f"| {row['name']} | {shown(row['r2'])} | {row['r']['value']:.3f} | {row['rmse']['value']:.4g} | {chance} |")
    rows += [f"| **{_gain_name(row)}** | {shown(row['r2'])} (gain {shown(row['gain'])}) | | | | |" for row in case["gain"]]
    notes = [f"{note[0].upper()}{note[1:]}." for note in case["notes"]]
    return [
        f"### {case['name']}",
        " ".join([f"{_what(case)[0].upper()}{_what(case)[1:]}; directions of {case['directions_of']}.", *notes]),
        "\n".join(rows),
        "Best places, looked at after the fact (no choice within folds), ridge and lasso:",
        _places(case),
        *_before_after(case),
        "Models: " + "; ".join(f"{role} {one['name']}, weights {one['fingerprint']}" for role, one in case["models"].items()) + ".",
    ]


def _places(case: Mapping[str, Any]) -> str:
    """The best place of each model and kind of direction, linear and squared."""
    rows = ["| place | R2, ridge | p | R2, lasso |", "|---|---|---|---|"]
    inside = [row for row in case["predictors"] if row["group"] != "baseline"]
    kinds = dict.fromkeys((row["source"], row["group"], row["squared"]) for row in inside)
    for kind in kinds:
        best = max((r for r in inside if (r["source"], r["group"], r["squared"]) == kind), key=lambda r: float(r["r2"]["value"]))
        p = f"{best['null']['p']:.2g}" if "null" in best else "-"
        rows.append(f"| {best['name']} | {shown(best['r2'])} | {p} | {shown(best['lasso']) if 'lasso' in best else '-'} |")
    return "\n".join(rows)


def _before_after(case: Mapping[str, Any]) -> list[str]:
    found = case["before_after"]
    if found is None:
        return []
    return [
        f"Scores before and after: mean {found['before']:.3g} and {found['after']:.3g}; correlation over prompts Pearson "
        f"{shown(found['pearson'])}, Spearman {shown(found['spearman'])} (intervals over families). The paper's mean over 7 to 16 "
        "comparisons is .28 to .30."
    ]


def _paper(result: Mapping[str, Any]) -> str:
    rows = ["| what | directions | R2 |", "|---|---|---|"]
    rows += [f"| arXiv 2606.20814, {what} | {directions} | {r2} |" for what, directions, r2 in PAPER]
    for case in result["cases"]:
        for row in case["chosen"]:
            word = "principal" if row["group"] == "activations" else "random"
            rows.append(f"| {case['name']}, {row['source']} model, ridge | {word} directions | {shown(row['r2'])} |")
    return "\n".join(rows)


def _method(result: Mapping[str, Any]) -> str:
    design = result["cases"][0]["design"]
    return (
        f"{design['repeats']} x {design['splits']} folds; paraphrases of one question are never on both sides. Everything is fitted within "
        f"the training part: principal directions, words, standardisation, penalties and places (by {design['inner']} inner folds, grouped "
        "too). Squares are of centred projections, and so hold nothing linear. Random directions are the mean of "
        f"{design['random_seeds']} draws. Intervals: Nadeau and Bengio's correction, variance times 1/J + n_test/n_train. Permutations: "
        f"{design['permutations']}, families exchanged, measured on {design['permutation_repeats']} repeat(s), as is the score found; "
        f"they choose places anew. Lasso on {design['lasso_repeats']} repeat(s), random directions of the first draw. The gain is of "
        "activations beside all baselines, their weight chosen on inner folds, paired over folds. The default number of directions is a "
        "tenth of the prompts."
    )
