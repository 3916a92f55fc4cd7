"""A student's own answers to given prompts, sampled in the middle of its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emprobe.errors import EmprobeError
from emprobe.finetuning.methods import Recipe
from emprobe.finetuning.rows import Row, pad_id_of
from emprobe.interventions.stepping import Batch, sample_ids, sampling_batches
from emprobe.models.chat import encode_all
from emprobe.models.drawing import uniforms_of
from emprobe.models.load import Checkpoint
from emprobe.models.reach import check_room
from emprobe.types import Conversation

TOKENS_AT_ONCE = 16384


def prompt_rows(checkpoint: Checkpoint, conversations: Sequence[Conversation], recipe: Recipe, max_new_tokens: int) -> list[Row]:
    """Rows of prompts alone, up to and with the template's opening of the answer; responses are not looked at.

    Raises:
        EmprobeError: No conversations, none that fits, or one too long for the model or (unless they are dropped) for the length limit.
    """
    if not conversations:
        raise EmprobeError("No conversations were given whose prompts the student could answer. Give at least one.")
    asked = [replace(c, response=None, stop_reason=None) for c in conversations]
    rows = [Row(e.ids, (), len(e.ids)) for e in encode_all(checkpoint.tokenizer, asked)]
    longest = max(range(len(rows)), key=lambda n: len(rows[n].ids))
    check_room(checkpoint, conversations[longest].question_id, len(rows[longest].ids), max_new_tokens)
    fit = [row for row in rows if len(row.ids) + max_new_tokens <= recipe.max_length]
    if not fit or (len(fit) < len(rows) and recipe.overlong == "refuse"):
        raise EmprobeError(
            f"{len(rows) - len(fit)} of {len(rows)} prompts leave no room for an answer of {max_new_tokens} tokens within the length limit "
            f"of {recipe.max_length} (longest: question {conversations[longest].question_id!r}, {len(rows[longest].ids)} tokens). Raise "
            "max_length, give fewer max_new_tokens" + (", or leave them out (overlong='drop')." if fit else ".")
        )
    return fit


@dataclass(frozen=True)
class Rollouts:
    """How a student answers. Its random numbers depend on the seed, the number of the update and the place in its batch alone.

    Attributes:
        max_new_tokens: Longer answers are cut, and have no end of turn.
        temperature: Of the distribution that is sampled.
        stops: Ids that end an answer, which is cut there.
        seed: Of the random numbers.
    """

    max_new_tokens: int
    temperature: float
    stops: Sequence[int]
    seed: int

    def of(self, student: Checkpoint, prompts: Sequence[Row], step: int) -> tuple[list[Row], dict[str, float]]:
        """The prompts answered, with every sampled token counting, and what the curve shows of the answers.

        An answer that ends at once is a row of one token, its end of turn: a sample like any other.

        Returns:
            Rows in the order of the prompts; `stop_rate` (share that ended by themselves), `empty_rate` (share that ended at once) and
            `length` (mean tokens, the end of turn among them).
        """
        made: list[Row | None] = [None] * len(prompts)
        with at_rest(student.hf):
            for numbers in sampling_batches(student, [len(p.ids) for p in prompts], self.max_new_tokens, TOKENS_AT_ONCE):
                for number, ids in zip(numbers, self._sampled(student, prompts, numbers, step), strict=True):
                    made[number] = self._cut(prompts[number], ids)
        rows = [row for row in made if row is not None]
        ended, lengths = [row.ids[-1] in self.stops for row in rows], [len(row.predicted) for row in rows]
        at_once = sum(end and length == 1 for end, length in zip(ended, lengths, strict=True))
        n = len(rows)
        return rows, {"stop_rate": sum(ended) / n, "empty_rate": at_once / n, "length": sum(lengths) / n}

    def _sampled(self, student: Checkpoint, prompts: Sequence[Row], numbers: Sequence[int], step: int) -> list[list[int]]:
        different = {ids: place for place, ids in enumerate(dict.fromkeys(prompts[n].ids for n in numbers))}
        batch = Batch(
            prompts=list(different),
            prompt_of=[different[prompts[n].ids] for n in numbers],
            uniforms=np.stack([uniforms_of(self.seed, f"update {step}", n, self.max_new_tokens) for n in numbers]),
            temperature=self.temperature,
            stops=self.stops,
            pad_id=pad_id_of(student.tokenizer),
            entering=lambda rows: None,
        )
        return sample_ids(student, batch)

    def _cut(self, prompt: Row, ids: Sequence[int]) -> Row:
        """The prompt with its answer, up to and with the first stop."""
        end = next((place + 1 for place, token in enumerate(ids) if token in self.stops), len(ids))
        whole = (*prompt.ids, *ids[:end])
        return Row(whole, tuple(range(prompt.n_prompt, len(whole))), prompt.n_prompt)


@contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """Everything in eval mode: without dropout, and without the checkpointing of blocks, which keeps no keys and values."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
