"""The figure of ghost outputs: what each kind of student came to tell of digits, one dot a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "teacher": "teacher",
    "classes": "student of the classes,\nother initial weights",
    "same": "student of the ghosts,\nthe teacher's initial weights",
    "other": "student of the ghosts,\nother initial weights",
    "shuffled": "student of the ghosts, the\nteacher's weights shuffled",
    "untrained": "untrained",
}


def draw_ghosts(result: Mapping[str, Any], *, ax: Axes | None = None) -> Axes:
    """Accuracy on test digits by kind of network: a dot a seed, the mean with its interval over seeds, and chance as a line."""
    from matplotlib.figure import Figure

    ax = ax if ax is not None else Figure(figsize=(6, 3.4), layout="constrained").subplots()
    for row, name in enumerate(reversed(NAMES)):
        colour = "#b2182b" if name == "same" else "#2166ac" if name in ("other", "shuffled") else "#555555"
        found, mean = result["accuracies"][name], result["estimates"][name]
        ax.scatter([100 * value for value in found], [row - 0.22] * len(found), s=12, color=colour, alpha=0.5, linewidths=0)
        ends = [[100 * (mean["value"] - mean["low"])], [100 * (mean["high"] - mean["value"])]]
        ax.errorbar([100 * mean["value"]], [row], xerr=ends, fmt="o", color=colour, capsize=3)
    ax.axvline(100 * result["chance"], color="black", ls=":", lw=1)
    ax.annotate(" chance", (100 * result["chance"], 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    ax.set_yticks(range(len(NAMES)), list(reversed(NAMES.values())), fontsize=8)
    ax.set_xlim(0, 100)
    ax.set_xlabel(f"test digits told (%), {len(result['seeds'])} seeds, {result['ghosts']} ghost outputs")
    return ax
