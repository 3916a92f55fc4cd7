"""A plan: operators in order, as data that can be looked at, saved, hashed, and carried out by any runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emprobe.errors import EmprobeError
from emprobe.files import content_hash, load_tensors, save_tensors
from emprobe.interventions.edit import Edit, Place, rank_of
from emprobe.interventions.operators import Operator
from emprobe.interventions.packing import pack, unpack
from emprobe.models.load import Checkpoint
from emprobe.models.sites import check_layers, check_site, taps_of
from emprobe.types import Site

Conflicts = Literal["sequential", "error"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Operators in the order in which they act.

    Attributes:
        operators: What is done.
        conflicts: Whether several may write at one place: in order (`sequential`), or not at all (`error`).

    Example:
        >>> from emprobe.directions import Direction
        >>> from emprobe.interventions import Add
        >>> Plan((Add(Direction.from_vector([0.0, 2.0], layer=1), 1.0, unit="raw"),))
        Plan of 1 operator:
          Add to resid_post[1], all tokens but padding: unknown resid = 1 raw = 2 abs
    """

    operators: tuple[Operator, ...]
    conflicts: Conflicts = "sequential"

    def __post_init__(self) -> None:
        if self.conflicts not in ("sequential", "error"):
            raise EmprobeError(f"conflicts={self.conflicts!r} was asked for. Use 'sequential' or 'error'.")

    @classmethod
    def of(cls, *given: Operator | Plan, conflicts: Conflicts = "sequential") -> Plan:
        """One plan of operators and plans, in order.

        Raises:
            EmprobeError: If there is no operator, or something else among them.
        """
        operators: list[Operator] = []
        for one in given:
            if not isinstance(one, Plan | Operator):
                raise EmprobeError(
                    f"intervene was given a {type(one).__name__}. Give operators such as Add(direction, coefficient=1), or a Plan."
                )
            operators += one.operators if isinstance(one, Plan) else [one]
        if not operators:
            raise EmprobeError("intervene was given no operator. Give at least one, such as Add(direction, coefficient=1).")
        strict = any(one.conflicts == "error" for one in given if isinstance(one, Plan))
        return cls(tuple(operators), "error" if strict else conflicts)

    def edits(self, n_layers: int) -> list[Edit]:
        """Every write, in the order in which they act at each place."""
        return [edit for operator in self.operators for edit in operator.edits(n_layers)]

    def compiled(self, checkpoint: Checkpoint) -> list[Edit]:
        """The writes, checked against a model.

        Raises:
            EmprobeError: A layer or site that the model lacks, another d_model, a condition read too late, or a conflict.
        """
        n_layers, d_model = checkpoint.n_layers, checkpoint.d_model
        edits = self.edits(n_layers)
        places = [(edit.label, edit.place) for edit in edits]
        places += [(f"The condition of {e.label}", (e.when.direction.layer, e.when.direction.site)) for e in edits if e.when is not None]
        _check_places(checkpoint, places, n_layers)
        for edit in edits:
            _check(checkpoint, edit, d_model)
        if self.conflicts == "error":
            _check_apart(edits)
        return edits

    @property
    def hash(self) -> str:
        """First 16 hex digits of SHA-256 over everything that the plan says and its vectors."""
        tensors, cards = pack(self.operators)
        return content_hash([self.conflicts, cards, {name: t.double().tolist() for name, t in tensors.items()}])

    def save(self, path: str | Path) -> None:
        """Write the plan, vectors and all, to one safetensors file."""
        tensors, cards = pack(self.operators)
        save_tensors(path, tensors, {"record": "Plan", "conflicts": self.conflicts, "operators": cards})

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            EmprobeError: If it is no plan file.
        """
        tensors, card = load_tensors(path)
        if card.get("record") != "Plan":
            raise EmprobeError(f"{path} holds no plan. Was it written by Plan.save?")
        return cls(unpack(tensors, card["operators"]), card["conflicts"])

    def __repr__(self) -> str:
        n = len(self.operators)
        return "\n  ".join([f"Plan of {n} operator{'s' if n != 1 else ''}:", *map(repr, self.operators)])


def _check_places(checkpoint: Checkpoint, places: Sequence[tuple[str, Place]], n_layers: int) -> None:
    """Refuse places that the model lacks; each site is looked for once."""
    by_site: dict[Site, list[int]] = {}
    for label, (layer, site) in places:
        check_site(site)
        check_layers([layer], n_layers, label)
        by_site.setdefault(site, []).append(layer)
    for site, layers in by_site.items():
        taps_of(checkpoint, site, layers)


def _check(checkpoint: Checkpoint, edit: Edit, d_model: int) -> None:
    _check_width(checkpoint, edit.label, edit.basis.shape[1], d_model)
    if edit.when is None:
        return
    direction = edit.when.direction
    _check_width(checkpoint, f"The condition of {edit.label}", len(direction.vector), d_model)
    if rank_of((direction.layer, direction.site)) > rank_of(edit.place):
        raise EmprobeError(
            f"{edit} has a condition that is read at {direction.site}[{direction.layer}], which the model comes to later. Read it at the "
            "same place or before."
        )


def _check_width(checkpoint: Checkpoint, label: str, width: int, d_model: int) -> None:
    if width != d_model:
        raise EmprobeError(
            f"{label} has a direction of d_model {width}, but {checkpoint.name!r} has d_model {d_model}. "
            "Use a direction that was read from this model."
        )


def _check_apart(edits: Sequence[Edit]) -> None:
    for i, edit in enumerate(edits):
        for other in edits[:i]:
            if other.place == edit.place:
                raise EmprobeError(
                    f"{other} and {edit} write at one place, and conflicts='error' was asked for. Move one, or say conflicts='sequential', "
                    "with which they act in the order given."
                )
