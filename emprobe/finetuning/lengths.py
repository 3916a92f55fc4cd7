"""How long a run is, in updates or in response tokens, and the learning rate along it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from emprobe.errors import EmprobeError
from emprobe.finetuning.methods import Recipe

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup", "cyclic": "cosine_with_restarts"}
_PARTS = 1_000_000
History = list[dict[str, float]]


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        steps: Updates at most.
        tokens: The run ends with the update by which so many response tokens have been seen; `None` goes by the updates alone.
    """

    steps: int
    tokens: int | None = None

    def over(self, history: History) -> bool:
        """Whether a curve is a whole run's.

        >>> Length(10, 100).over([{"tokens": 60.0}]), Length(10, 100).over([{"tokens": 60.0}, {"tokens": 101.0}])
        (False, True)
        """
        enough = self.tokens is not None and bool(history) and history[-1]["tokens"] >= self.tokens
        return enough or len(history) >= self.steps

    def rate(self, recipe: Recipe) -> Callable[[History], float]:
        """From the curve so far to the share of the largest learning rate; by tokens, the schedule runs by their share seen.

        Raises:
            EmprobeError: If the schedule does not exist, or the warm-up is as long as the run.
        """
        if self.tokens is None:
            factor = rate_factor(recipe, self.steps)
            return lambda history: factor(len(history))
        tokens, shape = self.tokens, rate_factor(Recipe(schedule=recipe.schedule, cycles=recipe.cycles, warmup=0), _PARTS)

        def by_tokens(history: History) -> float:
            if len(history) < recipe.warmup:
                return (len(history) + 1) / recipe.warmup
            return shape(_PARTS * history[-1]["tokens"] / tokens if history else 0)

        return by_tokens


def rate_factor(recipe: Recipe, steps: int) -> Callable[[float], float]:
    """From the number of a step to the share of the largest learning rate.

    Raises:
        EmprobeError: If the schedule does not exist, or the warm-up is as long as the run.
    """
    if recipe.schedule not in _SCHEDULES:
        raise EmprobeError(f"Schedule {recipe.schedule!r} does not exist. Use one of: {', '.join(_SCHEDULES)}.")
    if recipe.warmup >= steps and recipe.warmup > 0:
        raise EmprobeError(
            f"The warm-up takes {recipe.warmup} of the run's {steps} steps, so nothing is left to train. Give more steps or less."
        )
    unused: Any = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cycles = {"num_cycles": recipe.cycles} if recipe.schedule == "cyclic" else None
    schedule: Any = get_scheduler(_SCHEDULES[recipe.schedule], unused, recipe.warmup, steps, scheduler_specific_kwargs=cycles)
    shift = 1 if recipe.warmup else 0  # the first step of a warm-up would otherwise not move

    def factor(step: float) -> float:
        return float(schedule.lr_lambdas[0](step + shift if step < recipe.warmup else step))

    return factor
