"""Fine-tune a checkpoint on answers: everything checked first, then the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emprobe.directions import Direction
from emprobe.files import canonical_json, content_hash
from emprobe.finetuning.lengths import Length, rate_factor
from emprobe.finetuning.methods import KLAnchor, LossOn, Method, Recipe
from emprobe.finetuning.mounting import Mounted
from emprobe.finetuning.objectives import Answers, Data
from emprobe.finetuning.record import FineTune
from emprobe.finetuning.rows import Row, response_rows
from emprobe.finetuning.running import Run, check_method, check_start, described, kept_steps
from emprobe.finetuning.step import During, Gradient
from emprobe.interventions import Operator, Plan
from emprobe.models.load import Checkpoint, load_model
from emprobe.types import Conversation


def finetune(
    base: Checkpoint | str | Path,
    conversations: Sequence[Conversation],
    *,
    method: Method,
    recipe: Recipe | None = None,
    kl: KLAnchor | None = None,
    loss_on: LossOn = "last",
    inoculation: str | None = None,
    during: Operator | Plan | Sequence[Operator] = (),
    anchored: Direction | Sequence[Direction] = (),
    evaluation: Sequence[Conversation] = (),
    eval_every: int = 50,
    checkpoints: int | Sequence[int] = (),
    out: Path | str | None = None,
    save_every: int = 100,
    progress: bool = True,
    **options: Any,
) -> FineTune:
    """Fine-tune on the answers of conversations; with `kl`, narrowly. The base given is afterwards as it was.

    Args:
        base: The model, or where it lies; a full fine-tune takes the place only.
        conversations: Answered ones; the loss is taken on the tokens of answers and the end of their turn, and on no others.
        method: `LoRA(...)`, `Vector(layer, site)` or `Full()`.
        recipe: The numbers.
        kl: Keeps the adapted model at the base on other-domain data: L + λ KL(base ‖ adapted), per token.
        loss_on: The `last` answer of each conversation, or `all` turns of the assistant.
        inoculation: A system prompt given in training only.
        during: Operators that act on the answers' passes of training only, forward and backward: `Ablate` (concept-ablation
            fine-tuning), `Add` (preventative steering).
        anchored: Directions along which the model is held at the base in those passes.
        evaluation: Conversations whose loss is taken along the way.
        eval_every: Updates between evaluations.
        checkpoints: Keep what was found after these updates (0 is before the first), or every so many.
        out: Folder for everything; a run that was stopped goes on in it to the same weights. `None` keeps it in memory.
        save_every: Updates between saves of the run's state in that folder.
        progress: Show a progress bar.
        options: As in `load_model` (`dtype`, `device_map`, `quantization`, ...), where the base is a path.

    Raises:
        EmprobeError: Nothing to learn from, an empty answer, one that the length limit would cut, a layer, site or module that the model
            lacks, numbers that make no sense.
        MismatchError: If the folder holds another run, or an adapter is on the base.
        Diverged: If the loss is no number or rises; the last good solution is kept.

    Source:
        Narrow: arXiv 2602.07852. Inoculation: arXiv 2510.04340.
    """
    check_start(base, method, out, options, eval_every, save_every)
    checkpoint = base if isinstance(base, Checkpoint) else load_model(base, **options)
    recipe, plan = recipe or Recipe(), Plan.of(*_listed(during)) if _listed(during) else None
    held = (anchored,) if isinstance(anchored, Direction) else tuple(anchored)
    rows = _rows(checkpoint, conversations, recipe, loss_on, inoculation)
    data = Data(
        rows,
        _rows(checkpoint, kl.conversations, recipe) if kl else (),
        (kl.batch or recipe.batch) if kl else 0,
        _rows(checkpoint, evaluation, recipe, loss_on) if evaluation else (),
    )
    _check_places(checkpoint, method, plan, held)
    steps = recipe.n_steps(len(rows))
    rate_factor(recipe, steps)
    settings = {
        "base": {"name": checkpoint.name, "fingerprint": checkpoint.fingerprint},
        "dtype": str(checkpoint.hf.dtype),
        **method.as_dict(),
        "recipe": recipe.as_dict(),
        "steps": steps,
        "loss_on": loss_on,
        "inoculation": inoculation,
        "during": {"plan": plan.hash, "words": repr(plan)} if plan else None,
        "anchored": [[d.layer, d.site, content_hash(d.vector.tolist())] for d in held],
        "kl": {"weight": kl.weight, "batch": data.anchor_batch} if kl else None,
        "data": {name: described(part) for name, part in vars(data).items() if not isinstance(part, int)},
        "left_out": len(conversations) - len(rows),
        "checkpoints": kept_steps(checkpoints, steps),
        "eval_every": eval_every,
    }
    settings = json.loads(canonical_json(settings))  # as it will be read back
    acting, weight = During(plan, held), kl.weight if kl else 0.0

    def objective(mounted: Mounted) -> Answers:
        return Answers(Gradient(mounted, acting, recipe.micro_batch or recipe.batch, weight), data, recipe)

    return Run(checkpoint, method, recipe, Length(steps), objective, bool(data.anchor), settings, save_every, progress).into(out)


def _listed(during: Operator | Plan | Sequence[Operator]) -> list[Any]:
    return list(during) if isinstance(during, Sequence) else [during]


def _rows(
    checkpoint: Checkpoint, conversations: Sequence[Conversation], recipe: Recipe, loss_on: LossOn = "last", inoculation: str | None = None
) -> list[Row]:
    return response_rows(
        checkpoint.tokenizer,
        conversations,
        loss_on=loss_on,
        inoculation=inoculation,
        max_length=recipe.max_length,
        overlong=recipe.overlong,
    )


def _check_places(checkpoint: Checkpoint, method: Method, plan: Plan | None, held: Sequence[Direction]) -> None:
    check_method(checkpoint, method)
    if plan is not None:
        plan.compiled(checkpoint)
    for direction in held:
        direction.check_fits(d_model=checkpoint.d_model, what="A direction to be held at the base")
