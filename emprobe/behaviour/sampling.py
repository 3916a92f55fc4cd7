"""Sample answers: batched, seeded per (question, sample), cut at the first end of turn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor

from emprobe.batching import pad, plan_batches
from emprobe.errors import EmprobeError
from emprobe.models.chat import encode_all, end_of_turn_ids
from emprobe.models.decoding import plain_decoding
from emprobe.models.load import Checkpoint
from emprobe.types import Conversation


def row_seed(seed: int, question_id: str, sample: int) -> int:
    """The seed of one answer: it depends on nothing but these three, so neither do the answer's random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{question_id}\0{sample}".encode()).digest()[:8], "little")


class InverseCdfSampler(LogitsProcessor):
    """Sampling by one uniform number per row and step, whatever else is in the batch.

    The token is the first at which the cumulative probability passes the number; every other logit becomes -inf, so that
    greedy decoding picks it. Rows do not share a generator, hence batch size, order and company change nothing.
    """

    def __init__(self, uniforms: NDArray[np.float64], temperature: float, width: int) -> None:
        self.uniforms = torch.from_numpy(uniforms)
        self.temperature = temperature
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        cumulative = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(dim=-1)
        # Scaling by the last entry keeps a number near 1 from falling behind a sum that rounding left below it.
        threshold = self.uniforms[:, step, None].to(scores.device) * cumulative[:, -1:]
        token = (cumulative > threshold).long().argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def generate(
    checkpoint: Checkpoint,
    questions: Sequence[Conversation],
    *,
    samples: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    token_budget: int = 8192,
    progress: bool = True,
) -> list[Conversation]:
    """Answers to every question, `samples` each, in the order of the questions.

    Inside an `intervene` block of the same checkpoint the answers are steered, and the receipt is told where prompts end.

    Args:
        checkpoint: Who answers.
        questions: Prompts, rendered by the tokenizer's chat template.
        samples: Answers per question.
        seed: With (question_id, sample) it fixes an answer's random numbers, whatever batch the answer is in.
        temperature: 0 is greedy.
        max_new_tokens: Answers that reach it carry `stop_reason="length"`, others `"end_of_turn"`.
        token_budget: Padded tokens (prompt and answer) per batch.
        progress: Show a progress bar.

    Raises:
        EmprobeError: No questions, two with one id, or a sample count, length or temperature that makes no sense.
    """
    rows = [Row(question, sample) for question in questions for sample in range(samples)]
    sampling = Sampling(samples, seed, temperature, max_new_tokens, token_budget, progress)
    sampling.check(questions)
    return sample_rows(checkpoint, rows, sampling)


@dataclass(frozen=True)
class Row:
    """One answer to be sampled; `plan` is the number of the plan under which, where rows carry their own."""

    question: Conversation
    sample: int
    plan: int = 0


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled; see `generate`."""

    samples: int
    seed: int
    temperature: float
    max_new_tokens: int
    token_budget: int
    progress: bool

    def check(self, questions: Sequence[Conversation]) -> None:
        """Refuse what makes no sense."""
        _check_request(questions, self.samples, self.temperature, self.max_new_tokens)


def sample_rows(
    checkpoint: Checkpoint, rows: Sequence[Row], how: Sampling, before: Callable[[list[int]], None] | None = None
) -> list[Conversation]:
    """An answer to every row, in order.

    Args:
        checkpoint: Who answers.
        rows: In any order; they are batched by length.
        how: The settings.
        before: Told which rows make up a batch before it is sampled.
    """
    questions = {row.question.question_id: row.question for row in rows}
    encoded = encode_all(checkpoint.tokenizer, list(questions.values()))
    prompts = {name: e.ids for name, e in zip(questions, encoded, strict=True)}
    answers: list[Conversation | None] = [None] * len(rows)
    batches = plan_batches([len(prompts[row.question.question_id]) + how.max_new_tokens for row in rows], how.token_budget)
    stops = end_of_turn_ids(checkpoint.tokenizer, _model_stops(checkpoint))
    with tqdm(total=len(rows), desc="generate", unit="answer", disable=not how.progress, leave=False) as bar:
        for batch in batches:
            chosen = [rows[r] for r in batch]
            uniforms = np.stack([_uniforms(how.seed, r.question.question_id, r.sample, how.max_new_tokens) for r in chosen])
            if before:
                before(list(batch))
            produced = _generate_batch(checkpoint, [prompts[r.question.question_id] for r in chosen], uniforms, how.temperature, stops)
            for number, row, ids in zip(batch, chosen, produced, strict=True):
                answers[number] = _answer(checkpoint, row.question, row.sample, ids, stops)
            bar.update(len(batch))
    return [a for a in answers if a is not None]


def _check_request(questions: Sequence[Conversation], samples: int, temperature: float, max_new_tokens: int) -> None:
    if not questions:
        raise EmprobeError("generate was given no questions. Give at least one.")
    ids = [q.question_id for q in questions]
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise EmprobeError(f"Questions {', '.join(map(repr, twice[:5]))} occur more than once; ids name clusters. Give each its own id.")
    if samples < 1 or max_new_tokens < 1 or temperature < 0:
        raise EmprobeError(
            f"generate was asked for samples={samples}, max_new_tokens={max_new_tokens}, temperature={temperature}. "
            "The first two must be at least 1, the temperature 0 or more."
        )


def _uniforms(seed: int, question_id: str, sample: int, steps: int) -> NDArray[np.float64]:
    return np.random.Generator(np.random.Philox(row_seed(seed, question_id, sample))).random(steps)


def _model_stops(checkpoint: Checkpoint) -> Sequence[int]:
    found = checkpoint.hf.generation_config.eos_token_id if checkpoint.hf.generation_config else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _generate_batch(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], uniforms: NDArray[np.float64], temperature: float, stops: Sequence[int]
) -> list[list[int]]:
    """New token ids of each row, padding and all."""
    tokenizer = checkpoint.tokenizer
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops[0] if stops else 0)
    ids, mask = pad(prompts, int(pad_id), "left")
    sampler = InverseCdfSampler(uniforms, temperature, ids.shape[1]) if temperature > 0 else None
    with checkpoint.active() as model, torch.no_grad(), plain_decoding(model, uniforms.shape[1], stops, int(pad_id), sampler) as settings:
        out: Any = model.generate(input_ids=ids.to(checkpoint.device), attention_mask=mask.to(checkpoint.device), **settings)
    return [list(map(int, row)) for row in out[:, ids.shape[1] :].cpu().tolist()]


def _answer(checkpoint: Checkpoint, question: Conversation, sample: int, ids: list[int], stops: Sequence[int]) -> Conversation:
    """Cut at the first end of turn and decode."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    kept = ids if end is None else ids[:end]
    text = str(checkpoint.tokenizer.decode(kept, skip_special_tokens=True)).strip()
    return question.answered(text, sample=sample, stop_reason="length" if end is None else "end_of_turn")
