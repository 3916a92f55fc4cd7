"""The card and the printed table of training dynamics, beside what the paper found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from emprobe.files import atomic_path, write_text
from emprobe.report.cards import command
from emprobe.report.dynamics_plots import LOSS_NAMES, dynamics_figure

WORLD = (
    "The organism is half a million parameters in a synthetic world, scored exactly. Where it disagrees with the paper, it says what so "
    "small a model does, and not that the paper is wrong; where it agrees, it checks the tool. The default grid of learning rates and "
    "steps was chosen after six trial runs on these questions, for a spread of final alignment, and correlations depend on that choice."
)
PUBLISHED = """\
| paper (34 to 36 fine-tunes of Qwen2.5-32B on finance) | r | ρ | R² | max_diff |
|---|---|---|---|---|
| training loss, harmless, first-plot questions | .82 | .75 | .687 | 17.0 |
| evaluation loss, harmless, first-plot questions | | | | 18.6 |
| training loss, aligned, first-plot questions | | | | 16.1 |
| evaluation loss, aligned, first-plot questions | | | .687 | 18.8 |
| training loss, harmless, harmful-behaviour prompts | .75 | .29 | .556 | 2.1 / 1.5 |
| evaluation loss, aligned, harmful-behaviour prompts | | | .743 | |
| training loss, harmless, 200 general prompts | .50 | | | |

Its conclusion: lower in-domain loss goes with lower alignment, and no schedule was found that keeps alignment at the same loss. The \
published table of first-plot questions, run through `emprobe study dynamics --runs FILE --loss train_loss eval_loss --score harmless \
alignment`, gives r .82 [.76, .92] (.81 to .85 without any one run) and ρ .75 [.47, .89] for training loss and harmlessness, and the \
four max_diff above to the digit at tolerance 0; a straight line with as much noise gives 15.1 to 22.3 for the first of them, so it is \
what such noise gives."""


def dynamics_lines(result: Mapping[str, Any]) -> list[str]:
    """What was found, as lines to print."""
    lines = [f"{'loss against score':<46}{'runs':>5}  {'Pearson r':<22}{'Spearman ρ':<22}max_diff (no relation; line with this noise)"]
    for one in result["relations"]:
        largest = one["max_diff"]
        nulls = "; ".join(f"{largest['nulls'][kind]['low']:.1f} to {largest['nulls'][kind]['high']:.1f}" for kind in ("unrelated", "line"))
        lines.append(
            f"{_name(one):<46}{one['runs']:>5}  {_shown(one['pearson']):<22}{_shown(one['spearman']):<22}{largest['value']:.1f} ({nulls})"
        )
        if one["left_out"]:
            lines.append(f"  {one['left_out']} of {one['rows'] + one['left_out']} rows lack a number and were left out")
    lines += [f"  left out: {why}" for why in result.get("unusable", [])]
    if "summary" in result:
        lines += ["", *_said(result)]
    return lines


def dynamics_card(result: Mapping[str, Any]) -> str:
    """A Hugging Face model card in Markdown."""
    world = result["way"] == "world"
    base = result["inputs"].get("base", {}).get("name")
    data = ModelCardData(base_model=None if world else base, library_name="emprobe", tags=["emprobe", "model-organism"])
    what = f"of {base}" if base else f"in {result['inputs']['table']['file']}"
    first = result["relations"][0]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# Training dynamics: loss and alignment over {first['runs']} runs {what}",
        *([WORLD] if world else []),
        "## At the end of runs",
        _table(result),
        f"Intervals of 95 % from resampling whole runs (rows: {first['row_of_run']} of each). *p*: scores shuffled among runs. "
        "*Without one run*: the range of r as each run in turn is left out. "
        "*max_diff*: the largest score difference among pairs in which the better-scoring run has a loss at most "
        f"{first['max_diff']['tolerance']:g} above the other's; its lower end is a bootstrap's, which can say nothing of an upper one. "
        "Beside it, 95 % of what shuffled scores give, and of a straight line with the runs' own noise about it dealt out at random: as "
        "much is to be expected of such noise. (That noise holds any run that stands out, so this is no test for one.)",
        "![relations, nulls, ways of the runs](dynamics.png)",
        _tolerances(result),
        *_given(result),
        *_checkpoints(result),
        *(
            ["## The direction on its way", "\n".join(f"* {line}" for line in _said(result)), _changes(result)]
            if "summary" in result
            else []
        ),
        "## Beside the paper (arXiv 2606.20814, part 1)",
        PUBLISHED,
        "## What was measured",
        _measured(result),
        f"## Run it again\n\n```\n{command(_flags(result), 'study dynamics')}\n```",
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)
    return text


def write_dynamics(folder: Path, result: Mapping[str, Any]) -> None:
    """The figure and the card of a result folder."""
    with atomic_path(folder / "dynamics.png") as path:
        dynamics_figure(result).savefig(path, format="png", dpi=80, metadata={"Software": None})
    write_text(folder / "README.md", dynamics_card(result))


def _name(one: Mapping[str, Any]) -> str:
    loss = LOSS_NAMES.get(one["loss"], one["loss"])
    return f"{loss}, {one['score']}" + ("" if one["set"] == "all" else f", {one['set']}")


def _shown(found: Mapping[str, Any]) -> str:
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _table(result: Mapping[str, Any]) -> str:
    rows = ["| loss, score | runs | r | p | without one run | ρ | R² | max_diff | no relation | a line |", "|---" * 10 + "|"]
    for one in result["relations"]:
        found, null = one["max_diff"], one["pearson"].get("null")
        nulls = [f"{found['nulls'][kind]['low']:.1f} to {found['nulls'][kind]['high']:.1f}" for kind in ("unrelated", "line")]
        cells = [
            _name(one),
            str(one["runs"]),
            _shown(one["pearson"]),
            "-" if null is None else f"{null['p']:.2g}",
            f"{one['without_one']['lowest']:+.2f} to {one['without_one']['highest']:+.2f}" if one["without_one"] else "-",
            _shown(one["spearman"]),
            f"{one['r_squared']:.3f}",
            f"{found['value']:.1f} [{found['low']:.1f}, -]",
            *nulls,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    lost = [f"{_name(one)}: {one['left_out']} rows lack a number and were left out." for one in result["relations"] if one["left_out"]]
    pairs = [
        f"* {_name(one)}: {one['max_diff']['better_run']} scores {one['max_diff']['value']:.1f} above {one['max_diff']['worse_run']}."
        for one in result["relations"]
        if "better_run" in one["max_diff"]
    ]
    lost += [f"Left out: {why}" for why in result.get("unusable", [])]
    return "\n".join([*rows, "", *lost, *(["Which runs those are:", "", *pairs] if pairs else [])]).strip()


def _tolerances(result: Mapping[str, Any]) -> str:
    """What becomes of max_diff where more or less counts as similar loss."""
    heads = [f"{one['tolerance']:g}" for one in result["relations"][0]["max_diff"]["by_tolerance"]]
    rows = [f"| max_diff where this much more loss is similar | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    values = [[f"{found['value']:.1f}" for found in one["max_diff"]["by_tolerance"]] for one in result["relations"]]
    rows += [f"| {_name(one)} | {' | '.join(own)} |" for one, own in zip(result["relations"], values, strict=True)]
    said = "Where it leaps between small tolerances, many runs end at about one loss with very different scores: there loss says little."
    return "\n".join([*rows, "", said])


def _given(result: Mapping[str, Any]) -> list[str]:
    found = [one for one in result["relations"] if "within_given" in one]
    if not found:
        return []
    rows = [f"| among runs of equal {found[0]['within_given']['column']} | r | ρ |", "|---|---|---|"]
    both = ("pearson", "spearman")
    rows += [f"| {_name(one)} | {' | '.join(_shown(one['within_given'][kind]) for kind in both)} |" for one in found]
    return ["\n".join(rows)]


def _checkpoints(result: Mapping[str, Any]) -> list[str]:
    found = [one for one in result["relations"] if "checkpoints" in one]
    if not found:
        return []
    heads = ("all", "between", "within")
    rows = ["| loss, score | rows | " + " | ".join(f"{head}: r | ρ" for head in heads) + " |", "|---" * 8 + "|"]
    for one in found:
        cells = [
            _shown(one["checkpoints"][head][kind]) if head in one["checkpoints"] else "-"
            for head in heads
            for kind in ("pearson", "spearman")
        ]
        rows.append(f"| {_name(one)} | {one['checkpoints']['rows']} | {' | '.join(cells)} |")
    said = (
        "Over checkpoints, clustered by run: all rows, the means of runs (between), and each run's means taken away (within). Within a run "
        "both loss and alignment follow the clock, so a high correlation there says little."
    )
    return ["## Over checkpoints", "\n".join(rows), said]


def _said(result: Mapping[str, Any]) -> list[str]:
    """The direction's way in sentences."""
    found, n = result["summary"], len(result["runs"])
    lines = []
    for what, words in (
        ("appears", "appears (reliable, and nearer its last than 95 % of random directions)"),
        ("saturates", "reaches 90 % of its last norm"),
    ):
        when = found[what]
        lines.append(
            f"the direction {words} from step {when['median']:g} on in the median run ({when['first']} to {when['last']}; {when['runs']} "
            f"of {n} runs)"
            if when["runs"]
            else f"the direction never {words}"
        )
    last, parts = found["last_directions"], found["components"]
    lines.append(
        f"last directions of two runs: cosine {last['mean']:.3f} on average ({last['lowest']:.3f} to {last['highest']:.3f}); 95 % of "
        f"random ones below {last['random_p95']:.2f}, of random ones with the base's covariance below {last['covariance_p95']:.2f}"
    )
    lines.append(
        f"first component of a run's way: {100 * parts['mean'][0]:.0f} % of its variance ({100 * parts['lowest'][0]:.0f} to "
        f"{100 * parts['highest'][0]:.0f}); random walks of the same moves {100 * parts['walks']['mean'][0]:.0f} %"
    )
    local = found["local_cosine"]
    if "mean" in local:
        top = max(range(len(local["mean"])), key=lambda i: local["mean"][i]["value"])
        lines.append(
            f"local cosine, mean of runs: highest at step {local['steps'][top]}, {_shown(local['mean'][top])}; -1 is straight on, random "
            f"walks {local['random_walk'][0]:.2f} to {local['random_walk'][1]:.2f} (with these moves' second moments "
            f"{local['random_walk_of_these_moves'][0]:.2f} to {local['random_walk_of_these_moves'][1]:.2f})"
        )
    for curve, kinds in found["change_points"].items():
        jumps = f"in {kinds['abrupt']} of {n} runs" if kinds["abrupt"] else "none found"
        lines.append(f"jump of {curve}: {jumps} (bent without a jump: {kinds['curved']}, straight: {kinds['none']})")
    if not found["change_points"]:
        lines.append("change-points: not looked for, there are too few checkpoints")
    for name, half in found["half_way"].items():
        lines.append(
            f"half of the fall, {name}: loss at step {half['loss']:.0f}, alignment at step {half['alignment']:.0f} (medians of "
            f"{half['runs']} runs; alignment later in {half['later']})"
        )
    for name, seen in found["coherence"].items():
        lines.append(
            f"coherence, {name}: {seen['base']:.1f} of the base, {seen['at_end']:.1f} at the end of runs, lowest {seen['lowest']:.1f}"
        )
    return lines


def _changes(result: Mapping[str, Any]) -> str:
    found = result["summary"]["change_points"]
    rows = ["| curve | jumps | bent | straight | largest share of the way between two checkpoints (even drift) | where runs jump |"]
    rows.append("|---|---|---|---|---|---|")
    for curve, kinds in found.items():
        jumps = ", ".join(f"{j['run']} {j['between'][0]:g}-{j['between'][1]:g} [{j['low']:g}, {j['high']:g}]" for j in kinds["jumps"][:6])
        more = f" and {len(kinds['jumps']) - 6} more" if len(kinds["jumps"]) > 6 else ""
        shares = f"{100 * kinds['share']:.0f} % ({100 * kinds['even_share']:.0f} %)"
        rows.append(f"| {curve} | {kinds['abrupt']} | {kinds['curved']} | {kinds['none']} | {shares} | {jumps or 'none'}{more} |")
    said = (
        "A *jump* is a straight line with a step that fits better than the line (p < .05 of lines with noise, any place) and better "
        "than a cubic of as many parameters; in brackets the 95 % likelihood interval of its place, in steps. What a cubic fits as well is "
        "*bent*."
    )
    return "\n".join([*rows, "", said]) if found else "Too few checkpoints for change-points."


def _measured(result: Mapping[str, Any]) -> str:
    inputs = result["inputs"]
    if "table" in inputs:
        return f"{inputs['table']['file']}, {inputs['table']['rows']} rows, SHA-256 {inputs['table']['sha256'][:16]}."
    sets = "; ".join(f"{n} questions {name}" for name, n in inputs["questions"].items())
    return (
        f"Losses on {inputs['evaluation']} held-back conversations of the domain and as many of those trained on, nats per token. {sets}. "
        f"Scores: {inputs['scoring']}. The direction is the mean difference, tuned minus base, at the last prompt token of the "
        f"{inputs['outside']} questions out of the domain, at resid_post of block {inputs['layer']}. `runs.csv` has a row for each run, "
        "checkpoint and set, and goes back in with `--runs`."
    )


def _flags(result: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that count for this way of running."""
    asked = result["inputs"]["command"]
    always, table = ("tolerance", "draws", "seed"), ("runs", "loss", "score", "run", "step", "set", "given")
    of_table = result["way"] == "table"
    first = "runs" if of_table else "base"
    return {first: asked[first]} | {name: v for name, v in asked.items() if name in always or (name in table) == of_table}
