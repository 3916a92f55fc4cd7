"""Explicit spans: token indices, or a text that is looked for in the rendered conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from emprobe.errors import EmprobeError
from emprobe.models.chat import Encoded, tokenise, tokens_of
from emprobe.models.rendering import Renderer
from emprobe.models.whole import whole
from emprobe.types import Conversation

SpanOrText = tuple[int | None, int | None] | str


def plain_spans(spans: Any) -> list[SpanOrText]:
    """The spans with Python's own numbers in them, whatever they were given as.

    Raises:
        EmprobeError: If they are not one `(start, stop)` or text for each conversation.

    Example:
        >>> plain_spans([[0, 2], (-1, None), "beans"])
        [(0, 2), (-1, None), 'beans']
    """
    if not isinstance(spans, Iterable):
        raise EmprobeError(f"Positions {spans!r} are neither a rule nor a list of rules, nor a list of spans, one for each conversation.")
    return [_plain(span, row) for row, span in enumerate(spans)]


def _plain(span: Any, row: int) -> SpanOrText:
    if isinstance(span, str):
        return span
    try:
        start, stop = (None if end is None else whole(end) for end in span)
    except (TypeError, ValueError):
        raise EmprobeError(f"The span {span!r} of row {row} is neither (start, stop) in tokens nor a text. Give one of the two.") from None
    return start, stop


def resolve_spans(
    spans: Sequence[SpanOrText], tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], encoded: Sequence[Encoded]
) -> list[Sequence[int]]:
    """Token indices of one explicit span for each conversation; a span that names position 0 reads it.

    Raises:
        EmprobeError: If there are not as many spans as conversations, or one does not fit its row.
    """
    check_count(spans, conversations)
    renderer = Renderer(tokenizer)
    chosen: list[Sequence[int]] = []
    for span, conversation, row in zip(plain_spans(spans), conversations, encoded, strict=True):
        name = f"question {conversation.question_id!r}"
        if isinstance(span, str):
            chosen.append(_of_text(span, tokenizer, renderer.render(conversation).text, name))
        else:
            chosen.append(_of_indices(span, len(row.ids), name))
    return chosen


def check_count(spans: Sequence[SpanOrText], conversations: Sequence[Conversation]) -> None:
    """Refuse spans that are not as many as the conversations.

    Raises:
        EmprobeError: Names both numbers.
    """
    if len(spans) != len(conversations):
        raise EmprobeError(f"{len(spans)} spans were given for {len(conversations)} conversations. Give one span for each, in their order.")


def _of_indices(span: tuple[int | None, int | None], length: int, name: str) -> range:
    start, stop = (end if i is None else i + length * (i < 0) for i, end in zip(span, (0, length), strict=True))
    if not 0 <= start < stop <= length:
        raise EmprobeError(
            f"The span {tuple(span)} of {name} does not fit its {length} tokens. "
            f"Give start < stop within 0..{length}, negative ones from the end, None for the end itself."
        )
    return range(start, stop)


def _of_text(wanted: str, tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> range:
    starts = [m.start() for m in re.finditer(f"(?={re.escape(wanted)})", text)] if wanted else []
    if len(starts) != 1:
        raise EmprobeError(
            f"The text {wanted!r} occurs {len(starts)} times in the rendered conversation of {name}, and must occur exactly once. "
            "Give more of its surroundings, or the span in tokens."
        )
    ((_, offsets, _),) = tokenise(tokenizer, [text])
    first, last = tokens_of(offsets, starts[0], starts[0] + len(wanted))
    if last <= first:
        raise EmprobeError(f"The text {wanted!r} of {name} holds no token of the tokenizer's. Give a longer one.")
    return range(first, last)
