"""Which tokens of a conversation are read: by a rule that names what they are, or by explicit spans."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from emprobe.errors import EmprobeError
from emprobe.files import content_hash
from emprobe.models.chat import Encoded, encode_all
from emprobe.models.spans import SpanOrText, resolve_spans
from emprobe.types import Conversation

Positions = str | Sequence[SpanOrText]
"""A rule of `RULES`, or one span for each conversation: `(start, stop)` in tokens, or the text to be read."""

RULES = (
    "last_prompt_token",
    "all_tokens",
    "prompt_mean",
    "response_mean",
    "response_first",
    "response_last",
    "template_tokens",
    "decision_token",
)
MEANS = ("all_tokens", "prompt_mean", "response_mean", "template_tokens")
"""The rules that read several tokens; they leave out position 0."""
NEEDS_RESPONSE = ("response_mean", "response_first", "response_last", "decision_token")


def check_rule(rule: str) -> str:
    """The rule, if it exists.

    Raises:
        EmprobeError: Lists the rules there are.
    """
    if rule not in RULES:
        raise EmprobeError(f"Position rule {rule!r} does not exist. Use one of: {', '.join(RULES)}.")
    return rule


def name_of(positions: Positions) -> str:
    """The rule's name, or `spans-` and the hash of all spans, so that two different sets are never taken for the same.

    >>> name_of("response_mean"), name_of([(0, 2), (-1, None)])
    ('response_mean', 'spans-a102329b5628')
    """
    if isinstance(positions, str):
        return check_rule(positions)
    return f"spans-{content_hash([entry if isinstance(entry, str) else list(entry) for entry in positions])[:12]}"


def resolve_positions(
    positions: Positions,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    encoded: Sequence[Encoded],
) -> list[Sequence[int]]:
    """Token indices to be read in each conversation, 0-based; never empty.

    Args:
        positions: A rule of `RULES`: those over several tokens leave out position 0. Or one explicit span for each conversation:
            `(start, stop)` token indices, half-open, negative ones from the end, `None` for the row's own start or end; or a
            text that occurs exactly once in the rendered conversation. Explicit means explicit: a span that names position 0 reads it.
        tokenizer: The one that encoded the conversations.
        conversations: In the order of `encoded`; for `decision_token` their label `other_response` is the other answer.
        encoded: What `encode_all` made of them.

    Raises:
        EmprobeError: An unknown rule, a row without such tokens, or a span that does not fit its row. The row is named.
    """
    if not isinstance(positions, str):
        return resolve_spans(positions, tokenizer, conversations, encoded)
    others: Sequence[Encoded | None] = [None] * len(encoded)
    if check_rule(positions) == "decision_token":
        others = _others(tokenizer, conversations)
    named = zip(conversations, encoded, others, strict=True)
    return [positions_of(positions, row, other, name=f"question {c.question_id!r}") for c, row, other in named]


def _others(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]) -> list[Encoded | None]:
    responses = [c.labels.get("other_response") for c in conversations]
    answered = iter(encode_all(tokenizer, [c.answered(str(r)) for c, r in zip(conversations, responses, strict=True) if r]))
    return [next(answered) if r else None for r in responses]


def positions_of(rule: str, row: Encoded, other: Encoded | None = None, *, name: str = "a conversation") -> Sequence[int]:
    """Indices of the tokens that a rule reads in one row; rules over several tokens leave out position 0.

    Position 0 is an attention sink of huge norm in many models and would drown a mean; single-token rules read where they point.

    Args:
        rule: One of `RULES`. `decision_token` is the first token at which the response differs from another response to
            the same prompt. `template_tokens` are all that are neither a message's nor the response's.
        row: The row's tokens and spans.
        other: The same prompt with the other response, for `decision_token`.
        name: What errors call the row.

    Raises:
        EmprobeError: If the row has no such tokens.

    Example:
        >>> positions_of("all_tokens", Encoded((1, 7, 8, 9), n_prompt=3, response=(3, 4)))
        range(1, 4)
        >>> positions_of("last_prompt_token", Encoded((1, 7, 8, 9), n_prompt=3, response=(3, 4)))
        (2,)
    """
    start, stop = row.response
    if rule in NEEDS_RESPONSE and stop <= start:
        raise EmprobeError(f"Position rule {rule!r} needs a response, but {name} has none (or an empty one). Give answered conversations.")
    chosen: Sequence[int]
    match check_rule(rule):
        case "last_prompt_token":
            chosen = (row.n_prompt - 1,) if row.n_prompt else ()
        case "all_tokens":
            chosen = range(1, len(row.ids))
        case "prompt_mean":
            chosen = range(1, row.n_prompt)
        case "response_mean":
            chosen = range(max(1, start), stop)
        case "response_first":
            chosen = (start,)
        case "response_last":
            chosen = (stop - 1,)
        case "template_tokens":
            chosen = _template(row, name)
        case _:
            chosen = (_decision(row, other, name),)
    if not chosen:
        raise EmprobeError(f"Position rule {rule!r} finds no token in {name}, a row of {len(row.ids)} (position 0 is left out of means).")
    return chosen


def _template(row: Encoded, name: str) -> Sequence[int]:
    if row.lost:
        raise EmprobeError(
            f"Position rule 'template_tokens' must tell the template's text from the messages', but the chat template drops or rewrites "
            f"{', '.join(row.lost)} of {name}. Use another rule, or explicit spans."
        )
    return tuple(i for i in row.template if i)


def _decision(row: Encoded, other: Encoded | None, name: str) -> int:
    if other is None:
        raise EmprobeError(
            f"Position rule 'decision_token' needs a second response to compare {name} with: set the label 'other_response'."
        )
    for index in range(row.n_prompt, min(len(row.ids), len(other.ids))):
        if row.ids[index] != other.ids[index]:
            return index
    if len(row.ids) == len(other.ids):
        raise EmprobeError(f"Position rule 'decision_token' was given two equal responses to {name}, which differ at no token.")
    raise EmprobeError(
        f"Position rule 'decision_token': one response to {name} is the beginning of the other, so no token tells them apart."
    )
