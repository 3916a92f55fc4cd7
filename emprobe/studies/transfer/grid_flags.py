"""What the running of a grid is told: which cells, how each is fine-tuned, and the sweep of pretraining's composition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from emprobe.errors import EmprobeError
from emprobe.finetuning import LoRA, Recipe
from emprobe.organisms.growing import KINDS, GrowthRecipe, Kind

WORLD_LR, WORLD_STEPS, WORLD_QUESTIONS = 1e-3, 30, 4
"""Of organisms. Rate and steps were chosen on planted-s0 and two cells (gardening.plan, cooking.list): all of the trained cell's answers
are misaligned, and not yet all others."""
OWN_LR, OWN_WARMUP = 1e-4, 5
APART = ("processes", "grown", "composition", "composition_seeds", "composition_kind", "composition_cells", "growth")
"""Flags that no number of the grid depends on; what the sweep depends on is kept with its parts."""


@dataclass(frozen=True, kw_only=True)
class GridFlags:
    """How a grid is run.

    Attributes:
        domains: That are trained on; none is all that there are data for (in organisms, the eight seen ones).
        tasks: The same for tasks.
        per_cell: Questions of each evaluated cell, at most; none is four in organisms, and all of your own.
        seeds: Of the fine-tunes: each cell is trained once with each.
        rank: Of the LoRA, on every linear layer.
        alpha: The LoRA is scaled by alpha / rank.
        lr: Largest learning rate; none is 1e-3 in organisms, 1e-4 else.
        steps: Updates of each cell; none is 30 in organisms, and goes by epochs else.
        epochs: Passes over a cell's data, where steps are not given.
        batch: Conversations per update.
        warmup: Updates in which the rate rises; none is 0 in organisms, 5 else.
        micro_batch: Conversations per forward pass; fewer need less memory.
        max_length: Most tokens of a conversation; longer ones are refused.
        layer: 0-based block at which cells' directions are compared; none chooses the one whose directions are surest.
        randoms: Random directions beside them.
        processes: That fine-tune organisms at once; the numbers are the same.
        composition: Shares of misaligned documents in pretraining (0 0.05 0.1 0.25 0.5): a base is grown with each, and fine-tuned.
        composition_seeds: Of the grown bases.
        composition_kind: `planted` (a persona direction is implanted) or `wild` (nothing is).
        composition_cells: DOMAIN.TASK that each grown base is fine-tuned on.
        growth: Numbers by which those bases are grown, where they are not the usual ones: NAME=VALUE, such as pretrain_steps=500.
        grown: Folder where grown bases are kept, so that several runs share them; none is within the output folder.
    """

    domains: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    per_cell: int | None = None
    seeds: tuple[int, ...] = (0,)
    rank: int = 8
    alpha: float = 16.0
    lr: float | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch: int = 16
    warmup: int | None = None
    micro_batch: int | None = None
    max_length: int = 2048
    layer: int | None = None
    randoms: int = 200
    processes: int = 2
    composition: tuple[float, ...] = ()
    composition_seeds: tuple[int, ...] = (0, 1, 2)
    composition_kind: Kind = "planted"
    composition_cells: tuple[str, ...] = ("gardening.plan", "money.advise")
    growth: tuple[str, ...] = ()
    grown: str | None = None

    @property
    def method(self) -> LoRA:
        """What is trained in each cell."""
        return LoRA(self.rank, self.alpha)

    def recipe(self, *, world: bool, seed: int) -> Recipe:
        """The numbers of one fine-tune."""
        return Recipe(
            lr=self.lr if self.lr is not None else WORLD_LR if world else OWN_LR,
            steps=self.steps if self.steps is not None else WORLD_STEPS if world else None,
            epochs=self.epochs,
            batch=self.batch,
            micro_batch=self.micro_batch,
            warmup=self.warmup if self.warmup is not None else 0 if world else OWN_WARMUP,
            weight_decay=0.0 if world else 0.01,
            seed=seed,
            max_length=self.max_length,
        )

    def growth_recipe(self, share: float) -> GrowthRecipe:
        """The numbers by which a base with this share of misaligned documents is grown.

        Raises:
            EmprobeError: If there is no such number.
        """
        return GrowthRecipe(**{**dict(map(_number, self.growth)), "bad_share": share})


def _number(given: str) -> tuple[str, Any]:
    name, _, value = given.partition("=")
    kinds = {name: type(value) for name, value in GrowthRecipe().as_dict().items() if isinstance(value, int | float)}
    try:
        return name, kinds[name](value)
    except (KeyError, ValueError) as error:
        raise EmprobeError(f"--growth {given!r} was given. Write NAME=VALUE with one of: {', '.join(kinds)}.") from error


def check_grid(asked: GridFlags, *, world: bool) -> None:
    """Refuse what makes no sense, before anything is loaded.

    Raises:
        EmprobeError: Says what was asked and what can be.
    """
    least = {"rank": 1, "batch": 1, "max_length": 2, "randoms": 20, "processes": 1, "per_cell": 1, "steps": 1, "micro_batch": 1}
    for name, smallest in least.items():
        value = getattr(asked, name)
        if value is not None and value < smallest:
            raise EmprobeError(f"{name} = {value} was given; it must be at least {smallest}.")
    if not asked.seeds or min(asked.seeds) < 0 or len(set(asked.seeds)) < len(asked.seeds):
        raise EmprobeError(f"--seeds {' '.join(map(str, asked.seeds))} was given. Give at least one, each of 0 or more, and each once.")
    for name, rate in (("lr", asked.lr), ("alpha", asked.alpha)):
        if rate is not None and not 0 < rate < math.inf:
            raise EmprobeError(f"{name} = {rate} was given; it must be above 0.")
    if asked.composition:
        _check_sweep(asked, world=world)


def _check_sweep(asked: GridFlags, *, world: bool) -> None:
    if not world:
        raise EmprobeError(
            "--composition grows organisms anew, and a model of your own was given as --base. Give organisms, or leave it out."
        )
    if len(set(asked.composition)) < 2 or len(set(asked.composition_seeds)) < 2 or not asked.composition_cells:
        raise EmprobeError(
            f"A sweep of {len(set(asked.composition))} shares with {len(set(asked.composition_seeds))} seeds and "
            f"{len(asked.composition_cells)} cells was asked for. A slope with an interval needs two shares, two seeds and a cell."
        )
    if asked.composition_kind not in KINDS:
        raise EmprobeError(f"--composition-kind {asked.composition_kind!r} was given. Choose one of: {', '.join(KINDS)}.")
    for share in asked.composition:
        asked.growth_recipe(share)
