"""Figures of training dynamics: each takes the study's result; chance is drawn wherever something is claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RED, BLUE, GREY, ORANGE = "#b2182b", "#2166ac", "#999999", "#e08214"
LOSS_NAMES = {"train_loss": "training loss", "eval_loss": "evaluation loss"}


def draw_relation(result: Mapping[str, Any], number: int = 0, *, ax: Axes | None = None) -> Axes:
    """Score against loss, a dot for each run, with the straight line, the correlations, and the pair of the largest difference."""
    ax, one = _axes(ax), result["relations"][number]
    points, largest = one["points"], one["max_diff"]
    x, y = np.array(points["loss"]), np.array(points["score"])
    ax.scatter(x, y, s=16, color=BLUE, alpha=0.75, lw=0)
    ends = np.array([x.min(), x.max()])
    ax.plot(ends, np.polyval(np.polyfit(x, y, 1), ends), color=GREY, lw=1)
    if largest["better"] >= 0:
        pair = [largest["worse"], largest["better"]]
        label = f"max_diff {largest['value']:.1f}"
        ax.plot(x[pair], y[pair], color=RED, lw=1.2, marker="o", ms=4, mfc="none", label=label)
    said = "\n".join(f"{sign} = {_interval(one[kind])}" for sign, kind in (("r", "pearson"), ("ρ", "spearman")))
    ax.plot([], [], " ", label=said)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(f"{LOSS_NAMES.get(one['loss'], one['loss'])}, {one['row_of_run']} of each run")
    ax.set_ylabel(_score(one))
    ax.legend(fontsize=6.5, frameon=False, loc="best")
    return ax


def draw_correlations(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Pearson (dots) and Spearman (rings) with intervals over runs; grey, what 95 % of shuffles of scores among runs stay below."""
    ax = _axes(ax)
    for place, one in enumerate(result["relations"]):
        null = one["pearson"].get("null")
        if null is not None:
            ax.barh(place, 2 * null["high"], left=-null["high"], height=0.7, color="#e6e6e6", zorder=0)
        for kind, shift, fill in (("pearson", 0.14, BLUE), ("spearman", -0.14, "white")):
            found = one[kind]
            ax.plot([found["low"], found["high"]], [place + shift] * 2, color=BLUE, lw=1.2)
            ax.plot(found["value"], place + shift, "o", ms=4.5, color=BLUE, mfc=fill)
    _names(ax, result["relations"])
    ax.axvline(0, color="black", lw=0.6)
    ax.set_xlim(-1.02, 1.02)
    ax.set_xlabel("correlation (dots: Pearson, rings: Spearman)\ngrey: scores shuffled among runs")
    return ax


def draw_max_diff(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """The largest score difference at similar or lower loss, beside what no relation gives, and a line with as much noise."""
    ax = _axes(ax)
    for place, one in enumerate(result["relations"]):
        found = one["max_diff"]
        for kind, colour, shift in (("unrelated", "#cccccc", 0.18), ("line", "#fdb863", -0.18)):
            null = found["nulls"][kind]
            label = {"unrelated": "scores shuffled", "line": "a line with this noise"}[kind] if place == 0 else None
            ax.barh(place + shift, null["high"] - null["low"], left=null["low"], height=0.3, color=colour, label=label)
        ax.plot([found["low"], found["high"]], [place] * 2, color=RED, lw=1.2)
        ax.plot(found["value"], place, "o", ms=5, color=RED, label="max_diff" if place == 0 else None)
    _names(ax, result["relations"])
    ax.set_xlim(left=0)
    ax.set_xlabel("largest score difference at similar or lower loss")
    ax.legend(fontsize=6.5, frameon=False)
    return ax


def draw_checkpoints(result: Mapping[str, Any], set: str | None = None, loss: str = "eval_loss", *, ax: Axes | None = None) -> Axes:
    """Every run's way from the base (upper right) through loss and alignment; a ring where it ends."""
    ax, name = _axes(ax), set or result["headline"]["set"]
    for one, colour in zip(result["runs"], _colours(result["runs"]), strict=True):
        x = [row[loss] for row in one["rows"]]
        y = [row["sets"][name]["alignment"] for row in one["rows"]]
        ax.plot(x, y, color=colour, lw=0.8, alpha=0.8)
        ax.plot(x[-1], y[-1], "o", ms=4, color=colour, mfc="white")
    ax.set_xlabel(f"{LOSS_NAMES.get(loss, loss)} (nats per token)")
    ax.set_ylabel(f"alignment, {name}")
    _rates(ax, result["runs"])
    return ax


def draw_alignment(result: Mapping[str, Any], set: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Alignment over training, a line for each run; crosses where a jump was found."""
    ax, name = _axes(ax), set or result["headline"]["set"]
    for one, colour in zip(result["runs"], _colours(result["runs"]), strict=True):
        y = [one["start"]["sets"][name]["alignment"], *(row["sets"][name]["alignment"] for row in one["rows"])]
        ax.plot(one["steps"], y, color=colour, lw=0.9, alpha=0.85)
        change = one["change_points"].get(f"alignment, {name}")
        if change and change["kind"] == "abrupt":
            place = float(np.mean(change["between"]))
            ax.plot(place, np.interp(place, one["steps"], y), "x", ms=6, color="black")
    ax.set_xlabel("step (crosses: a jump was found)")
    ax.set_ylabel(f"alignment, {name}")
    _rates(ax, result["runs"])
    return ax


def draw_local_cosine(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Local cosine of the direction's way: thin, each run; thick, their mean; bands, random walks; -1, straight on."""
    ax, found = _axes(ax), result["summary"]["local_cosine"]
    low, high = found["random_walk_of_these_moves"]
    ax.axhspan(low, high, color="#f0f0f0", lw=0, label="random walk, moves like these")
    ax.axhspan(*found["random_walk"], color="#d0d0d0", lw=0, label="random walk, any direction")
    ax.axhline(-1, color="black", ls=":", lw=1, label="straight on")
    for one in result["runs"]:
        values = np.array(one["trajectory"]["local_cosine"], dtype=float)
        ax.plot(one["steps"], values, color=BLUE, lw=0.5, alpha=0.45)
    if "mean" in found:
        ax.plot(found["steps"], [e["value"] for e in found["mean"]], color=RED, lw=2, label="mean of runs")
        ax.fill_between(found["steps"], [e["low"] for e in found["mean"]], [e["high"] for e in found["mean"]], color=RED, alpha=0.2, lw=0)
    ax.set_ylim(-1.05, 1.05)
    ax.set_xlabel("step")
    ax.set_ylabel("local cosine")
    ax.legend(fontsize=6.5, frameon=False, loc="upper right")
    return ax


def draw_way(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Cosine of the direction with its last (blue), and its norm as a share of the last (orange), a line for each run."""
    ax = _axes(ax)
    for place, one in enumerate(result["runs"]):
        way = one["trajectory"]
        to_last, norms = np.array(way["cosine_to_last"], dtype=float), np.array(way["norm"])
        ax.plot(one["steps"], to_last, color=BLUE, lw=0.8, alpha=0.6, label="cosine with the last" if place == 0 else None)
        ax.plot(one["steps"], norms / norms[-1], color=ORANGE, lw=0.8, alpha=0.6, label="norm / last norm" if place == 0 else None)
    ax.axhline(result["summary"]["last_directions"]["random_p95"], color=GREY, ls=":", lw=1, label="95 % of random directions")
    ax.set_ylim(0, 1.08)
    ax.set_xlabel("step")
    ax.legend(fontsize=6.5, frameon=False, loc="lower right")
    return ax


def draw_components(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Share of the way's variance along its first principal components, mean of runs; grey, random walks of the same moves."""
    ax, found = _axes(ax), result["summary"]["components"]
    at = np.arange(len(found["mean"]))
    ax.bar(at - 0.2, 100 * np.array(found["mean"]), 0.38, color=BLUE, label="runs (mean, range)")
    spread = 100 * np.abs(np.array([found["lowest"], found["highest"]]) - np.array(found["mean"]))
    ax.errorbar(at - 0.2, 100 * np.array(found["mean"]), spread, color="black", fmt="none", lw=0.8, capsize=2)
    ax.bar(at + 0.2, 100 * np.array(found["walks"]["mean"]), 0.38, color="#cccccc", label="random walks (mean, 97.5 %)")
    above = 100 * (np.array(found["walks"]["high"]) - np.array(found["walks"]["mean"]))
    ax.errorbar(at + 0.2, 100 * np.array(found["walks"]["mean"]), [0 * above, above], color="black", fmt="none", lw=0.8, capsize=2)
    ax.set_xticks(at, [f"PC {i + 1}" for i in at])
    ax.set_ylabel("% of variance")
    ax.legend(fontsize=6.5, frameon=False)
    return ax


def dynamics_figure(result: Mapping[str, Any]) -> Figure:
    """Every picture that the result has something for."""
    from matplotlib.figure import Figure

    n = len(result["relations"])
    drawn: list[tuple[Any, str]] = [
        (lambda ax, i=i: draw_relation(result, i, ax=ax), _title(result["relations"][i])) for i in range(min(n, 6))
    ]
    drawn += [(lambda ax: draw_correlations(result, ax=ax), "correlations"), (lambda ax: draw_max_diff(result, ax=ax), "max_diff")]
    if "runs" in result:
        drawn += [
            (lambda ax: draw_checkpoints(result, ax=ax), "ways of the runs"),
            (lambda ax: draw_alignment(result, ax=ax), "alignment over training"),
            (lambda ax: draw_way(result, ax=ax), "the direction on its way"),
            (lambda ax: draw_local_cosine(result, ax=ax), "turning"),
            (lambda ax: draw_components(result, ax=ax), "components of the way"),
        ]
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (draw, title) in zip(axes, drawn, strict=False):
        draw(ax)
        ax.set_title(title, fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(drawn) :]:
        ax.remove()
    return figure


def _axes(ax: Axes | None) -> Axes:
    from matplotlib.figure import Figure

    return ax if ax is not None else Figure(figsize=(5, 3.6), layout="constrained").subplots()


def _score(one: Mapping[str, Any]) -> str:
    return str(one["score"]) if one["set"] == "all" else f"{one['score']}, {one['set']}"


def _title(one: Mapping[str, Any]) -> str:
    return f"{_score(one)} / {LOSS_NAMES.get(one['loss'], one['loss'])}"


def _names(ax: Axes, relations: Sequence[Mapping[str, Any]]) -> None:
    ax.set_yticks(range(len(relations)), [_title(one).replace(" / ", "\n") for one in relations], fontsize=6.5)
    ax.set_ylim(len(relations) - 0.4, -0.6)


def _interval(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _shades(runs: Sequence[Mapping[str, Any]]) -> dict[float, str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    rates = sorted({one["lr"] for one in runs})
    return {rate: to_hex(colormaps["viridis"](0.85 * i / max(1, len(rates) - 1))) for i, rate in enumerate(rates)}


def _colours(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    shades = _shades(runs)
    return [shades[one["lr"]] for one in runs]


def _rates(ax: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
    for rate, colour in _shades(runs).items():
        ax.plot([], [], color=colour, label=f"lr {rate:g}")
    ax.legend(fontsize=6.5, frameon=False)
