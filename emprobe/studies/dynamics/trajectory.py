"""The way of a direction through training: when it appears, how it turns, when it is done; each beside what chance or drift gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from emprobe._resampling import Floats
from emprobe.directions.certainty import reliability
from emprobe.directions.design import Design
from emprobe.errors import EmprobeError
from emprobe.overlap import cosine_null

RELIABLE = 0.5
SATURATED = 0.9
DRAWS = 1000


def cosines(a: Floats, b: Floats) -> Floats:
    """Cosine of each row of `a` with that of `b` (or with `b`, if it is one vector); NaN where one is zero.

    Example:
        >>> cosines(np.array([[1.0, 0.0], [3.0, 3.0]]), np.array([2.0, 0.0])).round(4).tolist()
        [1.0, 0.7071]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((a * b).sum(axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


def local_cosines(vectors: Float[NDArray[np.float64], "checkpoints d"], lag: int = 1) -> Floats:
    """Cosine of v[t-k] - v[t] with v[t+k] - v[t] at each checkpoint; NaN at the ends, and where nothing moves.

    -1 where it goes straight on, 1 where it turns back, 0 where it turns by a right angle, or where each move is random.

    Args:
        vectors: Of evenly spaced checkpoints.
        lag: k, in checkpoints.

    Raises:
        EmprobeError: If there are fewer than 2 k + 1 checkpoints.

    Source:
        arXiv 2506.11613, phase transition.

    Example:
        Two moves to the right, then one up.

        >>> local_cosines(np.array([[0.0, 0], [1, 0], [2, 0], [2, 1]])).tolist()
        [nan, -1.0, 0.0, nan]
    """
    if lag < 1 or len(vectors) < 2 * lag + 1:
        raise EmprobeError(
            f"Local cosines of lag {lag} were asked for over {len(vectors)} checkpoints. Give at least {2 * max(lag, 1) + 1}."
        )
    here = vectors[lag:-lag]
    found = np.full(len(vectors), np.nan)
    found[lag:-lag] = cosines(vectors[: -2 * lag] - here, vectors[2 * lag :] - here)
    return found + 0.0


def walk_cosines(moves: Float[NDArray[np.float64], "moves d"], draws: int = DRAWS, seed: int = 0) -> Floats:
    """Local cosines of random walks whose moves are drawn, each by itself, with the second moments of these moves."""
    rng = np.random.default_rng(seed)
    before, after = (rng.standard_normal((draws, len(moves))) @ moves for _ in range(2))
    return -cosines(before, after)


def component_shares(vectors: Float[NDArray[np.float64], "checkpoints d"], most: int = 3) -> list[float]:
    """Shares of the variance of a trajectory (about its mean) along its first principal components.

    Example:
        >>> component_shares(np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]), 2)
        [1.0, 0.0]
    """
    squares = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False) ** 2
    if not squares.sum() > 0:
        raise EmprobeError("The components of a trajectory were asked for that does not move.")
    return [float(share) + 0.0 for share in (squares / squares.sum()).round(12)[:most]]


def walk_shares(vectors: Floats, most: int = 3, draws: int = 200, seed: int = 0) -> dict[str, list[float]]:
    """The same of random walks with moves of the same lengths in random directions: mean, and 97.5 % of them.

    Source:
        Antognini & Sohl-Dickstein (2018), arXiv 1806.08805: the first component of a long random walk in many dimensions has 61 %.
    """
    rng = np.random.default_rng(seed)
    lengths = np.linalg.norm(np.diff(vectors, axis=0), axis=1, keepdims=True)
    found = []
    for _ in range(draws):
        moves = rng.standard_normal((len(lengths), vectors.shape[1]))
        moves *= lengths / np.linalg.norm(moves, axis=1, keepdims=True)
        found.append(component_shares(np.concatenate([np.zeros((1, vectors.shape[1])), np.cumsum(moves, axis=0)]), most))
    return {"mean": np.mean(found, axis=0).tolist(), "high": np.quantile(found, 0.975, axis=0).tolist()}


def reliabilities(deltas: Float[NDArray[np.float64], "checkpoints questions d"], clusters: Sequence[str]) -> Floats:
    """Of each checkpoint's mean shift, the share of its squared norm that is the same over questions; NaN where nothing has moved."""
    found = np.full(len(deltas), np.nan)
    labels = np.tile([False, True], len(clusters))
    owners = tuple(name for name in clusters for _ in range(2))
    for number, delta in enumerate(deltas):
        if np.linalg.norm(delta.mean(axis=0)) > 0:
            rows = np.stack([np.zeros_like(delta), delta], axis=1).reshape(-1, delta.shape[1])
            found[number] = reliability(Design(rows, labels, owners, True, 0))
    return found


def trajectory(
    steps: Sequence[int], deltas: Float[NDArray[np.float64], "checkpoints questions d"], clusters: Sequence[str], *, lag: int = 1
) -> dict[str, Any]:
    """Everything about the way of one run's mean shift, tuned minus base.

    `appears` is the first checkpoint from which on its reliability is at least .5 and its cosine with the last one above what 95 % of
    random directions have; `saturates` that from which on its norm is at least 90 % of the last.

    Args:
        steps: Of the checkpoints, evenly spaced, the first at nothing.
        deltas: Shift of each question at each.
        clusters: Which questions count as one.
        lag: Of the local cosine, in checkpoints.

    Raises:
        EmprobeError: If it does not move at all.
    """
    means = deltas.mean(axis=1)
    norms = np.linalg.norm(means, axis=1)
    if not norms[-1] > 0:
        raise EmprobeError(f"At step {steps[-1]} the fine-tune has not moved any activation, so there is no direction to follow.")
    to_last, sure = cosines(means, means[-1]), reliabilities(deltas, clusters)
    there = (np.nan_to_num(sure, nan=-1) >= RELIABLE) & (np.nan_to_num(to_last, nan=-1) >= cosine_null(means.shape[1]))
    turned = [math.degrees(math.acos(max(-1.0, min(1.0, c)))) if np.isfinite(c) else None for c in cosines(means[:-1], means[1:])]
    return {
        "norm": norms.tolist(),
        "cosine_to_last": _plain(to_last),
        "reliability": _plain(sure),
        "turned": [None, *turned],
        "local_cosine": _plain(local_cosines(means, lag)),
        "components": component_shares(means),
        "components_of_walks": walk_shares(means),
        "appears": from_then_on(steps, there),
        "saturates": from_then_on(steps, norms >= SATURATED * norms[-1]),
    }


def from_then_on(steps: Sequence[int], holds: NDArray[np.bool_]) -> int | None:
    """The first step from which on something holds to the end.

    Example:
        >>> from_then_on([0, 5, 10, 15], np.array([True, False, True, True])), from_then_on([0, 5], np.array([True, False]))
        (10, None)
    """
    missing = np.flatnonzero(~holds)
    first = int(missing[-1]) + 1 if len(missing) else 0
    return steps[first] if first < len(steps) else None


def _plain(values: Floats) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
