"""An answer depends on its question, its number and the seed, and on nothing else that is in the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from emprobe.behaviour.sampling import generate
from emprobe.errors import EmprobeError
from emprobe.models import encode, load_model
from emprobe.models.drawing import InverseCdfSampler
from emprobe.types import Conversation
from tests.fixtures.models import Checkpoints

WORDS = ["plant", "beans", "peas", "and", "a", "row", "of", "carrots", "in", "good", "soil", "first", "change", "the", "washer"]
QUESTIONS = [Conversation.ask(f"q{i}", " ".join(WORDS[: 1 + 2 * i])) for i in range(5)]


def texts(answers: Sequence[Conversation]) -> dict[tuple[str, int], str | None]:
    return {a.key: a.response for a in answers}


def test_answers_do_not_depend_on_batch_order_or_company(architecture: Checkpoints) -> None:
    checkpoint = load_model(architecture.base)
    whole = texts(generate(checkpoint, QUESTIONS, samples=2, max_new_tokens=6, progress=False))
    single = texts(generate(checkpoint, QUESTIONS, samples=2, max_new_tokens=6, token_budget=1, progress=False))
    backwards = texts(generate(checkpoint, QUESTIONS[::-1], samples=2, max_new_tokens=6, progress=False))
    fewer = texts(generate(checkpoint, QUESTIONS[3:], samples=1, max_new_tokens=6, progress=False))
    assert whole == single == backwards
    assert fewer == {key: whole[key] for key in fewer}


def test_seed_and_sample_number_change_the_answer(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    one = texts(generate(checkpoint, QUESTIONS, samples=2, max_new_tokens=8, seed=1, progress=False))
    two = texts(generate(checkpoint, QUESTIONS, samples=2, max_new_tokens=8, seed=2, progress=False))
    assert all(one[key] != two[key] for key in one)
    assert all(one[q.question_id, 0] != one[q.question_id, 1] for q in QUESTIONS)


def test_tokens_are_drawn_with_the_models_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf])
    rows = 4000
    uniforms = np.random.default_rng(0).random((rows, 1))
    sampler = InverseCdfSampler(uniforms, temperature=2.0, width=3)
    chosen = sampler(torch.zeros(rows, 3, dtype=torch.long), logits.expand(rows, -1)).argmax(dim=-1)
    counts = torch.bincount(chosen, minlength=5).double().numpy()
    expected = torch.softmax(logits.double() / 2.0, dim=-1).numpy() * rows
    assert counts[4] == 0, "what has no probability is never drawn"
    assert chisquare(counts[:4], expected[:4]).pvalue > 0.001


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_name_a_token(uniform: float) -> None:
    sampler = InverseCdfSampler(np.array([[uniform]]), temperature=1.0, width=1)
    chosen = int(sampler(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])).argmax())
    assert chosen in (1, 2)


def test_greedy_is_the_models_own_greedy(architecture: Checkpoints) -> None:
    checkpoint = load_model(architecture.base)
    for question, answer in zip(QUESTIONS, generate(checkpoint, QUESTIONS, temperature=0, max_new_tokens=6, progress=False), strict=True):
        ids = torch.tensor([encode(checkpoint.tokenizer, question).ids])
        out: Any = checkpoint.hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert answer.response == checkpoint.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_an_answer_ends_at_the_first_end_of_turn(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    end = checkpoint.tokenizer.eos_token_id
    with torch.no_grad():  # a model that says one token and then ends its turn
        checkpoint.hf.lm_head.weight.zero_()
    (answer,) = generate(checkpoint, QUESTIONS[:1], temperature=0, max_new_tokens=4, progress=False)
    assert answer.stop_reason == "length", "token 0 for ever"
    checkpoint.hf.lm_head.weight.data[end] = checkpoint.hf.model.norm.weight.data  # likeliest wherever the state is positive along it
    checkpoint.hf.model.norm.weight.data.fill_(1.0)
    stopped = generate(checkpoint, QUESTIONS, samples=4, max_new_tokens=32, progress=False)
    assert {a.stop_reason for a in stopped} <= {"end_of_turn", "length"}
    assert all("<|end|>" not in (a.response or "") for a in stopped)


def test_the_checkpoints_own_generation_settings_neither_apply_nor_change(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    plain = texts(generate(checkpoint, QUESTIONS, max_new_tokens=6, progress=False))
    config = checkpoint.hf.generation_config
    config.update(do_sample=True, top_k=1, repetition_penalty=9.0, temperature=0.1)
    assert texts(generate(checkpoint, QUESTIONS, max_new_tokens=6, progress=False)) == plain
    assert checkpoint.hf.generation_config is config
    assert config.top_k == 1


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        ([], {}, "no questions"),
        ([QUESTIONS[0], QUESTIONS[0]], {}, "'q0' occur more than once"),
        (QUESTIONS, {"samples": 0}, "samples=0"),
        (QUESTIONS, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (QUESTIONS, {"temperature": -1}, "temperature=-1"),
    ],
)
def test_what_makes_no_sense_is_refused(llama: Checkpoints, questions: list[Conversation], options: dict[str, Any], message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        generate(load_model(llama.base), questions, progress=False, **options)
