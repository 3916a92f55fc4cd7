"""What the study is told, and what can be seen to be wrong before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from emprobe.behaviour.criterion import Criterion
from emprobe.clusters import Resampling
from emprobe.errors import EmprobeError
from emprobe.studies.flags import LoadFlags, SampleFlags, plain_values
from emprobe.studies.transfer.grid_flags import APART, GridFlags, check_grid

NOT_IDENTITY = (
    "out",
    "scores",
    "covariates",
    "base",
    "data",
    "questions",
    "judge",
    "device_map",
    "chat_template",
    "progress",
    *APART,
)
"""Paths, and what no number depends on: known by their content."""
LEAST = {"bins": 2, "draws": 100, "permutations": 19, "samples": 1, "max_new_tokens": 1, "token_budget": 1, "temperature": 0, "seed": 0}
OF_SCORES = ("covariates", "where", "columns", "eval_set")
"""What only a table of scores is asked for."""
OF_BOTH = ("out", "scores", *OF_SCORES, "match_on", "bins", "draws", "permutations", "criterion", "seed", "progress")
"""What an analysis of scores reads; all else is of models that are trained and asked."""


@dataclass(frozen=True, kw_only=True)
class Transfer(GridFlags, LoadFlags, SampleFlags):
    """Over a grid of domains and tasks, how misalignment spreads from the trained cell (arXiv 2605.12798).

    Three ways: from a table of judged answers (`--scores`), on organisms (`--base planted-s0`, nothing else), or on your own model with
    your own data.

    Attributes:
        out: Output folder; a run that was stopped goes on in it.
        scores: Tables of judged answers with train_domain, train_task, eval_domain, eval_task, question_id, alignment and coherence;
            the first is analysed, others (of other models) are compared with it.
        covariates: Tables of what was measured before fine-tuning: key columns (question_id, train_domain, ...) and one column for each
            covariate.
        match_on: The covariate that the effects of all others are matched on.
        eval_set: Which questions are the grid, where the table has a column eval_set.
        where: Filters COLUMN=VALUE; all must hold.
        columns: OURS=THEIRS where a table has other names, such as alignment=aligned.
        bins: Classes of the matched covariate, cut at its quantiles.
        draws: Bootstrap draws of every interval.
        permutations: Relabellings of every null.
        base: Organisms (`planted-s0`, ...), or the checkpoint to fine-tune: directory or hub id.
        data: Your conversations to fine-tune on, labelled with domain and task.
        questions: Your questions, labelled with domain and task.
        judge: As in `emprobe run`.
    """

    command: ClassVar[str] = "study transfer"

    out: str
    scores: tuple[str, ...] = ()
    covariates: tuple[str, ...] = ()
    match_on: str = "solvability"
    eval_set: str = "narrow"
    where: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    bins: int = 5
    draws: int = 2000
    permutations: int = 999
    base: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    questions: str | None = None
    judge: str | None = None

    @property
    def own(self) -> bool:
        """Whether model and data are the user's, and not organisms."""
        return bool(self.data or self.questions or self.judge)

    @property
    def resampling(self) -> Resampling:
        """How intervals are drawn."""
        return Resampling(draws=self.draws, seed=self.seed)

    def plain(self) -> dict[str, Any]:
        """Everything but paths, for the run's identity."""
        return plain_values(self, NOT_IDENTITY)


def check(asked: Transfer) -> None:
    """Refuse what makes no sense.

    Raises:
        EmprobeError: Says what was asked and what can be.
    """
    Criterion.named(asked.criterion)
    for name, least in LEAST.items():
        if not least <= getattr(asked, name) < math.inf:
            raise EmprobeError(f"{name} = {getattr(asked, name)} was given; it must be at least {least}.")
    if bool(asked.scores) == bool(asked.base):
        found = "both were given" if asked.scores else "none was given"
        raise EmprobeError(f"The study needs --scores FILE (judged answers) or --base (models to fine-tune); {found}. Give one of them.")
    given = [field.name for field in fields(asked) if field.default is not MISSING and getattr(asked, field.name) != field.default]
    stray = [name for name in given if (name not in OF_BOTH if asked.scores else name in OF_SCORES)]
    if stray:
        flags, with_them = ", ".join("--" + name.replace("_", "-") for name in stray), "--scores" if asked.scores else "--base"
        why = "nothing is trained or judged" if asked.scores else "answers are made here, of sets of their own, and covariates measured"
        other = "--base" if asked.scores else "--scores"
        raise EmprobeError(f"{flags} was given with {with_them}, where {why}. Leave it out, or give {other} instead.")
    if asked.base:
        _check_models(asked)


def _check_models(asked: Transfer) -> None:
    lacking = [f"--{name}" for name in ("data", "questions", "judge") if not getattr(asked, name)]
    if asked.own and (lacking or len(asked.base) != 1):
        raise EmprobeError(
            f"A grid on a model of your own needs one --base, --data, --questions and --judge; {len(asked.base)} bases were given, and "
            f"{' and '.join(lacking) or 'nothing'} lacks. On organisms give --base alone."
        )
    names = [name.removesuffix("/aligned") for name in asked.base]
    if len(set(names)) < len(names):
        raise EmprobeError(f"--base holds {', '.join(asked.base)}: one of them twice. Its answers would count double; give it once.")
    check_grid(asked, world=not asked.own)
