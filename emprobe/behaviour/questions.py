"""Question files: read with errors that name the line, written back the same, and split by question."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emprobe.behaviour.answers import COLUMNS
from emprobe.behaviour.rows import Source, name_of, read_rows
from emprobe.errors import EmprobeError
from emprobe.files import content_hash, write_text
from emprobe.types import Conversation, Message

SPLITS = ("fit", "dev", "test")
REFERENCES = ("aligned", "misaligned")
_OWN = ("id", "question_id", "prompt", "messages", "system", *REFERENCES)


def load_questions(source: Source, *, instructions: bool = False) -> list[Conversation]:
    """Read questions from a file, a dataset, or a set that comes along.

    A question is an object with `prompt` (and `system`, if wanted) or `messages` (a list of role and content, the user's turn last).
    `id` names it; without one it gets a name made from its text. `split` is `fit`, `dev` or `test`; `aligned` and `misaligned` are
    reference answers (a text or a list). Every other field becomes a label.

    Public formats are read as they are: emergent-misalignment YAML (a question for each paraphrase, its `system` sent, its judge prompts in
    the label `judge_prompts`), persona trait JSON, and `conversations` of ShareGPT; see `emprobe.behaviour.formats`. Questions with one
    label `family` are one cluster in an interval and stay in one split.

    Args:
        source: File ending in `.jsonl`, `.json` (a list), `.yaml`, `.csv` (first line: names) or `.parquet`; a directory of
            `datasets.Dataset.save_to_disk`; `hub:OWNER/NAME[@SPLIT]`; a set (`open`, `open-json`, `open-template`, `open-forms`, `grid`);
            or objects, such as a `datasets.Dataset`.
        instructions: Ask every question of a trait file under each of its instructions, sent as system prompts; labels `polarity` (`pos`,
            `neg`) and `instruction` say which.

    Returns:
        One unanswered conversation per question, in the file's order.

    Raises:
        EmprobeError: If the source is missing, of another kind or unreadable; if it holds no question, an invalid one (with its line),
            two of one id, or one question under two ids, which every interval would count as two.
        MissingExtraError: If it is a dataset and `datasets` is not installed.

    Example:
        >>> grid = load_questions("grid")
        >>> len(grid), sorted(grid[0].labels)
        (240, ['domain', 'room', 'task'])
    """
    questions: list[Conversation] = []
    places: list[str] = []
    name = name_of(source)
    for where, place, row in read_rows(source, "questions", instructions=instructions):
        questions.append(question_of(row, where))
        places.append(place)
    if not questions:
        raise EmprobeError(f"{name} holds no questions. Give at least one, such as {{'id': 'q1', 'prompt': 'What should I plant?'}}.")
    _refuse_twins(questions, places, name)
    return questions


def save_questions(path: Path | str, questions: Sequence[Conversation]) -> None:
    """Write questions as JSONL, atomically, so that `load_questions` gives them back.

    Raises:
        EmprobeError: If the path does not end in `.jsonl`, or a label is not JSON.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise EmprobeError(f"Questions are written as JSONL, and {path} does not end in .jsonl.")
    lines = []
    for question in questions:
        try:
            lines.append(json.dumps(row_of(question), ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise EmprobeError(f"Question {question.question_id!r} has a label that JSON cannot hold: {error}.") from error
    write_text(path, "".join(line + "\n" for line in lines))


def row_of(question: Conversation) -> dict[str, Any]:
    """A question as an object of a file: its prompt where it is one, else its messages, and its labels."""
    roles = [message.role for message in question.messages]
    if roles not in (["user"], ["system", "user"]):
        return {"id": question.question_id, "messages": [message.as_dict() for message in question.messages], **question.labels}
    system = {"system": question.messages[0].content} if len(roles) == 2 else {}
    return {"id": question.question_id, **system, "prompt": question.prompt, **question.labels}


def assign_splits(
    questions: Sequence[Conversation],
    seed: int = 0,
    shares: tuple[float, float, float] = (0.4, 0.2, 0.4),
    least: int = 2,
) -> list[Conversation]:
    """Give every question the label `split`, at random but by its id and the seed only, whatever the order of the file.

    Questions that already have splits keep them; those of one `family` are drawn together.

    Args:
        questions: Questions with ids.
        seed: Another seed, another division.
        shares: Shares of `fit`, `dev` and `test`, which sum to 1.
        least: Questions that each split needs.

    Returns:
        The questions in the given order, each with its split.

    Raises:
        EmprobeError: If only some questions have a split, a split gets fewer than `least`, or the shares are not shares.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise EmprobeError(f"Splits were asked for in the shares {shares}; give three that are not negative and sum to 1.")
    having = [question for question in questions if question.labels.get("split") is not None]
    if having and len(having) < len(questions):
        without = next(q.question_id for q in questions if q.labels.get("split") is None)
        raise EmprobeError(
            f"{len(having)} of {len(questions)} questions have a split and the others, such as {without!r}, have none. "
            "Give one to all, or to none and they are drawn."
        )
    for question in having:
        _check_split(question.labels["split"], f"question {question.question_id!r}")
    split = {q.question_id: str(q.labels["split"]) for q in having} or _drawn(questions, seed, shares)
    counts = Counter(split.values())
    if any(counts[name] < least for name in SPLITS):
        found = ", ".join(f"{name} {counts[name]}" for name in SPLITS)
        raise EmprobeError(
            f"{len(questions)} questions make the splits {found}, and each needs at least {least}: the direction is fitted on one, "
            "chosen on another and tested on the third. Give more questions, or set their splits yourself."
        )
    return [replace(q, labels={**q.labels, "split": split[q.question_id]}) for q in questions]


def _drawn(questions: Sequence[Conversation], seed: int, shares: tuple[float, float, float]) -> dict[str, str]:
    """Families are drawn whole: a paraphrase of a question that a direction was fitted on is no test of it."""
    families = {q.question_id: q.cluster for q in questions}
    names = sorted(set(families.values()), key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest())
    first, second = round(shares[0] * len(names)), round((shares[0] + shares[1]) * len(names))
    split = {name: SPLITS[(i >= first) + (i >= second)] for i, name in enumerate(names)}
    return {name: split[family] for name, family in families.items()}


def question_of(row: dict[str, Any], where: str) -> Conversation:
    """One object of a file as an unanswered conversation."""
    if "id" in row and "question_id" in row:
        raise EmprobeError(f"{where}: both 'id' and 'question_id' are given. Keep one.")
    messages = _messages(row, where)
    labels = {name: value for name, value in row.items() if name not in _OWN}
    taken = [name for name in labels if name in COLUMNS or name == "response"]
    if taken:
        raise EmprobeError(f"{where}: the field {taken[0]!r} has the name of a column of the score table. Rename it.")
    if "split" in labels:
        _check_split(labels["split"], where)
    labels.update({name: _references(row[name], f"{where}: {name!r}") for name in REFERENCES if name in row})
    name = str(row.get("id", row.get("question_id", ""))).strip()
    name = name or "q-" + content_hash([message.as_dict() for message in messages])[:12]
    try:
        return Conversation(messages, question_id=name, labels=labels)
    except EmprobeError as error:
        raise EmprobeError(f"{where}: {error}") from None


def _messages(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    if ("prompt" in row) == ("messages" in row):
        found = "both" if "prompt" in row else f"neither, only {', '.join(map(repr, row)) or 'nothing'}"
        raise EmprobeError(f"{where}: a question needs either 'prompt' or 'messages', and has {found}.")
    if "prompt" in row:
        turns: Any = [{"role": role, "content": row[key]} for role, key in (("system", "system"), ("user", "prompt")) if key in row]
    else:
        turns = row["messages"]
        if "system" in row:
            raise EmprobeError(f"{where}: 'system' goes with 'prompt'. In 'messages', write it as a message of the role system.")
        if not isinstance(turns, list):
            raise EmprobeError(f"{where}: 'messages' must be a list of objects with role and content, not {type(turns).__name__}.")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise EmprobeError(f"{where}: every message needs a role and a content of text, and one is {turn!r}.")
        if not turn["content"].strip():
            raise EmprobeError(f"{where}: the {turn['role']} message is empty. Give it text or leave the question out.")
        messages.append(Message(turn["role"], turn["content"]))
    return tuple(messages)


def _references(value: Any, where: str) -> tuple[str, ...]:
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise EmprobeError(f"{where} must be a reference answer or a list of them, none empty, and is {value!r}.")
    return tuple(answers)


def _check_split(value: Any, where: str) -> None:
    if value not in SPLITS:
        raise EmprobeError(f"{where}: the split is {value!r}; it must be one of {', '.join(SPLITS)}.")


def _refuse_twins(questions: Sequence[Conversation], places: Sequence[str], name: str) -> None:
    """Refuse a name for two questions, and two names for one: both falsify the number of questions."""
    ids: dict[str, str] = {}
    texts: dict[tuple[tuple[str, str], ...], tuple[str, str]] = {}
    for question, place in zip(questions, places, strict=True):
        text = tuple((message.role, " ".join(message.content.split())) for message in question.messages)
        if text in texts:
            other, elsewhere = texts[text]
            raise EmprobeError(
                f"{name}: {elsewhere} (id {other!r}) and {place} (id {question.question_id!r}) ask the same question. "
                "It would count as two; keep one, and ask for more samples instead."
            )
        if question.question_id in ids:
            raise EmprobeError(
                f"{name}: the id {question.question_id!r} is given to two questions, in {ids[question.question_id]} and {place}. "
                "Give each its own."
            )
        ids[question.question_id], texts[text] = place, (question.question_id, place)
