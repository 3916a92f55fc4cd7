"""Operators as tensors and plain values, and back: what a plan's file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from emprobe.directions.direction import Direction
from emprobe.errors import EmprobeError
from emprobe.interventions import operators as kinds
from emprobe.interventions.operators import Operator
from emprobe.interventions.when import When
from emprobe.interventions.where import Where
from emprobe.overlap.subspace import Subspace

KINDS: Mapping[str, type[Operator]] = {
    kind.__name__: kind for kind in (kinds.Add, kinds.Ablate, kinds.MeanAblate, kinds.SetProjection, kinds.Cap, kinds.Rotate)
}


def pack(operators: Sequence[Operator]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors by name, and one card per operator that refers to them."""
    tensors: dict[str, Tensor] = {}
    cards = []
    for number, operator in enumerate(operators):
        card = {f.name: _packed(getattr(operator, f.name), f"{number}.{f.name}", tensors) for f in fields(operator)}
        cards.append({"operator": type(operator).__name__, **card})
    return tensors, cards


def unpack(tensors: Mapping[str, Tensor], cards: Sequence[Mapping[str, Any]]) -> tuple[Operator, ...]:
    """The operators that `pack` took apart."""
    made = []
    for card in cards:
        kind = KINDS.get(card["operator"])
        if kind is None:
            raise EmprobeError(
                f"The plan holds an operator {card['operator']!r}, which this emprobe does not know; it has {', '.join(KINDS)}."
            )
        made.append(kind(**{name: _unpacked(value, tensors) for name, value in card.items() if name != "operator"}))
    return tuple(made)


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Direction():
            tensors[name] = value.vector
            return {"tensor": name, **value.card()}
        case Subspace():
            tensors[name] = value.basis
            mean = {} if value.mean is None else {"mean": f"{name}.mean"}
            tensors.update({} if value.mean is None else {f"{name}.mean": value.mean})
            return {"tensor": name, **mean, **value.card()}
        case Tensor():
            tensors[name] = value
            return {"record": "Tensor", "tensor": name}
        case Where():
            return {"record": "Where", **asdict(value)}
        case When():
            return {
                "record": "When",
                "direction": _packed(value.direction, f"{name}.direction", tensors),
                "above": value.above,
                "below": value.below,
            }
        case str() | int() | float() | None:
            return value
        case Sequence():
            return [_packed(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
    raise AssertionError(f"an operator holds a {type(value).__name__}")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(one, tensors) for one in value]
    if not isinstance(value, Mapping):
        return value
    rest = {name: v for name, v in value.items() if name not in ("record", "tensor", "mean")}
    match value["record"]:
        case "Direction":
            return Direction(vector=tensors[value["tensor"]], **rest)
        case "Subspace":
            mean = tensors[value["mean"]] if "mean" in value else None
            return Subspace(basis=tensors[value["tensor"]], mean=mean, **{**rest, "share": tuple(value["share"])})
        case "Where":
            return Where(**rest)
        case "When":
            return When(_unpacked(value["direction"], tensors), value["above"], value["below"])
        case _:
            return tensors[value["tensor"]]
