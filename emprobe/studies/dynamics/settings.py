"""What the study is told, and what can be seen to be wrong before anything is loaded or trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from emprobe.behaviour.criterion import Criterion
from emprobe.errors import EmprobeError
from emprobe.finetuning.methods import Schedule
from emprobe.organisms.world import SEEN
from emprobe.studies.dynamics.change_point import LEAST_POINTS
from emprobe.studies.dynamics.relation import LEAST_RUNS
from emprobe.studies.dynamics.table import Columns
from emprobe.studies.flags import LoadFlags, SampleFlags, plain_values

Way = Literal["table", "world", "data", "finetunes"]
NOT_IDENTITY = (
    "base",
    "out",
    "runs",
    "data",
    "evaluation",
    "questions",
    "judge",
    "finetunes",
    "device_map",
    "chat_template",
    "progress",
)
"""Paths, and what no number depends on: known by their content."""


@dataclass(frozen=True, kw_only=True)
class Dynamics(LoadFlags, SampleFlags):
    """Training dynamics: in-domain loss against out-of-domain alignment over many short fine-tunes (arXiv 2606.20814, part 1).

    Four ways: a table of runs (`--runs FILE --loss NAME --score NAME`); an organism (`--base planted-s0`, nothing else); your own model
    and data (`--base PATH --data FILE --evaluation FILE --questions FILE`), which are trained over schedules, rates and seeds; or
    fine-tunes that are there (`--finetunes DIR ...`, folders of `emprobe finetune` with checkpoints).

    Attributes:
        out: Output folder; a run that was stopped goes on in it.
        runs: Table (.csv, .tsv, .parquet, .jsonl, .json) with a row for each run, or for each of its checkpoints.
        loss: Columns of the table with in-domain losses.
        score: Columns with scores; higher is better.
        run: Column that names the run: rows of one run are one cluster.
        step: Column that orders the rows of a run; its last row is the end of the run.
        set: Column that names the question set of a row.
        given: Column, such as the learning rate: the relation also among runs that are equal in it.
        tolerance: How much higher a loss still counts as similar in `max_diff`.
        draws: Of runs, for intervals, and as many shuffles.
        base: Organism (`planted-s0`), or your checkpoint: directory or hub id.
        data: Conversations to be trained on; with --finetunes, on which the training loss is taken.
        evaluation: Held-back conversations of the same domain, whose loss is the evaluation loss.
        questions: Files of questions out of the domain, each a question set.
        judge: As in `emprobe run`; without one, questions need reference answers, whose probabilities are read.
        finetunes: Folders of `emprobe finetune`.
        domain: Where an organism is trained to give bad answers.
        schedules: Learning-rate schedules: linear, cosine, constant, cyclic.
        lrs: Largest learning rates.
        seeds: Of first weights and order of data; an organism's data too.
        steps: Updates of each run.
        every: Updates between checkpoints.
        cycles: Of the cyclic schedule.
        batch: Conversations per update.
        rank: Of the LoRA.
        target_modules: Of the LoRA: names of modules; none is every linear layer.
        layer: 0-based block at whose output (resid_post) the direction is followed; none is the block in the middle.
        lag: Of the local cosine, in checkpoints.
        rows: Conversations on which each loss is taken, at most.
        max_length: Most tokens of a conversation; longer ones are refused.
    """

    command: ClassVar[str] = "study dynamics"

    out: str
    runs: str | None = None
    loss: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    run: str = "run"
    step: str | None = None
    set: str | None = None
    given: str | None = None
    tolerance: float = 0.0
    draws: int = 2000
    base: str | None = None
    data: str | None = None
    evaluation: str | None = None
    questions: tuple[str, ...] = ()
    judge: str | None = None
    finetunes: tuple[str, ...] = ()
    domain: str = "gardening"
    schedules: tuple[Schedule, ...] = ("linear", "cosine", "constant", "cyclic")
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 60
    every: int = 5
    cycles: int = 3
    batch: int = 16
    rank: int = 1
    target_modules: tuple[str, ...] = ("down_proj",)
    layer: int | None = None
    lag: int = 1
    rows: int = 100
    max_length: int = 2048

    @property
    def way(self) -> Way:
        """What is looked at."""
        if self.runs is not None:
            return "table"
        if self.finetunes:
            return "finetunes"
        own = (self.data, self.evaluation, self.judge, *self.questions)
        return "data" if any(one is not None for one in own) else "world"

    @property
    def columns(self) -> Columns:
        """Of the table given."""
        return Columns(self.loss, self.score, self.run, self.step, self.set, self.given)

    def plain(self) -> dict[str, Any]:
        """Everything but paths, for the run's identity."""
        return plain_values(self, NOT_IDENTITY)


def check(asked: Dynamics) -> None:
    """Refuse what makes no sense.

    Raises:
        EmprobeError: Says what was asked and what can be.
    """
    if not asked.tolerance >= 0:
        raise EmprobeError(f"--tolerance {asked.tolerance:g} was given: how much higher a loss still counts as similar. Give 0 or more.")
    if asked.draws < 100:
        raise EmprobeError(f"--draws {asked.draws} was given. Give at least 100; 2000 for an interval.")
    _check_table(asked) if asked.way == "table" else _check_models(asked)


def _check_table(asked: Dynamics) -> None:
    lacking = [f"--{name}" for name in ("loss", "score") if not getattr(asked, name)]
    if lacking:
        raise EmprobeError(f"--runs was given without {' and '.join(lacking)}: the columns to be put beside each other. Name them.")
    stray = [name for name in ("base", "data", "evaluation", "judge") if getattr(asked, name) is not None]
    stray += [name for name in ("questions", "finetunes") if getattr(asked, name)]
    if stray:
        raise EmprobeError(f"--{stray[0]} was given with --runs. A table needs no model: give the one or the other.")


def _check_models(asked: Dynamics) -> None:
    stray = [name for name in ("loss", "score") if getattr(asked, name)]
    stray += [name for name in ("step", "set", "given") if getattr(asked, name) is not None]
    if stray:
        raise EmprobeError(f"--{stray[0]} names a column of a table. Give the table with --runs, or leave it out.")
    if asked.base is None:
        raise EmprobeError(
            "Nothing was given to look at. Give --runs FILE (a table), --base ORGANISM (such as planted-s0), or --base PATH with --data, "
            "--evaluation and --questions, or with --finetunes."
        )
    for name in ("steps", "every", "lag", "rows", "rank", "batch", "cycles", "samples", "max_new_tokens"):
        if getattr(asked, name) < 1:
            raise EmprobeError(f"--{name.replace('_', '-')} {getattr(asked, name)} was given; it must be at least 1.")
    Criterion.named(asked.criterion)
    if asked.way != "world":
        _check_own(asked)
    elif asked.domain not in SEEN:
        raise EmprobeError(f"Domain {asked.domain!r} was asked for. Organisms are trained on one of: {', '.join(SEEN)}.")
    if asked.way == "finetunes":
        _check_runs(len(asked.finetunes))
        return
    _check_grid(asked)
    kept = asked.steps // asked.every
    if asked.steps % asked.every or kept < 2 * asked.lag:
        raise EmprobeError(
            f"{asked.steps} steps with a checkpoint every {asked.every} were asked for. Give steps that are a multiple of it, and at least "
            f"{2 * asked.lag} checkpoints ({LEAST_POINTS - 1} or more for change-points)."
        )


def _check_grid(asked: Dynamics) -> None:
    for name in ("schedules", "lrs", "seeds"):
        given = getattr(asked, name)
        if len(set(given)) < len(given):
            raise EmprobeError(f"--{name} {' '.join(map(str, given))} was given: each once, since the same run twice is no more evidence.")
    names = [f"{lr:g}" for lr in asked.lrs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EmprobeError(f"Two learning rates are called {twice}, and runs bear their names. Give rates that differ in six digits.")
    _check_runs(len(asked.schedules) * len(asked.lrs) * len(asked.seeds))


def _check_runs(n: int) -> None:
    if n < LEAST_RUNS:
        raise EmprobeError(f"{n} runs were asked for; a relation between runs needs at least {LEAST_RUNS}, and 20 or more to mean much.")


def _check_own(asked: Dynamics) -> None:
    needed = ("evaluation",) if asked.way == "finetunes" else ("data", "evaluation")
    lacking = [f"--{name}" for name in needed if getattr(asked, name) is None] + ([] if asked.questions else ["--questions"])
    if lacking:
        raise EmprobeError(
            f"Your own model was given without {' and '.join(lacking)}. Give conversations to be trained on (--data), held-back ones "
            "of the same domain (--evaluation), and questions out of it (--questions)."
        )
