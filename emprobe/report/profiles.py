"""A direction's layers as figures; each takes a result of `emprobe direction`, or what `layer_profile` gave, and an Axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from emprobe.directions import Choice, LayerProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DETECTED, SURE, NULL = "#b2182b", "#2166ac", "#888888"


def draw_detection(result: Mapping[str, Any] | LayerProfile, *, layer: int | None = None, ax: Axes | None = None) -> Axes:
    """Cross-fitted AUROC of every layer with its interval, over the band that 95 % of relabellings stay in.

    `layer` is marked as the one taken; a result of `emprobe direction` names its own.
    """
    ax, rows = _axes(ax), _plain(result)["profile"]
    layers, found = [row["layer"] for row in rows], [row["auroc"] for row in rows]
    ax.fill_between(layers, 0.5, [row["null_p95"] for row in rows], color=NULL, alpha=0.25, lw=0, label="95 % of relabellings")
    ax.axhline(0.5, color=NULL, lw=0.8)
    values = [e["value"] for e in found]
    spread = [[e["value"] - e["low"] for e in found], [e["high"] - e["value"] for e in found]]
    ax.errorbar(layers, values, spread, color=DETECTED, marker="o", ms=4, capsize=2, lw=1, label="held-out AUROC, 95 % interval")
    _finish(ax, result, layer, "AUROC", min(0.4, *(e["low"] for e in found)))
    return ax


def draw_certainty(result: Mapping[str, Any] | LayerProfile, *, layer: int | None = None, ax: Axes | None = None) -> Axes:
    """Per layer: split-half cosine, cosine with the true direction and its interval, and the share of energy in five dimensions.

    `layer` is marked as in `draw_detection`.
    """
    ax, rows = _axes(ax), _plain(result)["profile"]
    layers = [row["layer"] for row in rows]
    halves = [(row["layer"], row["split_half"]) for row in rows if row["split_half"] is not None]
    ax.plot(*zip(*halves, strict=True), color="black", marker="^", ms=4, ls="--", lw=1, label="split-half cosine") if halves else None
    known = [(row["layer"], row["truth"]) for row in rows if row["truth"] is not None]
    if known:
        where = [layer for layer, _ in known]
        ax.plot(
            where,
            [e["value"] for _, e in known],
            color=SURE,
            marker="o",
            ms=4,
            lw=1,
            label="cosine with that of endless prompts (estimated)",
        )
        ax.fill_between(where, [e["low"] for _, e in known], [e["high"] for _, e in known], color=SURE, alpha=0.15, lw=0)
    ax.plot(layers, [row["top_energy"] for row in rows], color=NULL, marker="s", ms=4, lw=1, label="energy in 5 dimensions")
    ax.plot(layers, [row["bf16_rounding"] for row in rows], color=NULL, marker="x", ms=4, ls=":", lw=1, label="lost if kept in bf16")
    _finish(ax, result, layer, "cosine or share", min([0.0, *(half for _, half in halves)]))
    return ax


def profile_figure(result: Mapping[str, Any] | LayerProfile, *, layer: int | None = None) -> Figure:
    """Both pictures side by side; `layer` as in `draw_detection`."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(11, 4), layout="constrained")
    for ax, draw in zip(made.subplots(1, 2), (draw_detection, draw_certainty), strict=True):
        draw(result, layer=layer, ax=ax)
    return made


def _axes(ax: Axes | None) -> Axes:
    from matplotlib.figure import Figure

    return ax if ax is not None else Figure(figsize=(5.5, 4), layout="constrained").subplots()


def _plain(result: Mapping[str, Any] | LayerProfile) -> Mapping[str, Any]:
    return result if isinstance(result, Mapping) else result.as_dict()


def _finish(ax: Axes, result: Mapping[str, Any] | LayerProfile, taken: int | None, label: str, low: float) -> None:
    found = _plain(result)
    direction = found.get("direction", {})
    taken = direction.get("layer") if taken is None else taken
    layers = [row["layer"] for row in found["profile"]]
    if taken is not None:
        ax.axvline(taken, color="black", ls="--", lw=0.8, label="layer taken")
    ax.set_xlabel(f"layer ({direction.get('site') or found['site']})")
    ax.set_xticks(layers if len(layers) <= 16 else layers[:: len(layers) // 8])
    ax.set_ylabel(label)
    ax.set_ylim(low, 1.03)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def choice_line(result: Mapping[str, Any]) -> str:
    """What was chosen how, in one sentence."""
    choice = result["choice"]
    if choice is None:
        return f"Layer {result['direction']['layer']} was asked for; nothing was chosen."
    return str(Choice.from_dict(choice))
