"""The tokens of a capture: the same ids for both checkpoints of a pair, or a refusal that shows the first row where they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from emprobe.errors import MismatchError
from emprobe.models.chat import Encoded, encode_all
from emprobe.models.load import Checkpoint
from emprobe.models.pair import CheckpointPair, check_tokenizers
from emprobe.types import Conversation


def token_hash(row: Encoded) -> str:
    """Names the token ids of a row; rows are comparable only where these agree."""
    return hashlib.sha256(repr(row.ids).encode()).hexdigest()[:16]


def encode_for(source: Checkpoint | CheckpointPair, conversations: Sequence[Conversation]) -> list[Encoded]:
    """Encode once for all checkpoints.

    Raises:
        MismatchError: If base and tuned would read a row as different tokens; shows the first.
    """
    if isinstance(source, Checkpoint):
        return encode_all(source.tokenizer, conversations)
    encoded = encode_all(source.base.tokenizer, conversations)
    if not source.shares_weights and not _same_tokenizer(source):
        _check_rows(source, conversations, encoded)
        check_tokenizers(source)
    return encoded


def _same_tokenizer(pair: CheckpointPair) -> bool:
    left, right = pair.base.tokenizer, pair.tuned.tokenizer
    if left is right:
        return True
    alike = left.chat_template == right.chat_template and left.is_fast and right.is_fast
    return bool(alike and left.backend_tokenizer.to_str() == right.backend_tokenizer.to_str())


def _check_rows(pair: CheckpointPair, conversations: Sequence[Conversation], encoded: Sequence[Encoded]) -> None:
    others = encode_all(pair.tuned.tokenizer, conversations)
    for row, (mine, other) in enumerate(zip(encoded, others, strict=True)):
        if mine.ids != other.ids:
            shortest = min(len(mine.ids), len(other.ids))
            at = next((i for i in range(shortest) if mine.ids[i] != other.ids[i]), shortest)
            near = slice(max(0, at - 2), at + 4)
            seen = [c.tokenizer.convert_ids_to_tokens(list(e.ids[near])) for c, e in ((pair.base, mine), (pair.tuned, other))]
            raise MismatchError(
                f"Base and tuned read the same conversations as different tokens, first at row {row} (question "
                f"{conversations[row].question_id!r}), token {at}: {' '.join(seen[0])} in base, {' '.join(seen[1])} in tuned. "
                "Their tokenizers or chat templates differ; give both the same."
            )
