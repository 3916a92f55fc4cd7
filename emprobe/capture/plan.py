"""What is run together: rows that open alike share their opening, the rest is sorted by length and padded under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emprobe.batching import pad

Padding = Literal["right", "left"]
MIN_SHARED_TOKENS = 32
MIN_SHARED_ROWS = 4


@dataclass(frozen=True)
class Row:
    """One conversation's tokens, and for every position rule the tokens that it reads."""

    ids: tuple[int, ...]
    read: tuple[Sequence[int], ...]


@dataclass(frozen=True)
class Group:
    """Rows that open with the same tokens; no prefix where sharing one would not pay."""

    prefix: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One padded forward, and the weight of each of its tokens in every row and rule that reads it.

    Attributes:
        rows: The rows that the weights speak of.
        ids: Token ids, and `mask` 1 on those that are no padding.
        weights: Share of a token in the mean that a rule takes over a row.
        counted: How often a token counts in the statistics over all tokens (position 0 never).
        past: How many tokens before these were computed already.
        shares: Of a shared opening: for each row and rule which reading of `weights` (a plain sum) is its own, and its tokens' weight.
    """

    rows: tuple[int, ...]
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    weights: Float[Tensor, "batch reading pos"]
    counted: Float[Tensor, "batch pos"]
    past: int
    padding: Padding
    shares: tuple[Int[Tensor, "row rule"], Float[Tensor, "row rule"]] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return int(self.counted.sum())


def group_rows(rows: Sequence[Row], longest: int) -> list[Group]:
    """Rows by the opening they share (a system prompt), at least `MIN_SHARED_TOKENS` long and in `MIN_SHARED_ROWS` rows.

    Rows of more than `longest` tokens share nothing.

    >>> alike = [Row((*range(40), end), ((39,),)) for end in (90, 91, 92, 93)]
    >>> [(len(g.prefix), g.rows) for g in group_rows([*alike, Row((7,), ((0,),))], longest=50)]
    [(40, (0, 1, 2, 3)), (0, (4,))]
    """
    openings: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        openings.setdefault(row.ids[:MIN_SHARED_TOKENS] if len(row.ids) <= longest else (), []).append(index)
    groups, single = [], []
    for opening, members in openings.items():
        prefix = _common([rows[m].ids for m in members]) if opening and len(members) >= MIN_SHARED_ROWS else ()
        if len(prefix) >= MIN_SHARED_TOKENS:
            groups.append(Group(prefix, tuple(members)))
        else:
            single += members
    return [*groups, Group((), tuple(sorted(single)))] if single else groups


def _common(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest opening of all rows that leaves each at least one token of its own."""
    first, last = min(rows), max(rows)
    most = min(map(len, rows)) - 1
    length = next((i for i in range(most) if first[i] != last[i]), most)
    return first[:length]


def prefix_batch(group: Group, rows: Sequence[Row]) -> Batch:
    """The shared opening as one row of tokens, read for every row of the group at once.

    Rows differ in how much a token weighs, hardly in which tokens they read: each set of tokens is summed up once.
    """
    length = len(group.prefix)
    parts: dict[Sequence[int], int] = {}
    own = [[parts.setdefault(_within(read, length), len(parts)) for read in rows[r].read] for r in group.rows]
    share = torch.tensor([[1 / len(read) for read in rows[r].read] for r in group.rows], dtype=torch.float64)
    weights = torch.zeros(1, len(parts), length, dtype=torch.float64)
    for tokens, index in parts.items():
        weights[0, index, list(tokens)] = 1
    counted = torch.full((1, length), float(len(group.rows)), dtype=torch.float64)
    counted[:, 0] = 0
    ids = torch.tensor([group.prefix])
    return Batch(group.rows, ids, torch.ones_like(ids), weights, counted, 0, "right", (torch.tensor(own), share))


def _within(read: Sequence[int], length: int) -> Sequence[int]:
    """Which of the tokens lie before `length`; equal sets of them are equal here, and can be looked up."""
    if isinstance(read, range) and read.step == 1:
        return range(min(read.start, length), min(read.stop, length))
    return tuple(p for p in read if p < length)


def row_batch(chosen: Sequence[int], rows: Sequence[Row], past: int, padding: Padding) -> Batch:
    """Rows padded to one length, without the `past` tokens that were computed already.

    Padding is token 0, which every model has: a tokenizer's own padding token may lie beyond the embedding, and nothing sees it.
    """
    ids, mask = pad([rows[r].ids[past:] for r in chosen], 0, padding)
    weights = torch.zeros(len(chosen), len(rows[chosen[0]].read), ids.shape[1], dtype=torch.float64)
    _weigh(weights, [rows[r] for r in chosen], past)
    counted = mask.double()
    if past == 0:
        counted[:, 0] = 0
    if padding == "left":
        for i, row in enumerate(chosen):
            shift = ids.shape[1] - len(rows[row].ids)
            weights[i] = weights[i].roll(shift, dims=-1)
            counted[i, shift] = 0
    return Batch(tuple(chosen), ids, mask, weights, counted, past, padding)


def _weigh(weights: Float[Tensor, "row rule pos"], rows: Sequence[Row], past: int) -> None:
    """Set the weight 1/n on each of the n tokens that a rule reads, as far as they lie in `[past, past + pos)`."""
    width = weights.shape[-1]
    for i, row in enumerate(rows):
        for k, read in enumerate(row.read):
            share = 1 / len(read)
            if isinstance(read, range) and read.step == 1:
                weights[i, k, max(read.start - past, 0) : max(read.stop - past, 0)] = share
            else:
                weights[i, k, [p - past for p in read if past <= p < past + width]] = share
