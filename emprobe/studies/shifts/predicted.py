"""Activations after fine-tuning, predicted by adding the mean training shift to those before."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from emprobe.errors import EmprobeError

Floats = NDArray[np.float64]


def least_squares_dose(shifts: Floats, families: Sequence[Hashable]) -> float:
    """How much of the mean shift of the other families predicts a family's shifts best.

    On the very rows whose mean it is, the best amount is 1 whatever they are; left out family by family, it is below 1 by as much as
    the mean is noise.

    Raises:
        EmprobeError: With one family only, or where the mean of the others is zero.

    Example:
        Two families with shifts 1 and 3: each is predicted from the other, (1 · 3 + 3 · 1) / (3² + 1²).

        >>> least_squares_dose(np.array([[1.0], [3.0]]), ["a", "b"])
        0.6
    """
    codes = np.unique([str(name) for name in families], return_inverse=True)[1]
    count = int(codes.max()) + 1
    if count < 2:
        raise EmprobeError("The best amount of a mean shift was asked of one family of prompts. Give two or more.")
    sums = np.stack([np.bincount(codes, column, count) for column in shifts.T], axis=1)
    sizes = np.bincount(codes)[:, None]
    others = (sums.sum(axis=0) - sums) / (len(shifts) - sizes)
    below = float((sizes[:, 0] * (others**2).sum(axis=1)).sum())
    if below == 0:
        raise EmprobeError("The mean shift is zero, so no amount of it predicts anything.")
    return float((sums * others).sum() / below)


def prediction(before: Floats, after: Floats, added: Floats, mean: Floats) -> dict[str, Floats]:
    """Of each row `[n]`: cosine of before + added with after, the same about a mean, and the error relative to the true shift.

    A relative error of 1 is that of adding nothing.

    Args:
        before: Activations `[n, d_model]` before fine-tuning.
        after: The same prompts' after.
        added: One vector `[d_model]`, or several `[draws, d_model]`: then measures are `[draws, n]`.
        mean: About which the centred cosine is taken, such as the mean before; raw activations share a large one.

    Raises:
        EmprobeError: If a row did not move.

    Example:
        >>> found = prediction(np.array([[1.0, 0.0]]), np.array([[1.0, 2.0]]), np.array([0.0, 1.0]), np.zeros(2))
        >>> found["relative_error"].tolist()
        [0.5]
    """
    moved = np.linalg.norm(after - before, axis=1)
    if not moved.all():
        raise EmprobeError(f"{int((moved == 0).sum())} of {len(moved)} prompts did not move, so no error is relative to their shift.")
    vectors = np.atleast_2d(added)
    found = {
        "cosine": _cosines(before, after, vectors),
        "centred_cosine": _cosines(before - mean, after - mean, vectors),
        "relative_error": _errors(after - before, vectors) / moved,
    }
    return found if added.ndim == 2 else {name: values[0] for name, values in found.items()}


def _cosines(x: Floats, y: Floats, added: Floats) -> Floats:
    """Cosine of x + a with y for every row and every a, without an array of all sums."""
    inner = (x * y).sum(axis=1) + added @ y.T
    squares = (x**2).sum(axis=1) + 2 * added @ x.T + (added**2).sum(axis=1)[:, None]
    return np.asarray(inner / np.sqrt(np.maximum(squares, 1e-300) * np.maximum((y**2).sum(axis=1), 1e-300)))


def _errors(shifts: Floats, added: Floats) -> Floats:
    squares = (shifts**2).sum(axis=1) - 2 * added @ shifts.T + (added**2).sum(axis=1)[:, None]
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def summed(found: Mapping[str, Floats]) -> dict[str, Floats]:
    """Means over rows, for each draw."""
    return {name: values.mean(axis=-1) for name, values in found.items()}
