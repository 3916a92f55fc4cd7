"""Held against the hooks once, before any work: names do not tell what another runtime computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from emprobe.interventions.edit import Edit, Place
from emprobe.interventions.places import Hooked
from emprobe.interventions.runtimes.program import Program
from emprobe.interventions.tokens import Prompts
from emprobe.interventions.when import When
from emprobe.interventions.where import Where
from emprobe.models.blocks import decoder_of, probe_ids
from emprobe.models.load import Checkpoint

Run = Callable[[Program, dict[str, Any]], Tensor]
"""A forward pass with a program's writes: logits."""


def deviation(checkpoint: Checkpoint, edits: Sequence[Edit], run: Run) -> tuple[float, str]:
    """How far a runtime is from the hooks on a few tokens, as a share of the norm, and where it is farthest.

    Every edit acts at every token. Compared are the hidden states that come to each place that is read or written, and the logits.
    """
    everywhere = [replace(edit, where=Where(), when=edit.when and _always(edit.when)) for edit in edits]
    ids = probe_ids(checkpoint.hf)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    wanted, found = (_seen(everywhere, given, how) for how in (_hooked(checkpoint), run))
    off = {where: float((found[where] - hidden).norm() / hidden.norm()) for where, hidden in wanted.items()}
    worst = max(off, key=lambda where: (off[where] != off[where], off[where]))
    return off[worst], "its logits" if worst == "logits" else f"{worst[1]!r} at layer {worst[0]}"


def _always(when: When) -> When:
    return When(when.direction, above=-torch.finfo(torch.float32).max)


def _seen(edits: Sequence[Edit], given: dict[str, Any], run: Run) -> dict[Any, Tensor]:
    program = Program(edits, Prompts(), ())
    seen: dict[Any, Tensor] = {}
    for place, writer in program.writers.items():
        program.writers[place] = _noting(place, writer, seen)
    with torch.no_grad():
        seen["logits"] = run(program, given).double()
    return seen


def _noting(place: Place, write: Callable[[Tensor], Tensor], seen: dict[Any, Tensor]) -> Any:
    def noted(hidden: Tensor) -> Tensor:
        seen[place] = hidden.double()
        return write(hidden)

    return noted


def _hooked(checkpoint: Checkpoint) -> Run:
    def run(program: Program, given: dict[str, Any]) -> Tensor:
        with checkpoint.active() as model, ExitStack() as stack:
            begin = decoder_of(model).register_forward_pre_hook(lambda _, args, kwargs: program.begin(args, kwargs), with_kwargs=True)
            stack.callback(begin.remove)
            hooked = Hooked(checkpoint, stack, [])
            for place, write in program.writers.items():
                hooked.write(place, write)
            logits: Tensor = model(**given).logits
            return logits

    return run
