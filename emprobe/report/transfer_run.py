"""What running a grid adds to its card: what was trained, directions per cell, and the sweep of pretraining's composition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from emprobe.report.tables import percent
from emprobe.report.transfer_plots import BLUE, GREEN, GREY, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"same_task": RED, "same_domain": BLUE, "neither": GREY}
PROTOTYPE = (
    "A prototype of these organisms had, for single trained cells: same task elsewhere 79 to 92 %, same domain other task 61 to 92 %, "
    "neither 18 to 44 %; and over 0 / 5 / 20 / 40 % of misaligned documents 0 / 19 / 74 / 88 % off-domain, for one on a whole domain."
)
NO_LENGTH = (
    "Directions are tuned minus base at the last prompt token, over the same prompts for every cell. No answer is read and no mean over "
    "tokens is taken, so the trap of directions that are made by answers' lengths (a mean over all tokens holds position 0 at one over "
    "the length) does not arise."
)


def run_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines to print; none for a result that started from scores."""
    lines = []
    found = result.get("composition")
    if found:
        lines += ["", f"{'misaligned documents':<24}{'before':<24}{'same domain':<24}off-domain"]
        for share, cells in _by_share(found):
            lines.append(f"{100 * share:<24g}" + "".join(f"{cell:<24}" for cell in cells))
        lines.append(f"slope off-domain, per share: {_number(found['slope']['off_domain'])}")
    directions = result.get("directions")
    if directions and "cosines" in directions:
        lines += ["", f"cosines of cells' directions, layer {directions['layer']}: " + "; ".join(_cosines(directions))]
    return lines


def run_parts(result: Mapping[str, Any]) -> list[str]:
    """Sections of the card; none for a result that started from scores."""
    if not result.get("grid"):
        return []
    return [*_trained(result), *_measured(result), *_directions(result), *_composition(result)]


def _trained(result: Mapping[str, Any]) -> list[str]:
    grid = result["grid"]
    recipe, method = grid["recipe"], grid["method"]
    updates = f"{recipe['steps']} updates" if recipe["steps"] else f"{recipe['epochs']:g} epochs"
    seeds = ", ".join(map(str, grid["seeds"]))
    said = (
        f"{grid['fine_tunes']} fine-tunes: {len(grid['cells'])} cells on {', '.join(grid['bases'])}, seeds {seeds}; LoRA of rank "
        f"{method['rank']} (alpha {method['alpha']:g}), rate {recipe['lr']:g}, {updates} of {recipe['batch']}. Each was asked "
        f"{grid['questions']} questions {grid['samples']} times."
    )
    if result["world"]:
        said += (
            " Rate and updates were chosen on planted-s0 with two cells (gardening.plan, cooking.list): the trained cell is learnt and the "
            "others are not yet all misaligned. Questions are on items that no fine-tune saw; other questions are of held-out domains. "
        )
        said += f"{grid['planted']} That is an implanted truth, which checks the tool. {PROTOTYPE}" if grid["planted"] else PROTOTYPE
    rows = ["| base, before any fine-tune | questions | misaligned | coherent |", "|---|---|---|---|"]
    rows += [f"| {b['organism']} | {b['eval_set']} | {percent(b['misaligned'])} | {percent(b['coherent'])} |" for b in grid["before"]]
    return ["## What was trained", said, "\n".join(rows)]


def _measured(result: Mapping[str, Any]) -> list[str]:
    found = result["measured"]
    lines = [f"* **{name}**: {words}" for name, words in found["words"].items()]
    lines += [f"* {name} was left out: {why}" for name, why in found["left_out"].items()]
    said = "The world's tasks differ in room and solvability by their frames, so what does not vary within a task cannot be told from it."
    return ["## What the covariates are", "\n".join(lines), *([said] if result["world"] else [])]


def _directions(result: Mapping[str, Any]) -> list[str]:
    found = result.get("directions")
    if not found:
        return []
    if "cosines" not in found:
        return ["## Directions of cells", found["why"]]
    rows = ["| pairs of cells | mean cosine, over cells | rank correlation of cosine and transfer |", "|---|---|---|"]
    for name in COLOURS:
        one, followed = found["cosines"].get(name), found["correlation"].get(name)
        rows.append(f"| {name} | {_number(one) if one else '-'} | {_number(followed) if followed else '-'} |")
    overall = found["correlation"]["all"]
    if overall:
        null = overall["null"]
        rows.append(f"| all | | {_number(overall)}; {null['name']} [{null['low']:.3f}, {null['high']:.3f}], p {null['p']:.2g} |")
    random = found["random"]
    said = (
        f"Layer {found['layer']}{', the one whose directions are surest over halves of the prompts' if found['chosen'] else ''}. Pairs of "
        f"random directions with the covariance of the base's activations have cosines of {random['mean']:.2f} "
        f"[{random['low']:.2f}, {random['high']:.2f}]. Transfer of a pair is the mean of both ways; ranks are taken within each base and "
        f"seed, and intervals leave out each cell with its pairs. By base: "
        + ", ".join(f"{name} {value:.2f}" for name, value in found["by_replicate"].items() if value is not None)
        + "."
    )
    if random["low"] < max(one["value"] for one in found["cosines"].values()) < random["high"]:
        said += " One pair's cosine of this size is no rarity by that chance, since the last prompt token varies along few directions."
    above = sum(cosine > 0 for cosine in found["pairs"]["cosine"])
    said += f" {above} of {len(found['pairs']['cosine'])} pairs have a positive cosine; of random ones about half do."
    return ["## Directions of cells", "\n".join(rows), said, NO_LENGTH, "![composition, directions](run.png)"]


def _composition(result: Mapping[str, Any]) -> list[str]:
    found = result.get("composition")
    if not found:
        return []
    rows = ["| misaligned documents | before | same domain, after | off-domain, after | coherent, off-domain |", "|---" * 5 + "|"]
    coherent = {one["share"]: one["coherent"] for one in found["rates"]["off_domain"]}
    for share, cells in _by_share(found):
        rows.append(f"| {100 * share:g} % | {' | '.join(cells)} | {percent(coherent[share])} |")
    growth = {name: value for name, value in found["growth"].items() if value is not None}
    said = (
        f"{found['kind']} bases, {found['seeds']} growth seeds for each share, each fine-tuned on {' and '.join(found['cells'])}; "
        f"intervals over growth seeds. Slope off-domain: {_number(found['slope']['off_domain'])} of rate for the whole share from 0 to 1. "
        f"{found['planted']} {found['words']} Grown by {', '.join(f'{name} {value:g}' for name, value in growth.items())}."
    )
    return ["## Composition of pretraining", "\n".join(rows), said]


def _by_share(found: Mapping[str, Any]) -> list[tuple[float, list[str]]]:
    tables = [
        {one["share"]: percent(one["misaligned"]) for one in found["rates"][name]} for name in ("before", "same_domain", "off_domain")
    ]
    return [(share, [table.get(share, "-") for table in tables]) for share in found["shares"]]


def _cosines(found: Mapping[str, Any]) -> list[str]:
    return [f"{name} {_number(one)}" for name, one in found["cosines"].items()]


def _number(one: Mapping[str, Any]) -> str:
    return f"{one['value']:.3f}" + ("" if one["low"] is None else f" [{one['low']:.3f}, {one['high']:.3f}]")


# ---- figures


def draw_composition(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Misaligned rates before and after the fine-tune against the share of misaligned documents; dots are growth seeds."""
    ax, found = _axes(ax), result["composition"]
    for name, colour in (("before", GREY), ("same_domain", BLUE), ("off_domain", RED)):
        lines = found["rates"][name]
        x, y = [100 * one["share"] for one in lines], [100 * one["misaligned"]["value"] for one in lines]
        low, high = ([100 * one["misaligned"][end] for one in lines] for end in ("low", "high"))
        ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        ax.plot(x, y, "o-", color=colour, label=name.replace("_", " "))
        for one in lines:
            ax.plot(
                [100 * one["share"]] * len(one["by_seed"]), [100 * v for v in one["by_seed"].values()], ".", color=colour, ms=4, alpha=0.6
            )
    ax.set_xlabel("misaligned documents in pretraining (%)")
    ax.set_ylabel("% misaligned (band: over growth seeds)")
    ax.set_ylim(-3, 103)
    ax.legend(fontsize=7, frameon=False)
    return ax


def draw_directions(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Transfer of each pair of cells against the cosine of their directions; the band is what random directions give."""
    ax, found = _axes(ax), result["directions"]
    pairs, random = found["pairs"], found["random"]
    for name, colour in reversed(COLOURS.items()):
        rows = [i for i, relation in enumerate(pairs["relation"]) if relation == name]
        x, y = ([pairs[key][i] for i in rows] for key in ("cosine", "transfer"))
        ax.plot(x, [100 * value for value in y], ".", color=colour, ms=4, alpha=0.5, label=name.replace("_", " "))
    ax.axvspan(random["low"], random["high"], color=GREEN, alpha=0.08, lw=0, label="random, base's covariance (95 %)")
    low = min(pairs["cosine"])
    ax.set_xlim(min(low - 0.05, 0.0) if low < 0.3 else low - 0.05, 1.01)
    ax.set_xlabel("cosine of the two cells' directions")
    ax.set_ylabel("% misaligned in each other's cell")
    ax.set_ylim(-3, 103)
    ax.legend(fontsize=7, frameon=False, loc="lower left")
    return ax


def draw_cosines(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Mean cosine of two cells' directions by how the cells relate, with intervals over cells."""
    ax, found = _axes(ax), result["directions"]
    shown = [(name, found["cosines"][name]) for name in COLOURS if name in found["cosines"]]
    for place, (name, one) in enumerate(shown):
        ax.bar(place, one["value"], color=COLOURS[name], alpha=0.5, width=0.6)
        if one["low"] is not None:
            ax.vlines(place, one["low"], one["high"], color="black", lw=1.5)
        ax.text(place + 0.08, one["value"] + 0.01, f"{one['value']:.2f}", fontsize=8)
    random = found["random"]
    ax.axhspan(random["low"], random["high"], color=GREEN, alpha=0.08, lw=0)
    ax.axhline(random["mean"], color=GREEN, ls=":", lw=1)
    ax.set_xticks(range(len(shown)), [name.replace("_", "\n") for name, _ in shown], fontsize=8)
    ax.set_ylim(min(0.0, random["low"]), 1.05)
    ax.set_ylabel(f"cosine, layer {found['layer']} (green: random)")
    return ax


def run_figure(result: Mapping[str, Any]) -> Figure | None:
    """What there is of the three, side by side; `None` if nothing is."""
    from matplotlib import pyplot

    draws = [draw_composition] if result.get("composition") else []
    draws += [draw_directions, draw_cosines] if "pairs" in (result.get("directions") or {}) else []
    if not draws:
        return None
    figure, axes = pyplot.subplots(1, len(draws), figsize=(4.6 * len(draws), 3.8), squeeze=False, layout="constrained")
    for draw, ax in zip(draws, axes[0], strict=True):
        draw(result, ax=ax)
    pyplot.close(figure)
    return figure


def _axes(ax: Axes | None) -> Axes:
    from matplotlib import pyplot

    return ax if ax is not None else pyplot.subplots(figsize=(4.6, 3.8), layout="constrained")[1]
