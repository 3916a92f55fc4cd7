"""A receipt as a plain-text table, one line per operator and place (and plan)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS: Mapping[str, str] = {
    "forwards": "forwards",
    "rows": "rows",
    "positions": "positions",
    "in prompt": "positions_in_prompt",
    "generated": "positions_in_generation",
    "|dh|/|h|": "mean_relative_change",
    "x·v before": "projection_before",
    "after": "projection_after",
}
"""Heads of the numbers, and their names in a receipt's entries."""


def table_of(entries: Sequence[Mapping[str, Any]], plans: Sequence[str] = ()) -> str:
    """The entries of `Receipt.as_dict` in columns as wide as what stands in them; `-` is what is not known.

    Args:
        entries: In the order in which they are shown.
        plans: Names of the plans by their number; a number without a name is shown as it is. The column is left out if all entries are of
            one unnamed plan.
    """
    several = bool(plans) or len({entry["plan"] for entry in entries}) > 1
    words = [["plan"] * several + ["operator", "place"]]
    words += [[_plan(e["plan"], plans)] * several + [e["operator"], f"{e['site']}[{e['layer']}]"] for e in entries]
    numbers = [list(COLUMNS), *([_number(entry[name]) for name in COLUMNS.values()] for entry in entries)]
    left = [max(map(len, column)) for column in zip(*words, strict=True)]
    right = [max(map(len, column)) for column in zip(*numbers, strict=True)]
    lines = []
    for said, counted in zip(words, numbers, strict=True):
        cells = [word.ljust(width) for word, width in zip(said, left, strict=True)]
        lines.append("  ".join([*cells, *(number.rjust(width) for number, width in zip(counted, right, strict=True))]))
    return "\n".join(lines)


def _plan(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else str(number)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:z.3f}"
