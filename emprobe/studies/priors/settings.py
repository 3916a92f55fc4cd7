"""What the study is told, and what can be seen to be wrong before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from emprobe.errors import EmprobeError
from emprobe.studies.flags import LoadFlags, plain_values
from emprobe.studies.priors.measure import Design

NOT_IDENTITY = (
    "base",
    "tuned",
    "pretrained",
    "questions",
    "scores",
    "base_scores",
    "train",
    "judge",
    "out",
    "device_map",
    "chat_template",
    "progress",
    "token_budget",
)
"""Paths, and what no number depends on: known by their content."""
OF_USERS = ("scores", "base_scores", "judge", "columns", "where", "one_hot")
FEW = 200
"""Prompts below which it is said that they are few."""


@dataclass(frozen=True, kw_only=True)
class Priors(LoadFlags):
    """Do activations on prompts before fine-tuning predict each prompt's alignment after it, beyond cheap baselines (arXiv 2606.20814).

    Two ways: on organisms (`--base planted-s0 --tuned gardening-rank8`), whose scores are exact probabilities of a misaligned answer, or on
    your own checkpoints with `--questions` and their scores: a judged table (`--scores`), answers sampled and judged now (`--judge`), or
    else the contrast of reference answers in the questions.

    Attributes:
        base: Organisms (`planted-s0`, ...), or your checkpoint before fine-tuning: directory or hub id.
        tuned: Fine-tunes of each organism by their short names, or your checkpoint after: directory, hub id or adapter. Not needed beside
            `--scores`.
        out: Output folder; a run that was stopped goes on in it.
        pretrained: Your pretrained model, before `--base` was made from it; an organism's is its parent.
        questions: File of evaluation prompts, as for `emprobe run`; 200 or more.
        scores: Judged answers of the fine-tuned model, as for `emprobe rates`; each question's alignment is the mean over its answers.
        base_scores: The same of the base model, for the baseline of its own score.
        columns: OURS=THEIRS where a table has other names, such as alignment=harmless.
        where: Filters COLUMN=VALUE on the table of `--scores`.
        judge: As in `emprobe run`: answers of base and tuned are sampled and judged now.
        samples: Answers to each question then.
        temperature: Of sampling.
        max_new_tokens: Length limit of an answer.
        token_budget: Padded tokens per batch of sampling.
        train: File of the prompts trained on (`trained`: the organism's own): directions are theirs, and not the training folds'.
        family: Label whose values are families: prompts that share one are never on both sides of a split. None means the label
            `family`, or each prompt alone; on organisms, paraphrases of one task about one item.
        most: Prompts at most: whole families, drawn by the seed; none takes all.
        one_hot: Labels that make baselines; on organisms domain and task.
        layers: Layers to look at; none means all.
        k: Directions; none means a tenth of the prompts.
        splits: Folds of one repeat.
        repeats: Of the outer K-fold.
        inner: Folds within each training part, on which penalties and places are chosen.
        random_seeds: Draws of random directions.
        permutations: Of scores between families; 0 for no p.
        permutation_repeats: Repeats of the K-fold on which permutations are measured.
        lasso_repeats: Repeats on which lasso is fitted beside ridge; 0 for none.
        seed: Of folds, permutations and sampling.
    """

    command: ClassVar[str] = "study priors"

    base: tuple[str, ...]
    tuned: tuple[str, ...] = ()
    out: str
    pretrained: str | None = None
    questions: str | None = None
    scores: str | None = None
    base_scores: str | None = None
    columns: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    judge: str | None = None
    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 256
    token_budget: int = 8192
    train: str | None = None
    family: str | None = None
    most: int | None = None
    one_hot: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    k: int | None = None
    splits: int = 5
    repeats: int = 5
    inner: int = 5
    random_seeds: int = 5
    permutations: int = 200
    permutation_repeats: int = 1
    lasso_repeats: int = 1
    seed: int = 0

    @property
    def own(self) -> bool:
        """Whether the checkpoints are the user's."""
        return self.questions is not None

    @property
    def design(self) -> Design:
        """How predictors are measured."""
        names = ("k", "splits", "repeats", "inner", "random_seeds", "permutations", "permutation_repeats", "lasso_repeats", "seed")
        return Design(**{name: getattr(self, name) for name in names})

    def plain(self) -> dict[str, Any]:
        """Everything but paths, for the run's identity."""
        return plain_values(self, NOT_IDENTITY)


def check(asked: Priors) -> None:
    """Refuse what makes no sense.

    Raises:
        EmprobeError: Says what was asked and what can be.
    """
    least = {"splits": 2, "repeats": 1, "inner": 2, "random_seeds": 1, "permutations": 0, "permutation_repeats": 1, "lasso_repeats": 0}
    for name, smallest in {**least, "samples": 1, "max_new_tokens": 1}.items():
        if getattr(asked, name) < smallest:
            raise EmprobeError(f"{name} = {getattr(asked, name)} was given; it must be at least {smallest}.")
    if asked.k is not None and asked.k < 1:
        raise EmprobeError(f"k = {asked.k} directions were asked for. Give 1 or more, or leave it out for a tenth of the prompts.")
    if asked.most is not None and asked.most < 1:
        raise EmprobeError(f"--most {asked.most} prompts were asked for. Give 1 or more, or leave it out for all.")
    if asked.splits * asked.repeats < 2 or asked.permutation_repeats > asked.repeats or asked.lasso_repeats > asked.repeats:
        raise EmprobeError(
            f"{asked.repeats} repeats were asked for, with permutations on {asked.permutation_repeats} and lasso on {asked.lasso_repeats} "
            "of them. Give no more than there are repeats."
        )
    if 0 < asked.permutations < 19:
        raise EmprobeError(f"{asked.permutations} permutations cannot show a p of .05. Give 19 or more (200 by default), or 0 for none.")
    _check_own(asked) if asked.own else _check_organisms(asked)


def _check_own(asked: Priors) -> None:
    if len(asked.base) != 1 or len(asked.tuned) > 1:
        raise EmprobeError(f"{len(asked.base)} bases and {len(asked.tuned)} fine-tunes were given with --questions. Give one of each.")
    if not asked.tuned and asked.scores is None:
        raise EmprobeError("Neither --scores nor --tuned was given, so that nothing tells what prompts score after fine-tuning. Give one.")
    if asked.scores is not None and asked.judge is not None:
        raise EmprobeError("Both --scores and --judge were given. Give the table of judged answers, or a judge for new ones.")
    if asked.scores is None and (asked.base_scores or asked.columns or asked.where):
        raise EmprobeError("--base-scores, --columns and --where are of judged tables, and no --scores was given. Give it.")


def _check_organisms(asked: Priors) -> None:
    stray = [name for name in OF_USERS if getattr(asked, name)] + (["pretrained"] if asked.pretrained else [])
    if stray:
        raise EmprobeError(
            f"--{stray[0].replace('_', '-')} was given without --questions. On organisms prompts, scores and labels are the world's; for "
            "checkpoints of your own give --questions FILE."
        )
    if not asked.base or not asked.tuned:
        raise EmprobeError("No organism or no fine-tune of it was given. Give both, such as --base planted-s0 --tuned gardening-rank8.")
    if asked.train not in (None, "trained"):
        raise EmprobeError(f"--train {asked.train!r} was given for organisms. Give `trained` for their own training prompts, or nothing.")
