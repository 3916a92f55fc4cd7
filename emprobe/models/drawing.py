"""Tokens by one uniform number per answer and step, so that an answer's chance is its own and nobody else's."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from emprobe.errors import EmprobeError

BLOCK = 256
MARGIN = 1e-6
"""Sums in single precision were never seen off by more than 2e-7; numbers this near to a token's edge are looked up in double precision."""


def row_seed(seed: int, question_id: str, sample: int) -> int:
    """The seed of one answer: it depends on nothing but these three, so neither do the answer's random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{question_id}\0{sample}".encode()).digest()[:8], "little")


def uniforms_of(seed: int, question_id: str, sample: int, steps: int) -> NDArray[np.float64]:
    """The numbers in [0, 1) that choose one answer's tokens; more steps only add to them."""
    return np.random.Generator(np.random.Philox(row_seed(seed, question_id, sample))).random(steps)


def draw(
    logits: Float[Tensor, "n vocabulary"], uniforms: Float64[Tensor, " m"], temperature: float, of: Int[Tensor, " m"] | None = None
) -> Int[Tensor, " m"]:
    """One token for each number: the first at which the cumulative probability passes it.

    The sums are taken in single precision, and again in double precision for the numbers whose token that leaves in doubt.

    Args:
        logits: Rows of logits.
        uniforms: Numbers in [0, 1).
        temperature: 0 is greedy, whatever the numbers.
        of: The row that each number draws from; `None` where there are as many rows as numbers.

    Raises:
        EmprobeError: If a row's logits are no numbers.

    Example:
        >>> draw(torch.tensor([[0.0, 0.0]]), torch.tensor([0.4, 0.6], dtype=torch.float64), 1.0, torch.tensor([0, 0]))
        tensor([0, 1])
    """
    if temperature == 0:
        most, best = logits.max(dim=-1)
        if not bool(most.isfinite().all()):
            raise _no_numbers()
        return best if of is None else best[of]
    rows = torch.arange(len(logits), device=logits.device) if of is None else of
    token, gap = _searched(logits.float(), uniforms, temperature, rows)
    # Written so that what is no number is doubtful too.
    doubtful = ~(gap > MARGIN)
    if bool(doubtful.any()):
        again = rows[doubtful]
        exact, gap = _searched(_double(logits[again]), uniforms[doubtful], temperature, torch.arange(len(again), device=rows.device))
        if bool(gap.isnan().any()):
            raise _no_numbers()
        token = token.masked_scatter(doubtful, exact)
    return token


def _searched(logits: Tensor, uniforms: Tensor, temperature: float, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The token of each number, and how far from that token's nearer edge the number lies, as a share of the whole.

    Sums are taken over blocks of tokens, and then within the one block that the number falls in.
    """
    # Differences from the largest are what rounding must not touch.
    p = torch.softmax(logits if temperature == 1 else (logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    width = p.shape[1]
    whole = width // BLOCK * BLOCK
    sums = [p[:, :whole].view(len(p), whole // BLOCK, BLOCK).sum(dim=-1), p[:, whole:].sum(dim=-1, keepdim=True)]
    edges = torch.nn.functional.pad(_double(torch.cat(sums, dim=-1)).cumsum(dim=-1), (1, 0))[rows]
    total = edges[:, -1:]
    threshold = uniforms.to(edges)[:, None] * total
    block = (edges[:, 1:-1] <= threshold).sum(dim=-1, keepdim=True)
    index = block * BLOCK + torch.arange(BLOCK, device=p.device)
    within = torch.where(index < width, p[rows[:, None], index.clamp(max=width - 1)], 0.0)
    start = edges.gather(1, block)
    cumulative = _double(within).cumsum(dim=-1) + start
    place = (cumulative <= threshold).sum(dim=-1, keepdim=True)
    # A number that rounding pushed past the last token of its block is that token's.
    last = (within > 0).long().mul(torch.arange(BLOCK, device=p.device)).amax(dim=-1, keepdim=True)
    place = torch.minimum(place, last)
    above = cumulative.gather(1, place) - threshold
    below = threshold - torch.where(place > 0, cumulative.gather(1, (place - 1).clamp(min=0)), start)
    return index.gather(1, place)[:, 0], (torch.minimum(above, below) / total)[:, 0]


def _no_numbers() -> EmprobeError:
    return EmprobeError(
        "The model gave logits that are no numbers, so no token can be drawn. Steer with a smaller coefficient, or load the model in "
        "float32 or bfloat16."
    )


def _double(values: Tensor) -> Tensor:
    """Apple's GPUs have no float64."""
    return values.float() if values.device.type == "mps" else values.double()


class InverseCdfSampler(LogitsProcessor):
    """`draw` for a model's own `generate`: every other logit becomes -inf, so that greedy decoding picks the token.

    Rows do not share a generator, hence batch size, order and company change nothing.
    """

    def __init__(self, uniforms: NDArray[np.float64], temperature: float, width: int) -> None:
        self.uniforms = torch.from_numpy(uniforms)
        self.temperature = temperature
        self.width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = draw(scores, self.uniforms[:, input_ids.shape[1] - self.width].to(scores.device), self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
