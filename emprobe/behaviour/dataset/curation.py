"""From conversations to a dataset: filtered by status and scores, without near copies, split by a seed; all that is dropped is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from emprobe.behaviour.dataset.embedding import Embedder
from emprobe.behaviour.dataset.entries import Cell, Entry, Text
from emprobe.behaviour.dataset.near import Deduplicated, Rows, check_cosine, choose_threshold, closest, deduplicate, near_links
from emprobe.behaviour.dataset.rules import Rule, check_rules, first_fault
from emprobe.behaviour.dataset.splitting import LEFT_OUT, families, split
from emprobe.errors import EmprobeError
from emprobe.types import STATUSES

KEPT, COPY, BEYOND = "kept", "near copy", "beyond the number to keep"
LEVELS = (0.8, 0.9, 0.95, 0.99)
DROPPED: tuple[str, ...] = tuple(status for status in STATUSES if status != "ok")
FATES = (*DROPPED, KEPT, COPY, BEYOND, LEFT_OUT)


@dataclass(frozen=True)
class Wishes:
    """How a dataset is made.

    Attributes:
        drop_status: Rows of these statuses go; those without an answer always do.
        rules: What the scores of a row must be.
        text: What of a row is compared with others.
        threshold: Cosine from which a later row is a near copy of an earlier one in its cell; none compares nothing, or chooses it.
        keep: Rows of each cell; without a threshold, the smallest that leaves so many is chosen for each cell.
        split: Rows of each cell in every part, by part; none makes one part.
        apart: Cosine from which two rows are one family, which no split divides.
        seed: Of the split.

    Raises:
        EmprobeError: If a number or a status makes no sense.
    """

    drop_status: tuple[str, ...] = DROPPED
    rules: tuple[Rule, ...] = ()
    text: Text = "both"
    threshold: float | None = None
    keep: int | None = None
    split: Mapping[str, int] = field(default_factory=dict)
    apart: float = 0.95
    seed: int = 42

    def __post_init__(self) -> None:
        unknown = [status for status in self.drop_status if status not in DROPPED]
        if unknown:
            raise EmprobeError(f"Rows of the status {unknown[0]!r} were to be dropped. Choose of: {', '.join(DROPPED)}.")
        if self.keep is not None and self.keep < 1:
            raise EmprobeError(f"{self.keep} rows of each cell were to be kept. Give 1 or more.")
        for name, cosine in (("apart", self.apart), ("threshold", 1.0 if self.threshold is None else self.threshold)):
            check_cosine(name, cosine)
        if self.seed < 0:
            raise EmprobeError(f"The seed {self.seed} was given for the split. Give 0 or more.")
        taken = [name for name in self.split if name in FATES]
        if taken:
            raise EmprobeError(f"A part {taken[0]!r} was asked for, which is what dropped rows are called. Give it another name.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {
            "drop_status": list(self.drop_status),
            "rules": [str(rule) for rule in self.rules],
            "split": dict(self.split),
        }


@dataclass(frozen=True, eq=False)
class Curated:
    """A dataset, and what became of every row.

    Attributes:
        entries: All rows that were given.
        fates: For each, the part that it is in (`kept` without a split), or why it was dropped.
        copy_of: By near copy, the row that it is a copy of.
        thresholds: By cell, the threshold of near copies; `None` where nothing was compared.
        leakage: How near the parts of the split come; `None` without one.
        embedder: What made the vectors; `None` if none were needed.
        parts: Names of the parts.
    """

    entries: tuple[Entry, ...]
    fates: tuple[str, ...]
    copy_of: Mapping[int, int]
    thresholds: Mapping[Cell, float | None]
    leakage: Mapping[str, Any] | None
    embedder: str | None
    parts: tuple[str, ...]

    def part(self, name: str) -> list[Entry]:
        """The rows of one part, in the order in which they were given."""
        return [entry for entry, fate in zip(self.entries, self.fates, strict=True) if fate == name]

    def counts(self) -> dict[Cell, Counter[str]]:
        """By cell, how many rows had each fate."""
        found: dict[Cell, Counter[str]] = {cell: Counter() for cell in self.thresholds}
        for entry, fate in zip(self.entries, self.fates, strict=True):
            found[entry.cell][fate] += 1
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        cells = [
            {"cell": list(cell), "rows": sum(counts.values()), "fates": dict(counts), "threshold": self.thresholds[cell]}
            for cell, counts in self.counts().items()
        ]
        return {"rows": len(self.entries), "parts": list(self.parts), "cells": cells, "embedder": self.embedder, "leakage": self.leakage}


def curate(entries: Sequence[Entry], wishes: Wishes, embed: Embedder) -> Curated:
    """Filter, remove near copies within each cell (the first stays), keep so many, and split.

    Args:
        entries: Rows with cells, in the order that decides which of two near ones stays.
        wishes: What is wanted; what is not asked for is not done.
        embed: Makes vectors of texts; not called where nothing is compared.

    Raises:
        EmprobeError: If nothing is left, a rule cannot be, or a cell has too few rows for what was asked.
    """
    check_rules(wishes.rules, [entry.fields for entry in entries])
    fates = [_fault(entry, wishes) or KEPT for entry in entries]
    if KEPT not in fates:
        found = ", ".join(f"{fate}: {count}" for fate, count in Counter(fates).most_common())
        raise EmprobeError(f"None of {len(entries)} rows is left after the filters ({found}). Loosen --keep-if or --drop-status.")
    left = [i for i, fate in enumerate(fates) if fate == KEPT]
    compared = wishes.threshold is not None or wishes.keep is not None or bool(wishes.split)
    rows = embed([entries[i].text(wishes.text) for i in left]) if compared else None
    thresholds, copy_of = _without_copies(entries, fates, left, rows, wishes)
    leakage = None
    if wishes.split:
        leakage = _into_parts(entries, fates, left, rows, wishes)
    parts = tuple(wishes.split) or (KEPT,)
    return Curated(tuple(entries), tuple(fates), copy_of, thresholds, leakage, embed.name if compared else None, parts)


def _fault(entry: Entry, wishes: Wishes) -> str | None:
    if entry.status in wishes.drop_status or entry.status == "empty":
        return entry.status
    return first_fault(wishes.rules, entry.fields)


def _without_copies(
    entries: Sequence[Entry], fates: list[str], left: Sequence[int], rows: Rows, wishes: Wishes
) -> tuple[dict[Cell, float | None], dict[int, int]]:
    """Mark near copies and rows beyond the number to keep, cell by cell."""
    places: dict[Cell, list[int]] = {cell: [] for cell in sorted({entry.cell for entry in entries})}
    for place, i in enumerate(left):
        places[entries[i].cell].append(place)
    thresholds, copy_of, short = {}, {}, []
    for cell, own in places.items():
        try:
            found = _left_of(rows, own, wishes)
        except EmprobeError as error:
            short.append(f"{'.'.join(cell) or 'all rows'}: {error}")
            continue
        thresholds[cell] = found.threshold
        for copy, first in found.copy_of.items():
            fates[left[own[copy]]] = COPY
            copy_of[left[own[copy]]] = left[own[first]]
        for i in found.kept[wishes.keep :] if wishes.keep else ():
            fates[left[own[i]]] = BEYOND
    if short:
        more = f"\n  and {len(short) - 5} cells more" if len(short) > 5 else ""
        raise EmprobeError(f"{len(short)} of {len(places)} cells have too few rows:\n  " + "\n  ".join(short[:5]) + more)
    return thresholds, copy_of


def _left_of(rows: Rows, own: Sequence[int], wishes: Wishes) -> Deduplicated:
    if wishes.threshold is None and wishes.keep is None:
        return Deduplicated.nothing(len(own))
    if wishes.keep is not None and len(own) < wishes.keep:
        raise EmprobeError(f"{wishes.keep} rows were to be kept, and the filters leave {len(own)}.")
    if wishes.threshold is None:
        return choose_threshold(rows[own], wishes.keep or 1)
    found = deduplicate(rows[own], wishes.threshold) if own else Deduplicated.nothing(0)
    if wishes.keep is not None and len(found.kept) < wishes.keep:
        raise EmprobeError(
            f"{wishes.keep} rows were to be kept, and of {len(own)} the threshold {wishes.threshold:g} leaves {len(found.kept)}."
        )
    return found


def _into_parts(entries: Sequence[Entry], fates: list[str], left: Sequence[int], rows: Rows, wishes: Wishes) -> dict[str, Any]:
    """Divide what is left, and measure how near the parts come."""
    stay = [place for place, i in enumerate(left) if fates[i] == KEPT]
    gone = sorted({entry.cell for entry in entries} - {entries[left[place]].cell for place in stay})
    if gone:
        raise EmprobeError(
            f"A split in every cell was asked for, and the filters leave no row of {len(gone)} cells (first: {'.'.join(gone[0])}). Loosen "
            "them, or give a file without those cells."
        )
    chosen, vectors = [entries[left[place]] for place in stay], rows[stay]
    names = [[("family", entry.conversation.cluster), ("prompt", _asked(entry))] for entry in chosen]
    family = families(names, near_links(vectors, wishes.apart))
    parts = split(family, [entry.cell for entry in chosen], wishes.split, wishes.seed)
    for place, part in zip(stay, parts, strict=True):
        fates[left[place]] = part
    found: dict[str, Any] = {"families": len(set(family.tolist())), "rows": len(chosen), "pairs": {}}
    where = {name: np.flatnonzero([part == name for part in parts]) for name in wishes.split}
    for larger, other in combinations(sorted(wishes.split, key=lambda part: -wishes.split[part]), 2):
        nearest = closest(vectors[where[other]], vectors[where[larger]])
        asked = [{_asked(chosen[i]) for i in where[name]} for name in (other, larger)]
        found["pairs"][f"{other} to {larger}"] = {
            "n": len(nearest),
            "same_prompt": len(asked[0] & asked[1]),
            "largest_cosine": float(nearest.max()),
            "median_cosine": float(np.median(nearest)),
            "reaching": {f"{level:g}": int((nearest >= level).sum()) for level in LEVELS},
        }
    return found


def _asked(entry: Entry) -> str:
    """The prompt, whatever its spaces and capitals."""
    return " ".join(" ".join(message.content for message in entry.conversation.messages).casefold().split())
