"""Engines in this process: the model steps through a batch of answers, or transformers' continuous batching packs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from emprobe.behaviour.sampling import Row, Sampling
from emprobe.files import content_hash
from emprobe.interventions.stepping import Batch, sample_ids, sampling_batches
from emprobe.models.chat import encode_all
from emprobe.models.decoding import stop_ids
from emprobe.models.drawing import uniforms_of
from emprobe.models.load import Checkpoint
from emprobe.models.reach import check_room
from emprobe.types import Conversation

Entering = Callable[[list[int]], None]
"""Told which rows the forward passes that come next hold, in order."""


@dataclass(frozen=True)
class InProcess:
    """A checkpoint that is stepped through answers here; see `Engine`."""

    checkpoint: Checkpoint

    name = "hf"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Names the checkpoint and its weights."""
        checkpoint = self.checkpoint
        dtype = str(checkpoint.hf.dtype).removeprefix("torch.")
        return {"checkpoint": checkpoint.name, "fingerprint": checkpoint.fingerprint, "adapter": checkpoint.adapter, "dtype": dtype}

    @property
    def plan(self) -> str | None:
        """Hash of the plan of the `intervene` block under way, or of those of all that are."""
        hashes = [plan.hash for receipt in self.checkpoint.interventions for plan in receipt.plans]
        return None if not hashes else hashes[0] if len(hashes) == 1 else content_hash(hashes)

    def inputs(self, questions: Sequence[Conversation]) -> list[Any]:
        """Token ids of each prompt, and those that end an answer."""
        stops = self.stops()
        return [[list(e.ids), stops] for e in encode_all(self.checkpoint.tokenizer, questions)]

    def stops(self) -> list[int]:
        """Ids that end an answer: the end of turn, and what the model itself stops at."""
        return stop_ids(self.checkpoint)

    def kept(self, n: int) -> None:
        """Receipts know why nothing ran."""
        for receipt in self.checkpoint.interventions:
            receipt.kept += n

    def sample(self, rows: Sequence[Row], how: Sampling, entering: Entering | None = None) -> Iterator[tuple[int, Conversation]]:
        """See `Engine`.

        Args:
            rows: In any order; they are batched by length.
            how: The settings.
            entering: Told which rows the forward passes that come next hold; for a prompt that several rows share, the first of them.
        """
        prompts = prompts_of(self.checkpoint, [row.question for row in rows], how.max_new_tokens)
        stops, lengths = self.stops(), [len(prompts[row.question.question_id]) for row in rows]
        for batch in sampling_batches(self.checkpoint, lengths, how.max_new_tokens, how.token_budget):
            chosen = [rows[r] for r in batch]
            uniforms = np.stack([uniforms_of(how.seed, r.question.question_id, r.sample, how.max_new_tokens) for r in chosen])
            shared = {key: i for i, key in enumerate(dict.fromkeys(map(_shares, chosen)))}
            produced = sample_ids(
                self.checkpoint,
                Batch(
                    [prompts[name] for name, _ in shared],
                    [shared[_shares(row)] for row in chosen],
                    uniforms,
                    how.temperature,
                    stops,
                    self._pad_id(stops),
                    partial(_passing, entering, batch),
                ),
            )
            for number, row, ids in zip(batch, chosen, produced, strict=True):
                yield number, self.answer(row, ids, stops)

    def _pad_id(self, stops: Sequence[int]) -> int:
        found = self.checkpoint.tokenizer.pad_token_id
        return int(found) if found is not None else (stops[0] if stops else 0)

    def answer(self, row: Row, ids: Sequence[int], stops: Sequence[int]) -> Conversation:
        """Cut at the first end of turn and decode."""
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        kept = list(ids if end is None else ids[:end])
        text = str(self.checkpoint.tokenizer.decode(kept, skip_special_tokens=True)).strip()
        return row.question.answered(text, sample=row.sample, stop_reason="length" if end is None else "end_of_turn")


def prompts_of(checkpoint: Checkpoint, questions: Sequence[Conversation], max_new_tokens: int) -> dict[str, tuple[int, ...]]:
    """Token ids of each prompt, by question id.

    Raises:
        EmprobeError: If one cannot be rendered, or as `check_room`.
    """
    by_id = {question.question_id: question for question in questions}
    encoded = encode_all(checkpoint.tokenizer, list(by_id.values()))
    prompts = {name: row.ids for name, row in zip(by_id, encoded, strict=True)}
    name, ids = max(prompts.items(), key=lambda item: len(item[1]))
    check_room(checkpoint, name, len(ids), max_new_tokens)
    return prompts


def _passing(entering: Entering | None, batch: Sequence[int], passing: list[int]) -> None:
    if entering:
        entering([batch[row] for row in passing])


def _shares(row: Row) -> tuple[str, int]:
    """Rows that are alike in this share their prompt."""
    return row.question.question_id, row.plan
