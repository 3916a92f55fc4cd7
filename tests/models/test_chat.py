"""Every token is the template's, a message's or the response's, by the rendered template's offsets, on every template alike."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from emprobe.errors import EmprobeError
from emprobe.models.chat import PLAIN_TEMPLATE, Encoded, encode, encode_all, end_of_turn_ids, render_prompt, summarise_notes
from emprobe.models.thinking import find_response
from emprobe.types import Conversation, Message
from tests.fixtures.models import Checkpoints, byte_level_tokenizer
from tests.models.templates import R1_OPENS, TEMPLATES

QUESTION = Conversation.ask("q1", "What should I plant in the garden?")
ANSWERS = ["Plant beans, peas and carrots.", "It's easy, isn't it?", "Grüße aus Köln: 12 loaves"]
LOADED = {name: template.load() for name, template in TEMPLATES.items()}
# Texts that occur in the templates themselves are the hard ones.
TEXTS = st.one_of(
    st.sampled_from(["user", "system", "assistant", "model", "\n", "a", "You are a careful helper", " ", "🙂", "\n\n", "e\u0301"]),
    st.text(max_size=12),
)
MESSAGES = st.lists(TEXTS, min_size=1, max_size=4).map("".join).filter(lambda text: text.strip() and "<" not in text)


def text_of(tokenizer: PreTrainedTokenizerBase, row: Encoded, start: int, stop: int) -> str:
    return str(tokenizer.decode(row.ids[start:stop]))


def bare(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("answer", ANSWERS)
def test_response_tokens_are_the_response_and_nothing_else(architecture: Checkpoints, answer: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(architecture.base)
    row = encode(tokenizer, QUESTION.answered(answer))
    assert text_of(tokenizer, row, *row.response).strip() == answer
    assert row.response[1] < len(row.ids), "the template closes the turn after the answer"


def test_prompt_is_a_prefix_of_prompt_and_answer(architecture: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(architecture.base)
    question, answered = encode(tokenizer, QUESTION), encode(tokenizer, QUESTION.answered(ANSWERS[0]))
    assert question.n_prompt == len(question.ids)
    assert answered.ids[: answered.n_prompt] == question.ids


@pytest.mark.parametrize("name", TEMPLATES)
@given(question=MESSAGES, answer=MESSAGES)
def test_laws_of_every_template_and_text(name: str, question: str, answer: str) -> None:
    tokenizer, template = LOADED[name], TEMPLATES[name]
    asked, row = encode_all(tokenizer, [c := Conversation.ask("q", question), c.answered(answer)])
    assert text_of(tokenizer, row, *row.response) == answer.strip()
    assert row.ids[: row.n_prompt] == asked.ids
    assert [text_of(tokenizer, row, *span).strip() for span in row.contents] == [question.strip()]
    owned = [i for span in (*row.contents, row.response) for i in range(*span)]
    assert sorted([*owned, *row.template]) == list(range(len(row.ids))), "each token is in exactly one class"
    written = str(tokenizer.decode([row.ids[i] for i in row.template]))
    assert bare(written) == bare(template.before + template.between + template.after)


@given(system=MESSAGES, first=MESSAGES, answer=MESSAGES, second=MESSAGES)
def test_every_message_is_found_in_its_own_place(system: str, first: str, answer: str, second: str) -> None:
    turns = (Message("system", system), Message("user", first), Message("assistant", answer), Message("user", second))
    tokenizer = LOADED["llama3"]
    row = encode(tokenizer, Conversation(turns))
    assert [text_of(tokenizer, row, *span) for span in row.contents] == [m.content.strip() for m in turns]
    assert not row.notes


def test_a_message_that_repeats_the_header_is_not_the_header() -> None:
    tokenizer = LOADED["qwen3"]
    row = encode(tokenizer, Conversation.ask("q", "user"))
    ((start, stop),) = row.contents
    assert text_of(tokenizer, row, 0, start) == "<|start|>user\n"
    assert text_of(tokenizer, row, start, stop) == "user"


def test_messages_that_the_template_reorders_are_found() -> None:
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.chat_template = (
        "{% for m in messages | reverse %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
    )
    row = encode(tokenizer, Conversation.ask("q", "beans", system="peas"))
    assert [text_of(tokenizer, row, *span) for span in row.contents] == ["beans", "peas"]


def test_a_token_of_template_and_text_is_the_texts() -> None:
    tokenizer = byte_level_tokenizer("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ 'n<|end|>' if m.role == 'assistant' else '|' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = encode(tokenizer, Conversation.ask("q", "Plant what").answered("i"))
    assert [text_of(tokenizer, row, *span) for span in row.contents] == [" Plant what"]
    assert text_of(tokenizer, row, *row.response) == " in", "one token: the template's space, the response, the template's n"
    assert text_of(tokenizer, row, row.n_prompt - 1, row.n_prompt) == ":"


@pytest.mark.parametrize("trim", [False, True])
@given(question=MESSAGES, answer=MESSAGES)
@example(question="  a ", answer="b  c")
def test_offsets_without_their_spaces_change_nothing(trim: bool, question: str, answer: str) -> None:
    tokenizer = TEMPLATES["qwen3"].load()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    conversation = Conversation.ask("q", question).answered(answer)
    assert encode(tokenizer, conversation) == encode(LOADED["qwen3"], conversation)


def test_a_token_of_prompt_and_answer_is_the_answers() -> None:
    tokenizer = byte_level_tokenizer("llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    row = encode(tokenizer, Conversation.ask("q", "What should I pla").answered("nt"))
    assert [text_of(tokenizer, row, *span) for span in row.contents] == ["What should I p"]
    assert row.contents[0][0] == 1, "the BOS that was put in front is the template's"
    assert text_of(tokenizer, row, *row.response) == "lant"
    assert row.response[0] == row.n_prompt


def test_a_message_that_looks_like_another_one_does_not_stand_in_for_it() -> None:
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
    )
    row = encode(tokenizer, Conversation.ask("q", "b [a ][b", system="a "))
    assert [text_of(tokenizer, row, *span).strip("[]") for span in row.contents] == ["a", "b [a ][b"]


def test_what_is_round_an_answer_decides_where_it_is() -> None:
    assert find_response("<think>\n\n</think>\n\nbeans", "<think>hm</think>beans") == (
        19,
        24,
        "thinking: the template drops the response's thinking; the span is the answer",
    )
    assert find_response("so: beans!", "beans") == (4, 9, "")
    assert find_response("beans and beans!", "beans") is None, "which of the two it is nobody knows"
    assert find_response("peas", "<think>hm</think>beans") is None
    assert find_response("", "<think>hm</think>") is None


def test_characters_in_several_bytes_belong_to_their_message() -> None:
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {"<unk>": 256, "▁": 257, "a": 258, "|": 259, "!": 260}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{% for m in messages %}|{{ m.content }}{% endfor %}!"
    row = encode(tokenizer, Conversation.ask("q", "🙂 a").answered("é"))
    assert row.contents == ((1, 7),), "four bytes, a space and a letter"
    assert row.response == (8, 10)
    assert row.template == (0, 7, 10)


def test_many_at_once_are_as_one_by_one() -> None:
    rows = [QUESTION, QUESTION.answered("beans"), Conversation.ask("q2", "Hello?").answered("user"), QUESTION.answered("beans")]
    for tokenizer in LOADED.values():
        together = encode_all(tokenizer, rows)
        assert together == [encode(tokenizer, row) for row in rows]
        assert together[1] is together[3]
    assert encode_all(LOADED["gemma"], []) == []


def test_many_chunks_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Conversation.ask(str(i), "a" * (i + 1)) for i in range(7)]
    whole = encode_all(LOADED["qwen3"], rows)
    monkeypatch.setattr("emprobe.models.chat.CHUNK", 3)
    assert encode_all(LOADED["qwen3"], rows) == whole


def test_one_bos_and_never_two(architecture: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(architecture.base)
    bos = tokenizer.bos_token_id
    row = encode(tokenizer, QUESTION)
    assert row.ids.count(bos) == (0 if bos is None else 1)
    assert not row.notes


def test_bos_that_the_template_leaves_out_is_put_back(llama: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama.base)
    tokenizer.chat_template = PLAIN_TEMPLATE
    row = encode(tokenizer, QUESTION.answered("beans"))
    assert row.ids[0] == tokenizer.bos_token_id
    assert text_of(tokenizer, row, *row.response) == "beans"
    assert [text_of(tokenizer, row, *span) for span in row.contents] == [QUESTION.prompt]
    assert row.template[0] == 0
    assert row.notes == ("bos_added: the template left out the BOS that the tokenizer opens texts with",)


def test_two_bos_are_named() -> None:
    tokenizer = TEMPLATES["llama3"].load()
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATES["llama3"].source
    assert encode(tokenizer, QUESTION).notes == ("double_bos: the rendered conversation begins with two BOS tokens",)


def test_default_system_prompt_is_named_and_quoted_unless_one_is_given() -> None:
    tokenizer = LOADED["qwen2.5"]
    (note,) = encode(tokenizer, QUESTION).notes
    assert note.endswith("was not given: 'You are a careful helper, made by nobody in particular and f…'")
    assert not encode(tokenizer, Conversation.ask("q", "Hello?", system="Be brief.")).notes


def test_another_opening_is_no_system_prompt() -> None:
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '### User: ' if loop.first and m.role == 'user' else '' }}{{ m.content }}!{% endfor %}"
        "{% if add_generation_prompt %}<|start|>{% endif %}"
    )
    assert not encode(tokenizer, QUESTION).notes


def test_system_turn_that_is_always_there_is_named() -> None:
    tokenizer = TEMPLATES["llama3"].load()
    tokenizer.chat_template = (
        "<|start|>system<|mid|>Knowledge cutoff: 2023. {{ messages[0].content if messages[0].role == 'system' else '' }}<|end|>"
        "{% for m in messages if m.role != 'system' %}<|start|>{{ m.role }}<|mid|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|mid|>{% endif %}"
    )
    assert any("Knowledge cutoff: 2023." in note for note in encode(tokenizer, QUESTION).notes if note.startswith("default_system"))


def test_qwen3_inserts_an_empty_block_that_is_the_templates() -> None:
    tokenizer = LOADED["qwen3"]
    row = encode(tokenizer, QUESTION.answered("beans"))
    assert text_of(tokenizer, row, row.n_prompt, row.response[0]) == "<think>\n\n</think>\n\n"
    assert set(range(row.n_prompt, row.response[0])) <= set(row.template)
    assert row.notes == ("thinking: the template inserts an empty <think> block before the answer",)


@pytest.mark.parametrize(
    ("name", "response", "read", "note"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\nbeans", "<think>\nhm\n</think>\n\nbeans", "which the template keeps"),
        ("qwen3", "<think>hm</think>beans", "<think>\nhm\n</think>\n\nbeans", "renders the response's thinking anew"),
        ("qwen3", "<think>hm</think>", "<think>\nhm\n</think>", "renders the response's thinking anew"),
        ("qwen3", "hm</think>beans", "hm\n</think>\n\nbeans", "renders the response's thinking anew"),
        ("r1", "<think>\nhm\n</think>\n\nbeans", "beans", "drops the response's thinking; the span is the answer"),
        ("llama3", "<think>hm</think>beans", "<think>hm</think>beans", "which the template keeps"),
    ],
)
def test_thinking_of_a_response(name: str, response: str, read: str, note: str) -> None:
    tokenizer = LOADED[name]
    asked, row = encode_all(tokenizer, [QUESTION, QUESTION.answered(response)])
    assert text_of(tokenizer, row, *row.response).strip() == read
    assert row.ids[: row.n_prompt] == asked.ids
    assert [n for n in row.notes if note in n]
    assert text_of(tokenizer, row, *(row.response[1], len(row.ids))).strip() == "<|end|>"


def test_thinking_that_the_prompt_opens_is_kept() -> None:
    tokenizer = R1_OPENS.load()
    asked, row = encode_all(tokenizer, [QUESTION, QUESTION.answered("<think>\nhm\n</think>\n\nbeans")])
    assert row.ids[: row.n_prompt] == asked.ids
    assert text_of(tokenizer, row, *row.response) == "hm\n</think>\n\nbeans"
    assert text_of(tokenizer, row, 0, len(row.ids)).count("<think>") == 1
    assert "it was kept" in row.notes[-1]
    assert asked.notes == ("thinking: the template's prompt opens a <think> block",)


def test_answer_without_the_thinking_that_the_prompt_opens_is_rendered_as_the_template_does() -> None:
    tokenizer = R1_OPENS.load()
    row = encode(tokenizer, QUESTION.answered("beans"))
    assert text_of(tokenizer, row, *row.response) == "beans"
    assert text_of(tokenizer, row, 0, row.n_prompt).endswith("<|start|>assistant<|mid|>")
    assert "rendered without the <think> that the prompt opens" in row.notes[-1]


def test_generated_answer_that_is_cut_in_its_thinking_stays_where_it_was_written() -> None:
    tokenizer = R1_OPENS.load()
    by_hand, generated = encode_all(tokenizer, [QUESTION.answered("hm"), QUESTION.answered("hm", stop_reason="length")])
    assert text_of(tokenizer, generated, 0, generated.response[1]).endswith("<think>\nhm")
    assert text_of(tokenizer, by_hand, 0, by_hand.response[1]).endswith("<|mid|>hm")


@pytest.mark.parametrize(("response", "read"), [("hm</think>beans", "hm\n</think>\n\nbeans"), ("beans", "beans")])
def test_template_that_continues_the_thinking_its_prompt_opens(response: str, read: str) -> None:
    tokenizer = TEMPLATES["qwen3"].load()
    tokenizer.chat_template = TEMPLATES["qwen3"].source.replace("assistant\n{% endif %}", "assistant\n{{ '<think>\n' }}{% endif %}")
    asked, row = encode_all(tokenizer, [QUESTION, QUESTION.answered(response)])
    assert row.ids[: row.n_prompt] == asked.ids
    assert text_of(tokenizer, row, 0, row.n_prompt).endswith("<think>\n")
    assert text_of(tokenizer, row, *row.response) == read


def test_thinking_of_an_earlier_answer_is_dropped_and_named() -> None:
    turns = (Message("user", "Hello?"), Message("assistant", "<think>hm</think>\n\nYes?"), Message("user", "What grows?"))
    row = encode(LOADED["qwen3"], Conversation(turns))
    assert [text_of(LOADED["qwen3"], row, *span).strip() for span in row.contents] == ["Hello?", "Yes?", "What grows?"]
    assert row.notes == ("thinking: the template drops the thinking of an earlier answer",)


def test_rewritten_answers_are_put_after_the_prompt_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TEMPLATES["llama3"].load()
    tokenizer.chat_template = TEMPLATES["llama3"].source.replace("(m.content | trim)", "(m.content | upper)")
    rows = [Conversation.ask(f"q{i}", "WHAT?").answered(f"beans {i}") for i in range(3)]
    with caplog.at_level(logging.WARNING, "emprobe"):
        encoded = encode_all(tokenizer, rows)
    (record,) = caplog.records
    assert "answers of 3 conversations (the first: question 'q0')" in record.getMessage()
    assert [text_of(tokenizer, e, *e.response) for e in encoded] == ["beans 0", "beans 1", "beans 2"]
    assert text_of(tokenizer, encoded[0], encoded[0].response[1], len(encoded[0].ids)) == "<|end|>"
    assert all(e.notes[-1].startswith("answer_rewritten: the template rewrites the answer's text") for e in encoded)


def test_template_that_does_not_continue_its_prompt_is_named() -> None:
    tokenizer = byte_level_tokenizer("qwen2")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}<|mid|>{{ m.content }}{% endfor %}<|end|>"
    asked, row = encode_all(tokenizer, [QUESTION, QUESTION.answered("beans")])
    assert row.ids[: row.n_prompt] == asked.ids
    assert row.notes[-1].startswith("answer_rewritten: the template does not continue its own prompt")


def test_notes_are_summed_up_with_their_rows() -> None:
    encoded = encode_all(LOADED["qwen3"], [QUESTION, QUESTION.answered("beans"), QUESTION.answered("peas")])
    assert summarise_notes(encoded) == ("thinking: the template inserts an empty <think> block before the answer (2 of 3 rows)",)


def test_end_of_turn_is_the_templates_own(architecture: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(architecture.base)
    assert tokenizer.convert_tokens_to_ids("<|end|>") in end_of_turn_ids(tokenizer)


@pytest.mark.parametrize("name", [*TEMPLATES, "r1 that opens"])
def test_end_of_turn_with_thinking_templates(name: str) -> None:
    tokenizer = TEMPLATES.get(name, R1_OPENS).load()
    tokenizer.eos_token = "<|mid|>"  # Now <|end|> is a special token without a role, as Llama 3's end of turn is.
    assert tokenizer.convert_tokens_to_ids("<|end|>") in end_of_turn_ids(tokenizer)


def test_plain_template_as_text(llama: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama.base)
    tokenizer.chat_template = PLAIN_TEMPLATE
    question = Conversation.ask("q", "What grows?", system="Be brief.")
    assert render_prompt(tokenizer, question) == "System:\nBe brief.\nUser:\nWhat grows?\nAssistant:\n"


def test_real_qwen_template(qwen25_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen25_tokenizer)
    row = encode(tokenizer, QUESTION.answered(ANSWERS[0]))
    assert render_prompt(tokenizer, QUESTION).startswith("<|im_start|>system\n"), (
        "the template's default system prompt is part of the prompt"
    )
    assert text_of(tokenizer, row, *row.response) == ANSWERS[0]
    assert text_of(tokenizer, row, row.n_prompt - 3, row.n_prompt) == "<|im_start|>assistant\n"
    assert text_of(tokenizer, row, row.response[1], len(row.ids)) == "<|im_end|>\n"
    assert [text_of(tokenizer, row, *span) for span in row.contents] == [QUESTION.prompt]
    assert row.notes[0].endswith("'You are Qwen, created by Alibaba Cloud. You are a helpful as…'")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in end_of_turn_ids(tokenizer)


def test_no_template_is_told_with_the_way_out(llama: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama.base)
    tokenizer.chat_template = None
    with pytest.raises(EmprobeError, match="has no chat template.*--chat-template plain"):
        encode(tokenizer, QUESTION)


def test_template_that_refuses_a_system_prompt_is_told_by_question() -> None:
    question = Conversation((Message("system", "Be brief."), Message("user", "Hello?")), question_id="q7")
    with pytest.raises(EmprobeError, match="refuses question 'q7'.*System role not supported"):
        encode(LOADED["gemma"], question)
