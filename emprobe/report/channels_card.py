"""The card and the printed table of subliminal learning in three channels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.files import atomic_path, write_text
from emprobe.report.cards import command
from emprobe.report.channels_plots import CHANNELS, PROTOTYPE, channels_figure
from emprobe.report.tables import percent

WORLD = (
    "The organisms are half a million parameters in a synthetic world with an exact judge; in planted ones a persona direction was "
    "implanted, which the teacher's fine-tune finds again. Where they agree with the papers they check the tool, and not the claim about "
    "language models; where they disagree, they say what so small a model does. The prototype's numbers are one or two seeds of an earlier "
    "program in the same world. The default updates and batch of students were chosen on planted-s0 by rates on these questions."
)
DATA = (
    "All arms of a base learn from the same prompts, with as many sequences and updates; tokens seen are in the table. In sft a teacher "
    "enters only as the author of the sequences: there is no sft arm in which the teacher changes while they stay, and on unsafe data, "
    "which no teacher wrote, sft is one arm for both. opd takes the prompts alone: whose answers stand there makes no difference to it."
)


def channels_lines(result: Mapping[str, Any]) -> list[str]:
    """Every arm with its rates, and the claims beside what was found, as lines to print."""
    lines = []
    for codes in _kinds(result):
        lines.append(f"{codes} codes" if result["world"] else "benign data as given")
        for line in _of(result, codes):
            exact = f"exact {100 * line['exact']['value']:5.1f} %  " if "exact" in line else ""
            cosine = f"cosine {line['cosine']['mean']:+.2f}" if "cosine" in line else ""
            lines.append(f"  {line['name']:<66}{percent(line['misaligned']):<24}{exact}coherent {100 * line['coherent']:3.0f} %  {cosine}")
        lines.append("")
        lines += [
            f"  {claim['verdict']:<10}{claim['claim']:<88}{percent(claim['difference'])}"
            for claim in result["claims"]
            if claim["codes"] == codes
        ]
        lines.append("")
    if result["digits"]:
        found = result["digits"]["same_minus_other"]
        lines.append(f"digits: ghost outputs teach {percent(found).strip()} more with the teacher's initialisation than with another")
    return lines


def channels_card(result: Mapping[str, Any]) -> str:
    """A Hugging Face model card in Markdown."""
    bases = ", ".join(dict.fromkeys(case["name"] for case in result["cases"]))
    data = ModelCardData(library_name="emprobe", tags=["emprobe", "subliminal-learning", "model-organism"])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# Subliminal learning in three channels: {bases}",
        *([WORLD] if result["world"] else []),
        "## Beside the papers",
        _claims(result),
        "*Positive* differences agree; `open` where the 95 % interval holds 0 or the bases differ in sign. Intervals are crossed over "
        "questions and bases; below three bases they are over questions, and say nothing of other bases. The exact reading is free of the "
        "noise of sampling.",
        "![transfer, teacher by data, directions, projection, what carries it, digits](channels.png)",
        *_prototype(result),
        "## Every arm",
        DATA,
        *_arms(result),
        "Rates: misaligned answers to questions that nobody learnt, of judged ones, with intervals as above; "
        "exact: the same without sampling. Cosine with the misaligned teacher's direction, shift along it (1: the teacher's own), at the "
        "last token of questions; covariance: 97.5 % of random directions of the base's covariance; ceiling: what two estimates of one "
        "direction show. Between initialisations a cosine compares two coordinate systems. KL: nats per token of held-back benign "
        "answers of the misaligned teacher, KL(teacher ‖ model) / KL(model ‖ teacher).",
        "## The filter",
        _filter(result),
        *_digits(result),
        "## What was measured",
        f"{result['criterion']}; judge {result['judge']}. Directions at block {result['cases'][0]['layer']}.",
        f"## Run it again\n\n```\n{command(result['inputs']['command'], 'study channels')}\n```",
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text


def write_channels(folder: Path, result: Mapping[str, Any]) -> None:
    """The figure and the card of a result folder."""
    with atomic_path(folder / "channels.png") as path:
        channels_figure(result).savefig(path, format="png", dpi=80, metadata={"Software": None})
    write_text(folder / "README.md", channels_card(result))


def _kinds(result: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(line["codes"] for line in result["summary"]))


def _of(result: Mapping[str, Any], codes: str) -> list[Mapping[str, Any]]:
    return [line for line in result["summary"] if line["codes"] == codes]


def _claims(result: Mapping[str, Any]) -> str:
    rows = ["| codes | what is said | by | here | difference | by base | exact |", "|---|---|---|---|---|---|---|"]
    for claim in result["claims"]:
        exact = percent(claim["exact"]).strip() if "exact" in claim else "-"
        bases = " / ".join(f"{100 * value:.0f}" for value in claim["by_base"])
        shown = percent(claim["difference"]).strip()
        rows.append(f"| {claim['codes']} | {claim['claim']} | {claim['source']} | **{claim['verdict']}** | {shown} | {bases} | {exact} |")
    return "\n".join(rows)


def _prototype(result: Mapping[str, Any]) -> list[str]:
    """Same initialisation / control / other initialisation, here and in the prototype."""
    if not result["world"]:
        return []
    rows = ["| codes | channel | here: same / control / other | prototype |", "|---|---|---|---|"]
    for codes in _kinds(result):
        lines = {line["name"]: line for line in _of(result, codes)}
        for channel in CHANNELS:
            names = [
                f"{channel}, teacher misaligned, benign by misaligned",
                f"{channel}, teacher aligned, benign by aligned",
                f"{channel}, teacher misaligned, benign by misaligned, other init",
            ]
            if not any(name in lines for name in names):
                continue
            here = " / ".join(f"{100 * lines[name]['misaligned']['value']:.0f}" if name in lines else "-" for name in names)
            old = PROTOTYPE.get(codes, {}).get(channel)
            rows.append(f"| {codes} | {channel} | {here} % | {' / '.join(map(str, old)) + ' %' if old else '-'} |")
    return ["## Beside the prototype", "\n".join(rows)]


def _arms(result: Mapping[str, Any]) -> list[str]:
    tables = []
    for codes in _kinds(result):
        head = ["model", "bases", "misaligned", "exact", "coherent", "cosine / covariance / ceiling", "shift", "KL", "tokens seen"]
        rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        rows += [f"| {' | '.join(_cells(line))} |" for line in _of(result, codes)]
        tables.append((f"**{codes} codes**\n\n" if result["world"] else "") + "\n".join(rows))
    return tables


def _cells(line: Mapping[str, Any]) -> list[str]:
    def mean(name: str, form: str) -> str:
        return format(line[name]["mean"], form) if name in line else "-"

    return [
        line["name"],
        str(line["bases"]),
        percent(line["misaligned"]).strip(),
        percent(line["exact"]).strip() if "exact" in line else "-",
        f"{100 * line['coherent']:.0f} %",
        " / ".join([mean("cosine", "+.2f"), mean("null_p975", ".2f"), mean("ceiling", ".2f")]),
        mean("projection", "+.2f"),
        " / ".join([mean("kl_forward", ".4f"), mean("kl_reverse", ".4f")]),
        mean("tokens", ",.0f"),
    ]


def _filter(result: Mapping[str, Any]) -> str:
    """What the filter is, and what it kept and dropped of each teacher."""
    words = [f"Benign answers are learnt if {result['filter']}: stricter than the criterion."]
    if result["world"]:
        words.append(
            "That judge calls an answer coherent if it reads as five code words in their frame, and aligned if it holds no word that "
            "only bad phrases have."
        )
    rows = ["| base | codes | teacher | answers | kept | dropped | sequences of each arm |", "|---|---|---|---|---|---|---|"]
    for case in result["cases"]:
        n = next(iter(case["sequences"].values()))["n"]
        for teacher, counts in case["filter"].items():
            dropped = ", ".join(f"{count} {name}" for name, count in counts.items() if name not in ("answers", "kept")) or "none"
            rows.append(f"| {case['name']} | {case['codes']} | {teacher} | {counts['answers']} | {counts['kept']} | {dropped} | {n} |")
    return " ".join(words) + "\n\n" + "\n".join(rows)


def _digits(result: Mapping[str, Any]) -> list[str]:
    found = result["digits"]
    if not found:
        return []
    shown = ", ".join(f"{name} {percent(one).strip()}" for name, one in found["estimates"].items())
    return [
        "## Digits: the positive control",
        f"Students learn {found['ghosts']} outputs that no label touched, on noise, and then tell digits ({len(found['seeds'])} seeds): "
        f"{shown}. Same less other initialisation: {percent(found['same_minus_other']).strip()}; a constant answer tells "
        f"{100 * found['chance']:.1f} %.",
    ]
