"""What each position rule reads, as text that a person can look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from emprobe.errors import EmprobeError
from emprobe.models.chat import Encoded, encode_all
from emprobe.models.positions import MEANS, Positions, name_of, resolve_positions
from emprobe.models.spans import check_count
from emprobe.types import Conversation

CONTEXT = 3
"""Tokens shown before and after a run of tokens that is read."""
LONGEST = 56
"""Characters shown of a run; of a longer one, its beginning and its end."""


def show_positions(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], rules: Sequence[Positions]) -> str:
    """The tokens that each rule reads in each conversation, by index and as text.

    A line for each run of neighbouring tokens: `tokens 25-31` (0-based, both ends read), then the text before it, the run in
    «», and the text after it. A newline is shown as ⏎, a tab as ⇥. A rule that fits no token of a row says why.

    Raises:
        EmprobeError: If the conversations cannot be rendered, a rule does not exist, or spans are not one for each conversation.
    """
    for rule in rules:
        if not isinstance(rule, str):
            check_count(rule, conversations)
    encoded = encode_all(tokenizer, conversations)
    names = [name_of(rule) for rule in rules]
    width = max(map(len, names), default=0)
    lines: list[str] = []
    for i, (conversation, row) in enumerate(zip(conversations, encoded, strict=True)):
        start, stop = row.response
        answer = f"prompt 0-{row.n_prompt - 1}, " + (f"response {start}-{stop - 1}" if stop > start else "no response")
        lines += [f"question {conversation.question_id!r}, sample {conversation.sample}: {len(row.ids)} tokens, {answer}"]
        lines += [f"  note: {note}" for note in row.notes]
        for name, rule in zip(names, rules, strict=True):
            own = rule if isinstance(rule, str) else rule[i : i + 1]
            shown = _shown(tokenizer, own, conversation, row)
            lines += [
                f"  {name if first else '':<{width}}  {text}" for first, text in zip([True] + [False] * len(shown), shown, strict=False)
            ]
    return "\n".join(lines)


def _shown(tokenizer: PreTrainedTokenizerBase, rule: Positions, conversation: Conversation, row: Encoded) -> list[str]:
    try:
        (chosen,) = resolve_positions(rule, tokenizer, [conversation], [row])
    except EmprobeError as error:
        return [f"none: {error}"]
    runs = [_run(tokenizer, row, first, last) for first, last in _runs(chosen)]
    if rule in MEANS and chosen[0] == 1:
        runs[-1] += "  (position 0 left out)"
    return runs


def _runs(chosen: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each stretch of neighbouring indices."""
    for _, group in groupby(enumerate(chosen), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        yield members[0], members[-1]


def _run(tokenizer: PreTrainedTokenizerBase, row: Encoded, first: int, last: int) -> str:
    def text(start: int, stop: int) -> str:
        # Decoded together: a token by itself may be a part of a character.
        return str(tokenizer.decode(list(row.ids[max(0, start) : stop]))).replace("\n", "⏎").replace("\t", "⇥")

    inside = text(first, last + 1)
    if len(inside) > LONGEST:
        inside = f"{inside[: LONGEST // 2]} … {inside[-LONGEST // 2 :]}"
    where = f"token {first}" if first == last else f"tokens {first}-{last}"
    before = "…" * (first > CONTEXT) + text(first - CONTEXT, first)
    after = text(last + 1, last + 1 + CONTEXT) + "…" * (last + 1 + CONTEXT < len(row.ids))
    return f"{where:<14} {before}«{inside}»{after}"
