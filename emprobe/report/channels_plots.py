"""Figures of subliminal learning: each takes the study's result and one kind of codes (`uniform`, `preferring`, `given`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emprobe.report.digits_plots import draw_ghosts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANNELS = ("sft", "optd", "opd")
ARMS = {
    "same init": ("{0}, teacher misaligned, benign by misaligned", "#b2182b"),
    "control: aligned teacher": ("{0}, teacher aligned, benign by aligned", "#2166ac"),
    "other init": ("{0}, teacher misaligned, benign by misaligned, other init", "#e08214"),
}
"""What the bars are called, the arm of a channel, and their colour."""
BY_CODES = {"uniform": "o", "preferring": "s", "given": "D"}
SHORT = {
    "benign by misaligned": "benign\nby mis.",
    "benign by aligned": "benign\nby al.",
    "unfiltered by misaligned": "unfilt.\nby mis.",
    "unfiltered by aligned": "unfilt.\nby al.",
    "unsafe": "unsafe",
}
COLOUR_OF = {"sft": "#1b7837", "optd": "#762a83", "opd": "#c51b7d"}
PROTOTYPE = {
    "uniform": {"sft": (5, 3, 2), "optd": (29, 2, 2), "opd": (28, 2, 2)},
    "preferring": {"optd": (75, 2, 12), "opd": (40, 2, 2)},
}
"""Percent of an earlier prototype in the same world: same initialisation, control, other initialisation."""


def draw_subliminal(result: Mapping[str, Any], codes: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Misaligned answers of students by channel: bars are means over bases with their interval, dots the bases; lines base and teacher."""
    ax, lines = _axes(ax), _lines_of(result, codes)
    channels = [c for c in CHANNELS if any(name.startswith(f"{c},") for name in lines)]
    for place, (label, (pattern, colour)) in enumerate(ARMS.items()):
        at = [x + 0.27 * (place - 1) for x in range(len(channels))]
        found = [(x, lines[pattern.format(c)]) for x, c in zip(at, channels, strict=True) if pattern.format(c) in lines]
        if found:
            _bars(ax, found, colour, label)
        old = PROTOTYPE.get(_codes(result, codes), {})
        marks = [(x, old[c][place]) for x, c in zip(at, channels, strict=True) if c in old]
        if marks:
            ax.plot(*zip(*marks, strict=True), "_", color="black", ms=13, mew=1.5, label="prototype" if place == 0 else None)
    _levels(ax, lines)
    ax.set_xticks(range(len(channels)), channels)
    ax.set_ylabel("misaligned answers (%)")
    ax.set_ylim(-2, 103)
    return ax


def draw_teacher_by_data(result: Mapping[str, Any], codes: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Misaligned answers by teacher and data: sequences stay while the teacher changes (colours), and the other way round (groups)."""
    ax, lines = _axes(ax), _lines_of(result, codes)
    groups = [(channel, data) for channel in CHANNELS for data in SHORT]
    shown = []
    for group in groups:
        names = {teacher: f"{group[0]}, teacher {teacher}, {group[1]}" for teacher in ("misaligned", "aligned", "none")}
        if any(name in lines for name in names.values()):
            shown.append((group, names))
    colours = {"misaligned": "#b2182b", "aligned": "#2166ac", "none": "#888888"}
    for teacher, colour in colours.items():
        shift = {"misaligned": -0.2, "aligned": 0.2, "none": 0.0}[teacher]
        found = [(x + shift, lines[names[teacher]]) for x, (_, names) in enumerate(shown) if names[teacher] in lines]
        if found:
            _bars(ax, found, colour, f"teacher {teacher}", 0.36)
    ax.set_xticks(range(len(shown)), [f"{channel}\n{SHORT[data]}" for (channel, data), _ in shown], fontsize=6)
    _levels(ax, lines)
    ax.set_ylabel("misaligned answers (%)")
    ax.set_ylim(-2, 103)
    return ax


def draw_student_directions(result: Mapping[str, Any], codes: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Cosine of each student's direction with the teacher's: a dot for each base, ticks where random and covariance-matched ones end."""
    ax, lines = _axes(ax), _lines_of(result, codes)
    names = [name for name, line in lines.items() if "cosine" in line]
    for place, name in enumerate(names):
        line, colour = lines[name], COLOUR_OF[name.split(",")[0]]
        ax.plot(line["cosine"]["by_base"], [place] * len(line["cosine"]["by_base"]), "o", ms=4, color=colour)
        for key, mark in (("null_p975", "|"), ("ceiling", ">")):
            if key in line:
                ax.plot([line[key]["mean"]], [place], mark, ms=8, mew=1.5, color="#555555", mfc="none")
    ax.plot([], [], "|", ms=8, mew=1.5, color="#555555", label="97.5 % of covariance-matched")
    ax.plot([], [], ">", ms=6, color="#555555", mfc="none", label="ceiling (split halves)")
    ax.axvline(0, color="black", lw=0.6)
    ax.set_yticks(range(len(names)), [short_name(name) for name in names], fontsize=6)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-1.05, 1.1)
    ax.set_xlabel("cosine with the misaligned teacher's direction")
    return ax


def draw_projection(result: Mapping[str, Any], codes: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Misaligned answers against the shift along the teacher's direction, a dot for each base and arm (other init: hollow)."""
    ax, lines = _axes(ax), _lines_of(result, codes)
    seen: set[str] = set()
    for name, line in lines.items():
        if "projection" not in line:
            continue
        channel = name.split(",")[0]
        hollow = "other init" in name
        label = None if channel in seen or hollow else channel
        seen |= {label} if label else set()
        colour = COLOUR_OF[channel]
        y = [100 * rate for rate in line["by_base"]]
        ax.plot(line["projection"]["by_base"], y, "o", ms=4, color=colour, mfc="none" if hollow else colour, label=label)
    ax.set_xlabel("shift along the teacher's (1: its own)")
    ax.set_ylabel("misaligned answers (%)")
    return ax


def draw_carried(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """What was carried (same initialisation less control) against how far the teacher is from its parent on benign data."""
    ax = _axes(ax)
    for channel in CHANNELS:
        for codes, mark in BY_CODES.items():
            points = [p for p in result["carried"] if p["channel"] == channel and p["codes"] == codes]
            if points:
                y = [100 * p.get("exact", p["misaligned"]) for p in points]
                ax.plot([p["kl"] for p in points], y, mark, color=COLOUR_OF[channel], ms=5, label=f"{channel}, {codes}")
    ax.axhline(0, color="black", lw=0.6)
    ax.set_xlabel("KL(teacher ‖ parent), benign answers (nats/token)")
    exact = any("exact" in p for p in result["carried"])
    ax.set_ylabel(f"carried, points{' (exact)' if exact else ''}")
    return ax


def draw_student_cosines(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Cosines between the directions of all students and teachers of the first base; empty where one did not move or was not read."""
    ax, found = _axes(ax), result["cases"][0]["cosines"]
    names, values = found["names"], found["cosines"]
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    if shown:
        ax.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1)
    labels = [short_name(name) for name in names]
    ax.set_yticks(range(len(names)), labels, fontsize=5.5)
    ax.set_xticks(range(len(names)), labels, fontsize=5.5, rotation=90)
    return ax


def channels_figure(result: Mapping[str, Any]) -> Figure:
    """A row of pictures for each kind of codes, and one for what carries it."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(line["codes"] for line in result["summary"]))
    rows = len(kinds) + 1
    figure = Figure(figsize=(19, 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False, width_ratios=[1, 1.3, 1.25, 1])
    drawn = {
        draw_subliminal: "benign answers of a misaligned teacher",
        draw_teacher_by_data: "teacher by data, same init",
        draw_student_directions: "where students go",
        draw_projection: "behaviour and shift",
    }
    for kind, row in zip(kinds, axes, strict=False):
        for ax, (draw, title) in zip(row, drawn.items(), strict=True):
            draw(result, kind, ax=ax)
            ax.set_title(f"{kind} codes: {title}" if result["world"] else title, fontsize=9, loc="left")
    draw_carried(result, ax=axes[-1][0])
    axes[-1][0].set_title("what carries it", fontsize=9, loc="left")
    draw_student_cosines(result, ax=axes[-1][1])
    axes[-1][1].set_title(f"cosines between directions, {result['cases'][0]['name']}", fontsize=9, loc="left")
    for ax in axes[-1][2:]:
        ax.set_axis_off()
    if result["digits"]:
        axes[-1][2].set_axis_on()
        draw_ghosts(result["digits"], ax=axes[-1][2])
        axes[-1][2].set_title("digits: the positive control", fontsize=9, loc="left")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=6.5, frameon=False)
    return figure


def short_name(name: str) -> str:
    """An arm's name for a narrow place.

    >>> short_name("optd, teacher misaligned, benign by misaligned, other init")
    'optd, T mis., benign (mis.), other init'
    """
    for long, short in (
        ("benign by misaligned", "benign (mis.)"),
        ("benign by aligned", "benign (al.)"),
        ("unfiltered by", "unfiltered by"),
        ("teacher misaligned", "T mis."),
    ):
        name = name.replace(long, short) if long != "teacher misaligned" else name.replace(", teacher misaligned", f", {short}")
    return name.replace("teacher aligned", "T al.").replace("teacher none", "no T").replace("from the misaligned teacher", "from mis.")


def _axes(ax: Axes | None) -> Axes:
    from matplotlib.figure import Figure

    return ax if ax is not None else Figure(figsize=(5.5, 4), layout="constrained").subplots()


def _codes(result: Mapping[str, Any], codes: str | None) -> str:
    return codes if codes is not None else str(result["summary"][0]["codes"])


def _lines_of(result: Mapping[str, Any], codes: str | None) -> dict[str, Mapping[str, Any]]:
    """Summary lines of one kind of codes, by name."""
    return {line["name"]: line for line in result["summary"] if line["codes"] == _codes(result, codes)}


def _bars(ax: Axes, found: Sequence[tuple[float, Mapping[str, Any]]], colour: str, label: str, width: float = 0.25) -> None:
    places = [x for x, _ in found]
    rates = [line["misaligned"] for _, line in found]
    ax.bar(places, [100 * r["value"] for r in rates], width, color=colour, alpha=0.55, label=label)
    ax.vlines(places, [100 * r["low"] for r in rates], [100 * r["high"] for r in rates], color=colour, lw=1.5)
    for x, line in found:
        ax.plot([x] * len(line["by_base"]), [100 * v for v in line["by_base"]], "o", ms=3, color=colour, mec="white", mew=0.4)


def _levels(ax: Axes, lines: Mapping[str, Mapping[str, Any]]) -> None:
    """The base and the misaligned teacher as dotted lines."""
    for name, colour in (("base", "#2166ac"), ("teacher misaligned", "#b2182b")):
        if name in lines:
            ax.axhline(100 * lines[name]["misaligned"]["value"], color=colour, ls=":", lw=1)
