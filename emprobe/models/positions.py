"""Which tokens of a conversation are read, named by what they are."""

from __future__ import annotations

from collections.abc import Sequence

from emprobe.errors import EmprobeError
from emprobe.models.chat import Encoded

RULES = (
    "last_prompt_token",
    "all_tokens",
    "prompt_mean",
    "response_mean",
    "response_first",
    "response_last",
    "decision_token",
)
NEEDS_RESPONSE = ("response_mean", "response_first", "response_last", "decision_token")


def check_rule(rule: str) -> str:
    """The rule, if it exists.

    Raises:
        EmprobeError: Lists the rules there are.
    """
    if rule not in RULES:
        raise EmprobeError(f"Position rule {rule!r} does not exist. Use one of: {', '.join(RULES)}.")
    return rule


def positions_of(rule: str, row: Encoded, other: Encoded | None = None) -> Sequence[int]:
    """Indices of the tokens that a rule reads in one row; means over several leave out position 0.

    Position 0 is an attention sink of huge norm in many models and would drown a mean; single-token rules read where they point.

    Args:
        rule: One of `RULES`. `decision_token` is the first token at which the response differs from another response to
            the same prompt.
        row: The row's tokens and spans.
        other: The same prompt with the other response, for `decision_token`.

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
        raise EmprobeError(
            f"Position rule {rule!r} needs a response, but a conversation has none (or an empty one). Give answered conversations."
        )
    chosen: Sequence[int]
    match check_rule(rule):
        case "last_prompt_token":
            chosen = (row.n_prompt - 1,)
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
        case _:
            chosen = (_decision(row, other),)
    if not chosen:
        raise EmprobeError(f"Position rule {rule!r} finds no token in a row of {len(row.ids)} (position 0 is left out of means).")
    return chosen


def _decision(row: Encoded, other: Encoded | None) -> int:
    if other is None:
        raise EmprobeError("Position rule 'decision_token' needs a second response to compare with: set the label 'other_response'.")
    for index in range(row.n_prompt, min(len(row.ids), len(other.ids))):
        if row.ids[index] != other.ids[index]:
            return index
    raise EmprobeError("Position rule 'decision_token' was given two equal responses, which differ at no token.")
