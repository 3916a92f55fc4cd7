"""The record of an overlap over layers, which prints as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from emprobe.errors import EmprobeError
from emprobe.overlap.between import Overlap

COLUMNS = (("layer", ">5"), ("k", ">7"), ("mean squared cosine", "<24"), ("null", "<24"), ("its mean and 95 %", "<22"))
NUMBERS = (("pctl", ">6"), ("p", ">7"), ("q", ">7"), ("ceiling", "<7"))


@dataclass(frozen=True, eq=False)
class LayerOverlap:
    """The overlap at one layer.

    Attributes:
        layer: 0-based block; `None` where one of each side was compared, from different layers.
        overlap: Every measure beside its nulls.
        ceiling: Overlap of each side with itself from two halves of its questions, geometric mean of both; `None` without rows.
        q: For each null, the p of the mean squared cosine under false-discovery control over the layers.
    """

    layer: int | None
    overlap: Overlap
    ceiling: float | None
    q: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.overlap.as_dict(), "layer": self.layer, "ceiling": self.ceiling, "false_discovery": dict(self.q)}


@dataclass(frozen=True, eq=False)
class OverlapLayers:
    """What `overlap_layers` found; `em.plots.draw_overlap` takes it as it is, and printing it gives a table.

    Attributes:
        layers: One record for each layer, ascending.
        left_out: Layers at which a side cannot carry the subspace that was asked for, and why.
    """

    layers: tuple[LayerOverlap, ...]
    left_out: Mapping[int | None, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[LayerOverlap]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def at(self, layer: int | None) -> LayerOverlap:
        """The record of one layer.

        Raises:
            EmprobeError: If that layer was not compared.
        """
        found = [row for row in self.layers if row.layer == layer]
        if not found:
            why = self.left_out.get(layer, f"there are {', '.join(str(row.layer) for row in self.layers)}")
            raise EmprobeError(f"Layer {layer} was asked for, but was not compared: {why}")
        return found[0]

    def __repr__(self) -> str:
        return "\n".join([*overlap_lines(self.as_dict()), *left_out_lines(self.left_out)])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        left_out = {str(layer): why for layer, why in self.left_out.items()}
        return {"record": "OverlapOverLayers", "layers": [row.as_dict() for row in self.layers], "left_out": left_out}


def left_out_lines(left_out: Mapping[int | None, str]) -> list[str]:
    """A line for each reason, with the layers that were left out for it."""
    layers: dict[str, list[str]] = {}
    for layer, why in left_out.items():
        layers.setdefault(why.replace(f" at layer {layer} ", " there ").replace(f" at layer {layer}", ""), []).append(str(layer))
    return [f"Left out: layer {', '.join(found)}. {why}" for why, found in layers.items()]


def overlap_lines(result: Mapping[str, Any]) -> list[str]:
    """The mean squared cosine of every layer beside each null: its 95 %, where the value stands, p, and q over the layers."""
    lines = ["  ".join(format(name, form) for name, form in COLUMNS + NUMBERS)]
    for row in result["layers"]:
        value = row["measures"]["mean_squared_cosine"]
        shown = f"{value['value']:.3f}" + ("" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]")
        layer = "-" if row["layer"] is None else row["layer"]
        head = f"{layer:>5}  {'x'.join(map(str, row['k'])):>7}  {shown:<24}"
        ceiling = "-" if row.get("ceiling") is None else f"{row['ceiling']:.3f}"
        for name, null in (row["nulls"].get("mean_squared_cosine") or {"-": None}).items():
            lines.append(f"{head}  {name:<24}  {_null_words(null, row['false_discovery'].get(name))}  {ceiling}")
            head, ceiling = " " * len(head), ""
    notes: dict[str, list[str]] = {}
    for row in result["layers"]:
        notes.setdefault(row.get("note", ""), []).append(str(row["layer"]))
    lines += [f"Layer {', '.join(layers)}: {note}" for note, layers in notes.items() if note]
    return [line.rstrip() for line in lines]


def _null_words(null: Mapping[str, Any] | None, q: float | None) -> str:
    if null is None:
        return f"{'-':<22}  {'-':>6}  {'-':>7}  {'-':>7}"
    band = f"{null['mean']:.3f}" + ("" if null["low"] is None else f" [{null['low']:.3f}, {null['high']:.3f}]")
    numbers = [(null["percentile"], 6, ".3f"), (null["p"], 7, ".3g"), (q, 7, ".3g")]
    shown = ["-" if number is None else "<1e-300" if number == 0 and form == ".3g" else format(number, form) for number, _, form in numbers]
    return f"{band:<22}  " + "  ".join(f"{words:>{width}}" for words, (_, width, _) in zip(shown, numbers, strict=True))
