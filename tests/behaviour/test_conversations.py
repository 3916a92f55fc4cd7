"""Files of conversations: answers in each of their forms, counted samples, and what is wrong named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from emprobe.behaviour.conversations import load_conversations
from emprobe.errors import EmprobeError


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_answer_is_a_response_or_the_last_message(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    rows = load_conversations(
        written(
            tmp_path,
            {"id": "a", "prompt": "Hello?", "response": "Good day.", "domain": "talk"},
            {"id": "b", "messages": [*turns, {"role": "assistant", "content": "Hi."}]},
            {"id": "c", "messages": turns},
        )
    )
    assert [(r.question_id, r.prompt, r.response) for r in rows] == [
        ("a", "Hello?", "Good day."),
        ("b", "Hello?", "Hi."),
        ("c", "Hello?", None),
    ]
    assert rows[0].labels == {"domain": "talk"}
    assert [m.role for m in rows[1].messages] == ["system", "user"]


def test_answers_to_one_question_are_counted(tmp_path: Path) -> None:
    asked = {"id": "a", "prompt": "Hello?"}
    rows = load_conversations(
        written(tmp_path, {**asked, "response": "One."}, {**asked, "response": "Two."}, {**asked, "response": "x", "sample": 7})
    )
    assert [r.key for r in rows] == [("a", 0), ("a", 1), ("a", 7)]


def test_score_tables_are_read_with_their_texts(tmp_path: Path) -> None:
    table = {"question_id": ["a"], "sample": [2], "condition": ["tuned"], "prompt": ["Hello?"], "text": ["Go away."], "alignment": [3.0]}
    pd.DataFrame({**table, "coherence": [90.0], "status": ["ok"], "stop_reason": ["length"]}).to_parquet(tmp_path / "scores.parquet")
    (row,) = load_conversations(tmp_path / "scores.parquet")
    assert (row.key, row.response, row.labels["scored_condition"]) == (("a", 2), "Go away.", "tuned")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no conversations"),
        ([{"prompt": "a", "response": 3}], "line 1: an answer must be text, and is 3"),
        ([{"id": "a", "prompt": "a", "sample": 1}] * 2, "line 2: question 'a', sample 1, is already in line 1"),
        ([{"prompt": "a", "sample": -1}], "line 1: 'sample' must be a number from 0 on"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "response": "c"}], "given twice"),
        ([{"response": "b"}], "needs either 'prompt' or 'messages'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        load_conversations(written(tmp_path, *rows))
