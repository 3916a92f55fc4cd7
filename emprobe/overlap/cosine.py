"""The cosine of two directions beside what random directions of that width would give."""

from __future__ import annotations

import torch
from jaxtyping import Float
from scipy.stats import beta
from torch import Tensor


def cosine_null(d_model: int, quantile: float = 0.95) -> float:
    """The |cosine| that a uniformly random direction stays below with this probability.

    Source:
        The squared cosine of a uniform direction with a fixed one is Beta(1/2, (d_model - 1)/2).

    Example:
        >>> round(cosine_null(2, 0.5), 4)  # the angle is uniform: cos(45°)
        0.7071
    """
    return float(beta.ppf(quantile, 0.5, (d_model - 1) / 2) ** 0.5)


def random_directions(n: int, d_model: int, seed: int) -> Float[Tensor, "n d_model"]:
    """Uniformly random unit vectors, float64; vector i does not depend on how many are drawn."""
    rows = []
    for index in range(n):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        row = torch.randn(d_model, generator=generator, dtype=torch.float64)
        rows.append(row / row.norm())
    return torch.stack(rows)
