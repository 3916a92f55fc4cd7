"""Overlap over layers as a figure; takes a result of `emprobe overlap`, or what `overlap_layers` gave, and an Axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emprobe.overlap import OverlapLayers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALUE, CEILING = "#b2182b", "black"
NULLS = {
    "haar": ("#888888", "isotropic null"),
    "analytic": ("#555555", "isotropic null, analytic"),
    "covariance_matched": ("#2166ac", "covariance-matched null"),
    "activation_differences": ("#1b7837", "activation-difference null"),
    "permutation": ("#e08214", "permutation null"),
}
NAMES = {
    "mean_squared_cosine": "mean squared cosine",
    "explained_l2": "share of b's squared norm in a",
    "projection_fraction": "projection fraction",
    "reconstruction_cosine": "cosine of the reconstruction",
    "grassmann_distance": "Grassmann distance (rad)",
    "cosine": "cosine",
}


def draw_overlap(result: Mapping[str, Any] | OverlapLayers, *, ax: Axes | None = None, measure: str = "mean_squared_cosine") -> Axes:
    """A measure over layers with its interval, each null as its mean in the band that holds 95 % of it, and the noise ceiling if known."""
    from matplotlib.figure import Figure

    result = result if isinstance(result, Mapping) else result.as_dict()
    ax = ax if ax is not None else Figure(figsize=(6.5, 4.4), layout="constrained").subplots()
    rows = [row for row in result["layers"] if measure in row["measures"]]
    places = _places(rows)
    for name in {name: None for row in rows for name in row["nulls"].get(measure, {})}:
        _draw_null(ax, places, [row["nulls"][measure].get(name) for row in rows], name)
    found = [row["measures"][measure] for row in rows]
    values = [e["value"] for e in found]
    sure = all(e["low"] is not None for e in found)
    label = NAMES.get(measure, measure) + (", 95 % interval" if sure else "")
    ax.plot(places, values, color=VALUE, marker="o", ms=4, lw=1.2, label=label, zorder=3)
    if sure:
        spread = [[e["value"] - e["low"] for e in found], [e["high"] - e["value"] for e in found]]
        ax.errorbar(places, values, spread, fmt="none", ecolor=VALUE, elinewidth=1, capsize=2, zorder=3)
    ceilings = [(place, row["ceiling"]) for place, row in zip(places, rows, strict=True) if row.get("ceiling") is not None]
    if ceilings and measure == "mean_squared_cosine":
        ax.plot(*zip(*ceilings, strict=True), color=CEILING, ls="--", lw=1, marker="^", ms=3, label="noise ceiling of half the rows")
    ax.set_xticks(places if len(places) <= 16 else places[:: len(places) // 8])
    ax.set_xlabel("layer (0-based block)" if all(row["layer"] is not None for row in rows) else "pair")
    ax.set_ylabel(NAMES.get(measure, measure))
    if measure in ("mean_squared_cosine", "explained_l2", "projection_fraction"):
        # Shares end at 1, but far smaller ones are striking too.
        top = min(1.02, 1.1 * ax.get_ylim()[1])
        ax.set_ylim(-0.02 * top, top)
    ax.legend(fontsize=7, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def overlap_figure(result: Mapping[str, Any] | OverlapLayers) -> Figure:
    """Mean squared cosine, and how much of b lies in a."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(12, 4.4), layout="constrained")
    for ax, measure in zip(made.subplots(1, 2), ("mean_squared_cosine", "explained_l2"), strict=True):
        draw_overlap(result, ax=ax, measure=measure)
    return made


def _places(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    layers = [row["layer"] for row in rows]
    return layers if all(layer is not None for layer in layers) else list(range(len(rows)))


def _draw_null(ax: Axes, places: Sequence[int], found: Sequence[Mapping[str, Any] | None], name: str) -> None:
    known = [(place, null) for place, null in zip(places, found, strict=True) if null is not None]
    colour, label = NULLS.get(name, ("#762a83", f"{name} null"))
    at, means = [place for place, _ in known], [null["mean"] for _, null in known]
    banded = [(place, null["low"], null["high"]) for place, null in known if null["low"] is not None]
    label += ", mean and 95 %" if banded and (len(banded) == 1 or name != "analytic") else ", mean"
    ax.plot(at, means, color=colour, lw=1, ls=":" if name == "analytic" else "-", marker="_" if len(at) == 1 else None, label=label)
    if len(banded) == 1:
        ax.vlines(banded[0][0], banded[0][1], banded[0][2], color=colour, alpha=0.4, lw=6)
    elif banded and name != "analytic":
        at, low, high = ([band[i] for band in banded] for i in range(3))
        ax.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
