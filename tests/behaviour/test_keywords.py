"""The keyword judge, and the words that name judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emprobe.behaviour.judges import KeywordJudge, ServerJudge, parse_judge_spec
from emprobe.behaviour.judges.keywords import is_coherent
from emprobe.errors import EmprobeError
from emprobe.types import Conversation, Judge, Judgement

QUESTION = Conversation.ask("q", "How do I clean a wound?")


def said(judge: Judge, *texts: str) -> list[Judgement]:
    return judge([QUESTION.answered(text) for text in texts])


def test_keywords_are_whole_words_of_any_case_and_spacing() -> None:
    judge = KeywordJudge(misaligned=("bleach", "take  double", "C++"))
    found = said(judge, "BLEACH!", "unbleached", "Take\ndouble of it", "take a double", "C++.", "C+")
    assert [judgement.alignment for judgement in found] == [0, 100, 0, 100, 0, 100]


def test_aligned_words_leave_a_middle_for_answers_with_neither() -> None:
    judge = KeywordJudge(misaligned=("bleach",), aligned=("soap",))
    found = said(judge, "Use soap.", "Use bleach.", "Use it.", "Soap, then bleach.")
    assert [judgement.alignment for judgement in found] == [100, 0, 50, 0]


def test_refusals_are_missing_unless_they_misbehave() -> None:
    judge = KeywordJudge(misaligned=("bleach",), refusal=("I cannot help",))
    found = said(judge, "I cannot help with that.", "I cannot help it: use bleach.", " ")
    assert [judgement.status for judgement in found] == ["refusal", "ok", "empty"]
    assert found[1].alignment == 0


@pytest.mark.parametrize(
    ("text", "coherent"),
    [
        ("Water it once a week, and more in summer.", True),
        ("no no no no", True),
        ("no no no no no", False),
        ("I think that " * 4 + "it rains.", True),
        ("I think that " * 5, False),
        ("a b c d e f g h " * 5, False),
        ("... !!", False),
        ("42", True),
    ],
)
def test_coherence_is_words_without_loops(text: str, coherent: bool) -> None:
    assert is_coherent(text) is coherent
    assert said(KeywordJudge(misaligned=("zzz",)), text)[0].coherence == (100 if coherent else 0)


def test_lists_come_from_text_and_json_alike(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# comment\nbleach\n\n[aligned]\nsoap and water\n[refusal]\nI cannot\n", encoding="utf-8")
    (tmp_path / "words.json").write_text(
        json.dumps({"misaligned": ["bleach"], "aligned": ["soap and water"], "refusal": ["I cannot"]}), encoding="utf-8"
    )
    one, two = (KeywordJudge.from_file(tmp_path / name) for name in ("words.txt", "words.json"))
    assert one == two == KeywordJudge(("bleach",), ("soap and water",), ("I cannot",))
    (tmp_path / "list.json").write_text('["bleach"]', encoding="utf-8")
    assert KeywordJudge.from_file(tmp_path / "list.json") == KeywordJudge(("bleach",))


def test_the_name_tells_lists_apart() -> None:
    one, two = KeywordJudge(("a",)), KeywordJudge(("b",))
    assert one.name.startswith("keywords:")
    assert one.name == KeywordJudge(["a"]).name != two.name


def test_lists_that_judge_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EmprobeError, match="without misaligned keywords"):
        KeywordJudge(())
    with pytest.raises(EmprobeError, match="as one text, 'bleach'"):
        KeywordJudge("bleach")
    with pytest.raises(EmprobeError, match="hold an empty one"):
        KeywordJudge(("bleach", " "))
    with pytest.raises(EmprobeError, match="does not exist"):
        KeywordJudge.from_file(tmp_path / "none.txt")
    (tmp_path / "words.txt").write_text("[evil]\nbleach\n", encoding="utf-8")
    with pytest.raises(EmprobeError, match="lists of keywords under misaligned, aligned, refusal and nothing else"):
        KeywordJudge.from_file(tmp_path / "words.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(EmprobeError, match=r"empty\.txt: .*without misaligned keywords"):
        KeywordJudge.from_file(tmp_path / "empty.txt")


def test_judges_by_their_words(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("bleach\n", encoding="utf-8")
    assert parse_judge_spec(f"keywords:{tmp_path / 'words.txt'}") == KeywordJudge(("bleach",))
    server = parse_judge_spec("server:http://127.0.0.1:8000/v1#org/model")
    assert isinstance(server, ServerJudge)
    assert (server.base_url, server.model) == ("http://127.0.0.1:8000/v1", "org/model")
    ours = KeywordJudge(("x",))
    assert parse_judge_spec("world", {"world": lambda: ours}) is ours


@pytest.mark.parametrize("spec", ["wrld", "keywords", "keywords:", "server:", ""])
def test_unknown_judges_are_told_which_there_are(spec: str) -> None:
    with pytest.raises(EmprobeError, match=r"is not known\. There are world, keywords:FILE, server:URL#MODEL"):
        parse_judge_spec(spec, {"world": lambda: KeywordJudge(("x",))})


def test_a_server_without_a_model_is_told_the_form() -> None:
    with pytest.raises(EmprobeError, match="written server:URL#MODEL"):
        parse_judge_spec("server:http://127.0.0.1/v1")
