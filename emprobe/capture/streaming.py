"""`capture_moments`: means and covariances of groups of rows, in memory that does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch

from emprobe.capture.request import Records, Request, request
from emprobe.capture.rows import OnePlace
from emprobe.errors import EmprobeError
from emprobe.files import load_tensors, save_tensors
from emprobe.models.load import Checkpoint
from emprobe.models.pair import CheckpointPair
from emprobe.moments import LowRankMoments, Moments
from emprobe.types import Conversation, Site

Kind = Literal["variance", "covariance"] | int
AnyMoments = Moments | LowRankMoments
GroupOf = Callable[[Conversation], str]


@dataclass(frozen=True, eq=False)
class GroupMoments:
    """Moments of captured rows per group and layer.

    Attributes:
        parts: By (role, group), one entry per layer. Roles are `model`, or `base`, `tuned` and `delta` (tuned - base, row by row).
        layers: The 0-based block of each entry.
        kind: `variance`, `covariance`, or the rank of low-rank second moments.
        checkpoints: Name and fingerprint by role.
    """

    parts: Mapping[tuple[str, str], tuple[AnyMoments, ...]]
    layers: tuple[int, ...]
    site: Site
    positions: str
    kind: Kind
    checkpoints: Mapping[str, tuple[str, str]]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(dict.fromkeys(group for _, group in self.parts))

    def at(self, layer: int, *, group: str | None = None, role: str | None = None) -> Any:
        """The moments of one group at one layer; group and role may be left out where there is one.

        Raises:
            EmprobeError: If there is no such layer, group or role; says which there are.
        """
        roles = tuple(dict.fromkeys(r for r, _ in self.parts))
        wanted = [("role", role, roles), ("group", group, self.groups), ("layer", layer, self.layers)]
        for what, asked, there in wanted:
            if asked not in there and not (asked is None and len(there) == 1):
                raise EmprobeError(f"Moments of {what} {asked!r} were asked for, and there are {', '.join(map(str, there))}.")
        # A label may be empty, so that `group or ...` would take another group for it.
        place = roles[0] if role is None else role, self.groups[0] if group is None else group
        return self.parts[place][self.layers.index(layer)]

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        tensors: dict[str, torch.Tensor] = {}
        entries = []
        for index, ((role, group), moments) in enumerate(self.parts.items()):
            entries.append({"role": role, "group": group, "n": [m.n for m in moments], "lost": [getattr(m, "lost", 0.0) for m in moments]})
            for column, m in enumerate(moments):
                spread = m.scatter if isinstance(m, Moments) else m.sketch
                tensors |= {f"{index}.{column}.mean": torch.from_numpy(m.mean), f"{index}.{column}.spread": torch.from_numpy(spread)}
        card = {name: getattr(self, name) for name in ("layers", "site", "positions", "kind", "checkpoints")}
        save_tensors(path, tensors, {"record": "GroupMoments", "parts": entries, **card})

    @classmethod
    def load(cls, path: str | Path) -> GroupMoments:
        """Read what `save` wrote.

        Raises:
            EmprobeError: If it is no file of moments.
        """
        tensors, card = load_tensors(path)
        if card.get("record") != "GroupMoments":
            raise EmprobeError(f"{path} holds no moments. Was it written by GroupMoments.save?")
        kind, parts = card["kind"], {}
        for index, entry in enumerate(card["parts"]):
            made: list[AnyMoments] = []
            for column, (n, lost) in enumerate(zip(entry["n"], entry["lost"], strict=True)):
                mean, spread = (tensors[f"{index}.{column}.{what}"].numpy() for what in ("mean", "spread"))
                made.append(LowRankMoments(n, mean, spread, kind, lost) if isinstance(kind, int) else Moments(n, mean, spread))
            parts[entry["role"], entry["group"]] = tuple(made)
        checkpoints = {role: (name, fingerprint) for role, (name, fingerprint) in card["checkpoints"].items()}
        return cls(parts, tuple(card["layers"]), card["site"], card["positions"], kind, checkpoints)

    def __repr__(self) -> str:
        rows = {group: next(m[0].n for (_, g), m in self.parts.items() if g == group) for group in self.groups}
        counts = ", ".join(f"{group} {n}" for group, n in rows.items())
        return f"GroupMoments({self.kind}, rows: {counts}, {len(self.layers)} layers, site {self.site}, positions {self.positions})"


def capture_moments(
    source: Checkpoint | CheckpointPair,
    conversations: Iterable[Conversation],
    *,
    by: str | GroupOf | None = None,
    kind: Kind = "covariance",
    chunk_rows: int = 256,
    **options: Unpack[OnePlace],
) -> GroupMoments:
    """Mean and covariance of what `capture` would return as rows, without keeping the rows.

    Args:
        source: One checkpoint, or a pair (then also of the row-wise difference).
        conversations: Any iterable; it is read once, a chunk at a time.
        by: Groups: the name of a label, or a function of the conversation. All rows are one group, `all`, if left out.
        kind: `variance` (per dimension), `covariance` (`[d_model, d_model]` per layer), or the rank of a low-rank second moment
            for widths at which that does not fit.
        chunk_rows: Rows in memory at a time.
        options: As in `capture`: layers, site, positions (one of each), backend, token_budget, …

    Raises:
        EmprobeError: As `capture`; or if a conversation lacks the label.
    """
    if chunk_rows < 1:
        raise EmprobeError(f"Moments were asked for with chunk_rows={chunk_rows}. Give at least 1.")
    if kind not in ("variance", "covariance") and not (isinstance(kind, int) and kind >= 1):
        raise EmprobeError(f"Moments of kind {kind!r} were asked for. Use 'variance', 'covariance', or a rank (a number from 1 on).")
    asked = request(source, **options)
    if asked.several != (False, False):
        raise EmprobeError("Moments are captured at one site and one position rule at a time. Call once for each.")
    parts: dict[tuple[str, str], tuple[AnyMoments, ...]] = {}
    engine = asked.engine(conversations)
    with engine.speed.bar:
        for chunk in asked.chunks(conversations, chunk_rows):
            groups = [_group(c, by) for c in chunk.conversations]
            for key, made in _chunk_moments(asked, asked.run(engine, chunk), groups, kind).items():
                parts[key] = tuple(_merged(*two) for two in zip(parts[key], made, strict=True)) if key in parts else made
    return GroupMoments(
        parts=parts,
        layers=asked.layers,
        site=asked.sites[0],
        positions=next(iter(asked.rules)),
        kind=kind,
        checkpoints={role: (c.name, c.fingerprint) for role, c in asked.roles.items()},
    )


def _group(conversation: Conversation, by: str | GroupOf | None) -> str:
    if by is None:
        return "all"
    if callable(by):
        return str(by(conversation))
    if by not in conversation.labels:
        there = ", ".join(map(str, conversation.labels)) or "none"
        raise EmprobeError(f"Groups by label {by!r} were asked for, and question {conversation.question_id!r} has the labels: {there}.")
    return str(conversation.labels[by])


def _chunk_moments(asked: Request, records: Records, groups: list[str], kind: Kind) -> dict[tuple[str, str], tuple[AnyMoments, ...]]:
    (found,) = records.values()
    rows = {role: record.values.double() for role, record in zip(asked.roles, found, strict=True)}
    if "tuned" in rows:
        rows["delta"] = rows["tuned"] - rows["base"]
    made = {}
    for group in dict.fromkeys(groups):
        members = torch.tensor([i for i, g in enumerate(groups) if g == group])
        for role, values in rows.items():
            made[role, group] = tuple(_moments(values[members, column].numpy(), kind) for column in range(len(asked.layers)))
    return made


def _merged(left: Any, right: Any) -> AnyMoments:
    merged: AnyMoments = left.merge(right)
    return merged


def _moments(rows: np.ndarray[Any, Any], kind: Kind) -> AnyMoments:
    if isinstance(kind, int):
        return LowRankMoments.from_rows(rows, rank=kind)
    return Moments.from_rows(rows, full=kind == "covariance")
