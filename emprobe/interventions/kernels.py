"""How edits are carried out on a hidden state: one at a time, or one per row of the batch in a single pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emprobe.interventions.changes import Affine
from emprobe.interventions.edit import Edit
from emprobe.interventions.tally import SMALL, Seen, Tally
from emprobe.interventions.tokens import Tokens


@dataclass
class State:
    """What every hook of one `intervene` block shares about the forward pass under way.

    Attributes:
        tokens: What its tokens are.
        plan_of_row: Which plan each row carries; `None` where there is one.
        held: Where conditions hold that were read so far, by the identity of the edit.
    """

    tokens: Tokens | None = None
    plan_of_row: Int[Tensor, " batch"] | None = None
    held: dict[int, Tensor] = field(default_factory=dict)


class Kernel(Protocol):
    """Writes to the hidden state at one place."""

    tally: Tally

    def write(self, hidden: Float[Tensor, "batch pos d_model"], state: State) -> Float[Tensor, "batch pos d_model"]:
        """The hidden state as it goes on; never written in place."""
        ...


class _Numbers(NamedTuple):
    """What a single edit needs at hand.

    Attributes:
        basis: (k, d_model), `first` its first row, `columns` transposed.
        shift: What is added, where that does not depend on the hidden state; otherwise `None`.
        scale: Of a change along one direction that only scales the projection; otherwise `None`.
        exact: Whether hidden states are edited in their own dtype; half precision is edited in float32.
    """

    basis: Tensor
    first: Tensor
    columns: Tensor
    shift: Tensor | None
    scale: float | None
    exact: bool


class Single:
    """One edit, on all rows or on those that carry its plan.

    A forward pass of a small model is made of calls rather than of arithmetic, so the commonest changes take as few as can be.
    """

    def __init__(self, edit: Edit, plan: int = 0, n_plans: int = 1) -> None:
        self.edit, self.plan, self.tally = edit, plan, Tally(lambda before, _: edit.change.step(before), n_plans)
        self._numbers: dict[tuple[torch.device, torch.dtype], _Numbers] = {}

    def write(self, hidden: Tensor, state: State) -> Tensor:
        """See `Kernel`."""
        tokens, plans = state.tokens, None
        assert tokens is not None, "a block ran before its decoder"
        mask = tokens.named(self.edit.where, hidden.device)
        if state.plan_of_row is not None:
            carried = state.plan_of_row == self.plan
            plans = torch.where(carried, self.plan, -1)
            mask = _both(mask, carried.to(hidden.device)[:, None])
        if self.edit.when is not None:
            mask = _both(mask, state.held[id(self.edit)].to(hidden.device))
        on = self._numbers.get((hidden.device, hidden.dtype)) or self._prepared(hidden)
        exact = hidden if on.exact else hidden.float()
        before = exact @ on.columns
        if mask is None and on.scale is not None:
            edited = torch.addcmul(exact, before, on.first, value=on.scale)
        else:
            edited = self._moved(exact, before, on, mask)
        edited = edited if on.exact else edited.to(hidden.dtype)
        self.tally.add(_seen(tokens, mask, before, exact, edited, on.columns), plans)
        return edited

    def _moved(self, exact: Tensor, before: Tensor, on: _Numbers, mask: Tensor | None) -> Tensor:
        """The hidden state after the edit, bit-equal at the positions that are not named."""
        if on.shift is not None:
            return exact + on.shift if mask is None else torch.where(mask.unsqueeze(-1), exact + on.shift, exact)
        if on.scale is not None:
            p = before if mask is None else torch.where(mask.unsqueeze(-1), before, 0.0)
            return torch.addcmul(exact, p, on.first, value=on.scale)
        step = self.edit.change.step(before)
        step = step if mask is None else torch.where(mask.unsqueeze(-1), step, 0.0)
        return exact + step @ on.basis

    def _prepared(self, hidden: Tensor) -> _Numbers:
        """The edit's numbers on a device, for hidden states of a dtype."""
        exact = _exact(hidden).dtype
        # Made in inference mode, they could not be used where gradients are wanted later.
        with torch.inference_mode(False):
            basis, change = self.edit.basis.to(hidden.device, exact), self.edit.change
            shift, scale = None, None
            if isinstance(change, Affine) and change.scale == 0:
                shift = (torch.tensor(change.shift, dtype=torch.float64) @ self.edit.basis).to(hidden.device, exact)
            elif isinstance(change, Affine) and len(basis) == 1 and not change.shift[0]:
                scale = change.scale
            made = _Numbers(basis, basis[0], basis.T.contiguous(), shift, scale, exact == hidden.dtype)
        self._numbers[hidden.device, hidden.dtype] = made
        return made


class _Gathered(NamedTuple):
    """The numbers of each row: vector (batch, d_model, 1), shift and scale (batch, 1, 1); which rows carry an edit (`None`: all)."""

    vectors: Tensor
    shift: Tensor
    scale: Tensor
    carried: Tensor | None
    plans: Tensor


class Rowwise:
    """Edits of different plans at one place, one per row: every row moves along its own direction by its own amount, in one pass.

    Args:
        edits: By plan; each plain (`Edit.is_plain`), all with one `where`.
        n_plans: How many plans there are; a row whose plan has no edit here goes on bit-equal.
    """

    def __init__(self, edits: Mapping[int, Edit], n_plans: int) -> None:
        first = next(iter(edits.values()))
        self.where, self.tally = first.where, Tally(self._step, n_plans)
        self.vectors = torch.zeros(n_plans, first.basis.shape[1], dtype=torch.float64)
        self.numbers = torch.zeros(n_plans, 2, dtype=torch.float64)
        self.here = torch.zeros(n_plans, dtype=torch.bool)
        for plan, edit in edits.items():
            assert isinstance(edit.change, Affine)
            self.vectors[plan], self.here[plan] = edit.basis[0], True
            self.numbers[plan] = torch.tensor([edit.change.shift[0], edit.change.scale], dtype=torch.float64)
        self._of: Tensor | None = None
        self._gathered: dict[tuple[torch.device, torch.dtype], _Gathered] = {}

    def write(self, hidden: Tensor, state: State) -> Tensor:
        """See `Kernel`."""
        assert state.tokens is not None, "a block ran before its decoder"
        exact = _exact(hidden)
        rows = self._rows(state.plan_of_row, exact)
        mask = _both(state.tokens.named(self.where, hidden.device), rows.carried)
        before = torch.bmm(exact, rows.vectors)
        step = torch.addcmul(rows.shift, before, rows.scale)
        step = step if mask is None else torch.where(mask.unsqueeze(-1), step, 0.0)
        moved = torch.addcmul(exact, step, rows.vectors.transpose(1, 2))
        edited = moved if moved.dtype == hidden.dtype else moved.to(hidden.dtype)
        self.tally.add(_seen(state.tokens, mask, before, exact, edited, rows.vectors), rows.plans)
        return edited

    def _step(self, before: Tensor, plan_of_row: Tensor | None) -> Tensor:
        rows = self._rows(plan_of_row, before)
        return torch.addcmul(rows.shift, before, rows.scale)

    def _rows(self, plan_of_row: Tensor | None, exact: Tensor) -> _Gathered:
        assert plan_of_row is not None, "rows carry no plans"
        if self._of is not plan_of_row:
            self._of, self._gathered = plan_of_row, {}
        key = (exact.device, exact.dtype)
        if key not in self._gathered:
            with torch.inference_mode(False):
                # A row without a plan here is given that of row 0, and masked.
                plan = plan_of_row.cpu().clamp(min=0)
                shift, scale = (self.numbers[plan, i].to(*key)[:, None, None] for i in (0, 1))
                here = self.here[plan] & (plan_of_row.cpu() >= 0)
                carried = None if bool(here.all()) else here[:, None].to(exact.device)
                plans = torch.where(here, plan, -1)
                self._gathered[key] = _Gathered(self.vectors[plan].to(*key)[:, :, None], shift, scale, carried, plans)
        return self._gathered[key]


def _exact(hidden: Tensor) -> Tensor:
    """Half precision is edited in float32."""
    return hidden if hidden.dtype in (torch.float32, torch.float64) else hidden.float()


def _both(mask: Tensor | None, condition: Tensor | None) -> Tensor | None:
    return condition if mask is None else mask if condition is None else mask & condition


def _seen(tokens: Tokens, mask: Tensor | None, before: Tensor, exact: Tensor, edited: Tensor, columns: Tensor) -> Seen:
    """What the receipt needs; in half precision a small step may be rounded away, so what really was added is measured."""
    if torch.is_grad_enabled():
        before, exact, edited = before.detach(), exact.detach(), edited.detach()
    added = None
    if edited.dtype != exact.dtype:
        really = edited.to(exact.dtype) - exact
        added = (really @ columns, torch.linalg.vector_norm(really, dim=-1))
    return Seen(tokens, mask, before, exact if exact.numel() <= SMALL else torch.linalg.vector_norm(exact, dim=-1), added)


def kernels_of(edits: Sequence[tuple[int, Edit]], n_plans: int) -> list[tuple[Kernel, dict[int, Edit]]]:
    """The kernels that carry out edits at one place, in order, each with its edits by plan.

    Plans do not see each other's rows, so the first plain edits of all plans can be one pass, then their second ones, and so on.
    """
    if n_plans == 1:
        return [(Single(edit), {0: edit}) for _, edit in edits]
    waiting: dict[int, list[Edit]] = {}
    for plan, edit in edits:
        waiting.setdefault(plan, []).append(edit)
    made: list[tuple[Kernel, dict[int, Edit]]] = []
    while any(waiting.values()):
        heads = {plan: queue[0] for plan, queue in waiting.items() if queue}
        plan, first = next(iter(heads.items()))
        together = {p: e for p, e in heads.items() if e.is_plain and first.is_plain and e.where == first.where} or {plan: first}
        kernel: Kernel = Rowwise(together, n_plans) if first.is_plain else Single(first, plan, n_plans)
        made.append((kernel, together))
        for p in together:
            waiting[p].pop(0)
    return made
