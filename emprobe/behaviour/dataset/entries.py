"""Rows of a dataset before anything is dropped: conversations with their cell, status and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from emprobe.behaviour.conversations import load_conversations
from emprobe.behaviour.rows import Source, name_of, read_rows
from emprobe.behaviour.table_files import STATED
from emprobe.errors import EmprobeError
from emprobe.types import STATUSES, Conversation

Cell = tuple[str, ...]
Text = Literal["both", "prompt", "response"]
SCORES = ("alignment", "coherence")


@dataclass(frozen=True)
class Entry:
    """One row: what was said, the cell it is of, why it may have no scores, and every field that it came with."""

    conversation: Conversation
    cell: Cell
    status: str
    fields: Mapping[str, Any]

    def text(self, of: Text) -> str:
        """What is compared with other rows: all turns of the question, the answer, or both."""
        asked = "\n".join(message.content for message in self.conversation.messages)
        parts = {"prompt": [asked], "response": [self.conversation.response or ""], "both": [asked, self.conversation.response or ""]}
        return "\n".join(parts[of])


def load_entries(source: Source, by: Sequence[str], rename: Mapping[str, str] | None = None) -> list[Entry]:
    """Read conversations with the fields that name their cells, and with scores and statuses where they have them.

    Args:
        source: As in `load_conversations`; rows may also have `alignment`, `coherence` and `status` (or `alignment_status`,
            `coherence_status`), which become labels `judged_alignment` and so on of the conversation. What is NaN is missing.
        by: Fields that name a cell together; none makes one cell of all.
        rename: By our name, the file's own for a field, such as `{"alignment": "aligned"}`.

    Raises:
        EmprobeError: Unreadable rows, a row that lacks a field of its cell, or an unknown status.
    """
    given = (_without_nan(row) for _, _, row in read_rows(source, "conversations"))
    rows = [_renamed(row, rename or {}) for row in given]
    name = name_of(source)
    for ours, theirs in (rename or {}).items():
        if not any(ours in row for row in rows):
            raise EmprobeError(f"{name} has no field {theirs!r} to be read as {ours}; there are {_fields(rows)}.")
    conversations = load_conversations([_bare(row) for row in rows]) if rows else []
    if not conversations:
        raise EmprobeError(f"{name} holds no conversations. Give at least one, with a prompt and a response.")
    made = []
    for number, (row, conversation) in enumerate(zip(rows, conversations, strict=True), start=1):
        lacking = [field for field in by if row.get(field) in (None, "")]
        if lacking:
            raise EmprobeError(
                f"{name}, row {number}: no {' and no '.join(map(repr, lacking))}, which names its cell. Fields there are {_fields(rows)}; "
                "choose of them with --by."
            )
        judged = {f"judged_{field}": row[field] for field in (*SCORES, *STATED) if field in row}
        labels = {**conversation.labels, **judged}
        cell, status = tuple(str(row[field]) for field in by), _status(row, conversation, f"{name}, row {number}")
        made.append(Entry(replace(conversation, labels=labels), cell, status, row))
    return made


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """A column of numbers that lacks some comes with NaN in their place, which no label can be."""
    return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}


def _renamed(row: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    taken = set(rename) | set(rename.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return kept | {ours: row[theirs] for ours, theirs in rename.items() if theirs in row}


def _bare(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as a conversation: scores aside, and an answer in `text` as the response."""
    rest = {name: value for name, value in row.items() if name not in (*SCORES, *STATED)}
    if "text" in rest and "response" not in rest and "messages" not in rest:
        rest["response"] = rest.pop("text")
    if "condition" in rest:
        rest["scored_condition"] = rest.pop("condition")
    return rest


def _status(row: Mapping[str, Any], conversation: Conversation, where: str) -> str:
    """The first that is not `ok`; an answer without text is empty, whatever else is said of it."""
    if not (conversation.response or "").strip():
        return "empty"
    stated = [word for name in STATED if (word := str(row.get(name, "")).strip().casefold())]
    unknown = [status for status in stated if status not in STATUSES]
    if unknown:
        raise EmprobeError(f"{where}: the status is {unknown[0]!r}; known ones are {', '.join(STATUSES)}.")
    return next((status for status in stated if status != "ok"), "ok")


def _fields(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(str(name) for row in rows for name in row)) or "none"
