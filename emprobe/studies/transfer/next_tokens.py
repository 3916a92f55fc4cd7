"""What a model would say next after each of some texts: distributions, their entropy, and how much two of them share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emprobe.batching import plan_batches
from emprobe.models.chat import encode_all
from emprobe.models.load import Checkpoint
from emprobe.types import Conversation

BUDGET = 2048
"""Tokens of a forward pass."""


def prompt_tokens(checkpoint: Checkpoint, rows: Sequence[Conversation]) -> list[tuple[int, ...]]:
    """The tokens of each prompt, up to where the answer begins."""
    return [row.ids[: row.n_prompt] for row in encode_all(checkpoint.tokenizer, rows)]


def answer_tokens(checkpoint: Checkpoint, question: Conversation, answers: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens of each answer to a question."""
    return [row.ids[slice(*row.response)] for row in encode_all(checkpoint.tokenizer, [question.answered(text) for text in answers])]


def shared_start(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens with which all rows begin.

    >>> shared_start([(5, 6, 7), (5, 6, 8), (5, 6)])
    (5, 6)
    """
    found = []
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        found.append(tokens[0])
    return tuple(found)


def next_tokens(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Float[Tensor, "rows d_vocab"]]]:
    """Log-probabilities of the next token after each text, float64, with the numbers of the texts, a batch at a time.

    Texts of one length go together, so that nothing is padded.
    """
    lengths = [len(text) for text in texts]
    with checkpoint.active() as model, torch.no_grad():
        for length in sorted(set(lengths)):
            alike = [number for number, n in enumerate(lengths) if n == length]
            for batch in plan_batches([length] * len(alike), BUDGET):
                rows = sorted(alike[i] for i in batch)
                ids = torch.tensor([list(texts[i]) for i in rows], device=checkpoint.device)
                logits = model(input_ids=ids, use_cache=False).logits[:, -1]
                yield rows, torch.log_softmax(logits.float(), dim=-1).double().cpu()


def entropy(logs: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, " rows"]:
    """Entropy in nats.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]).double().log()).tolist()
    [0.6931471805599453, 0.0]
    """
    found: Tensor = torch.special.entr(logs.exp()).sum(-1)
    return found


def shared(left: Float[Tensor, "a d_vocab"], right: Float[Tensor, "b d_vocab"]) -> Float[Tensor, "a b"]:
    """One minus the Jensen-Shannon divergence in bits between probabilities: 1 for equal distributions, 0 for ones without a common token.

    >>> shared(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[1.0, 0.0]]
    """
    columns = []
    for one in right:
        middle = (left + one) / 2
        gain = entropy(middle.log()) - (entropy(left.log()) + entropy(one[None].log())) / 2
        columns.append(1 - gain / torch.log(torch.tensor(2.0, dtype=gain.dtype)))
    return torch.stack(columns, dim=1)
