"""Loss on answers and KL to the base, row by row: what training watches and what a study compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from emprobe.batching import plan_batches
from emprobe.errors import EmprobeError
from emprobe.finetuning.losses import cross_entropies, divergences, head_of, hidden_at_targets
from emprobe.finetuning.mounting import Mounted
from emprobe.finetuning.rows import Batch, Row, pad_id_of
from emprobe.finetuning.solution import Solution
from emprobe.models.load import Checkpoint

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class PerRow:
    """A quantity in nats, summed over the tokens that count in each row; rows are what intervals resample.

    Attributes:
        sums: float64.
        tokens: How many tokens count.

    Example:
        >>> PerRow(np.array([1.0, 2.0]), np.array([1, 5])).mean
        0.5
    """

    sums: Float[NDArray[np.float64], " rows"]
    tokens: Int[NDArray[np.int64], " rows"]

    @property
    def mean(self) -> float:
        """Nats per token, over all tokens of all rows."""
        return float(self.sums.sum() / self.tokens.sum())


def response_loss(checkpoint: Checkpoint, rows: Sequence[Row], *, token_budget: int = TOKENS_AT_ONCE) -> PerRow:
    """Cross-entropy of the tokens that count, of a checkpoint as it is (with its adapter, and inside `intervene` steered).

    Raises:
        EmprobeError: No rows.
    """
    with checkpoint.active() as model, torch.no_grad():
        head = head_of(model)
        return summed(
            rows, checkpoint, token_budget, lambda batch: [cross_entropies(hidden_at_targets(model, batch), batch.targets, head)]
        )[0]


def kl_to_base(base: Checkpoint, solution: Solution, rows: Sequence[Row], *, token_budget: int = TOKENS_AT_ONCE) -> PerRow:
    """KL(base ‖ adapted) of the tokens that count, in one pass of each; a reference corpus comes as `text_rows`.

    Raises:
        EmprobeError: No rows, a negative KL, or as in `Solution.applied`.
    """
    with solution.mounted(base) as mounted:
        return mounted_kl(mounted, rows, token_budget=token_budget)


def mounted_kl(mounted: Mounted, rows: Sequence[Row], *, token_budget: int = TOKENS_AT_ONCE) -> PerRow:
    """As `kl_to_base`, of what is mounted already."""

    def found(batch: Batch) -> list[Tensor]:
        with mounted.base() as model:
            base = hidden_at_targets(model, batch)
        with mounted.tuned.active() as model:
            return [divergences(hidden_at_targets(model, batch), base, mounted.head, mounted.base_head)]

    with torch.no_grad():
        return summed(rows, mounted.tuned, token_budget, found)[0]


def summed(rows: Sequence[Row], checkpoint: Checkpoint, token_budget: int, of: Callable[[Batch], Sequence[Tensor]]) -> list[PerRow]:
    """Quantities of the tokens that count, added up row by row.

    Args:
        rows: In any order; they are batched by length.
        checkpoint: Whose device and padding a batch has.
        token_budget: Padded tokens per batch.
        of: From a batch to each quantity of its tokens.

    Raises:
        EmprobeError: No rows.
    """
    if not rows:
        raise EmprobeError("A loss was asked for of no rows. Give at least one.")
    sums: list[NDArray[np.float64]] = []
    tokens = np.array([len(row.predicted) for row in rows], dtype=np.int64)
    pad_id: Any = pad_id_of(checkpoint.tokenizer)
    for numbers in plan_batches([len(row.ids) for row in rows], token_budget):
        values = of(Batch.of([rows[n] for n in numbers], pad_id, checkpoint.device))
        sums = sums or [np.zeros(len(rows)) for _ in values]
        ends = np.cumsum(tokens[numbers])
        for total, value in zip(sums, values, strict=True):
            total[numbers] = [part.sum() for part in np.split(value.double().cpu().numpy(), ends[:-1])]
    return [PerRow(total, tokens) for total in sums]
