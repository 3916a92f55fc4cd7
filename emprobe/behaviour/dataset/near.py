"""Rows that nearly say the same: greedy removal, the threshold that leaves enough, and how near two sets come.

Rows are unit vectors, so a product of two is their cosine; blocks of rows are compared at a time, which keeps memory to a block by what
was kept. A cosine counts as reaching a threshold from 1e-6 below it, so that rounding decides no tie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from emprobe.errors import EmprobeError

Rows = Any
"""Unit rows `[n, d]`: an array, or a sparse matrix by rows; a row of zeros is like nothing."""
Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]
BLOCK = 512
TIE = 1e-6
GRID = tuple(round(0.70 + 0.01 * i, 2) for i in range(30))
"""Thresholds that are tried where one is to be chosen: .70, .71, ..., .99."""


@dataclass(frozen=True, eq=False)
class Deduplicated:
    """What greedy removal left.

    Attributes:
        threshold: Cosine from which a row counts as a copy; `None` where nothing was compared.
        kept: Numbers of the rows that stay, in order.
        copy_of: By removed row, the first kept row that it is a copy of.
    """

    threshold: float | None
    kept: tuple[int, ...]
    copy_of: dict[int, int]

    @classmethod
    def nothing(cls, n: int) -> Deduplicated:
        """All of n rows stay."""
        return cls(None, tuple(range(n)), {})


def deduplicate(rows: Rows, threshold: float, *, block: int = BLOCK) -> Deduplicated:
    """Go through the rows in order and keep each whose cosine with every row kept before is below the threshold.

    Of two near rows the first stays; a row near a removed one only stays.

    Args:
        rows: Unit rows `[n, d]`, dense or sparse.
        threshold: Above -1 and at most 1.
        block: Rows compared at once; it changes speed and memory, and not what is kept.

    Raises:
        EmprobeError: If the threshold is no such cosine.

    Source: arXiv 2605.12798, dataset pipeline.

    Example:
        >>> angles = np.deg2rad([0, 10, 20, 90])
        >>> found = deduplicate(np.column_stack([np.cos(angles), np.sin(angles)]), 0.97)
        >>> found.kept, found.copy_of
        ((0, 2, 3), {1: 0})
    """
    check_cosine("threshold", threshold)
    kept: list[int] = []
    copy_of: dict[int, int] = {}
    for start in range(0, rows.shape[0], block):
        part = rows[start : start + block]
        copies = np.full(part.shape[0], -1)
        if kept:
            near = cosines(part, rows[kept]) >= threshold - TIE
            copies = np.where(near.any(1), np.asarray(kept)[near.argmax(1)], -1)
        near = cosines(part, part) >= threshold - TIE
        for i in range(len(copies)):
            if copies[i] >= 0:
                copy_of[start + i] = int(copies[i])
                continue
            kept.append(start + i)
            later = near[i] & (copies < 0)
            later[: i + 1] = False
            copies[later] = start + i
    return Deduplicated(threshold, tuple(kept), copy_of)


def check_cosine(name: str, value: float) -> None:
    """Refuse what is no cosine from which rows could count as near.

    Raises:
        EmprobeError: Names it.
    """
    if not -1 < value <= 1:
        raise EmprobeError(f"{name} = {value:g} was given; it is a cosine, so give one above -1 and up to 1, such as 0.9.")


def choose_threshold(rows: Rows, keep: int, grid: Sequence[float] = GRID) -> Deduplicated:
    """The smallest threshold of a grid that leaves at least so many rows, and what it leaves.

    Every threshold is tried in turn, the smallest first: more may be left at a smaller one than at a larger, since a row that stays can
    remove others.

    Raises:
        EmprobeError: If no threshold of the grid leaves so many; says how many the largest leaves.

    Source: arXiv 2605.12798, dataset pipeline (grid .70 to .99; .76 to .92 were chosen there).
    """
    found = Deduplicated.nothing(0)
    for threshold in sorted(grid):
        found = deduplicate(rows, threshold)
        if len(found.kept) >= keep:
            return found
    raise EmprobeError(
        f"{keep} rows were to be left, and of {rows.shape[0]} even the largest threshold ({max(grid):g}) leaves {len(found.kept)}. "
        "Ask for fewer, or give more rows."
    )


def near_pairs(rows: Rows, threshold: float, *, block: int = BLOCK) -> Numbers:
    """All pairs i < j whose cosine reaches a threshold, `[pairs, 2]`."""
    return np.concatenate([np.empty((0, 2), dtype=np.int64), *_pairs(rows, threshold, block)])


def near_links(rows: Rows, threshold: float, *, block: int = BLOCK) -> Numbers:
    """Fewer pairs than rows that connect what `near_pairs` connects: where thousands of rows are alike, all pairs would fill the memory."""
    links, n = np.empty((0, 2), dtype=np.int64), rows.shape[0]
    for pairs in _pairs(rows, threshold, block):
        first, second = np.concatenate([links, pairs]).T
        graph = sparse.coo_matrix((np.ones(len(first), dtype=np.int8), (first, second)), shape=(n, n))
        _, group = connected_components(graph.tocsr(), directed=False)
        start = np.unique(group, return_index=True)[1][group]
        links = np.column_stack([start, np.arange(n)])[start != np.arange(n)]
    return links


def _pairs(rows: Rows, threshold: float, block: int) -> Iterator[Numbers]:
    for start in range(0, rows.shape[0], block):
        first, second = np.nonzero(cosines(rows[start : start + block], rows[start:]) >= threshold - TIE)
        ahead = second > first
        yield np.column_stack([first[ahead], second[ahead]]) + start


def closest(rows: Rows, others: Rows, *, block: int = BLOCK) -> Floats:
    """The largest cosine of each row with any of the others, `[n]`."""
    found = [cosines(rows[start : start + block], others).max(1) for start in range(0, rows.shape[0], block)]
    return np.concatenate(found).astype(np.float64)


def cosines(a: Rows, b: Rows) -> NDArray[Any]:
    """Cosines of unit rows, `[a, b]`."""
    product = a @ b.T
    return np.asarray(product.toarray() if sparse.issparse(product) else product)
