"""Running the grid: every cell is fine-tuned and asked of all cells, the base is measured before, and the scores are analysed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.table_files import load_table
from emprobe.clusters import means
from emprobe.errors import EmprobeError
from emprobe.files import content_hash, file_hash, locked_folder, read_json, write_json
from emprobe.finetuning import response_rows
from emprobe.finetuning.lengths import rate_factor
from emprobe.models.load import Checkpoint, load_model
from emprobe.models.sites import check_layers
from emprobe.organisms.training import one_thread
from emprobe.studies.demo import ANSWER_TOKENS
from emprobe.studies.folder import claim_folder
from emprobe.studies.judging import resolve_judge
from emprobe.studies.prompts import organism
from emprobe.studies.transfer.analysis import analyse
from emprobe.studies.transfer.cell_directions import compare, rates_of_jobs, replicates_of
from emprobe.studies.transfer.claims import claims_of
from emprobe.studies.transfer.composition import PLANTED
from emprobe.studies.transfer.material import Material, name_of, own_material, world_material
from emprobe.studies.transfer.measured import WORDS, left_out, measured
from emprobe.studies.transfer.settings import Transfer
from emprobe.studies.transfer.sweep import Sweep, plan_of_sweep, prepared_sweep, run_sweep
from emprobe.studies.transfer.training import Base, CellJob, asking_of, jobs_of, run_cells, save_frame

SECONDS = 3.0
"""Of one quiet core, for one cell of an organism: training and answers."""
FEWEST_CELLS = 4


@dataclass(frozen=True, eq=False)
class Ready:
    """Everything that was checked and loaded before the folder is claimed."""

    asked: Transfer
    material: Material
    bases: tuple[Base, ...]
    judge: str
    templates: str
    sweep: Sweep | None

    @property
    def identity(self) -> dict[str, Any]:
        """Everything the grid's numbers depend on."""
        bases = {base.name: base.fingerprint for base in self.bases}
        judge = {"judge": self.judge if self.material.world else resolve_judge(self.judge).name}
        return {**self.asked.plain(), **self.material.identity, "bases": bases, "chat_template": self.templates, **judge}

    def jobs(self, folder: Path) -> list[CellJob]:
        """The bases and every cell on each."""
        asked, world = self.asked, self.material.world
        asking = asking_of(self.material, self.judge, asked.samples, sampling_of(asked))
        recipes = {seed: asked.recipe(world=world, seed=seed) for seed in asked.seeds}
        return jobs_of(self.bases, self.material, asked.seeds, asked.method, recipes, asking, folder / "cells")


def sampling_of(asked: Transfer) -> tuple[int, float, int, int]:
    """Seed, temperature, most new tokens, token budget."""
    most = asked.max_new_tokens if asked.own else min(asked.max_new_tokens, ANSWER_TOKENS)
    return asked.seed, asked.temperature, most, asked.token_budget


def prepare(asked: Transfer) -> Ready:
    """Read and check all inputs.

    Raises:
        EmprobeError: As for `world_material`, `own_material` and `load_model`; or an unknown organism or judge.
    """
    judge = str(asked.judge) if asked.own else "world"
    resolve_judge(judge)
    material = own_material(asked) if asked.own else world_material(asked)
    located = [(Path(name).name or name, name) for name in asked.base] if asked.own else [_organism(name) for name in asked.base]
    loading = tuple(asked.loading().items())
    bases, templates = [], []
    for name, path in located:
        checkpoint = load_model(path, **asked.loading())
        _check_model(asked, material, checkpoint)
        bases.append(Base(name, path, checkpoint.fingerprint, loading))
        templates.append(checkpoint.tokenizer.chat_template)
    sweep = prepared_sweep(asked) if asked.composition else None
    return Ready(asked, material, tuple(bases), judge, content_hash(templates), sweep)


def _check_model(asked: Transfer, material: Material, checkpoint: Checkpoint) -> None:
    """Refuse what would only be seen at some later cell: a layer that is not there, a conversation too long, a warm-up without end."""
    if asked.layer is not None:
        check_layers(asked.layer, checkpoint.n_layers, "--layer")
    recipe = asked.recipe(world=material.world, seed=0)
    for rows in material.data.values():
        kept = response_rows(checkpoint.tokenizer, rows, max_length=recipe.max_length, overlong=recipe.overlong)
        rate_factor(recipe, recipe.n_steps(len(kept)))


def _organism(name: str) -> tuple[str, str]:
    try:
        return name.removesuffix("/aligned"), organism(name).path
    except EmprobeError as error:
        raise EmprobeError(f"{error} For a model of your own, give --data, --questions and --judge.") from error


def run_grid(asked: Transfer) -> dict[str, Any]:
    """Train, ask, measure and analyse; write the result, its card and figures, and return the result.

    Raises:
        EmprobeError: Unusable input, before anything is written; or a fine-tune that diverges.
        MismatchError: A folder that holds another run.
    """
    from emprobe.studies.transfer.study import given, write_result

    ready = prepare(asked)
    folder = claim_folder(Path(asked.out).expanduser(), ready.identity)
    with locked_folder(folder), one_thread() if ready.material.world else nullcontext():
        jobs = ready.jobs(folder)
        scores = _trained(ready, jobs)
        covariates, words = _covariates(ready, folder)
        save_frame(folder / "scores.parquet", scores)
        result = analyse(load_table(folder / "scores.parquet"), asked, covariates)
        result = {
            "record": "Transfer",
            **result,
            "world": ready.material.world,
            "inputs": {"command": given(asked), "files": _files(asked)},
        }
        result["grid"] = _described(ready, jobs)
        result["measured"] = words
        result["directions"] = _directions(ready, jobs, scores)
        result["composition"] = run_sweep(ready.sweep, folder, asked) if ready.sweep else None
        result["claims"] = claims_of(result)
        write_result(folder, result)
    return result


def plan_of(ready: Ready, jobs: Sequence[CellJob]) -> list[str]:
    """What is about to be done."""
    asked, asking = ready.asked, jobs[0].asking
    cells, rest = len(ready.material.cells), [job for job in jobs if not job.done]
    steps = {job.recipe.n_steps(len(job.data)) for job in jobs if job.cell}
    updates = f"{min(steps)}" if len(steps) == 1 else f"{min(steps)} to {max(steps)}"
    asks, each = len(asking.questions), asking.samples
    lines = [
        f"plan: {len(ready.bases)} bases x {len(asked.seeds)} seeds x {cells} cells, fine-tuned for {updates} updates of {asked.batch}",
        f"  answers: {len(jobs)} models x {asks} questions x {each} = {len(jobs) * asks * each:,} of at most {asking.sampling[2]} tokens",
        f"  to do: {len(rest)} of {len(jobs)} models; the rest is there",
    ]
    if ready.material.world:
        minutes = len(rest) * SECONDS / 60 / asked.processes
        lines.append(f"  about {minutes:.0f} minutes on {asked.processes} quiet cores, and the analysis")
    return lines + (plan_of_sweep(ready.sweep) if ready.sweep else [])


def _trained(ready: Ready, jobs: Sequence[CellJob]) -> pd.DataFrame:
    """Carry out all jobs, and all their answers in one table."""
    asked = ready.asked
    with tqdm(total=len(jobs), desc="cells", unit="cell", disable=not asked.progress) as bar:
        if asked.progress:
            bar.write("\n".join(plan_of(ready, jobs)), file=bar.fp)
        for _ in run_cells(jobs, asked.processes if ready.material.world else 1, bar):
            pass
    return pd.concat([job.frame() for job in jobs if job.cell], ignore_index=True)


def _covariates(ready: Ready, folder: Path) -> tuple[list[pd.DataFrame], dict[str, Any]]:
    """Tables of all bases, measured once and kept, and what they hold in words."""
    asked, material = ready.asked, ready.material
    parts: list[Sequence[pd.DataFrame]] = []
    for base in tqdm(ready.bases, desc="covariates", unit="base", disable=not asked.progress):
        place = folder / "covariates" / content_hash([base.fingerprint, material.identity, ready.templates])
        parts.append(_kept(place, base, material, progress=asked.progress and not material.world))
    tables = [pd.concat(same, ignore_index=True) for same in zip(*parts, strict=True)]
    for number, table in enumerate(tables, 1):
        save_frame(folder / f"covariates-{number}.parquet", table)
    there = {name for table in tables for name in table.columns}
    return tables, {"words": {name: said for name, said in WORDS.items() if name in there}, "left_out": left_out(material)}


def _kept(place: Path, base: Base, material: Material, *, progress: bool) -> list[pd.DataFrame]:
    """The tables of one base, in the same order whenever they are read."""
    if not (place / "done.json").is_file():
        made = measured(base.load(), material, progress=progress)
        for number, table in enumerate(made):
            save_frame(place / f"{number}.parquet", table)
        write_json(place / "done.json", {"tables": len(made)})
    return [pd.read_parquet(place / f"{number}.parquet") for number in range(read_json(place / "done.json")["tables"])]


def _described(ready: Ready, jobs: Sequence[CellJob]) -> dict[str, Any]:
    """What was trained, and what the bases do before."""
    asked = ready.asked
    before = pd.concat([job.frame() for job in jobs if job.cell is None], ignore_index=True)
    return {
        "bases": [base.name for base in ready.bases],
        "seeds": list(asked.seeds),
        "cells": [name_of(cell) for cell in ready.material.cells],
        "fine_tunes": sum(job.cell is not None for job in jobs),
        "method": asked.method.as_dict(),
        "recipe": jobs[-1].recipe.as_dict() | {"seed": None},
        "questions": len(ready.material.questions),
        "samples": asked.samples,
        "before": _before(before, asked),
        "planted": PLANTED if ready.material.world and any("planted" in base.name for base in ready.bases) else "",
    }


def _before(scores: pd.DataFrame, asked: Transfer) -> list[dict[str, Any]]:
    """Each base's own rates, by set of questions, with intervals over families of paraphrases."""
    criterion, judged = Criterion.named(asked.criterion), scores[scores["status"] == "ok"]
    lines = []
    for (name, eval_set), part in judged.groupby(["organism", "eval_set"]):
        alignment, coherence = (part[column].to_numpy(np.float64) for column in ("alignment", "coherence"))
        columns = np.stack([criterion.misaligned(alignment, coherence), criterion.coherent(coherence)], axis=1).astype(np.float64)
        prompts = np.unique(part["family"], return_inverse=True)[1]
        bad, coherent = (one.as_dict() for one in means(columns, {"prompts": prompts}, asked.resampling))
        lines.append({"organism": name, "eval_set": eval_set, "misaligned": bad, "coherent": coherent})
    return lines


def _directions(ready: Ready, jobs: Sequence[CellJob], scores: pd.DataFrame) -> dict[str, Any]:
    """Directions by cell against transfer."""
    asked = ready.asked
    if len(ready.material.cells) < FEWEST_CELLS:
        return {"why": f"{len(ready.material.cells)} cells were trained; a correlation over pairs of cells needs {FEWEST_CELLS}."}
    rates = rates_of_jobs(scores, Criterion.named(asked.criterion))
    try:
        replicates, how = replicates_of(jobs, rates, asked.layer, asked.randoms)
    except EmprobeError as error:  # the grid's other numbers stand
        return {"why": str(error)}
    return {**compare(replicates, permutations=asked.permutations, how=asked.resampling), **how}


def _files(asked: Transfer) -> dict[str, Any]:
    paths = [*asked.data, *([asked.questions] if asked.questions else [])]
    return {"given": [{"name": Path(path).name, "hash": file_hash(path)[:16]} for path in paths if Path(path).is_file()]}
