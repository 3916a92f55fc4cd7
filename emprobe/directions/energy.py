"""What a direction's numbers are made of: energy in few dimensions, and how much of it bf16 would round away."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from emprobe.errors import EmprobeError


def top_energy(vector: ArrayLike, k: int = 5) -> float:
    """Share of a vector's squared norm in its k largest dimensions, 0 to 1; near k / d_model when spread evenly.

    Raises:
        EmprobeError: If k is not between 1 and the number of dimensions, or the vector is 0.

    Example:
        >>> top_energy([3.0, 0.0, -4.0], k=1)  # 16 of 25
        0.64
    """
    squares = np.asarray(vector, dtype=np.float64) ** 2
    if not 1 <= k <= len(squares):
        raise EmprobeError(f"The share of the top {k} of {len(squares)} dimensions was asked for; give k between 1 and {len(squares)}.")
    if not np.isfinite(squares).all():
        raise EmprobeError(f"The energy of a vector with {int((~np.isfinite(squares)).sum())} NaN or infinite values was asked for.")
    if not squares.sum() > 0:
        raise EmprobeError("The energy of a vector of zeros was asked for, and it has none.")
    return float(np.sort(squares)[-k:].sum() / squares.sum())


def bf16_rounding(low: ArrayLike, high: ArrayLike) -> float:
    """How far high - low moves, as a share of its norm, when both means are stored in bf16 before they are subtracted.

    Raises:
        EmprobeError: If the means are equal.

    Example:
        bf16 keeps 8 binary digits: 257 becomes 256, and half of a difference of 2 is gone.

        >>> bf16_rounding([255.0, 0.0], [257.0, 0.0])
        0.5
    """
    a, b = (torch.as_tensor(np.asarray(x, dtype=np.float64)) for x in (low, high))
    if a.shape != b.shape or not bool((torch.isfinite(a) & torch.isfinite(b)).all()):
        raise EmprobeError(
            f"Means of shapes {list(a.shape)} and {list(b.shape)} were given; rounding is told of two finite ones of one shape."
        )
    difference = b - a
    if not float(difference.norm()) > 0:
        raise EmprobeError("The rounding of a difference of two equal means was asked for; there is nothing to round.")
    rounded = b.bfloat16().double() - a.bfloat16().double()
    return float((rounded - difference).norm() / difference.norm())
