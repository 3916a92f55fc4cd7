"""How edits are carried out on a hidden state: one at a time, or one per row of the batch in a single pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emprobe.interventions.changes import Affine
from emprobe.interventions.edit import Edit
from emprobe.interventions.tally import Done, Tally
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
        """The hidden state as it goes on; a new tensor."""
        ...


class Single:
    """One edit, on all rows or on those that carry its plan."""

    def __init__(self, edit: Edit, plan: int = 0, n_plans: int = 1) -> None:
        self.edit, self.plan, self.tally = edit, plan, Tally(n_plans)
        self._bases: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def write(self, hidden: Tensor, state: State) -> Tensor:
        """See `Kernel`."""
        assert state.tokens is not None, "a block ran before its decoder"
        exact = hidden if hidden.dtype == torch.float64 else hidden.float()
        basis = self._basis(exact)
        before = exact @ basis.T
        step = self.edit.change.step(before)
        mask = self._mask(state, hidden.device)
        if mask is not None:
            step = torch.where(mask[..., None], step, torch.zeros((), device=step.device, dtype=step.dtype))
        moved = torch.addcmul(exact, step, basis[0]) if len(basis) == 1 else exact + step @ basis
        edited = moved if moved.dtype == hidden.dtype else moved.to(hidden.dtype)
        self._count(state, mask, before, step, exact, edited, basis)
        return edited

    def _mask(self, state: State, device: torch.device) -> Tensor | None:
        """The positions it writes at; `None` is all of them."""
        assert state.tokens is not None
        mask = state.tokens.named(self.edit.where, device)
        further = []
        if state.plan_of_row is not None:
            further.append((state.plan_of_row == self.plan).to(device)[:, None])
        if self.edit.when is not None:
            further.append(state.held[id(self.edit)].to(device))
        for condition in further:
            mask = condition if mask is None else mask & condition
        return mask if mask is None or not further else mask.expand(state.tokens.real.shape)

    def _basis(self, exact: Tensor) -> Tensor:
        key = (exact.device, exact.dtype)
        if key not in self._bases:
            self._bases[key] = self.edit.basis.to(device=exact.device, dtype=exact.dtype)
        return self._bases[key]

    @torch.no_grad()
    def _count(self, state: State, mask: Tensor | None, before: Tensor, step: Tensor, exact: Tensor, edited: Tensor, basis: Tensor) -> None:
        norm, moved = torch.linalg.vector_norm(exact.detach(), dim=-1), None
        if edited.dtype != exact.dtype:
            # In half precision a small step may be rounded away: count what was really added.
            really = edited.detach().to(exact.dtype) - exact.detach()
            step, moved = really @ basis.T, torch.linalg.vector_norm(really, dim=-1)
        assert state.tokens is not None
        plans = None if state.plan_of_row is None else torch.where(state.plan_of_row == self.plan, self.plan, -1)
        self.tally.add(Done(state.tokens, mask, before.detach(), step.detach(), norm, moved), plans)


class Rowwise:
    """Edits of different plans at one place, one per row: every row moves along its own direction by its own amount, in one pass.

    Args:
        edits: By plan; each plain (`Edit.is_plain`), all with one `where`.
        n_plans: How many plans there are; a row whose plan has no edit here goes on bit-equal.
    """

    def __init__(self, edits: Mapping[int, Edit], n_plans: int) -> None:
        first = next(iter(edits.values()))
        self.where, self.tally, self.plans = first.where, Tally(n_plans), sorted(edits)
        d_model = first.basis.shape[1]
        vectors, numbers = torch.zeros(n_plans, d_model, dtype=torch.float64), torch.zeros(n_plans, 2, dtype=torch.float64)
        here = torch.zeros(n_plans, dtype=torch.bool)
        for plan, edit in edits.items():
            assert isinstance(edit.change, Affine)
            vectors[plan], here[plan] = edit.basis[0], True
            numbers[plan] = torch.tensor([edit.change.shift[0], edit.change.scale], dtype=torch.float64)
        self.vectors, self.numbers, self.here = vectors, numbers, here
        self._of: tuple[Tensor | None, dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]]] = (None, {})

    def write(self, hidden: Tensor, state: State) -> Tensor:
        """See `Kernel`."""
        assert state.tokens is not None, "a block ran before its decoder"
        exact = hidden if hidden.dtype == torch.float64 else hidden.float()
        vectors, shift, scale, carried, plans = self._rows(state, exact)
        before = torch.bmm(exact, vectors)
        step = torch.addcmul(shift, before, scale)
        named = state.tokens.named(self.where, hidden.device)
        mask = carried if named is None else (named if carried is None else named & carried)
        if mask is not None:
            mask = mask.expand(state.tokens.real.shape)
            step = torch.where(mask[..., None], step, torch.zeros((), device=step.device, dtype=step.dtype))
        moved = torch.addcmul(exact, step, vectors.transpose(1, 2))
        edited = moved if moved.dtype == hidden.dtype else moved.to(hidden.dtype)
        self._count(state, mask, before, step, exact, edited, vectors, plans)
        return edited

    def _rows(self, state: State, exact: Tensor) -> tuple[Tensor, ...]:
        """Direction, shift, scale of each row, which rows carry an edit here (`None`: all), and their plans (-1: none)."""
        if self._of[0] is not state.plan_of_row:
            self._of = (state.plan_of_row, {})
        key = (exact.device, exact.dtype)
        if key not in self._of[1]:
            assert state.plan_of_row is not None
            plan = state.plan_of_row.cpu()
            vectors = self.vectors[plan].to(device=exact.device, dtype=exact.dtype)[:, :, None]
            shift, scale = (self.numbers[plan, i].to(device=exact.device, dtype=exact.dtype)[:, None, None] for i in (0, 1))
            here = self.here[plan]
            carried = None if bool(here.all()) else here[:, None].to(exact.device)
            self._of[1][key] = (vectors, shift, scale, carried, torch.where(here, plan, -1).to(exact.device))  # type: ignore[assignment]
        return self._of[1][key]

    @torch.no_grad()
    def _count(
        self, state: State, mask: Tensor | None, before: Tensor, step: Tensor, exact: Tensor, edited: Tensor, vectors: Tensor, plans: Tensor
    ) -> None:
        norm, moved = torch.linalg.vector_norm(exact.detach(), dim=-1), None
        if edited.dtype != exact.dtype:
            really = edited.detach().to(exact.dtype) - exact.detach()
            step, moved = torch.bmm(really, vectors), torch.linalg.vector_norm(really, dim=-1)
        assert state.tokens is not None
        self.tally.add(Done(state.tokens, mask, before.detach(), step.detach(), norm, moved), plans)


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
