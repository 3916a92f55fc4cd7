"""Counts of what was done, kept cheap: hooks leave what they saw, and it is measured for many forward passes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emprobe.interventions.tokens import Tokens

LARGE = 2**18
"""Numbers of hidden states that one hook lets wait before they are measured; a long prompt's are measured at once."""

Measured = tuple[Tensor, Tensor, Tensor]
Measure = Callable[[Tensor, Tensor | None], Measured]
"""Projection before, projection after, and ‖Δh‖/‖h‖, each (batch, pos), of hidden states (batch, pos, d_model) of rows under plans."""


class Seen(NamedTuple):
    """What one hook saw in one forward pass: the hidden state before it wrote, and where it wrote (`None`: everywhere)."""

    tokens: Tokens
    mask: Bool[Tensor, "batch pos"] | None
    hidden: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True)
class Totals:
    """Sums over the steered positions of one plan."""

    forwards: int
    named: bool
    rows: int
    rows_steered: int
    positions: int
    generated: int
    before: float
    after: float
    change: float

    def mean(self, total: float) -> float | None:
        """A sum as a mean over positions; `None` where there are none."""
        return total / self.positions if self.positions else None


class Tally:
    """Counts what one hook does, plan by plan.

    Args:
        measure: What was done to hidden states, given these and which plan each row carries.
        n_plans: How many plans the rows of a batch may carry.
    """

    def __init__(self, measure: Measure, n_plans: int = 1) -> None:
        self.measure, self.n_plans = measure, n_plans
        self.forwards = 0
        self.named = True
        self._waiting: list[Seen] = []
        self._size = 0
        self._plans: Tensor | None = None
        self._rows: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, tokens: Tokens, mask: Tensor | None, hidden: Tensor, plan_of_row: Int[Tensor, " batch"] | None) -> None:
        """Note one forward pass; `plan_of_row` is `None` where there is one plan, and -1 for rows that carry none of these."""
        if tokens.fresh:
            self._close()
        self._plans = plan_of_row
        self.forwards += 1
        self._waiting.append(Seen(tokens, mask, hidden.detach() if hidden.requires_grad else hidden))
        self._size += hidden.numel()
        if self._size > LARGE:
            self._sum()

    def totals(self, plan: int = 0) -> Totals:
        """What was counted so far."""
        self._close()
        sums = [0.0] * 7 if self._sums is None else self._sums[plan].tolist()
        rows, steered, positions, generated = (round(s) for s in sums[:4])
        return Totals(self.forwards, self.named, rows, steered, positions, generated, *sums[4:])

    @torch.no_grad()
    def _sum(self) -> None:
        """Measure what is waiting, and add it up over positions, row by row."""
        if not self._waiting:
            return
        self.named = self.named and all(seen.tokens.generated is not None for seen in self._waiting)
        hidden = torch.cat([seen.hidden for seen in self._waiting], dim=1)
        # Apple's GPUs have no float64.
        exact = torch.float32 if hidden.device.type == "mps" else torch.float64
        steered = torch.cat([_filled(seen.mask, seen) for seen in self._waiting], dim=1)
        told = torch.cat([_filled(bool(g) if (g := seen.tokens.generated) is None else g, seen) for seen in self._waiting], dim=1)
        numbers = [steered, told, *self.measure(hidden, self._plans)]
        # A padding token's hidden state may be anything, NaN included, so it is chosen away and not multiplied.
        columns = torch.where(steered[..., None], torch.stack([n.to(exact) for n in numbers], dim=-1), 0.0)
        rows = columns.sum(dim=1)
        self._rows = rows if self._rows is None else self._rows + rows
        self._waiting, self._size = [], 0

    def _close(self) -> None:
        """Add up the rows of the batch under way; what comes next is another."""
        self._sum()
        if self._rows is None:
            return
        found = torch.cat([torch.ones_like(self._rows[:, :1]), (self._rows[:, :1] > 0).to(self._rows.dtype), self._rows], dim=1)
        plans = torch.zeros(len(found), dtype=torch.long) if self._plans is None else self._plans
        plans = plans.to(found.device)
        if self._sums is None:
            self._sums = found.new_zeros(self.n_plans, found.shape[1])
        self._sums.index_add_(0, plans[plans >= 0], found[plans >= 0])
        self._rows = None


def _filled(given: Tensor | bool | None, seen: Seen) -> Tensor:
    """A mask in full; `None` and `True` are everywhere."""
    shape, device = seen.hidden.shape[:2], seen.hidden.device
    if isinstance(given, Tensor):
        return given.to(device).expand(shape)
    return torch.full(shape, given is not False, device=device)
