"""Counts of what was done, kept cheap: hooks append what they have in hand, and sums are formed once for many forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from emprobe.interventions.tokens import Tokens

LARGE = 2**20
"""So many positions are kept before they are summed."""


class Done(NamedTuple):
    """What one hook did in one forward pass; detached.

    Attributes:
        mask: Positions that were steered; `None` is all.
        before: Coordinates before.
        step: How far they moved; broadcasts with `before`.
        norm: Norm of the hidden state before.
        moved: Norm of the whole move, where the model's dtype rounded it; `None` is the norm of `step`.
    """

    tokens: Tokens
    mask: Bool[Tensor, "batch pos"] | None
    before: Float[Tensor, "batch pos k"]
    step: Tensor
    norm: Float[Tensor, "batch pos"]
    moved: Float[Tensor, "batch pos"] | None = None


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
        n_plans: How many plans the rows of a batch may carry.
    """

    def __init__(self, n_plans: int = 1) -> None:
        self.n_plans = n_plans
        self.forwards = 0
        self.named = True
        self._waiting: list[Done] = []
        self._size = 0
        self._plans: Tensor | None = None
        self._rows: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, done: Done, plan_of_row: Int[Tensor, " batch"] | None) -> None:
        """Note one forward pass; `plan_of_row` is `None` where there is one plan, and -1 for rows that carry none of these."""
        if done.tokens.fresh:
            self._close()
        self._plans = plan_of_row
        self.forwards += 1
        self.named = self.named and done.tokens.prompt_lengths is not None
        self._waiting.append(done)
        self._size += done.norm.numel()
        if self._size > LARGE:
            self._sum()

    def totals(self, plan: int = 0) -> Totals:
        """What was counted so far."""
        self._close()
        sums = [0.0] * 7 if self._sums is None else self._sums[plan].tolist()
        rows, steered, positions, generated = (round(s) for s in sums[:4])
        return Totals(self.forwards, self.named, rows, steered, positions, generated, *sums[4:])

    def _sum(self) -> None:
        """Sums over positions of what is waiting, row by row."""
        if not self._waiting:
            return
        parts = torch.cat([_columns(done) for done in self._waiting], dim=1).sum(dim=1)
        self._rows = parts if self._rows is None else self._rows + parts
        self._waiting, self._size = [], 0

    def _close(self) -> None:
        """Add up the rows of the batch under way; what comes next is another."""
        self._sum()
        if self._rows is None:
            return
        found = torch.cat([torch.ones_like(self._rows[:, :1]), (self._rows[:, :1] > 0).to(self._rows.dtype), self._rows], dim=1)
        plans = self._plans if self._plans is not None else torch.zeros(len(found), dtype=torch.long, device=found.device)
        if self._sums is None:
            self._sums = found.new_zeros(self.n_plans, found.shape[1])
        mine = plans.to(found.device) >= 0
        self._sums.index_add_(0, plans.to(found.device)[mine], found[mine])
        self._rows = None


def _columns(done: Done) -> Float[Tensor, "batch pos five"]:
    """Steered or not, generated or not, projection before and after, relative change; 0 where nothing was steered."""
    # Apple's GPUs have no float64.
    exact = torch.float32 if done.norm.device.type == "mps" else torch.float64
    before = done.before.to(exact)
    step = done.step.to(exact).expand_as(before)
    moved = torch.linalg.vector_norm(step, dim=-1) if done.moved is None else done.moved.to(exact)
    steered = torch.ones_like(moved) if done.mask is None else done.mask.to(exact)
    generated = done.tokens.generated
    told = torch.zeros_like(moved) if generated is None else generated.to(exact)
    found = [steered, told, _signed(before), _signed(before + step), moved / done.norm.to(exact).clamp(min=1e-12)]
    # A padding token's hidden state may be anything, NaN included, so it is chosen away and not multiplied.
    return torch.where(steered[..., None] > 0, torch.stack(found, dim=-1), 0.0)


def _signed(coordinates: Tensor) -> Tensor:
    return coordinates[..., 0] if coordinates.shape[-1] == 1 else torch.linalg.vector_norm(coordinates, dim=-1)
