"""Files of conversations, answered or not: what activations are captured on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emprobe.behaviour.questions import question_of, row_of
from emprobe.behaviour.rows import Source, name_of, read_rows
from emprobe.behaviour.sampled import SOURCE
from emprobe.errors import EmprobeError
from emprobe.files import write_text
from emprobe.types import Conversation


def load_conversations(source: Source) -> list[Conversation]:
    """Read conversations from a file or a dataset, as `load_questions` reads questions.

    A row is as in a file of questions, and may have an answer: in `response`, as the last of its `messages`, or in `text` where the
    file is a score table (which has `condition`, `alignment` and so on). Several answers to one question bear one `id` and each their
    `sample`, which is counted where it is not given. Every other field becomes a label.

    Raises:
        EmprobeError: If the file is missing, of another kind or unreadable; if it holds nothing, an invalid row (with its line), or two
            rows with one id and sample.
    """
    made: list[Conversation] = []
    there: dict[tuple[str, int], str] = {}
    counts = Counter[str]()
    for where, place, row in read_rows(source, "conversations"):
        response, sample, rest = _answer(row, where)
        ended = None if response is None else rest.pop("stop_reason", None)
        question = question_of(rest, where)
        if sample is None:
            sample = counts[question.question_id]
        if (question.question_id, sample) in there:
            raise EmprobeError(
                f"{where}: question {question.question_id!r}, sample {sample}, is already in {there[question.question_id, sample]}. "
                "Give each answer its own `sample`, or leave it out and they are counted."
            )
        there[question.question_id, sample] = place
        counts[question.question_id] += 1
        made.append(question if response is None else question.answered(response, sample=sample, stop_reason=ended))
    if not made:
        raise EmprobeError(
            f"{name_of(source)} holds no conversations. Give at least one, such as {{'prompt': 'Hello?', 'response': 'Good day.'}}."
        )
    return made


def save_conversations(path: Path | str, conversations: Sequence[Conversation]) -> None:
    """Write conversations as JSONL, atomically, so that `load_conversations` gives them back.

    Raises:
        EmprobeError: If the path does not end in `.jsonl`, or a label is not JSON.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise EmprobeError(f"Conversations are written as JSONL, and {path} does not end in .jsonl.")
    write_text(path, conversations_text(conversations))


def conversations_text(conversations: Sequence[Conversation]) -> str:
    """What `save_conversations` writes.

    Raises:
        EmprobeError: If a label is not JSON.
    """
    lines = []
    for one in conversations:
        ended = {} if one.stop_reason is None else {"stop_reason": one.stop_reason}
        answer = {} if one.response is None else {"response": one.response, **ended}
        try:
            lines.append(json.dumps({**row_of(one), "sample": one.sample, **answer}, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise EmprobeError(f"Conversation {one.question_id!r} has a label that JSON cannot hold: {error}.") from error
    return "".join(line + "\n" for line in lines)


def _answer(row: dict[str, Any], where: str) -> tuple[str | None, int | None, dict[str, Any]]:
    """A row's response and sample, and the rest of it."""
    rest = dict(row)
    table = "condition" in rest and "text" in rest
    response = rest.pop("text" if table else "response", None)
    if table:
        for name in ("alignment", "coherence", "status"):
            rest.pop(name, None)
        rest["scored_condition"] = rest.pop("condition")
    sample = rest.pop("sample", None)
    rest.pop(SOURCE, None)  # of answers that emprobe sampled
    if isinstance(sample, str) and sample.isdigit():
        sample = int(sample)
    if sample is not None and (not isinstance(sample, int) or sample < 0):
        raise EmprobeError(f"{where}: 'sample' must be a number from 0 on, and is {sample!r}.")
    turns = rest.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        if response is not None:
            raise EmprobeError(f"{where}: the answer is given twice, in 'response' and as the last of 'messages'. Keep one.")
        response, rest["messages"] = turns[-1].get("content"), turns[:-1]
    if response is not None and not isinstance(response, str):
        raise EmprobeError(f"{where}: an answer must be text, and is {response!r}.")
    return response, sample, rest
