"""A run with its files: mounted, carried out, kept along the way, and taken up again after a kill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import content_hash, locked_folder, read_json, write_json
from emprobe.finetuning.lengths import History, Length
from emprobe.finetuning.loop import Loop
from emprobe.finetuning.methods import Full, LoRA, Method, Recipe, Vector
from emprobe.finetuning.mounting import Mounted, lora_config, mounted_full, mounted_lora, mounted_vector, plain_config
from emprobe.finetuning.objectives import Objective
from emprobe.finetuning.record import CARD, COLUMNS, CURVE, FOUND, FineTune, checkpoint_folder, save_curve
from emprobe.finetuning.rows import Row
from emprobe.finetuning.solution import FullSolution, LoRASolution, Solution, VectorSolution
from emprobe.finetuning.state import STATE, load_state, save_state
from emprobe.finetuning.watching import Diverged
from emprobe.models.load import Checkpoint
from emprobe.models.sites import check_layers, taps_of


def check_start(base: Checkpoint | str | Path, method: Method, out: Path | str | None, options: dict[str, Any], *every: int) -> None:
    """Refuse what can be told before a model is loaded.

    Args:
        base: As in `finetune`.
        method: As there.
        out: As there.
        options: As there.
        every: Numbers of updates between evaluations, and between saves.

    Raises:
        EmprobeError: A full fine-tune of a model in memory, or into none; options of loading for what is loaded; no updates between.
    """
    if min(every, default=1) < 1:
        raise EmprobeError(f"eval_every and save_every are {' and '.join(map(str, every))}; they are numbers of updates. Give 1 or more.")
    if isinstance(method, Full) and (isinstance(base, Checkpoint) or out is None):
        raise EmprobeError(
            "A full fine-tune changes the model's own weights and is a checkpoint of its own. Give the base as a path (a checkpoint in "
            "memory would stop being the base), and a folder as out."
        )
    if isinstance(base, Checkpoint) and options:
        raise EmprobeError(f"{', '.join(options)} say how a model is loaded, and {base.name!r} is loaded already. Leave them out.")


def check_method(checkpoint: Checkpoint, method: Method) -> None:
    """Refuse a method for which the model lacks the place.

    Raises:
        EmprobeError: Names layer, site or module.
    """
    if isinstance(method, LoRA):
        lora_config(checkpoint, method)
    if isinstance(method, Vector):
        check_layers(method.layer, checkpoint.n_layers, "A trained vector")
        taps_of(checkpoint, method.site, [method.layer])


def described(rows: Sequence[Row]) -> dict[str, Any]:
    """How much data, and its hash."""
    tokens = sum(len(row.predicted) for row in rows)
    return {"rows": len(rows), "tokens": tokens, "hash": content_hash([[row.ids, row.predicted] for row in rows])}


def kept_steps(checkpoints: int | Sequence[int], steps: int) -> list[int]:
    """The updates after which a run of so many is kept along the way.

    Raises:
        EmprobeError: If one lies outside the run.
    """
    every = isinstance(checkpoints, int)
    wanted = list(range(checkpoints, steps + 1, checkpoints)) if isinstance(checkpoints, int) and checkpoints > 0 else checkpoints
    if isinstance(wanted, int) or any(not 0 <= step <= steps for step in wanted):
        asked = f"every {checkpoints} steps" if every else f"at steps {checkpoints}"
        raise EmprobeError(f"Checkpoints were asked for {asked}, and the run has {steps}. Give steps in 0..{steps}, or a number above 0.")
    return sorted(set(wanted))


@dataclass(eq=False)
class Run:
    """One run with its files.

    Attributes:
        checkpoint: The base.
        method: What is put on it.
        recipe: The numbers.
        length: When it ends.
        objective: Makes what is learnt of what is mounted.
        with_base: Whether that needs the base beside a full fine-tune.
        settings: All that the result depends on; decides whether a folder holds this run.
        save_every: Updates between saves of the state.
        progress: Show a bar.
    """

    checkpoint: Checkpoint
    method: Method
    recipe: Recipe
    length: Length
    objective: Callable[[Mounted], Objective]
    with_base: bool
    settings: dict[str, Any]
    save_every: int
    progress: bool
    kept: dict[int, Solution] = field(default_factory=dict)
    last_good: tuple[int, Solution | None] = (0, None)

    def into(self, out: Path | str | None) -> FineTune:
        """Carry it out, in a folder or in memory; what a folder holds of it already is not done again.

        Raises:
            MismatchError: If the folder holds another run.
            Diverged: If the loss is no number or rises.
        """
        if out is None:
            return self._carry_out(None)
        with locked_folder(Path(out).expanduser()) as folder:
            return self._carry_out(folder)

    def _carry_out(self, folder: Path | None) -> FineTune:
        if folder is not None:
            self._claim(folder)
            if (folder / CURVE).is_file():
                return FineTune.load(folder)
        with ExitStack() as stack:
            mounted = stack.enter_context(self._mounting())
            loop = self._loop(mounted, folder)
            if 0 in self.settings["checkpoints"] and not loop.history:
                self._keep(mounted, folder, 0)
            loop.run()
            solution = self._solution(mounted, loop.history, folder)
        columns = [name for name in COLUMNS if any(name in entry for entry in loop.history)]
        history = pd.DataFrame(loop.history)[columns].astype({"step": "int64"})
        if folder is None:
            return FineTune(solution, history, self.settings, tuple(sorted(self.kept)), None, self.kept)
        save_curve(folder, history)
        (folder / STATE).unlink(missing_ok=True)
        return FineTune.load(folder)

    def _claim(self, folder: Path) -> None:
        if not (folder / CARD).is_file():
            if any(folder.iterdir()):
                raise EmprobeError(
                    f"The output folder {folder} holds files that are no fine-tune of emprobe. Give an empty or a new folder."
                )
            write_json(folder / CARD, self.settings)
            return
        there = {"dtype": self.settings["dtype"]} | read_json(folder / CARD)  # earlier records do not name it
        if content_hash(there) != content_hash(self.settings):
            different = [name for name in self.settings if there.get(name) != self.settings[name]]
            raise MismatchError(f"{folder} holds another fine-tune (it differs in: {', '.join(different)}). Give another folder.")

    def _mounting(self) -> AbstractContextManager[Mounted]:
        if isinstance(self.method, Vector):
            return mounted_vector(self.checkpoint, self.method)
        if isinstance(self.method, LoRA):
            return mounted_lora(self.checkpoint, lora_config(self.checkpoint, self.method), seed=self.recipe.seed)
        return mounted_full(self.checkpoint, with_base=self.with_base)

    def _loop(self, mounted: Mounted, folder: Path | None) -> Loop:
        optimizer = torch.optim.AdamW(mounted.parameters.values(), lr=self.recipe.lr, weight_decay=self.recipe.weight_decay)
        history: History = load_state(folder, mounted.parameters, optimizer) if folder else []

        def after(step: int) -> None:
            if step in self.settings["checkpoints"]:
                self._keep(mounted, folder, step)
            if folder and step % self.save_every == 0:
                save_state(folder, mounted.parameters, optimizer, history)

        def good(step: int) -> None:
            if step % 10 == 0 and not isinstance(self.method, Full):
                self.last_good = (step, self._found(mounted, step))

        def stopped(words: str, step: int) -> None:
            raise self._diverged(words, folder)

        every = int(self.settings["eval_every"])
        objective = self.objective(mounted)
        return Loop(objective, self.recipe, self.length, optimizer, after, good, stopped, every, history, self.progress)

    def _keep(self, mounted: Mounted, folder: Path | None, step: int) -> None:
        if folder is None:
            self.kept[step] = self._found(mounted, step)
        else:
            self._write(mounted, checkpoint_folder(folder, step), step)

    def _solution(self, mounted: Mounted, history: History, folder: Path | None) -> Solution:
        if folder is None:
            return self._found(mounted, len(history))
        return self._write(mounted, folder / FOUND, len(history))

    def _write(self, mounted: Mounted, folder: Path, step: int) -> Solution:
        if isinstance(self.method, Full):
            self.checkpoint.hf.save_pretrained(folder)
            self.checkpoint.tokenizer.save_pretrained(folder)
            return FullSolution(folder)
        solution = self._found(mounted, step)
        solution.save(folder)
        return solution

    def _found(self, mounted: Mounted, step: int) -> Solution:
        card = {"base": self.settings["base"], "step": step, "settings": content_hash(self.settings)}
        values = {name: p.detach().cpu().clone() for name, p in mounted.parameters.items()}
        if isinstance(self.method, Vector):
            return VectorSolution(values["vector"], self.method.layer, self.method.site, card=card)
        return LoRASolution(values, plain_config(mounted.tuned.model.peft_config["default"], self.checkpoint.name), card=card)

    def _diverged(self, words: str, folder: Path | None) -> Diverged:
        step, solution = self.last_good
        if folder is None:
            where = f"what it had found by step {step} is in the error's `solution`"
        elif solution is not None:
            where = f"the last good checkpoint is of step {step}, in {checkpoint_folder(folder, step)}"
            solution.save(checkpoint_folder(folder, step))
        else:
            before = [s for s in self.settings["checkpoints"] if checkpoint_folder(folder, s).is_dir()]
            where = f"its last checkpoint is of step {before[-1]}" if before else "no checkpoint had been kept"
        return Diverged(f"The fine-tune diverged and was stopped: {words}; {where}. Use a lower learning rate.", step, solution)
