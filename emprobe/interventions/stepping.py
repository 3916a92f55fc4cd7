"""Sampling step by step: each prompt is read once for all of its answers, and rows that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emprobe.batching import pad, plan_batches
from emprobe.interventions.generating import generating
from emprobe.interventions.tokens import Spread
from emprobe.models.caches import empty_cache, spread_cache, steppable
from emprobe.models.decoding import plain_decoding
from emprobe.models.drawing import InverseCdfSampler, draw
from emprobe.models.load import Checkpoint
from emprobe.models.reach import changed_by_padding, lengths_of

ENDED = 1 / 8
"""Once so large a share of the rows has ended, copying the others' keys and values costs less than to go on with all."""


@dataclass(frozen=True)
class Batch:
    """Rows that are sampled together.

    Attributes:
        prompts: Token ids of the different prompts.
        prompt_of: Which prompt each row answers.
        uniforms: (row, step) in [0, 1).
        stops: Ids that end a row.
        entering: Told which rows of the batch the next forward passes hold (for a prompt that several share: the first of them).
    """

    prompts: Sequence[Sequence[int]]
    prompt_of: Sequence[int]
    uniforms: NDArray[np.float64]
    temperature: float
    stops: Sequence[int]
    pad_id: int
    entering: Callable[[list[int]], None]


def sample_ids(checkpoint: Checkpoint, batch: Batch) -> list[list[int]]:
    """New token ids of each row, up to and with the stop if there is one; padding may follow it."""
    return step_through(checkpoint, batch) if steppable(checkpoint) else _generated(checkpoint, batch)


def sampling_batches(checkpoint: Checkpoint, lengths: Sequence[int], more: int, budget: int) -> Iterator[list[int]]:
    """Rows that may be sampled together; only those of one length of prompt, where padding or longer rows would change a token.

    Args:
        checkpoint: Who answers.
        lengths: Tokens of each row's prompt.
        more: Tokens that each may get.
        budget: Padded tokens (prompt and answer) per batch.
    """
    model = checkpoint.hf
    alike = lengths_of(model).switch is not None or (len(set(lengths)) > 1 and changed_by_padding(model, "left"))
    for length in sorted(set(lengths), reverse=True) if alike else [None]:
        chosen = [row for row, n in enumerate(lengths) if length in (n, None)]
        for batch in plan_batches([lengths[row] + more for row in chosen], budget):
            yield [chosen[row] for row in batch]


def step_through(checkpoint: Checkpoint, batch: Batch) -> list[list[int]]:
    """New token ids of each row, up to and with the stop if there is one."""
    rows, steps = batch.uniforms.shape
    device = checkpoint.device
    uniforms, stops = torch.from_numpy(batch.uniforms).to(device), torch.tensor(list(batch.stops), device=device, dtype=torch.long)
    prompt_of = torch.tensor(batch.prompt_of, device=device)
    alive = torch.arange(rows, device=device)
    produced = torch.full((rows, steps), batch.pad_id, dtype=torch.long, device=device)
    ids, real = (given.to(device) for given in pad(batch.prompts, batch.pad_id, "left"))
    with checkpoint.active() as model, torch.no_grad(), generating(model, ids.shape[1]) as told:
        told(Spread(prompt_of, alive, rows))
        batch.entering([batch.prompt_of.index(prompt) for prompt in range(len(batch.prompts))])
        walk = Walk(model, empty_cache(checkpoint), real)
        logits = walk.forward(ids, logits_of=1)
        token = draw(logits, uniforms[:, 0], batch.temperature, prompt_of)
        walk.take(prompt_of, steps - 1)
        told(Spread(alive, alive, rows))
        batch.entering(list(range(rows)))
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        for step in range(steps):
            produced[alive, step] = torch.where(ended, batch.pad_id, token)
            ended = ended | torch.isin(token, stops)
            n_ended = int(ended.sum())
            if n_ended == len(alive) or step + 1 == steps:
                break
            if n_ended > ENDED * len(alive):
                kept = (~ended).nonzero()[:, 0]
                walk.take(kept, 0)
                alive, token, ended = alive[kept], token[kept], ended[kept]
                told(Spread(torch.arange(len(alive), device=device), alive, rows))
                batch.entering(alive.tolist())
            token = draw(walk.forward(token[:, None]), uniforms[alive, step + 1], batch.temperature)
    return [list(map(int, row)) for row in produced.cpu().tolist()]


class Walk:
    """A model's forward passes over rows that go on, with what it keeps of them."""

    def __init__(self, model: Any, cache: Any, real: Tensor) -> None:
        self.model, self.cache = model, cache
        # Without a mask attention takes a faster path, and so do interventions.
        self.mask = None if bool(real.all()) else real
        self.seen, self.lengths = 0, real.sum(dim=1, keepdim=True)
        self.padding = real.shape[1] - self.lengths

    def forward(self, ids: Tensor, logits_of: int = 1) -> Tensor:
        """Logits of the last token of each row."""
        width = ids.shape[1]
        columns = torch.arange(self.seen, self.seen + width, device=ids.device)
        if self.mask is not None and self.seen:
            self.mask = torch.nn.functional.pad(self.mask, (0, width), value=1)
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=(columns - self.padding).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_of,
        )
        self.seen += width
        logits: Tensor = out.logits[:, -1]
        return logits

    def take(self, rows: Tensor, room: int) -> None:
        """Go on with these rows, each any number of times."""
        self.cache = spread_cache(self.cache, rows, room)
        self.padding = self.padding[rows]
        self.mask = None if self.mask is None else self.mask[rows]


def _generated(checkpoint: Checkpoint, batch: Batch) -> list[list[int]]:
    """New token ids of each row, padding and all, by the model's own `generate`: for models that keep other state than keys and values."""
    rows, steps = batch.uniforms.shape
    batch.entering(list(range(rows)))
    ids, mask = pad([batch.prompts[prompt] for prompt in batch.prompt_of], batch.pad_id, "left")
    sampler = InverseCdfSampler(batch.uniforms, batch.temperature, ids.shape[1])
    device = checkpoint.device
    with checkpoint.active() as model, torch.no_grad(), plain_decoding(model, steps, batch.stops, batch.pad_id, sampler) as settings:
        out: Any = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **settings)
    return [list(map(int, row)) for row in out[:, ids.shape[1] :].cpu().tolist()]
