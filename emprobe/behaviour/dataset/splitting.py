"""Rows into parts of exact sizes in every cell, by a seed, with families whole: what is alike is on one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from emprobe.behaviour.dataset.near import Numbers
from emprobe.errors import EmprobeError

LEFT_OUT = "left out"


def families(names: Sequence[Sequence[Hashable]], pairs: Numbers) -> Numbers:
    """The number of each row's family: rows that share a name, or are a near pair, or are so by way of others.

    Args:
        names: For each row, whatever it may share with others: its label `family`, its prompt.
        pairs: Pairs of rows that are one family besides, `[pairs, 2]`.

    Example:
        >>> families([["a"], ["b"], ["a", "c"], ["d"]], np.array([[1, 3]])).tolist()
        [0, 1, 0, 1]
    """
    first: dict[Hashable, int] = {}
    links = [(first.setdefault(name, row), row) for row, own in enumerate(names) for name in own]
    edges = np.concatenate([np.array(links, dtype=np.int64).reshape(-1, 2), pairs])
    graph = sparse.coo_matrix((np.ones(len(edges), dtype=np.int8), (edges[:, 0], edges[:, 1])), shape=(len(names), len(names)))
    _, found = connected_components(graph.tocsr(), directed=False)
    return np.asarray(found, dtype=np.int64)


def split(family: Numbers, cells: Sequence[Hashable], sizes: Mapping[str, int], seed: int) -> list[str]:
    """The part of each row: so many rows of every cell in each part, the rest left out.

    Families are shuffled by the seed. The smallest part takes whole families while they fit, then a piece of one if it must, whose other
    rows are left out; the next part goes on with those that are untouched.

    Args:
        family: Number of each row's family; no family has rows in two parts, in one cell or across cells.
        cells: Cell of each row.
        sizes: Rows of each cell, by part.
        seed: Same seed, same parts.

    Returns:
        The name of a part for each row, or `left out`.

    Raises:
        EmprobeError: If a size is not positive, or a cell has too few rows; says how many of how many.

    Example:
        >>> split(np.arange(5), ["cell"] * 5, {"train": 3, "eval": 2}, seed=0)
        ['train', 'train', 'eval', 'train', 'eval']
    """
    if not sizes or min(sizes.values()) < 1 or LEFT_OUT in sizes:
        raise EmprobeError(f"A split into {dict(sizes)} was asked for. Give names with sizes of at least 1, such as train=4100 eval=400.")
    rows_of: dict[int, list[int]] = {}
    for row, number in enumerate(family):
        rows_of.setdefault(int(number), []).append(row)
    order = list(rows_of)
    free = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    parts = [LEFT_OUT] * len(cells)
    for name in sorted(sizes, key=lambda part: sizes[part]):
        room = dict.fromkeys(cells, sizes[name])
        for whole in (True, False):
            free = [one for one in free if not _placed(rows_of[one], cells, room, parts, name, whole=whole)]
        short = {cell: sizes[name] - left for cell, left in room.items() if left}
        if short:
            _refuse(name, sizes, short, Counter(cells))
    return parts


def _placed(rows: Sequence[int], cells: Sequence[Hashable], room: dict[Hashable, int], parts: list[str], name: str, *, whole: bool) -> bool:
    """Put a family into a part if there is room for all of it (or, unless whole, for any), and say whether it was."""
    if whole and any(room[cell] < count for cell, count in Counter(cells[row] for row in rows).items()):
        return False
    fitting = []
    for row in rows:
        if room[cells[row]]:
            room[cells[row]] -= 1
            fitting.append(row)
    for row in fitting:
        parts[row] = name
    return bool(fitting)


def _refuse(name: str, sizes: Mapping[str, int], short: Mapping[Hashable, int], there: Mapping[Hashable, int]) -> None:
    wanted = " ".join(f"{part}={size}" for part, size in sizes.items())
    cells = "; ".join(f"{_shown(cell)}: {found} of {sizes[name]}, of {there[cell]} rows" for cell, found in list(short.items())[:5])
    more = f" and {len(short) - 5} more" if len(short) > 5 else ""
    raise EmprobeError(
        f"A split into {wanted} in every cell was asked for, and {len(short)} of {len(there)} cells have too few rows for {name} ({cells}"
        f"{more}). Families stay whole, so a large one can take rows from the other part. Ask for fewer, or give more rows."
    )


def _shown(cell: Hashable) -> str:
    return ".".join(map(str, cell)) if isinstance(cell, tuple) else str(cell)
