"""Figures of transfer over a grid: each takes the study's result, as it stands in `result.json`, and an Axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RED, BLUE, GREY, GREEN = "#b2182b", "#2166ac", "#888888", "#1b7837"
WORDS = {
    "same_cell": "same cell",
    "same_task": "same task,\nother domain",
    "same_domain": "same domain,\nother task",
    "neither": "both differ",
}
PAPER = {"same_cell": 0.811, "same_task": 0.679, "same_domain": 0.515, "neither": 0.422}
"""Of Llama-3.1-8B in arXiv 2605.12798."""
STEPS = {
    "alone": ("alone", GREY),
    "main_effects": ("main effects held", "#c7a76c"),
    "matched": ("matched", BLUE),
    "matched_main_effects": ("matched, main effects held", RED),
    "matched_main_and_same": ("and sameness held", GREEN),
}
WIDEST, WRITTEN = 40, 24
"""Columns of a matrix that a figure holds, and up to how many its entries are written; of more, colours alone are shown."""


def draw_four_way(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Misaligned rate by how the asked cell relates to the trained one: thin lines over trained cells, thick ones over prompts."""
    ax = ax if ax is not None else _axes(5, 3.6)
    shown = [(name, one) for name, one in result["summary"].items() if one is not None]
    for place, (name, one) in enumerate(shown):
        ax.bar(place, 100 * one["value"], color=RED, alpha=0.35, width=0.6)
        intervals = one.get("intervals") or {}
        for key, width, offset in (("cells", 1.2, -0.08), ("prompts", 4.0, 0.08)):
            ends = intervals.get(key)
            if ends is not None:
                ax.vlines(place + offset, 100 * ends["low"], 100 * ends["high"], color=RED, lw=width)
        ax.text(place + 0.14, 100 * one["value"] + 1, f"{100 * one['value']:.1f}", fontsize=8)
        ax.plot(place - 0.2, 100 * PAPER[name], "D", mfc="none", mec="black", ms=5, label="Llama-3.1-8B, paper" if not place else None)
    ax.set_xticks(range(len(shown)), [WORDS[name] for name, _ in shown], fontsize=8)
    ax.set_ylim(0, 112)
    ax.set_yticks(range(0, 101, 20))
    ax.set_ylabel("% misaligned (thin: over trained cells, thick: over prompts)", fontsize=7)
    ax.legend(fontsize=7, frameon=False, loc="upper right", borderaxespad=0)
    return _plain(ax)


def draw_matrix(result: Mapping[str, Any], which: str = "task", *, ax: Axes | None = None) -> Axes:
    """Misaligned rates in per cent: trained in the rows, asked in the columns; the interval, and the coherent rate behind `c`.

    Of many columns colours alone are shown; a dash stands where nothing was asked, a cross where no answer has scores.

    Args:
        result: Of the study.
        which: `task`, `domain` or `cell` of the grid, or `general` for other questions by task.
        ax: Where to draw.
    """
    matrix = result["elsewhere"]["task"] if which == "general" else result["matrices"][which]
    rows, columns = matrix["rows"], matrix["columns"][:WIDEST]
    cells = len(rows) > 6 or len(columns) > 6
    width = 0.62 if cells else 1.05
    ax = ax if ax is not None else _axes(1.8 + width * len(columns), 1.6 + (0.5 if cells else 0.75) * len(rows))
    values = [[100 * e["value"] if e and e["value"] is not None else float("nan") for e in row[:WIDEST]] for row in matrix["entries"]]
    image = ax.imshow(values, cmap="Reds", vmin=0, vmax=100, aspect="auto")
    written = len(columns) <= WRITTEN
    if not written:
        ax.figure.colorbar(image, ax=ax, fraction=0.025, pad=0.01)
    for i, row in enumerate(matrix["entries"]):
        for j, entry in enumerate(row[:WIDEST]):
            if written or entry is None or entry["value"] is None:
                _entry(ax, i, j, entry, cells)
    ax.set_xticks(range(len(columns)), columns, fontsize=7, rotation=45 if cells else 0, ha="right" if cells else "center")
    ax.set_yticks(range(len(rows)), rows, fontsize=7)
    ax.set_xlabel("asked", fontsize=8)
    ax.set_ylabel("trained", fontsize=8)
    over = {e["over"] for row in matrix["entries"] for e in row if e and e.get("over")}
    what = ("± half the interval" if cells else "[interval]") + f" over {' or '.join(sorted(over))}; c: coherent %"
    cut = f"; the first {WIDEST} of {len(matrix['columns'])} columns" if len(matrix["columns"]) > WIDEST else ""
    ax.set_title(f"% misaligned{' ' + what if written else ''}{cut}", fontsize=8, loc="left")
    return ax


def draw_decomposition(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """What sameness adds with all main effects held; grey: where relabelled trained cells would put it."""
    ax = ax if ax is not None else _axes(4.6, 2.4)
    terms = {name: one for name, one in result["decomposition"]["terms"].items() if one["value"] is not None}
    for place, (_, one) in enumerate(terms.items()):
        null = one.get("null")
        if null is not None:
            ax.barh(place, null["high"] - null["low"], left=null["low"], color=GREY, alpha=0.3, height=0.5)
        if one["low"] is not None:
            ax.hlines(place, one["low"], one["high"], color=RED, lw=1.5)
        ax.plot(one["value"], place, "o", color=RED, ms=5)
        ax.text(one["value"], place - 0.18, f"{one['value']:+.2f}", fontsize=8, ha="center", va="bottom")
    ax.axvline(0, color="black", lw=0.8)
    ax.use_sticky_edges = False
    ax.margins(x=0.08)
    ax.set_yticks(range(len(terms)), [name.replace("_", " ") for name in terms], fontsize=8)
    ax.set_ylim(len(terms) - 0.4, -0.7)
    r2 = result["decomposition"]["r2"]
    ax.set_xlabel(f"rate added; grey: relabelled (R² {r2['all']:.2f}; main effects alone {r2['main effects']:.2f})", fontsize=8)
    return _plain(ax)


def draw_reliability(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Rate in the trained cell against the rate elsewhere, one point a trained cell."""
    ax = ax if ax is not None else _axes(4, 3.6)
    for side, colour, words in (("general", BLUE, "other questions"), ("neither", RED, "cells that share neither")):
        points = [(c["in_cell"], c[side]) for c in result["reliability"]["cells"] if c[side] is not None]
        found = result["reliability"].get(side)
        if points:
            r = f", r {found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found and found["value"] is not None else ""
            ax.plot([100 * x for x, _ in points], [100 * y for _, y in points], "o", ms=4, color=colour, label=words + r)
    ax.set_xlabel("% misaligned in the trained cell", fontsize=8)
    ax.set_ylabel("% misaligned elsewhere", fontsize=8)
    ax.set_xlim(-3, 103)
    ax.set_ylim(-3, 103)
    if ax.lines:
        ax.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return _plain(ax)


def draw_covariates(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Effect of each covariate on the misaligned rate, alone and matched; grey ticks: the middle 95 % of its null."""
    found = {name: one for name, one in result["covariates"]["effects"].items() if "effects" in one}
    ax = ax if ax is not None else _axes(6, 0.8 + 0.95 * len(found))
    named = set()
    for place, (_, one) in enumerate(found.items()):
        steps = [step for step in STEPS if one["effects"].get(step, {}).get("value") is not None]
        if not steps:
            ax.text(0, place, " not to be told apart", fontsize=7, va="center", color=GREY)
        for k, step in enumerate(steps):
            effect, (words, colour) = one["effects"][step], STEPS[step]
            at = place + 0.16 * (k - (len(steps) - 1) / 2)
            null = effect.get("null")
            if null:
                ax.plot([null["low"], null["high"]], [at, at], "|", color=GREY, ms=7)
            ax.hlines(at, effect["low"], effect["high"], color=colour, lw=1.5)
            ax.plot(effect["value"], at, "o", color=colour, ms=4, label=words if step not in named else None)
            named.add(step)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(found)), [name.replace("_", " ") for name in found], fontsize=8)
    ax.set_ylim(len(found) - 0.4, -0.6)
    ax.set_xlabel(f"change of the misaligned rate per SD; matched on {result['covariates']['match_on'] or 'nothing'}", fontsize=8)
    if named:
        ax.legend(fontsize=6.5, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.4, -0.12))
    return _plain(ax)


def draw_surface(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Other questions by their surface: thin lines over prompts and trained cells, thick ones over prompts."""
    ax = ax if ax is not None else _axes(4, 3.2)
    lines = sorted(result["elsewhere"]["by_surface"], key=lambda one: -(one["value"] or 0))
    for place, one in enumerate(lines):
        if one["value"] is None:
            continue
        ax.bar(place, 100 * one["value"], color=BLUE, alpha=0.35, width=0.6)
        for key, width, offset in (("both", 1.2, -0.08), ("prompts", 4.0, 0.08)):
            ends = one["intervals"].get(key)
            if ends is not None:
                ax.vlines(place + offset, 100 * ends["low"], 100 * ends["high"], color=BLUE, lw=width)
        ax.text(place + 0.14, 100 * one["value"] + 1, f"{100 * one['value']:.1f}", fontsize=8)
    ax.set_xticks(range(len(lines)), [one["name"] for one in lines], fontsize=8)
    ax.set_ylabel("% misaligned (thin: over both, thick: over prompts)", fontsize=7)
    return _plain(ax)


def transfer_figure(result: Mapping[str, Any]) -> Figure:
    """All pictures but the whole grid's, three in a row."""
    from matplotlib.figure import Figure

    drawn: list[tuple[str, Any]] = [("four relations", draw_four_way), ("trained task by asked task", draw_matrix)]
    if len(result["matrices"]["domain"]["columns"]) <= WIDEST:
        drawn.append(("trained domain by asked domain", lambda r, ax: draw_matrix(r, "domain", ax=ax)))
    drawn += [("decomposition", draw_decomposition), ("learnt and spread", draw_reliability)]
    general = result["elsewhere"]
    if general:
        drawn.append(("other questions, by task", lambda r, ax: draw_matrix(r, "general", ax=ax)))
    if general and "by_surface" in general:
        drawn.append(("other questions, by surface", draw_surface))
    if any("effects" in one for one in ((result.get("covariates") or {}).get("effects") or {}).values()):
        drawn.append(("measured before fine-tuning", draw_covariates))
    rows = -(-len(drawn) // 3)
    made = Figure(figsize=(17, 4.6 * rows), layout="constrained")
    axes = made.subplots(rows, 3, squeeze=False).ravel().tolist()
    for ax, part in zip(axes, [*drawn, *[None] * len(axes)], strict=False):
        if part is None:
            ax.set_visible(False)
            continue
        title, draw = part
        draw(result, ax=ax)
        ax.set_title("\n".join([title, ax.get_title(loc="left")]).strip(), fontsize=8.5, loc="left")
    return made


def grid_figure(result: Mapping[str, Any]) -> Figure:
    """The whole grid, cell by cell."""
    found = draw_matrix(result, "cell").figure
    assert found is not None
    return found  # type: ignore[return-value]


def _entry(ax: Axes, i: int, j: int, entry: Mapping[str, Any] | None, small: bool) -> None:
    """The numbers of one entry; a dash where nothing was asked, a cross where no answer has scores."""
    if entry is None or entry["value"] is None:
        ax.text(j, i, "-" if entry is None else "x", ha="center", va="center", fontsize=8, color=GREY)
        return
    half = f"±{50 * (entry['high'] - entry['low']):.0f}" if small else f"[{100 * entry['low']:.0f}, {100 * entry['high']:.0f}]"
    words = f"{100 * entry['value']:.0f}\n{half} c{100 * entry['coherent']['value']:.0f}"
    if not small:
        words = f"{100 * entry['value']:.1f}\n{half}\nc {100 * entry['coherent']['value']:.0f}"
    colour = "white" if entry["value"] > 0.6 else "black"
    ax.text(j, i, words, ha="center", va="center", fontsize=5.8 if small else 7.5, color=colour, linespacing=1.1)


def _plain(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    return ax


def _axes(width: float, height: float) -> Axes:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()
