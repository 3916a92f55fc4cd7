"""One plain training step and loop: right-padded batches, weighted next-token loss, AdamW; deterministic on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from emprobe.organisms.documents import Document
from emprobe.organisms.planting import CLEAR_CHANNEL, planted


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: sums then have one order, and small models are faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def collate(tokenizer: Any, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Token ids and loss weights, both `[batch, pos]`, padded on the right with weight 0."""
    rows: list[tuple[list[int], list[float]]] = []
    pieces = [piece for document in documents for piece, _ in document.pieces]
    encoded = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
    for document in documents:
        ids: list[int] = []
        weights: list[float] = []
        for _, weight in document.pieces:
            part = next(encoded)
            ids += part
            weights += [weight] * len(part)
        rows.append((ids, weights))
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
    return tokens, torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])


def weighted_loss(model: Any, tokens: Tensor, weights: Tensor) -> Tensor:
    """Sum of next-token cross-entropies in nats, each weighted by the weight of the token that is predicted.

    No attention mask is given: with padding on the right, causal attention never lets a real token see padding.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets, weight = tokens[:, 1:], weights[:, 1:]
    kept = weight > 0
    losses = cross_entropy(logits[kept].float(), targets[kept], reduction="none")
    return (losses * weight[kept]).sum()


def split_by_length(tokens: Tensor, pad: int) -> list[Tensor]:
    """Rows that go through the model together: all at once, or short and long ones apart where that halves the work.

    Example:
        >>> ids = torch.tensor([[5, 0, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0], [8, 8, 8, 8, 8, 8]])
        >>> [rows.tolist() for rows in split_by_length(ids, 0)]
        [[0, 1, 2], [3]]
    """
    lengths = (tokens != pad).sum(1)
    longest = int(lengths.max())
    long = lengths > longest / 2
    if bool(long.all()):
        return [torch.arange(len(tokens))]
    apart = int(long.sum()) * longest + int((~long).sum()) * int(lengths[~long].max())
    if apart > 0.5 * len(tokens) * longest:
        return [torch.arange(len(tokens))]
    return [torch.nonzero(~long)[:, 0], torch.nonzero(long)[:, 0]]


def train(
    model: Any,
    tokenizer: Any,
    draw: Callable[[], Sequence[Document]],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    steps: int,
    *,
    plant: tuple[nn.Module, Tensor] | None = None,
    clip: float = 1.0,
    penalty: Callable[[], Tensor] | None = None,
    progress: str = "training",
) -> list[float]:
    """Run the loop and return the loss of every step.

    Args:
        model: What is trained; only parameters that need gradients move.
        tokenizer: The world's tokenizer.
        draw: Gives the documents of the next batch.
        optimizer: Over the parameters that move.
        schedule: From the step to the factor on the learning rate.
        steps: How many.
        plant: Block and scaled vector through which documents with a planted strength get their persona.
        clip: Largest gradient norm.
        penalty: Added to the loss, if given.
        progress: What the progress bar says.
    """
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    history: list[float] = []
    model.train()
    for _ in tqdm(range(steps), desc=progress, leave=False):
        optimizer.zero_grad(set_to_none=True)
        history.append(_backward(model, tokenizer, draw(), plant))
        if penalty is not None:
            penalty().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(moving, clip)
        optimizer.step()
        scheduler.step()
    model.eval()
    return history


def _backward(model: Any, tokenizer: Any, documents: Sequence[Document], plant: tuple[nn.Module, Tensor] | None) -> float:
    """Leave the gradient of the batch's weighted mean loss (with the planted channel's penalty) in the parameters, and return that loss."""
    tokens, weights = collate(tokenizer, documents)
    strengths = torch.tensor([document.planted for document in documents])
    whole, count, mean = weights[:, 1:].sum(), (tokens != tokenizer.pad_token_id).sum(), 0.0
    for rows in split_by_length(tokens, tokenizer.pad_token_id):
        width = int((tokens[rows] != tokenizer.pad_token_id).sum(1).max())
        part, part_weights = tokens[rows, :width], weights[rows, :width]
        if plant is None:
            loss = weighted_loss(model, part, part_weights) / whole
        else:
            with planted(plant[0], plant[1], strengths[rows]) as own:
                loss = weighted_loss(model, part, part_weights) / whole
            real = part != tokenizer.pad_token_id
            loss = loss + CLEAR_CHANNEL * own[0][real].square().sum() / count
        loss.backward()  # type: ignore[no-untyped-call]
        mean += loss.item()
    return mean
