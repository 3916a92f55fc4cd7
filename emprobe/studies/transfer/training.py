"""One trained cell: fine-tune, answer all questions, judge, and read the prompts; kept on disk, so that a killed grid goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from emprobe.activations import Activations
from emprobe.behaviour.scores import Scores
from emprobe.capture import capture
from emprobe.files import atomic_path, content_hash, read_json, write_json
from emprobe.finetuning import LoRA, Recipe, finetune
from emprobe.models.load import Checkpoint, load_model
from emprobe.studies.judging import resolve_judge
from emprobe.studies.runner import Runner, known_by
from emprobe.studies.settings import without_references
from emprobe.studies.transfer.cell_rates import Cell
from emprobe.studies.transfer.material import Material, name_of
from emprobe.studies.workers import in_processes
from emprobe.types import Conversation

if TYPE_CHECKING:
    import pandas as pd

DONE, SCORES, PROMPTS = "cell.json", "scores.parquet", "prompts.safetensors"
NO_CELL = "base"
"""Folder of the base itself, which is asked and read as fine-tunes are."""


@dataclass(frozen=True)
class Base:
    """A model that cells are trained on, as a process can be told of it.

    Attributes:
        name: As results call it.
        path: Where it lies.
        fingerprint: Of its weights.
        loading: What `load_model` takes, as items.
    """

    name: str
    path: str
    fingerprint: str
    loading: tuple[tuple[str, Any], ...]

    def load(self) -> Checkpoint:
        """The checkpoint, once a process."""
        return replace(_loaded(self.path, self.loading), name=self.name)


@lru_cache(maxsize=1)
def _loaded(path: str, loading: tuple[tuple[str, Any], ...]) -> Checkpoint:
    return load_model(path, **dict(loading))


def save_frame(path: Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, atomically, into a folder that is made if need be."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


@dataclass(frozen=True)
class Asking:
    """How fine-tunes are asked: all that is the same for every cell.

    Attributes:
        questions: Without reference answers.
        prompts: Where activations are read; none reads nothing.
        judge: As `resolve_judge` takes it.
        samples: Answers to each question.
        sampling: Seed, temperature, most new tokens, padded tokens per batch.
    """

    questions: Sequence[Conversation]
    prompts: Sequence[Conversation]
    judge: str
    samples: int
    sampling: tuple[int, float, int, int]

    @property
    def identity(self) -> str:
        """Hash of it; the batch's size changes no answer."""
        return content_hash([known_by(self.questions), known_by(self.prompts), self.judge, self.samples, list(self.sampling[:3])])


@dataclass(frozen=True)
class CellJob:
    """One cell to train on one base with one seed, or with no data the base itself.

    Attributes:
        folder: Its own.
    """

    base: Base
    seed: int
    cell: Cell | None
    data: Sequence[Conversation]
    method: LoRA
    recipe: Recipe
    asking: Asking
    folder: Path

    @property
    def identity(self) -> str:
        """Everything that its numbers depend on."""
        data = [known_by(self.data), [row.response for row in self.data]]
        return content_hash(
            [
                self.base.fingerprint,
                [*map(list, self.base.loading)],
                self.method.as_dict(),
                self.recipe.as_dict(),
                data,
                self.asking.identity,
            ]
        )

    @property
    def done(self) -> bool:
        """Whether it was carried out, with the same numbers."""
        path = self.folder / DONE
        return path.is_file() and bool(read_json(path)["identity"] == self.identity)

    def frame(self) -> pd.DataFrame:
        """Its judged answers, one a row, with both cells' names."""
        table = Scores.load(self.folder / SCORES).to_frame()
        labels = {q.question_id: q.labels for q in self.asking.questions}
        asked = [labels[name] for name in table["question_id"]]
        found = table[["question_id", "sample", "alignment", "coherence", "status", "stop_reason"]].copy()
        found["family"] = [one["family"] for one in asked]
        found["eval_set"] = [one["eval_set"] for one in asked]
        for i, side in enumerate(("domain", "task")):
            found[f"eval_{side}"] = [str(one[side]) for one in asked]
            found[f"train_{side}"] = self.cell[i] if self.cell else None
        return found.assign(organism=self.base.name, seed=self.seed)

    def activations(self) -> Activations:
        """Of the last token of every prompt, at every block."""
        return Activations.load(self.folder / PROMPTS)


def run_cell(job: CellJob) -> None:
    """Carry out one job; its parts that are there already are taken as they are.

    Raises:
        Diverged: If the loss does; a smaller rate helps.
    """
    base = job.base.load()
    losses: list[float] = []
    if job.cell is None:
        _ask(job, base)
    else:
        found = finetune(base, job.data, method=job.method, recipe=job.recipe, out=job.folder / "tuned", progress=False)
        losses = [float(value) for value in found.history["loss"]]
        with found.solution.applied(base) as tuned:
            _ask(job, replace(tuned, name=f"{job.base.name}, {name_of(job.cell)}"))
    write_json(job.folder / DONE, {"identity": job.identity, "losses": losses})


def _ask(job: CellJob, checkpoint: Checkpoint) -> None:
    asking, judge = job.asking, resolve_judge(job.asking.judge)
    with tqdm(disable=True) as unseen:
        runner = Runner(judge, judge.name, job.folder / "answers", *asking.sampling, unseen)
        runner.run("tuned", checkpoint, asking.questions, asking.samples).scores.save(job.folder / SCORES)
    if asking.prompts:
        capture(checkpoint, asking.prompts, positions="last_prompt_token", progress=False).save(job.folder / PROMPTS)


def jobs_of(
    bases: Sequence[Base],
    material: Material,
    seeds: Sequence[int],
    method: LoRA,
    recipes: Mapping[int, Recipe],
    asking: Asking,
    folder: Path,
) -> list[CellJob]:
    """Every base with nothing trained, and every cell on it with every seed."""
    found = []
    for base in bases:
        place = folder / base.name.replace("/", "-")
        found.append(CellJob(base, seeds[0], None, (), method, recipes[seeds[0]], asking, place / NO_CELL))
        found += [
            CellJob(base, seed, cell, material.data[cell], method, recipes[seed], asking, place / f"seed-{seed}" / name_of(cell))
            for seed in seeds
            for cell in material.cells
        ]
    return found


def run_cells(jobs: Sequence[CellJob], processes: int, bar: tqdm[Any]) -> Iterator[CellJob]:
    """Carry out what is not done; the bar moves by one for each job.

    Raises:
        Diverged: As `run_cell`.
    """
    rest = [job for job in jobs if not job.done]
    bar.update(len(jobs) - len(rest))
    for job in in_processes(run_cell, rest, processes):
        bar.set_postfix_str(f"{job.base.name} {name_of(job.cell) if job.cell else 'base'}", refresh=False)
        bar.update(1)
        yield job


def asking_of(material: Material, judge: str, samples: int, sampling: tuple[int, float, int, int], *, read: bool = True) -> Asking:
    """How the material's questions are asked; answers given with them are for covariates only."""
    return Asking([without_references(q) for q in material.questions], material.prompts if read else (), judge, samples, sampling)
