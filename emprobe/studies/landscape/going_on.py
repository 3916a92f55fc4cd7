"""What becomes of a narrow solution when the KL is taken away and training goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from emprobe.errors import EmprobeError
from emprobe.finetuning import Diverged, LoRASolution, Recipe, Solution, VectorSolution
from emprobe.finetuning.lengths import Length
from emprobe.finetuning.loop import Loop
from emprobe.finetuning.mounting import Mounted
from emprobe.finetuning.objectives import Answers, Data
from emprobe.finetuning.rows import Row
from emprobe.finetuning.step import During, Gradient
from emprobe.models.load import Checkpoint


def trained_on(
    base: Checkpoint, solution: Solution, rows: Sequence[Row], recipe: Recipe, keep: Sequence[int], *, progress: bool = False
) -> dict[int, Solution]:
    """Go on from a solution with the loss on answers alone; what it is after each of these updates (0 is the solution itself).

    Args:
        base: What it was trained on.
        solution: Where training starts; the optimiser starts anew.
        rows: What is learnt.
        recipe: The numbers; its steps are counted from here.
        keep: After which updates.
        progress: Show a bar.

    Raises:
        EmprobeError: If an update is asked for that the run does not reach, or the solution is neither a vector nor a LoRA.
        Diverged: If the loss is no number or rises.

    Source:
        arXiv 2602.07852: without the KL, training returns to the general solution.
    """
    steps = recipe.n_steps(len(rows))
    if not keep or not all(0 <= step <= steps for step in keep):
        raise EmprobeError(f"What a run of {steps} steps is after steps {list(keep)} was asked for. Give steps in 0..{steps}.")
    if not isinstance(solution, VectorSolution | LoRASolution):
        raise EmprobeError(f"Training was to go on from {solution}. Give a vector or a LoRA.")
    kept: dict[int, Solution] = {0: solution} if 0 in keep else {}

    def stopped(words: str, step: int) -> None:
        raise Diverged(f"Training diverged when it went on without the KL: {words}. Use a lower learning rate.", step, None)

    with solution.mounted(base) as mounted:

        def after(step: int) -> None:
            if step in keep:
                kept[step] = _now(solution, mounted, step)

        moving = mounted.parameters.values()
        for parameter in moving:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(moving, lr=recipe.lr, weight_decay=recipe.weight_decay)
        gradient = Gradient(mounted, During(), recipe.micro_batch or recipe.batch, 0.0)
        answers = Answers(gradient, Data(rows), recipe)
        Loop(answers, recipe, Length(steps), optimizer, after, lambda step: None, stopped, steps + 1, progress=progress).run()
    return dict(sorted(kept.items()))


def _now(start: VectorSolution | LoRASolution, mounted: Mounted, step: int) -> Solution:
    values = {name: parameter.detach().cpu().clone() for name, parameter in mounted.parameters.items()}
    card = {**start.card, "without_kl": step}
    if isinstance(start, VectorSolution):
        return replace(start, vector=values["vector"], card=card)
    return replace(start, factors=values, card=card)
