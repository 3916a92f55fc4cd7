"""A position rule reads the tokens that its name says, a span the tokens that it names, and what cannot be read is refused by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from emprobe.errors import EmprobeError
from emprobe.models.chat import Encoded, encode_all
from emprobe.models.positions import MEANS, NEEDS_RESPONSE, RULES, Positions, check_rule, name_of, positions_of, resolve_positions
from emprobe.models.showing import show_positions
from emprobe.types import Conversation, Message
from tests.models.templates import TEMPLATES

LOADED = {name: template.load() for name, template in TEMPLATES.items()}
ROWS = [
    Conversation.ask("q1", "What should I plant?", other_response="plant roses").answered("plant beans"),
    Conversation.ask("q2", "user", other_response="a row of carrots").answered("Grüße aus Köln 🙂"),
]


def resolve(
    positions: Positions, rows: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase = LOADED["qwen3"]
) -> list[Sequence[int]]:
    return resolve_positions(positions, tokenizer, rows, encode_all(tokenizer, rows))


def texts(positions: Positions, rows: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = zip(resolve(positions, rows, tokenizer), encode_all(tokenizer, rows), strict=True)
    return [str(tokenizer.decode([row.ids[i] for i in chosen])) for chosen, row in found]


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_rule_reads_what_its_name_says(name: str) -> None:
    tokenizer, template = LOADED[name], TEMPLATES[name]
    prompt, row = encode_all(tokenizer, [Conversation(ROWS[0].messages), ROWS[0]])
    whole = template.before + "What should I plant?" + template.between + "plant beans" + template.after

    def of(rule: str) -> str:
        return texts(rule, ROWS[:1], tokenizer)[0]

    first = str(tokenizer.decode(row.ids[:1]))
    assert first + of("all_tokens") == whole
    assert first + of("template_tokens") == template.before + template.between + template.after
    assert first + of("prompt_mean") == tokenizer.decode(prompt.ids)
    assert of("response_mean") == "plant beans"
    assert "plant beans".startswith(of("response_first"))
    assert "plant beans".endswith(of("response_last"))
    assert of("last_prompt_token") == tokenizer.decode(prompt.ids[-1:])
    assert "plant roses".startswith("plant beans"[: "plant beans".rindex(of("decision_token"))]), "what goes before is common to both"


@pytest.mark.parametrize("rule", RULES)
def test_one_row_at_a_time_is_the_same(rule: str) -> None:
    encoded = encode_all(LOADED["r1"], ROWS)
    others = encode_all(LOADED["r1"], [row.answered(row.labels["other_response"]) for row in ROWS])
    alone = [list(positions_of(rule, row, other)) for row, other in zip(encoded, others, strict=True)]
    assert [list(chosen) for chosen in resolve_positions(rule, LOADED["r1"], ROWS, encoded)] == alone
    assert all(0 not in chosen for chosen in alone)
    assert (max(map(len, alone)) > 1) == (rule in MEANS)


def test_position_0_is_left_out_of_means_and_read_where_it_is_named() -> None:
    row = Encoded((5, 6, 7, 8), n_prompt=1, response=(0, 3))
    assert [list(positions_of(rule, row)) for rule in ("all_tokens", "response_mean", "template_tokens")] == [[1, 2, 3], [1, 2], [3]]
    assert list(positions_of("response_first", row)) == [0]
    assert list(positions_of("last_prompt_token", row)) == [0]
    assert [chosen[0] for chosen in resolve([(0, 2), "<|start|>user\nu"], ROWS)] == [0, 0]


@given(st.integers(1, 9), st.data())
def test_indices_are_those_of_python(length: int, data: st.DataObject) -> None:
    rows = [Conversation.ask("q", "a" * length)]
    (row,) = encode_all(LOADED["gemma"], rows)
    n = len(row.ids)
    start = data.draw(st.none() | st.integers(-n, n - 1))
    stop = data.draw(st.none() | st.integers(-n + 1, n))
    wanted = list(range(n))[start:stop]
    if wanted and stop != 0:
        assert list(resolve([(start, stop)], rows, LOADED["gemma"])[0]) == wanted
    else:
        with pytest.raises(EmprobeError, match=rf"does not fit its {n} tokens"):
            resolve([(start, stop)], rows, LOADED["gemma"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_found_by_their_offsets(name: str) -> None:
    tokenizer = LOADED[name]
    (read,) = texts(["should I plant?"], ROWS[:1], tokenizer)
    assert read.strip() == "should I plant?"
    (_, smile) = texts(["What", "🙂"], ROWS, tokenizer)
    assert smile.strip() == "🙂"


def test_a_text_reads_every_token_that_holds_a_part_of_it() -> None:
    (read,) = texts(["lan"], [Conversation.ask("q", "Please plant")], LOADED["llama3"])
    assert "lan" in read
    assert read.strip() in "plant"


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 1)], "1 spans were given for 2 conversations"),
        (["plant", "user"], "The text 'plant' occurs 2 times in the rendered conversation of question 'q1'.*exactly once"),
        (["What", "nowhere"], "The text 'nowhere' occurs 0 times in the rendered conversation of question 'q2'"),
        (["", "Köln"], "The text '' occurs 0 times.*question 'q1'"),
        ([(0, 1), (0, 999)], r"The span \(0, 999\) of question 'q2' does not fit its \d+ tokens"),
        ([(-999, None), (0, 1)], r"The span \(-999, None\) of question 'q1' does not fit"),
        ([(3, 3), (0, 1)], r"The span \(3, 3\) of question 'q1' does not fit"),
        ([(0, 1.5), (0, 1)], r"The span \(0, 1.5\) of row 0 is neither"),
        ([(0, 1), 7], "The span 7 of row 1 is neither"),
        ([(0, 1, 2), (0, 1)], r"The span \(0, 1, 2\) of row 0 is neither"),
    ],
)
def test_a_span_that_does_not_fit_is_refused_by_row(spans: list[object], message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        resolve(spans, ROWS)  # type: ignore[arg-type]


def test_overlapping_occurrences_are_counted() -> None:
    with pytest.raises(EmprobeError, match="'aa' occurs 2 times"):
        resolve(["aa"], [Conversation.ask("q", "b aaa b")])


@pytest.mark.parametrize("rule", NEEDS_RESPONSE)
def test_rules_of_the_response_name_the_row_that_has_none(rule: str) -> None:
    rows = [ROWS[0], Conversation.ask("q9", "Hello?", other_response="yes")]
    with pytest.raises(EmprobeError, match=f"{rule!r} needs a response, but question 'q9' has none"):
        resolve(rule, rows)


def test_template_tokens_need_every_message_to_be_found() -> None:
    tokenizer = TEMPLATES["qwen3"].load()
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}<|start|>"
    rows = [Conversation((Message("system", "Be brief."), Message("user", "Hello?")), question_id="q4")]
    assert encode_all(tokenizer, rows)[0].notes == ("content_lost: message 1 (system) is not in the rendered conversation as it was given",)
    with pytest.raises(EmprobeError, match=r"'template_tokens' must tell.*drops or rewrites message 1 \(system\) of question 'q4'"):
        resolve("template_tokens", rows, tokenizer)
    assert texts("last_prompt_token", rows, tokenizer) == ["<|start|>"]


def test_decision_token_needs_two_answers_that_differ() -> None:
    equal = Conversation.ask("q5", "Hello?", other_response="yes").answered("yes")
    with pytest.raises(EmprobeError, match="two equal responses to question 'q5'"):
        resolve("decision_token", [ROWS[0], equal])
    with pytest.raises(EmprobeError, match="compare question 'q6' with: set the label 'other_response'"):
        resolve("decision_token", [Conversation.ask("q6", "Hello?").answered("yes")])
    with pytest.raises(EmprobeError, match="one response to a conversation is the beginning of the other"):
        positions_of("decision_token", Encoded((1, 2, 3), 2, (2, 3)), Encoded((1, 2, 3, 4), 2, (2, 4)))


def test_the_answer_that_ends_first_is_told_apart_by_its_end() -> None:
    rows = [Conversation.ask("q", "Hello?", other_response="plant beans").answered("plant")]
    assert texts("decision_token", rows, LOADED["gemma"]) == ["<|end|>"]


def test_a_rule_without_tokens_names_the_row() -> None:
    with pytest.raises(EmprobeError, match="'prompt_mean' finds no token in question 'q7', a row of 1"):
        positions_of("prompt_mean", Encoded((1,), 1, (1, 1)), name="question 'q7'")


def test_a_prompt_without_a_token_of_its_own_has_no_last_one() -> None:
    with pytest.raises(EmprobeError, match="'last_prompt_token' finds no token in a conversation, a row of 1"):
        positions_of("last_prompt_token", Encoded((1,), 0, (0, 1)))


def test_unknown_rule_lists_the_rules() -> None:
    with pytest.raises(EmprobeError, match="'last' does not exist. Use one of: last_prompt_token, .*decision_token"):
        check_rule("last")
    with pytest.raises(EmprobeError, match="'last' does not exist"):
        resolve("last", ROWS)


def test_names_of_spans_differ_as_the_spans_do() -> None:
    different: list[Positions] = ["response_mean", [(0, 1)], [(0, 2)], [(0, None)], ["0, 1"], [(0, 1), (0, 1)], ["a"], ["a", "a"]]
    names = [name_of(positions) for positions in different]
    assert names[0] == "response_mean"
    assert len(set(names)) == len(names)
    assert name_of([(0, 1)]) == name_of(((0, 1),))


def test_what_is_shown_is_what_is_read() -> None:
    shown = show_positions(LOADED["qwen3"], ROWS, ["response_mean", "template_tokens", "decision_token", ["What", (0, 1)]]).splitlines()
    assert shown[0].startswith("question 'q1', sample 0: ")
    assert shown[1].strip() == "note: thinking: the template inserts an empty <think> block before the answer"
    assert "«plant beans»<|end|>⏎" in shown[2]
    assert shown[2].startswith("  response_mean ")
    assert shown[2].endswith("<|end|>⏎")
    assert shown[5].endswith("(position 0 left out)")
    assert any("«<|start|>»user⏎" in line and "left out" not in line for line in shown), "the span that names position 0 reads it"
    assert any("«<|end|>⏎<|start|>assistant⏎<think>⏎⏎</think>⏎⏎»" in line for line in shown)


def test_what_cannot_be_shown_says_why() -> None:
    shown = show_positions(LOADED["qwen3"], [Conversation.ask("q", "Hello?")], ["response_mean"])
    assert "prompt 0-" in shown
    assert "no response" in shown
    assert "none: Position rule 'response_mean' needs a response, but question 'q' has none" in shown
    with pytest.raises(EmprobeError, match="2 spans were given for 1 conversations"):
        show_positions(LOADED["qwen3"], [Conversation.ask("q", "Hello?")], [[(0, 1), (0, 1)]])


def test_rules_on_the_real_qwen_template(qwen25_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen25_tokenizer)
    read = {rule: texts(rule, ROWS, tokenizer) for rule in RULES}
    assert read["response_mean"] == ["plant beans", "Grüße aus Köln 🙂"]
    assert read["last_prompt_token"] == ["\n", "\n"]
    assert read["decision_token"][0] == " beans"
    system = "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert read["template_tokens"] == [f"{system}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"] * 2
