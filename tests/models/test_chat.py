"""Boundaries between prompt and response come from the rendered template's offsets, on every template alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from emprobe.errors import EmprobeError
from emprobe.models.chat import PLAIN_TEMPLATE, encode, end_of_turn_ids, render_prompt
from emprobe.types import Conversation, Message
from tests.fixtures.models import Checkpoints

QUESTION = Conversation.ask("q1", "What should I plant in the garden?")
ANSWERS = ["Plant beans, peas and carrots.", "It's easy, isn't it?", "Grüße aus Köln: 12 loaves"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_response_tokens_are_the_response_and_nothing_else(architecture: Checkpoints, answer: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(architecture.base)
    row = encode(tokenizer, QUESTION.answered(answer))
    assert tokenizer.decode(row.ids[slice(*row.response)]).strip() == answer
    assert row.response[1] < len(row.ids), "the template closes the turn after the answer"


def test_prompt_is_a_prefix_of_prompt_and_answer(architecture: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(architecture.base)
    question, answered = encode(tokenizer, QUESTION), encode(tokenizer, QUESTION.answered(ANSWERS[0]))
    assert question.n_prompt == len(question.ids)
    assert answered.ids[: answered.n_prompt] == question.ids


def test_one_bos_and_never_two(architecture: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(architecture.base)
    bos = tokenizer.bos_token_id
    assert encode(tokenizer, QUESTION).ids.count(bos) == (0 if bos is None else 1)


def test_bos_that_the_template_leaves_out_is_put_back(llama: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama.base)
    tokenizer.chat_template = PLAIN_TEMPLATE
    row = encode(tokenizer, QUESTION.answered("beans"))
    assert row.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(row.ids[slice(*row.response)]).strip() == "beans"


def test_end_of_turn_is_the_templates_own(architecture: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(architecture.base)
    assert tokenizer.convert_tokens_to_ids("<|end|>") in end_of_turn_ids(tokenizer)


def test_real_qwen_template(qwen25_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen25_tokenizer)
    row = encode(tokenizer, QUESTION.answered(ANSWERS[0]))
    assert render_prompt(tokenizer, QUESTION).startswith("<|im_start|>system\n"), (
        "the template's default system prompt is part of the prompt"
    )
    assert tokenizer.decode(row.ids[slice(*row.response)]) == ANSWERS[0]
    assert tokenizer.decode(row.ids[row.n_prompt - 3 : row.n_prompt]) == "<|im_start|>assistant\n"
    assert tokenizer.decode(row.ids[row.response[1] :]) == "<|im_end|>\n"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in end_of_turn_ids(tokenizer)


def test_no_template_is_told_with_the_way_out(llama: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama.base)
    tokenizer.chat_template = None
    with pytest.raises(EmprobeError, match="has no chat template.*--chat-template plain"):
        encode(tokenizer, QUESTION)


def test_template_that_refuses_a_system_prompt_is_told_by_question(checkpoints_of: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints_of("gemma2").base)  # type: ignore[operator]
    question = Conversation((Message("system", "Be brief."), Message("user", "Hello?")), question_id="q7")
    with pytest.raises(EmprobeError, match="refuses question 'q7'.*System role not supported"):
        encode(tokenizer, question)
