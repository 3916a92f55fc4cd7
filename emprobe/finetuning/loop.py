"""The loop: one update after another, learning rate, divergence.

A small loop of our own and not a library's trainer: runs of 80 steps on half a million weights and runs on 14 billion go through it alike,
losses stream beside a second model's, and every step depends on nothing but seed, number and weights, which makes a resumed run equal an
uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm.auto import tqdm

from emprobe.finetuning.lengths import History, Length
from emprobe.finetuning.methods import Recipe
from emprobe.finetuning.mounting import Mounted
from emprobe.finetuning.objectives import Objective
from emprobe.finetuning.watching import Watch
from emprobe.models.blocks import decoder_of

_SUMMED = ("tokens", "sequences")
"""What an update returns for itself, and the curve shows for all so far."""


@dataclass(eq=False)
class Loop:
    """One run.

    Attributes:
        objective: What is learnt.
        recipe: The numbers.
        length: When it ends.
        optimizer: Of what is mounted.
        after: Called after each update with the number of updates so far.
        good: Called before an update, with the updates so far, where the loss stands at about its lowest.
        stopped: Called with words and the step when the run diverges; raises.
        eval_every: Updates between evaluations.
        history: The curve so far; a run goes on from its end.
    """

    objective: Objective
    recipe: Recipe
    length: Length
    optimizer: torch.optim.Optimizer
    after: Callable[[int], None]
    good: Callable[[int], None]
    stopped: Callable[[str, int], None]
    eval_every: int
    history: History = field(default_factory=list)
    progress: bool = True

    def run(self) -> None:
        """Go on from the end of the history to the end of the run."""
        watch, rate = Watch(), self.length.rate(self.recipe)
        for entry in self.history:
            watch.see(self.objective.watched(entry))
        total, unit = (self.length.steps, "it") if self.length.tokens is None else (self.length.tokens, "tok")
        with (
            training(self.objective.mounted, self.recipe),
            tqdm(total=total, initial=self._seen, unit=unit, desc="fine-tune", disable=not self.progress) as bar,
        ):
            while not self.length.over(self.history):
                before = self._seen
                self._step(len(self.history), rate(self.history), watch)
                bar.update(self._seen - before)
                bar.set_postfix({k: f"{self.history[-1][k]:.3f}" for k in ("loss", "kl") if k in self.history[-1]}, refresh=False)

    @property
    def _seen(self) -> int:
        """How far the run is, in what its length is given in."""
        if self.length.tokens is None:
            return len(self.history)
        return int(self.history[-1]["tokens"]) if self.history else 0

    def _step(self, step: int, factor: float, watch: Watch) -> None:
        mounted = self.objective.mounted
        self.optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(self.recipe.seed * 1_000_003 + step)  # dropout, the same when a run is taken up again
            found = self.objective.update(step)
        norm = float(nn.utils.clip_grad_norm_(list(mounted.parameters.values()), self.recipe.clip))
        words = watch.see(self.objective.watched(found))
        if not words and not math.isfinite(norm):
            words = f"the gradient of step {step + 1} has norm {norm:g}"
        if words:
            self.stopped(words, step)
        if watch.is_good:
            self.good(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * factor
        self.optimizer.step()
        before = self.history[-1] if self.history else {}
        found |= {name: before.get(name, 0.0) + found[name] for name in _SUMMED if name in found}
        self.history.append({"step": float(step + 1), "lr": self.recipe.lr * factor, "gradient_norm": norm} | found)
        evaluate = (step + 1) % self.eval_every == 0 or self.length.over(self.history)
        if evaluate:
            mounted.train(False)
        self.history[-1] |= self.objective.standing(evaluate)
        if evaluate:
            mounted.train(True)
        self.after(step + 1)


@contextmanager
def training(mounted: Mounted, recipe: Recipe) -> Iterator[None]:
    """Dropout of what is trained on, everything else in eval mode; with gradient checkpointing, blocks that compute again on the way back.

    The model's own dropout stays off: the base and the adapted model then differ by what is trained and nothing else.
    """
    model = mounted.tuned.hf
    mounted.train(True)
    if not recipe.gradient_checkpointing:
        try:
            yield
        finally:
            mounted.train(False)
        return
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    marked = [decoder_of(model), *mounted.tuned.blocks]
    enable({"use_reentrant": False})
    for module in marked:
        module.training = True  # of the block itself and not of what is in it, where dropout would wake
    try:
        yield
    finally:
        for module in marked:
            module.training = False
        disable()
        mounted.train(False)
