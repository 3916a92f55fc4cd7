"""Distil a teacher into a student through one of three channels; everything checked first, then the run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from emprobe.errors import EmprobeError
from emprobe.files import canonical_json
from emprobe.finetuning.channels import Channel, ChannelGradient, Distilling, Estimator, change_of
from emprobe.finetuning.lengths import Length
from emprobe.finetuning.methods import Full, Method, Recipe
from emprobe.finetuning.mounting import Mounted
from emprobe.finetuning.record import FineTune
from emprobe.finetuning.rollouts import Rollouts, prompt_rows
from emprobe.finetuning.rows import Row, response_rows
from emprobe.finetuning.running import Run, check_method, check_start, described, kept_steps
from emprobe.finetuning.teaching import Teacher, check_teacher, opened
from emprobe.models.decoding import stop_ids
from emprobe.models.load import Checkpoint, load_model
from emprobe.types import Conversation


def distill(
    student: Checkpoint | str | Path,
    teacher: Checkpoint | str | Path,
    conversations: Sequence[Conversation],
    *,
    channel: Channel,
    method: Method,
    recipe: Recipe | None = None,
    tokens: int | None = None,
    temperature: float = 1.0,
    estimator: Estimator = "full",
    max_new_tokens: int = 256,
    evaluation: Sequence[Conversation] = (),
    eval_every: int = 50,
    checkpoints: int | Sequence[int] = (),
    out: Path | str | None = None,
    save_every: int = 100,
    progress: bool = True,
    **options: Any,
) -> FineTune:
    """Teach a student what a teacher says. The student's base and the teacher are afterwards as they were.

    * `sft`: cross-entropy on given answers, whoever wrote them: -log π_S(x_i | x_<i).
    * `optd`, off-policy teacher distillation: KL(π_T ‖ π_S) at each token of the same given answers, over the whole vocabulary. The
      teacher scores them whoever wrote them, so that teacher and data can be varied apart.
    * `opd`, on-policy distillation: the student answers the prompts (responses are not looked at), and KL(π_S ‖ π_T) is taken at each
      token of its own answers. The discount is 0: a token is charged with its own divergence and not with what it leads to, so this is
      not the gradient of the KL between whole answers.

    All take the mean over the response tokens of an update, each answer's end of turn among them, whatever the micro-batches. Summed over
    tokens, `sft` and `optd` have the same expected gradient where answers are the teacher's own, unfiltered samples and the temperature is
    1; the mean over the tokens of finite batches departs from it, since the lengths of answers are random too.

    The curve (`FineTune.history`) has in every channel `loss` (before the update; of `opd` always the KL over the whole vocabulary),
    `tokens` and `sequences` seen so far, `gradient_norm`, `change_norm` (Frobenius norm of all changes of weights, or of the vector) and,
    where it was evaluated, `eval_loss`, `eval_forward_kl` = KL(π_T ‖ π_S) and `eval_reverse_kl` = KL(π_S ‖ π_T), all in nats per token.
    `opd` adds `stop_rate`, `empty_rate` and `length` of the student's answers: empty ones are rows of one token, their end of turn.

    Args:
        student: The model that learns, or where it lies; a full fine-tune takes the place only.
        teacher: A checkpoint of the same tokens and chat template, or where one lies; or where a PEFT adapter, a solution or a finished
            fine-tune of the student's base lies. The student's own base is allowed.
        conversations: Answered ones; for `opd` prompts.
        channel: `sft`, `optd` or `opd`.
        method: What is trained, as in `finetune`.
        recipe: The numbers; the order of the data depends on its seed alone, so that it is the same in all channels.
        tokens: End with the update by which so many response tokens have been seen, instead of going by steps or epochs; the schedule
            then runs by their share.
        temperature: π is softmax(logits / temperature), of teacher and student, and the student samples from it. `sft` takes 1 only.
            Gradients are not multiplied by its square.
        estimator: Of `opd`: the divergence over the whole vocabulary (`full`), or at the sampled token alone (`sampled`: policy gradient
            with advantage log π_T - log π_S, which has the other as its expectation).
        max_new_tokens: Of the student's answers in `opd`; longer ones are cut and have no end of turn.
        evaluation: Answered conversations on which student and teacher are compared along the way.
        eval_every: Updates between evaluations.
        checkpoints: Keep what was found after these updates, or every so many.
        out: Folder for everything; a run that was stopped goes on in it to the same weights. `None` keeps it in memory.
        save_every: Updates between saves of the run's state in that folder.
        progress: Show a progress bar.
        options: As in `load_model`, for what is given as a path (a revision is the student's).

    Raises:
        EmprobeError: Nothing to learn from, an empty answer or one too long, numbers or a channel that make no sense; a method that the
            model has no place for.
        MismatchError: If teacher and student have other tokens, chat templates or numbers of logits, or the folder holds another run.
        Diverged: If the loss is no number or rises; the last good solution is kept.

    Source:
        arXiv 2605.12798, appendix E (SFT, OPTD, OPD). On-policy: arXiv 2306.13649; its token-level policy gradient with discount 0 as
        usual in released code.
    """
    recipe = recipe or Recipe()
    _check_wishes(channel, estimator, temperature, tokens, max_new_tokens, recipe)
    check_start(student, method, out, {} if not isinstance(teacher, Checkpoint) else options, eval_every, save_every)
    base = student if isinstance(student, Checkpoint) else load_model(student, **options)
    check_method(base, method)
    with opened(teacher, base, options) as taught_by:
        check_teacher(base, taught_by)
        own = channel == "opd"
        rows = prompt_rows(base, conversations, recipe, max_new_tokens) if own else _given(base, recipe, conversations)
        compared = _given(base, recipe, evaluation) if evaluation else []
        steps = recipe.n_steps(len(rows)) if tokens is None else math.ceil(tokens / recipe.batch)
        length = Length(steps, tokens)
        length.rate(recipe)
        settings = {
            "base": {"name": base.name, "fingerprint": base.fingerprint},
            "teacher": {"name": taught_by.name, "fingerprint": taught_by.fingerprint},
            "channel": channel,
            "dtype": str(base.hf.dtype),
            **method.as_dict(),
            "recipe": recipe.as_dict(),
            "steps": steps if tokens is None else None,
            "tokens": tokens,
            "temperature": temperature,
            "rollouts": {"estimator": estimator, "max_new_tokens": max_new_tokens} if own else None,
            "kl": None,
            "data": {("prompts" if own else "answers"): described(rows), "evaluation": described(compared)},
            "left_out": len(conversations) - len(rows),
            "checkpoints": kept_steps(checkpoints, steps),
            "eval_every": eval_every,
        }

        settings = json.loads(canonical_json(settings))  # as it will be read back
        rollouts = Rollouts(max_new_tokens, temperature, stop_ids(base), recipe.seed) if own else None

        def objective(mounted: Mounted) -> Distilling:
            beside = _beside(mounted, taught_by, compared, rows if channel == "optd" and _again(rows, recipe, length) else [])
            gradient = ChannelGradient(mounted, beside, channel, recipe.micro_batch or recipe.batch, temperature, estimator)
            return Distilling(gradient, rows, recipe, rollouts, compared, change_of(mounted, method, base))

        return Run(base, method, recipe, length, objective, isinstance(method, Full), settings, save_every, progress).into(out)


def _beside(mounted: Mounted, teacher: Checkpoint, compared: Sequence[Row], learnt: Sequence[Row]) -> Teacher:
    """A teacher that has read what it will be asked about more than once."""
    beside = Teacher.of(mounted, teacher)
    rows = [*compared, *learnt]
    if rows:
        beside.keep(rows, mounted.tuned, teacher.d_model * teacher.hf.dtype.itemsize)
    return beside


def _again(rows: Sequence[Row], recipe: Recipe, length: Length) -> bool:
    """Whether a run comes past its data more than once."""
    if length.tokens is not None:
        return length.tokens > sum(len(row.predicted) for row in rows)
    return length.steps * recipe.batch > len(rows)


def _given(base: Checkpoint, recipe: Recipe, conversations: Sequence[Conversation]) -> list[Row]:
    return response_rows(base.tokenizer, conversations, max_length=recipe.max_length, overlong=recipe.overlong)


def _check_wishes(channel: str, estimator: str, temperature: float, tokens: int | None, max_new_tokens: int, recipe: Recipe) -> None:
    if channel not in get_args(Channel) or estimator not in get_args(Estimator):
        raise EmprobeError(
            f"Channel {channel!r} with estimator {estimator!r} was asked for. Channels are {', '.join(get_args(Channel))}; estimators of "
            f"opd are {', '.join(get_args(Estimator))}."
        )
    if estimator != "full" and channel != "opd":
        raise EmprobeError(f"Estimator {estimator!r} was asked for with channel {channel!r}, which samples nothing. It is for opd.")
    if not (temperature > 0 and math.isfinite(temperature)) or (channel == "sft" and temperature != 1):
        raise EmprobeError(
            f"Temperature {temperature:g} was asked for in channel {channel!r}. It must be above 0, and 1 for sft, which has no "
            "distribution of a teacher's."
        )
    if min(max_new_tokens, 1 if tokens is None else tokens) < 1:
        raise EmprobeError(f"tokens={tokens} and max_new_tokens={max_new_tokens} were asked for. Both must be at least 1.")
    length = f"{recipe.epochs:g} epochs" if recipe.steps is None else f"{recipe.steps} steps"
    if tokens is not None and (recipe.steps is not None or recipe.epochs != 1):
        raise EmprobeError(f"A run of {length} was asked for that ends after {tokens} tokens. Give one of the two: {length}, or tokens.")
