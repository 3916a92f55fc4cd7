"""The receipt: what an intervention really did, counted where it was done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from emprobe.errors import InterventionDidNotFire
from emprobe.interventions.operators import Edit
from emprobe.interventions.where import Tokens


@dataclass
class Line:
    """What one edit did at one layer. Sums stay on the device until they are read."""

    edit: Edit
    forwards: int = 0
    rows: Any = 0
    positions: Any = 0
    in_generation: Any = 0
    named: bool = True
    before: Any = 0.0
    after: Any = 0.0
    change: Any = 0.0

    def count(self, mask: Tensor, tokens: Tokens, before: Tensor, after: Tensor, hidden: Tensor, edited: Tensor) -> None:
        """Add one forward pass."""
        self.forwards += 1
        self.rows = self.rows + (tokens.real & (tokens.index == 0)).any(dim=1).sum()
        self.positions = self.positions + mask.sum()
        if tokens.generated is None:
            self.named = False
        else:
            self.in_generation = self.in_generation + (mask & tokens.generated).sum()
        zero = torch.zeros_like(before, dtype=torch.float64)
        self.before = self.before + torch.where(mask, before.double(), zero).sum()
        self.after = self.after + torch.where(mask, after.double(), zero).sum()
        moved = (edited.float() - hidden.float()).norm(dim=-1) / hidden.float().norm(dim=-1).clamp(min=1e-12)
        self.change = self.change + torch.where(mask, moved.double(), zero).sum()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers; means are over the steered positions."""
        positions = int(self.positions)
        generation = int(self.in_generation) if self.named and self.forwards else None
        mean = {k: float(v) / positions if positions else None for k, v in (("b", self.before), ("a", self.after), ("c", self.change))}
        return {
            "operator": self.edit.label,
            "layer": self.edit.layer,
            "site": self.edit.site,
            "forwards": self.forwards,
            "rows": int(self.rows),
            "positions": positions,
            "positions_in_prompt": None if generation is None else positions - generation,
            "positions_in_generation": generation,
            "mean_relative_change": mean["c"],
            "projection_before": mean["b"],
            "projection_after": mean["a"],
        }


@dataclass
class Receipt:
    """Per layer: forwards and rows seen, positions steered, mean ‖Δh‖/‖h‖, mean projection before and after.

    Attributes:
        prompt_lengths: Real tokens of each row's prompt in the current batch; `emprobe.generate` sets it, and a plain
            forward pass may. Needed only where an intervention names prompt or generated tokens.
    """

    lines: list[Line] = field(default_factory=list)
    adapter: str = "none"
    prompt_lengths: Int[Tensor, " batch"] | None = None

    def as_dict(self) -> list[dict[str, Any]]:
        """One entry per operator and layer."""
        return [line.as_dict() for line in self.lines]

    def check(self) -> None:
        """Refuse silence.

        Raises:
            InterventionDidNotFire: If an edit touched no position, with what was seen instead.
        """
        for line in self.lines:
            seen, place = line.as_dict(), f"{line.edit.label} at {line.edit.site}[{line.edit.layer}]"
            if not line.forwards:
                raise InterventionDidNotFire(
                    f"{place} never ran: no forward pass reached that block inside the "
                    "intervene block. Generate (or call the model) inside it, with the checkpoint that was given to intervene."
                )
            if not seen["positions"]:
                raise InterventionDidNotFire(
                    f"{place} saw {line.forwards} forward passes and {seen['rows']} rows but "
                    f"steered no position with {line.edit.where}. Name other tokens, or generate at least one."
                )

    def __str__(self) -> str:
        head = f"{'operator':<22}{'layer':>5}{'forwards':>9}{'rows':>6}{'positions':>10}{'|dh|/|h|':>9}{'x·v before':>11}{'after':>9}"
        body = []
        for entry in self.as_dict():
            shown = [entry[k] for k in ("mean_relative_change", "projection_before", "projection_after")]
            change, before, after = (float("nan") if x is None else x for x in shown)
            body.append(
                f"{entry['operator']:<22}{entry['layer']:>5}{entry['forwards']:>9}{entry['rows']:>6}{entry['positions']:>10}"
                f"{change:>9.3f}{before:>11.3f}{after:>9.3f}"
            )
        return "\n".join([head, *body])
