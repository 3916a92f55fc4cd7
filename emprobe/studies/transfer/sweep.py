"""Carrying out the sweep of pretraining's composition: grow the bases, fine-tune each on the same cells, and ask them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from emprobe.behaviour.criterion import Criterion
from emprobe.studies.demo import ANSWER_TOKENS
from emprobe.studies.transfer.composition import PLANTED, Growth, grow, growths_of, swept
from emprobe.studies.transfer.material import Material, world_cell, world_material
from emprobe.studies.transfer.settings import Transfer
from emprobe.studies.transfer.training import CellJob, asking_of, jobs_of, run_cells, save_frame
from emprobe.studies.workers import in_processes

SECONDS = 150.0
"""Of one quiet core, for one base by the usual numbers."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """What is to be grown, and what each base is fine-tuned on."""

    asked: Transfer
    material: Material
    growths: tuple[Growth, ...]


def prepared_sweep(asked: Transfer) -> Sweep:
    """Check cells and numbers.

    Raises:
        EmprobeError: A cell that the world lacks, or a number of growing that there is not.
        MismatchError: If the folder of grown bases holds some that were grown by other numbers.
    """
    cells = [world_cell(name) for name in dict.fromkeys(asked.composition_cells)]
    folder = Path(asked.grown).expanduser() if asked.grown else Path(asked.out).expanduser() / "grown"
    recipes = {share: asked.growth_recipe(share) for share in asked.composition}
    growths = growths_of(asked.composition_kind, asked.composition, asked.composition_seeds, recipes, folder)
    for growth in growths:
        growth.check()
    return Sweep(asked, world_material(asked, cells), tuple(growths))


def plan_of_sweep(sweep: Sweep) -> list[str]:
    """What is about to be done."""
    rest = [growth for growth in sweep.growths if not growth.done]
    minutes = len(rest) * SECONDS / 60 / sweep.asked.processes
    return [
        f"composition: {len(sweep.growths)} bases x {len(sweep.material.cells)} cells; {len(rest)} bases are yet to be grown, in about "
        f"{minutes:.0f} minutes on {sweep.asked.processes} quiet cores"
    ]


def run_sweep(sweep: Sweep, folder: Path, asked: Transfer) -> dict[str, Any]:
    """Grow, train, ask; rates by share and their slope."""
    rest = [growth for growth in sweep.growths if not growth.done]
    with tqdm(total=len(sweep.growths), desc="composition: growing", unit="base", disable=not asked.progress) as bar:
        bar.update(len(sweep.growths) - len(rest))
        for _ in in_processes(grow, rest, asked.processes):
            bar.update(1)
    jobs = _jobs(sweep, folder)
    with tqdm(total=len(jobs), desc="composition: cells", unit="cell", disable=not asked.progress) as bar:
        for _ in run_cells(jobs, asked.processes, bar):
            pass
    scores = pd.concat([job.frame().assign(growth_seed=job.seed) for job in jobs], ignore_index=True)
    save_frame(folder / "composition.parquet", scores)
    shares = {growth.name: growth.recipe.bad_share for growth in sweep.growths}
    found = swept(scores, shares, Criterion.named(asked.criterion), asked.resampling)
    return {**found, **_described(sweep)}


def _jobs(sweep: Sweep, folder: Path) -> Sequence[CellJob]:
    asked = sweep.asked
    sampling = asked.seed, asked.temperature, min(asked.max_new_tokens, ANSWER_TOKENS), asked.token_budget
    asking = asking_of(sweep.material, "world", asked.samples, sampling, read=False)
    found: list[CellJob] = []
    for growth in sweep.growths:
        recipes = {growth.seed: asked.recipe(world=True, seed=growth.seed)}
        found += jobs_of([growth.base()], sweep.material, [growth.seed], asked.method, recipes, asking, folder / "composition")
    return found


def _described(sweep: Sweep) -> dict[str, Any]:
    asked, one = sweep.asked, sweep.growths[0].recipe
    return {
        "kind": asked.composition_kind,
        "cells": list(dict.fromkeys(asked.composition_cells)),
        "growth": one.as_dict() | {"bad_share": None},
        "planted": PLANTED if asked.composition_kind == "planted" else "",
    }
