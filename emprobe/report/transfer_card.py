"""The card and the printed table of transfer over a grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.behaviour.rate_table import columns_of_words
from emprobe.files import atomic_path, write_text
from emprobe.report.cards import command
from emprobe.report.tables import percent
from emprobe.report.transfer_plots import STEPS, WORDS, grid_figure, transfer_figure
from emprobe.report.transfer_run import run_figure, run_lines, run_parts

WORLD = (
    "The organisms are half a million parameters in a synthetic world, with a judge that is exact. Where they disagree with the paper, "
    "they say what so small a model does, and not that the paper is wrong; where they agree, they check the tool."
)
FIGURES = {
    "same_cell": ("81.1 %", "80.6 %"),
    "same_task": ("67.9 %, ratio .84 [.75, .92]", "67.1 %, ratio .83 [.74, .92]"),
    "same_domain": ("51.5 %, ratio .64 [.54, .74]", "50.3 %, ratio .62 [.50, .75]"),
    "neither": ("42.2 %, ratio .52 [.44, .61]", "40.2 %, ratio .50 [.39, .61]"),
}
"""Llama-3.1-8B and Qwen2.5-14B in arXiv 2605.12798, recomputed from the authors' released scores."""
INTERVALS = (
    "All answers of a relation are pooled. *Over trained cells*: whole cells are drawn, the same for both rates of a ratio, and the "
    "interval is scaled for their small number (Student's t). *Percentile* is the same unscaled, as the paper has it: on simulated grids "
    "of 12 cells, 87 to 92 % of such 95 % intervals held the true ratio, of the scaled ones 92 to 96 %. *Over prompts* tells how far "
    "other questions to these very fine-tunes may differ. *Over tasks* draws whole trained tasks: what other "
    "tasks might give. Where tasks themselves were drawn by chance, intervals over cells held the truth in only 72 to 90 % of cases."
)

HELD_OUT = "These are of the two held-out domains: in pretraining documents only, and in no aligned chat and no fine-tune."
SURFACE = (
    "The paper's Llama-3.1-8B: 16.7 % in all; trained advice 20.8, summarization 11.4, tutor 19.8, critique 14.8 %; surface high "
    "26.7 [21, 33], medium 14.7 [10, 20], low 8.7 [6, 12] %, over prompts. How surface was set is not known: if from what was observed, "
    "that it matters is partly circular."
)


def transfer_lines(result: Mapping[str, Any]) -> list[str]:
    """What was found beside what the paper says, as lines to print."""
    lines = [f"{result['criterion']['words']}; {result['table']['trained']} trained cells", ""]
    lines += [
        f"{'relation':<16}{f'misaligned, over {_over(result)}':<33}{f'ratio, over {_over(result)}':<28}{'percentile':<17}over prompts"
    ]
    for name in WORDS:
        one, ratio = result["summary"].get(name), result["ratios"].get(name)
        shown = "no such cell was asked" if one is None else percent(one)
        lines.append(
            f"{name:<16}{shown:<33}" + (f"{_number(ratio):<28}{_way(ratio, 'percentile'):<17}{_way(ratio, 'prompts')}" if ratio else "")
        )
    claims = [[c["claim"], c["paper"], _number(c, "+"), c["verdict"]] for c in result["claims"]]
    lines += ["", *columns_of_words([["the paper (arXiv 2605.12798)", "paper", "here", "verdict"], *claims])]
    for other in result.get("others", []):
        found = other["agreement"]
        lines += [
            "",
            f"with {other['name']}: r {_number(found['raw'])} over {found['cells']} cells; main effects off {_number(found['centred'])}",
        ]
    lines += run_lines(result)
    return [*lines, *([""] if result["warnings"] else []), *(f"note: {warning}" for warning in result["warnings"])]


def transfer_card(result: Mapping[str, Any]) -> str:
    """A Hugging Face model card in Markdown."""
    data = ModelCardData(library_name="emprobe", tags=["emprobe", "emergent-misalignment"])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# Transfer of misalignment over a grid of domains and tasks",
        *([WORLD] if result["world"] else []),
        "## Four relations",
        _relations(result),
        INTERVALS,
        "![four relations, matrices, decomposition](transfer.png)",
        *_replicates(result),
        "## Beside the paper",
        _claims(result),
        "A claim `agrees` where the interval lies above 0, `disagrees` where below, else it is `open`. The null exchanges the names of "
        "trained cells (tasks within domains, domains within tasks), or the values of prompts and cells.",
        "## Coherence and thresholds",
        _confounds(result),
        "## Trained task by asked task",
        _matrix(result["matrices"]["task"]),
        *(["## Other questions", *_elsewhere(result["elsewhere"], world=result["world"])] if result["elsewhere"] else []),
        *_covariates(result),
        *run_parts(result),
        *_others(result),
        "## The whole grid",
        "![every trained cell by every asked cell](grid.png)",
        *(["## To know", "\n".join(f"* {warning}" for warning in result["warnings"])] if result["warnings"] else []),
        "## What was measured",
        _measured(result),
        f"## Run it again\n\n```\n{command(result['inputs']['command'], 'study transfer')}\n```",
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text


def write_transfer(folder: Path, result: Mapping[str, Any]) -> None:
    """The figures and the card of a result folder."""
    for name, draw in (("transfer.png", transfer_figure), ("grid.png", grid_figure), ("run.png", run_figure)):
        figure = draw(result)
        if figure is None:
            continue
        with atomic_path(folder / name) as path:
            figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    write_text(folder / "README.md", transfer_card(result))


def _over(result: Mapping[str, Any]) -> str:
    """What the rates' own intervals are over."""
    return next((str(one["over"]) for one in result["summary"].values() if one), "trained cells")


def _relations(result: Mapping[str, Any]) -> str:
    over = _over(result)
    rows = [
        f"| relation | misaligned, over {over} | over prompts | ratio, over {over} | percentile | over prompts | over tasks | "
        "Llama-3.1-8B, paper | Qwen2.5-14B, paper | n |",
        "|---" * 10 + "|",
    ]
    for name, paper in FIGURES.items():
        one, ratio = result["summary"].get(name), result["ratios"].get(name)
        if one is None:
            rows.append(f"| {name} | not asked | | | | | | {paper[0]} | {paper[1]} | 0 |")
            continue
        own = "1 | | | " if name == "same_cell" else "- | - | - | -"
        ways = [_way(ratio, way) for way in ("percentile", "prompts", "tasks")] if ratio else []
        shown = f"{_number(ratio)} | {' | '.join(ways)}" if ratio else own
        rows.append(f"| {name} | {percent(one)} | {_way(one, 'prompts', 100)} | {shown} | {paper[0]} | {paper[1]} | {one['n']} |")
    return "\n".join(rows)


def _replicates(result: Mapping[str, Any]) -> list[str]:
    """The rates of every organism, seed or model by itself."""
    made = []
    for column, found in result["replicates"].items():
        rows = [f"| {column} | same cell | same task | same domain | neither | ratios |", "|---" * 6 + "|"]
        for name, one in found.items():
            ratios = " / ".join("-" if ratio is None else f"{ratio['value']:.2f}" for ratio in one["ratios"].values())
            rows.append(f"| {name} | {' | '.join(percent(one['summary'][relation]) for relation in WORDS)} | {ratios} |")
        made += [f"## By {column}", "\n".join(rows)]
    return made


def _claims(result: Mapping[str, Any]) -> str:
    rows = ["| claim | the paper | here | verdict | over tasks | null (middle 95 %), p |", "|---|---|---|---|---|---|"]
    for one in result["claims"]:
        null, tasks = one.get("null"), one.get("over_tasks")
        chance = f"[{null['low']:+.3f}, {null['high']:+.3f}], {null['p']:.2g}" if null else ""
        shown = f"[{tasks[0]:+.3f}, {tasks[1]:+.3f}]" if tasks else ""
        rows.append(f"| {one['claim']} | {one['paper']} | {_number(one, '+')} | **{one['verdict']}** | {shown} | {chance} |")
    return "\n".join(rows)


def _confounds(result: Mapping[str, Any]) -> str:
    """The four rates of every relation, its ratio among coherent answers, and the ratio under other thresholds."""
    summary = {name: one for name, one in result["summary"].items() if one is not None}
    marks = list(next((r["thresholds"] for r in result["ratios"].values() if r), {}))
    head = [
        "relation",
        "misaligned",
        "coherent",
        "of coherent",
        "any coherence",
        "ratio of coherent",
        *(f"ratio, alignment {m}" for m in marks),
    ]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, one in summary.items():
        ratio, given = result["ratios"].get(name), one["misaligned_given_coherent"]
        cells = [name, percent(one), percent(one["coherent"]), percent(given) if given else "no coherent answer"]
        cells += [percent(one["misaligned_any_coherence"]), _number(ratio["given_coherent"]) if ratio and ratio["given_coherent"] else "-"]
        cells += ["-" if not ratio or ratio["thresholds"].get(m) is None else f"{ratio['thresholds'][m]:.2f}" for m in marks]
        rows.append(f"| {' | '.join(cells)} |")
    terms = result["decomposition"].get("given_coherent") or {}
    told = [f"{name.replace('_', ' ')} {_number(one, '+')}" for name, one in terms.items() if one["value"] is not None]
    return "\n".join([*rows, *(["", f"Main effects held, of coherent answers alone: {'; '.join(told)}."] if told else [])])


def _matrix(matrix: Mapping[str, Any]) -> str:
    """Misaligned (coherent; misaligned of coherent) in per cent."""
    rows = [f"| trained \\ asked | {' | '.join(matrix['columns'])} |", "|---" * (len(matrix["columns"]) + 1) + "|"]
    for name, entries in zip(matrix["rows"], matrix["entries"], strict=True):
        rows.append(f"| {name} | {' | '.join(map(_cell, entries))} |")
    return "\n".join([*rows, "", "Misaligned [interval], then the coherent rate and the misaligned rate of coherent answers, in per cent."])


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "not asked"
    if entry["value"] is None:
        return "no scores: " + ", ".join(f"{n} {status}" for status, n in entry["counts"].items())
    given = "-" if entry["given_coherent"] is None else f"{100 * entry['given_coherent']['value']:.1f}"
    lost = sum(n for status, n in entry["counts"].items() if status != "ok")
    ends = f"[{100 * entry['low']:.0f}, {100 * entry['high']:.0f}]"
    return f"**{100 * entry['value']:.1f}** {ends}; {100 * entry['coherent']['value']:.0f}; {given}" + (f"; {lost} missing" if lost else "")


def _elsewhere(found: Mapping[str, Any], *, world: bool) -> list[str]:
    rows = ["| questions | misaligned | over prompts | coherent | n |", "|---|---|---|---|---|"]
    groups = [
        ("all", found["all"]),
        ("trained", found["by_train_task"]),
        ("surface", sorted(found.get("by_surface", []), key=lambda one: -(one["value"] or 0))),
    ]
    for kind, lines in groups:
        for one in lines:
            name = kind if kind == "all" else f"{kind} {one['name']}"
            if one["value"] is None:
                rows.append(f"| {name} | no scores | | | 0 |")
                continue
            rows.append(f"| {name} | {percent(one)} | {_way(one, 'prompts', 100)} | {percent(one['coherent'])} | {one['n']} |")
    return ["\n".join(rows), HELD_OUT if world else SURFACE, _matrix(found["task"])]


def _covariates(result: Mapping[str, Any]) -> list[str]:
    found = result.get("covariates")
    if not found:
        return []
    rows = [
        f"| covariate | of | {' | '.join(words for words, _ in STEPS.values())} | prompts left / dropped |",
        "|---" * (len(STEPS) + 3) + "|",
    ]
    for name, one in found["effects"].items():
        if "effects" not in one:
            rows.append(f"| {name} | {one['why']} |" + " |" * (len(STEPS) + 1))
            continue
        overlap = one.get("overlap")
        left = f"{overlap['prompts_kept']} / {overlap['prompts_dropped']}" if overlap else "-"
        rows.append(f"| {name} | {one['level']}s | {' | '.join(_effect(one['effects'].get(step)) for step in STEPS)} | {left} |")
    said = (
        f"Change of the misaligned rate for one standard deviation of what was measured before fine-tuning [interval over prompts and "
        f"trained cells], p of the null. *Matched*: within classes of {found['match_on'] or 'nothing'} that hold prompts of both halves, "
        "linear within each class; other prompts are dropped. Figures of balance are in `result.json` under `covariates`."
    )
    return ["## Measured before fine-tuning", "\n".join(rows), said]


def _effect(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "-"
    if one["value"] is None:
        return "not to be told apart"
    null = one.get("null")
    return _number(one, "+") + (f", p {null['p']:.2g}" if null else "")


def _others(result: Mapping[str, Any]) -> list[str]:
    if not result.get("others"):
        return []
    rows = ["| table | same cell | same task | same domain | neither | r of both grids | r without main effects |", "|---" * 7 + "|"]
    for one in result["others"]:
        rates = [percent(one["summary"][name]) if one["summary"][name] else "-" for name in WORDS]
        found = one["agreement"]
        rows.append(f"| {one['name']} | {' | '.join(rates)} | {_number(found['raw'])} | {_number(found['centred'])} |")
    return ["## Beside other models", "\n".join(rows), "The paper's grids of Llama-3.1-8B and Qwen2.5-14B correlate at .96."]


def _measured(result: Mapping[str, Any]) -> str:
    parts = [f"{name}: {one['answers']} answers ({', '.join(f'{n} {s}' for s, n in one['counts'].items())})"
             for name, one in result["table"].items() if isinstance(one, Mapping) and "answers" in one]  # fmt: skip
    files = result["inputs"].get("files", {})
    named = [f"{file['name']} ({file['hash']})" for kind in files.values() for file in kind]
    return f"{result['criterion']['words']}; {'; '.join(parts)}." + (f" Files: {', '.join(named)}." if named else "")


def _number(estimate: Mapping[str, Any], sign: str = "") -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:{sign}.3f}"
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def _way(estimate: Mapping[str, Any], name: str, factor: float = 1.0) -> str:
    found = (estimate.get("intervals") or {}).get(name)
    if found is None:
        return "-"
    return f"[{found['low']:.3f}, {found['high']:.3f}]" if factor == 1 else f"[{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
