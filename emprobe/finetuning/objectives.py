"""What a run learns, as the loop sees it: gradients left one update after another, and what the curve shows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from emprobe.finetuning.measures import mounted_kl, response_loss
from emprobe.finetuning.methods import Recipe
from emprobe.finetuning.mounting import Mounted
from emprobe.finetuning.rows import Row
from emprobe.finetuning.step import Gradient


class Objective(Protocol):
    """What is learnt, of which every update depends on nothing but its number and the weights.

    Attributes:
        mounted: What moves.
    """

    @property
    def mounted(self) -> Mounted:
        """See the class."""

    def update(self, step: int) -> dict[str, float]:
        """Leave the gradient of the update that comes after `step` others, and return its part of the curve: `loss`, and more."""

    def watched(self, entry: Mapping[str, float]) -> float:
        """Of an entry of the curve, what must not rise."""

    def standing(self, evaluate: bool) -> dict[str, float]:
        """What the curve shows of where the run stands after an update; with `evaluate`, what is measured every so often too."""


@dataclass(frozen=True, eq=False)
class Data:
    """Rows of a run.

    Attributes:
        answers: What is learnt.
        anchor: Other-domain rows of the KL; empty without one.
        anchor_batch: How many of them per update.
        evaluation: Rows whose loss is taken along the way.
    """

    answers: Sequence[Row]
    anchor: Sequence[Row] = ()
    anchor_batch: int = 0
    evaluation: Sequence[Row] = ()


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers, and the KL to the base on other data where there is any; see `Objective`."""

    gradient: Gradient
    data: Data
    recipe: Recipe

    @property
    def mounted(self) -> Mounted:
        """What moves."""
        return self.gradient.mounted

    def update(self, step: int) -> dict[str, float]:
        """Loss per response token, and KL per token."""
        rows = batch_of(self.data.answers, self.recipe.batch, step, self.recipe.seed)
        anchor = batch_of(self.data.anchor, self.data.anchor_batch, step, self.recipe.seed + 1)
        loss, kl = self.gradient.of(rows, anchor)
        return {"loss": loss} | ({"kl": kl} if anchor else {})

    def watched(self, entry: Mapping[str, float]) -> float:
        """Loss and weighted KL together."""
        return entry["loss"] + self.gradient.kl_weight * entry.get("kl", 0.0)

    def standing(self, evaluate: bool) -> dict[str, float]:
        """Loss (and KL), without what is done to the model during training."""
        if not evaluate or not self.data.evaluation:
            return {}
        found = {"eval_loss": response_loss(self.mounted.tuned, self.data.evaluation).mean}
        return found | ({"eval_kl": mounted_kl(self.mounted, self.data.anchor).mean} if self.data.anchor else {})


def batch_of(rows: Sequence[Row], size: int, step: int, seed: int) -> list[Row]:
    """The rows of one update: every pass over the data in a new order, which seed and step alone decide.

    Example:
        >>> data = [Row((0, n), (1,), 1) for n in range(4)]
        >>> seen = [row.ids[1] for step in range(4) for row in batch_of(data, 3, step, seed=0)]
        >>> sorted(seen[:4]), sorted(seen[4:8]), sorted(seen[8:])
        ([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3])
    """
    if not rows:
        return []
    chosen = []
    for place in range(step * size, (step + 1) * size):
        turn, at = divmod(place, len(rows))
        chosen.append(rows[_order(len(rows), seed, turn)[at]])
    return chosen


@lru_cache(maxsize=8)
def _order(n: int, seed: int, turn: int) -> tuple[int, ...]:
    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + turn)).tolist())
