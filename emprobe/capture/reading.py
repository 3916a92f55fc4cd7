"""What is kept of a forward: pooled rows and token statistics, taken inside the hook, so that no activation outlives its layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from emprobe.capture.plan import Batch
from emprobe.types import Site


def exact(hidden: Tensor) -> Tensor:
    """The hidden state in float64 (float32 where the device has none)."""
    return hidden.detach().to(torch.float32 if hidden.device.type == "mps" else torch.float64)


@dataclass
class Reading:
    """What one forward of one batch gave, still on the device; kept apart until the whole forward has gone well.

    Called as `reading(site, layer, hidden)` with hidden `[batch, pos, d_model]`.
    """

    batch: Batch
    found: dict[tuple[Site, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, site: Site, layer: int, hidden: Tensor) -> None:
        """Pool one layer's hidden state."""
        x = exact(hidden)
        weights, counted = self._weights_on(x)
        if self.batch.padding == "left":
            # A padded position that sees no token may hold NaN, and 0 x NaN would spoil the mean.
            x = x.masked_fill(~self.batch.mask.bool().to(x.device)[..., None], 0)
        token_sum = counted.reshape(1, -1) @ x.reshape(-1, x.shape[-1])
        norm_sum = (x.norm(dim=-1) * counted).sum()
        self.found[site, layer] = (torch.bmm(weights, x), token_sum[0], norm_sum)

    def _weights_on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device not in self._on:
            self._on[x.device] = (self.batch.weights.to(x.device, x.dtype), self.batch.counted.to(x.device, x.dtype))
        return self._on[x.device]


@dataclass
class Gathered:
    """One checkpoint's rows and token sums at one site, as the batches bring them in."""

    pooled: Float[Tensor, "row rule layer d_model"]
    token_sum: Float[Tensor, "layer d_model"]
    norm_sum: Float[Tensor, " layer"]
    n_tokens: int = 0

    @classmethod
    def empty(cls, n_rows: int, n_rules: int, n_layers: int, d_model: int) -> Gathered:
        """Nothing yet."""
        return cls(
            pooled=torch.zeros(n_rows, n_rules, n_layers, d_model),
            token_sum=torch.zeros(n_layers, d_model, dtype=torch.float64),
            norm_sum=torch.zeros(n_layers, dtype=torch.float64),
        )

    def add(self, reading: Reading, site: Site, layers: Sequence[int]) -> None:
        """Take in one batch's reading of this site; rows read in two parts (prefix and rest) add up."""
        batch, rows = reading.batch, list(reading.batch.rows)
        for column, layer in enumerate(layers):
            pooled, token_sum, norm_sum = reading.found[site, layer]
            self.pooled[rows, :, column] += _by_row(pooled.cpu(), batch).float()
            self.token_sum[column] += token_sum.cpu()
            self.norm_sum[column] += norm_sum.cpu()
        self.n_tokens += batch.n_tokens


def _by_row(pooled: Float[Tensor, "batch reading d_model"], batch: Batch) -> Float[Tensor, "row rule d_model"]:
    if batch.shares is None:
        return pooled
    own, share = batch.shares
    return pooled[0, own] * share[..., None].to(pooled.dtype)
