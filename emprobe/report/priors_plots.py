"""Figures of what predicts alignment: every predictor with its interval, baselines beside activations, and chance drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"baseline": "#444444", "activations": "#b2182b", "random": "#2166ac", "gain": "#1b7837"}
NULL = "#bbbbbb"
STYLES = {"last_prompt_token": "-", "prompt_mean": "--"}


def draw_predictors(case: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """R2 of baselines, of activations with the place chosen within folds, and of both together; grey, 95 % of permutations."""
    ax = _axes(ax)
    rows = [row for row in case["predictors"] if row["group"] == "baseline"]
    rows += case["chosen"]
    shown = [(row["name"].replace(", place chosen within folds", " model"), row["r2"], row.get("null"), row["group"]) for row in rows]
    for gain in case["gain"]:
        word = "PCA" if gain["group"] == "activations" else "random"
        shown.append((f"all baselines + {word}: {gain['source']} model", gain["r2"], None, "gain"))
    for place, (_, r2, null, group) in enumerate(reversed(shown)):
        if null is not None:
            ax.fill_betweenx([place - 0.35, place + 0.35], max(null["low"], -0.5), null["high"], color=NULL, lw=0, zorder=0)
        ends = [[r2["value"] - r2["low"]], [r2["high"] - r2["value"]]]
        ax.errorbar([r2["value"]], [place], xerr=ends, fmt="o", ms=4, capsize=2, lw=1.2, color=COLOURS[group])
    ax.set_yticks(range(len(shown)), [name for name, *_ in reversed(shown)], fontsize=7)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlim(min(-0.25, *(max(r2["low"], -0.6) - 0.05 for _, r2, *_ in shown)), 1.02)
    ax.set_xlabel("R2 on held-out families (95 %); grey: permuted")
    return ax


def draw_prior_layers(case: Mapping[str, Any], source: str = "base", *, ax: Axes | None = None) -> Axes:
    """R2 at every layer: principal directions (red) and as many random ones (blue), linear, by position; dotted, the best baselines."""
    ax = _axes(ax)
    rows = [row for row in case["predictors"] if row.get("source") == source and not row["squared"]]
    for group, word in (("activations", "PCA"), ("random", "random")):
        for positions, style in STYLES.items():
            found = [row for row in rows if row["group"] == group and row["positions"] == positions]
            layers, values = [row["layer"] for row in found], [row["r2"]["value"] for row in found]
            ax.plot(layers, values, color=COLOURS[group], ls=style, marker="o", ms=3, lw=1.2, label=f"{word}, {positions}")
            if positions == "last_prompt_token":
                low, high = ([row["r2"][end] for row in found] for end in ("low", "high"))
                ax.fill_between(layers, low, high, color=COLOURS[group], alpha=0.1, lw=0)
    nulls = [row["null"]["high"] for row in rows if row.get("null")]
    if nulls:
        ax.axhspan(min(row["null"]["low"] for row in rows), max(nulls), color=NULL, alpha=0.5, lw=0, label="permuted, 95 %")
    _levels(ax, case)
    ax.set_xticks(sorted({row["layer"] for row in rows}))
    ax.set_xlabel(f"layer of the {source} model")
    ax.set_ylabel("R2 on held-out families")
    return ax


def priors_figure(result: Mapping[str, Any]) -> Figure:
    """A row for each fine-tune: all predictors, then layer by layer for each model."""
    from matplotlib.figure import Figure

    cases = result["cases"]
    sources = [row["source"] for row in cases[0]["against_random"]]
    rows = max(sum(1 for row in case["predictors"] if row["group"] == "baseline") + 2 * len(case["chosen"]) for case in cases)
    size = (6.2 + 4.2 * len(sources), max(3.4, 0.24 * rows + 1.0) * len(cases))
    figure = Figure(figsize=size, layout="constrained")
    ratios = [1.35, *[1.0] * len(sources)]
    axes = figure.subplots(len(cases), 1 + len(sources), squeeze=False, width_ratios=ratios)
    for case, row in zip(cases, axes, strict=True):
        draw_predictors(case, ax=row[0])
        for source, ax in zip(sources, row[1:], strict=True):
            draw_prior_layers(case, source, ax=ax)
        row[-1].legend(fontsize=6.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=4)
        for ax, title in zip(row, ("predictors", *sources), strict=True):
            ax.set_title(f"{case['name']}: {title}", fontsize=8.5, loc="left")
            ax.spines[["top", "right"]].set_visible(False)
    return figure


def _levels(ax: Axes, case: Mapping[str, Any]) -> None:
    """All baselines together, and the best of them alone."""
    cheap = [row for row in case["predictors"] if row["group"] == "baseline"]
    together, single = cheap[-1], max(cheap[:-1], key=lambda row: float(row["r2"]["value"]))
    ax.axhline(together["r2"]["value"], color="black", ls=":", lw=1.2, label=together["name"])
    ax.axhline(single["r2"]["value"], color=NULL, ls=":", lw=1.2, label=f"best baseline: {single['name']}")


def _axes(ax: Axes | None) -> Axes:
    from matplotlib.figure import Figure

    return ax if ax is not None else Figure(figsize=(6, 4), layout="constrained").subplots()
