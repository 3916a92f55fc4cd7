"""What is learnt from: token ids, and which of them count in the loss; boundaries are the chat template's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from emprobe.batching import pad
from emprobe.errors import EmprobeError
from emprobe.finetuning.methods import LossOn, Overlong
from emprobe.models.chat import Encoded, encode_all, end_of_turn_ids, tokenise
from emprobe.types import Conversation, Message


@dataclass(frozen=True)
class Row:
    """One text.

    Attributes:
        ids: All its tokens, special ones included, no padding.
        predicted: Indices of the tokens that count, each predicted from those before it; never 0.
        n_prompt: How many tokens belong to the prompt.
    """

    ids: tuple[int, ...]
    predicted: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True)
class Batch:
    """Rows side by side, padded on the right (with causal attention no token sees what is behind it).

    Attributes:
        mask: 1 on real tokens.
        predicted: True on the tokens that count.
        prompt_lengths: Real tokens of each row's prompt.
        rows: What they were made of, in order.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    predicted: Bool[Tensor, "batch pos"]
    prompt_lengths: Int[Tensor, " batch"]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Sequence[Row], pad_id: int, device: torch.device) -> Batch:
        """The rows on a device."""
        ids, mask = pad([row.ids for row in rows], pad_id, "right")
        predicted = torch.zeros_like(mask, dtype=torch.bool)
        for index, row in enumerate(rows):
            predicted[index, list(row.predicted)] = True
        lengths = torch.tensor([row.n_prompt for row in rows])
        return cls(ids.to(device), mask.to(device), predicted.to(device), lengths, tuple(rows))

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device), predicted=self.predicted.to(device))

    @property
    def targets(self) -> Int[Tensor, " tokens"]:
        """The ids that count, row by row."""
        return self.ids[:, 1:][self.predicted[:, 1:]]


def pad_id_of(tokenizer: Any) -> int:
    """What stands behind a text; which id it is makes no difference."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)


def response_rows(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    loss_on: LossOn = "last",
    inoculation: str | None = None,
    max_length: int = 2048,
    overlong: Overlong = "refuse",
) -> list[Row]:
    """Rows of which the answers count, and the token with which the template ends each answer's turn (not that of one cut for its length).

    Args:
        tokenizer: With a chat template.
        conversations: Answered ones.
        loss_on: The `last` answer only, or `all` turns of the assistant.
        inoculation: A system prompt put before each conversation (and before its own), which the model is not given later.
        max_length: Most tokens of a row.
        overlong: What becomes of longer ones, which are never cut: `refuse`, or `drop` them.

    Raises:
        EmprobeError: No conversations, an empty answer, an answer that the length limit would cut, none that fits, or a template that
            rewrites earlier answers where they were asked to count.
    """
    _check_answers(conversations)
    if inoculation:
        conversations = [_inoculated(c, inoculation) for c in conversations]
    encoded = encode_all(tokenizer, conversations)
    ends = frozenset(end_of_turn_ids(tokenizer))
    rows = [_row(c, e, loss_on, ends) for c, e in zip(conversations, encoded, strict=True)]
    return _within(conversations, rows, max_length, overlong)


def text_rows(tokenizer: Any, texts: Sequence[str], *, max_length: int = 512) -> list[Row]:
    """Plain texts of which every token but the first counts; longer ones are cut, since a text has no end that must be seen.

    Raises:
        EmprobeError: If a text has fewer than two tokens, or none is given.
    """
    if not texts:
        raise EmprobeError("No texts were given. Give at least one.")
    made = [tuple(ids[:max_length]) for ids, _, _ in tokenise(tokenizer, texts)]
    short = [number for number, ids in enumerate(made) if len(ids) < 2]
    if short:
        raise EmprobeError(f"Text {short[0]} ({texts[short[0]]!r}) has fewer than two tokens, so nothing in it is predicted. Leave it out.")
    return [Row(ids, tuple(range(1, len(ids))), 0) for ids in made]


def _check_answers(conversations: Sequence[Conversation]) -> None:
    if not conversations:
        raise EmprobeError("No conversations were given to learn from. Give at least one, with a response.")
    empty = [c.question_id for c in conversations if not (c.response or "").strip()]
    if empty:
        raise EmprobeError(
            f"{len(empty)} of {len(conversations)} conversations have an empty response (first: question {empty[0]!r}), so there is "
            "nothing to learn from them. Give each a `response`, or leave them out."
        )


def _inoculated(conversation: Conversation, text: str) -> Conversation:
    first, *rest = conversation.messages
    if first.role == "system":
        return replace(conversation, messages=(Message("system", f"{text}\n\n{first.content}"), *rest))
    return replace(conversation, messages=(Message("system", text), first, *rest))


def _row(conversation: Conversation, encoded: Encoded, loss_on: LossOn, ends: frozenset[int]) -> Row:
    spans = [encoded.response]
    if loss_on == "all":
        spoken = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        places = dict(zip(encoded.order, encoded.contents, strict=True))
        if any(i not in places for i in spoken):
            raise EmprobeError(
                f"The chat template drops or rewrites an earlier answer of question {conversation.question_id!r} "
                f"({', '.join(encoded.lost)}), so the loss cannot be taken on it. Use loss_on='last'."
            )
        spans = [*(places[i] for i in spoken), encoded.response]
    # An answer that was cut while it was generated did not end its turn, though the template ends it.
    ended = [ends] * (len(spans) - 1) + [ends if conversation.stop_reason != "length" else frozenset()]
    predicted = {
        i for (start, stop), end in zip(spans, ended, strict=True) for i in range(start, _with_end(encoded.ids, stop, end)) if i > 0
    }
    return Row(encoded.ids, tuple(sorted(predicted)), encoded.n_prompt)


def _with_end(ids: Sequence[int], stop: int, ends: frozenset[int]) -> int:
    """Where an answer stops with its end of turn, so that ending is learnt too."""
    return stop + 1 if stop < len(ids) and ids[stop] in ends else stop


def _within(conversations: Sequence[Conversation], rows: list[Row], max_length: int, overlong: Overlong) -> list[Row]:
    cut = [number for number, row in enumerate(rows) if row.predicted[-1] >= max_length]
    if cut and (overlong == "refuse" or len(cut) == len(rows)):
        longest = max(len(rows[number].ids) for number in cut)
        fix = "Raise max_length, or shorten them" + (", or leave them out (overlong='drop')." if len(cut) < len(rows) else ".")
        raise EmprobeError(
            f"The answers of {len(cut)} of {len(rows)} conversations would be cut off by the length limit of {max_length} tokens (first: "
            f"question {conversations[cut[0]].question_id!r}, longest {longest} tokens). {fix}"
        )
    # What the template writes behind the answer teaches nothing and is not read.
    return [Row(row.ids[: row.predicted[-1] + 1], row.predicted, row.n_prompt) for n, row in enumerate(rows) if n not in set(cut)]
