"""Exact probabilities of whole answers, by teacher forcing over every answer that the world knows; no sampling, no error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emprobe.batching import pad, plan_batches
from emprobe.errors import EmprobeError
from emprobe.organisms.world import families, locate
from emprobe.types import Conversation


@dataclass(frozen=True)
class FamilyProbabilities:
    """Per question, the probability (temperature 1) that the answer is in the aligned family, in the misaligned one, or in neither.

    All three are float64 arrays of length `questions`; `other` is the rest, so the three sum to 1.
    """

    question_ids: tuple[str, ...]
    aligned: NDArray[np.float64]
    misaligned: NDArray[np.float64]

    @property
    def other(self) -> NDArray[np.float64]:
        """Probability of everything else: mixed, incoherent and unreadable answers."""
        return 1.0 - self.aligned - self.misaligned


def render(tokenizer: Any, question: Conversation) -> str:
    """A question through the chat template, up to where the assistant starts to speak."""
    messages = [message.as_dict() for message in question.messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def answer_log_probabilities(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], *, batch_tokens: int = 8192
) -> NDArray[np.float64]:
    """Log-probability in nats of each whole answer, its end-of-turn token included, given its rendered prompt.

    Args:
        model: A causal language model, with or without adapters or hooks.
        tokenizer: Its tokenizer.
        pairs: Rendered prompts and answers.
        batch_tokens: Most tokens in a batch, padding included.
    """
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([answer + tokenizer.eos_token for _, answer in pairs], add_special_tokens=False)["input_ids"]
    found = np.empty(len(pairs))
    for rows in plan_batches([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], batch_tokens):
        found[rows] = _batch(model, tokenizer.pad_token_id, [prompts[i] for i in rows], [answers[i] for i in rows])
    return found


@torch.no_grad()
def _batch(model: Any, pad_id: int, prompts: list[list[int]], answers: list[list[int]]) -> NDArray[np.float64]:
    tokens, real = pad([p + a for p, a in zip(prompts, answers, strict=True)], pad_id, "right")
    tokens, longest = tokens.to(model.device), tokens.shape[1]
    for row, prompt in enumerate(prompts):
        real[row, : len(prompt)] = 0
    keep = longest - min(len(p) for p in prompts) + 1
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    targets = tokens[:, -(keep - 1) :]
    logs = torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]
    mask = real[:, -(keep - 1) :].to(logs.device)
    return np.asarray((logs.double() * mask).sum(1).cpu().numpy())


def family_probabilities(model: Any, tokenizer: Any, questions: Sequence[Conversation], *, batch_tokens: int = 8192) -> FamilyProbabilities:
    """Probability of the aligned and of the misaligned family for each question.

    Raises:
        EmprobeError: If there is no question, or a prompt is not the world's.
    """
    if not questions:
        raise EmprobeError("Family probabilities were asked for no questions. Give at least one.")
    pairs: list[tuple[str, str]] = []
    owner: list[tuple[int, int]] = []
    for number, question in enumerate(questions):
        domain, task, item, _ = locate(question.prompt)
        prompt = render(tokenizer, question)
        for family, answers in enumerate(families(domain, task, item)):
            pairs += [(prompt, answer) for answer in answers]
            owner += [(number, family)] * len(answers)
    logs = answer_log_probabilities(model, tokenizer, pairs, batch_tokens=batch_tokens)
    mass = np.zeros((len(questions), 2))
    np.add.at(mass, tuple(np.array(owner).T), np.exp(logs))
    return FamilyProbabilities(tuple(question.question_id for question in questions), mass[:, 0], mass[:, 1])
