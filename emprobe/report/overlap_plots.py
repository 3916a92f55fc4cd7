"""Overlap over layers as table and figure; each takes a result of `emprobe overlap` and, for figures, an Axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def draw_overlap(result: Mapping[str, Any], *, ax: Axes | None = None, measure: str = "mean_squared_cosine") -> Axes:
    """A measure over layers with its interval, each null as its mean in the band that holds 95 % of it, and the noise ceiling if known."""
    from matplotlib.figure import Figure

    ax = ax if ax is not None else Figure(figsize=(6.5, 4.4), layout="constrained").subplots()
    rows = [row for row in result["layers"] if measure in row["measures"]]
    places = _places(rows)
    for name in {name: None for row in rows for name in row["nulls"].get(measure, {})}:
        _draw_null(ax, places, [row["nulls"][measure].get(name) for row in rows], name)
    found = [row["measures"][measure] for row in rows]
    values = [e["value"] for e in found]
    ax.plot(places, values, color=VALUE, marker="o", ms=4, lw=1.2, label=NAMES.get(measure, measure), zorder=3)
    if all(e["low"] is not None for e in found):
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


def overlap_figure(result: Mapping[str, Any]) -> Figure:
    """Mean squared cosine, and how much of b lies in a."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(12, 4.4), layout="constrained")
    for ax, measure in zip(made.subplots(1, 2), ("mean_squared_cosine", "explained_l2"), strict=True):
        draw_overlap(result, ax=ax, measure=measure)
    return made


def overlap_lines(result: Mapping[str, Any]) -> list[str]:
    """The mean squared cosine of every layer beside each null: its 95 %, where the value stands, p, and q over the layers."""
    columns = (("layer", ">5"), ("k", ">7"), ("mean squared cosine", "<24"), ("null", "<24"), ("its mean and 95 %", "<22"))
    numbers = (("pctl", ">6"), ("p", ">7"), ("q", ">7"), ("ceiling", "<7"))
    lines = ["  ".join(format(name, form) for name, form in columns + numbers)]
    for row in result["layers"]:
        value = row["measures"]["mean_squared_cosine"]
        shown = f"{value['value']:.3f}" + ("" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]")
        layer = "-" if row["layer"] is None else row["layer"]
        head = f"{layer:>5}  {'x'.join(map(str, row['k'])):>7}  {shown:<24}"
        ceiling = "-" if row.get("ceiling") is None else f"{row['ceiling']:.3f}"
        for name, null in (row["nulls"].get("mean_squared_cosine") or {"-": None}).items():
            lines.append(f"{head}  {name:<24}  {_null_words(null, row['false_discovery'].get(name))}  {ceiling}")
            head, ceiling = " " * len(head), ""
    return [line.rstrip() for line in lines]


def _null_words(null: Mapping[str, Any] | None, q: float | None) -> str:
    if null is None:
        return f"{'-':<22}  {'-':>6}  {'-':>7}  {'-':>7}"
    band = f"{null['mean']:.3f}" + ("" if null["low"] is None else f" [{null['low']:.3f}, {null['high']:.3f}]")
    numbers = [(null["percentile"], 6, ".3f"), (null["p"], 7, ".3g"), (q, 7, ".3g")]
    return f"{band:<22}  " + "  ".join(f"{'-' if number is None else format(number, form):>{width}}" for number, width, form in numbers)


def _places(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    layers = [row["layer"] for row in rows]
    return layers if all(layer is not None for layer in layers) else list(range(len(rows)))


def _draw_null(ax: Axes, places: Sequence[int], found: Sequence[Mapping[str, Any] | None], name: str) -> None:
    known = [(place, null) for place, null in zip(places, found, strict=True) if null is not None]
    colour, label = NULLS.get(name, ("#762a83", f"{name} null"))
    at, means = [place for place, _ in known], [null["mean"] for _, null in known]
    ax.plot(at, means, color=colour, lw=1, ls=":" if name == "analytic" else "-", marker="_" if len(at) == 1 else None, label=label)
    banded = [(place, null["low"], null["high"]) for place, null in known if null["low"] is not None]
    if len(banded) == 1:
        ax.vlines(banded[0][0], banded[0][1], banded[0][2], color=colour, alpha=0.4, lw=6)
    elif banded and name != "analytic":
        at, low, high = ([band[i] for band in banded] for i in range(3))
        ax.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
