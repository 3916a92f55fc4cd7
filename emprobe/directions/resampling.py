"""Differences of means with their bootstrap, layer by layer, at little more than the cost of reading the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.directions.design import Bools, check_labels
from emprobe.errors import EmprobeError, MismatchError
from emprobe.types import Estimate

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Rows = slice | NDArray[np.int64]

POOL = 512
"""Resampled questions that are summed once a layer, in all; draws pick among them."""


@dataclass(frozen=True, eq=False)
class ResampledDirection:
    """A difference of means at one layer and what resampling says of it.

    Attributes:
        layer: As counted in the layers given, from 0.
        vector: Unit vector, float64.
        raw_norm: Norm of the difference of means.
        stability: Cosine between the direction and those of the resamples: their mean, and the middle 95 % of them.
        truth: Cosine between the direction and the true one, 0 to 1, as far as the resamples' noise tells (see `resample_directions`).
    """

    layer: int
    vector: Floats
    raw_norm: float
    stability: Estimate
    truth: Estimate


def resample_directions(
    layers: Iterable[Any],
    questions: Sequence[str],
    labels: Sequence[bool] | None = None,
    *,
    draws: int = 1000,
    rows_too: bool = False,
    seed: int = 0,
) -> Iterator[ResampledDirection]:
    """The difference of means and its bootstrap at each layer, one layer in memory at a time.

    A draw takes as many questions as there are, with replacement, each with all its rows; with `rows_too` each drawn question's rows
    are drawn again, with replacement. The same draws serve every layer. The second stage counts the noise within questions twice (see
    `emprobe.stats.clustered_interval`), so it is the wider, more cautious interval; the first alone covers as it promises.

    How it is fast: a direction is linear in its rows, so a draw needs sums only. For each question a few row resamples are summed (by
    one small matrix product), a draw picks for every copy of a question another of them, and norms and cosines of all draws come from
    the inner products of these sums. Each draw by itself has exactly the two-stage distribution, since no sum is used twice in it;
    different draws share sums.

    `truth`: with d the estimate and e a draw's deviation from it, at a right angle to d, sin² between estimate and truth is as
    ‖e‖² / ‖d‖², scaled by k / (k - 1) for k questions; ‖d‖ holds the noise already, so the truth is shorter than d and is not asked.

    Args:
        layers: Arrays `[row, d_model]`, float32 or float64; may be read from disk or made one by one. For a pair, tuned minus base.
        questions: The question of each row. Rows of one question that lie together are not copied.
        labels: One truth value per row for a contrast within one checkpoint; without them rows are differences, and are averaged.
        draws: Resamples.
        rows_too: Draw rows within questions, too.
        seed: Same seed, same draws.

    Raises:
        EmprobeError: No rows, fewer than two questions, unusable labels, NaN or infinity (row and layer named), or no difference.
        MismatchError: If a layer's rows are not as many as the questions, or layers differ in width.

    Example:
        >>> rows = np.array([[2.0, 1], [2, -1], [2, 1], [2, -1]])
        >>> found = next(resample_directions([rows], ["a", "b", "c", "d"]))
        >>> found.vector, found.raw_norm
        (array([1., 0.]), 2.0)
    """
    plan = _Plan.of(questions, labels, draws, rows_too, seed)
    width = None
    for number, values in enumerate(layers):
        X = np.asarray(values)
        if X.ndim != 2 or len(X) != len(questions):
            raise MismatchError(f"Layer {number} has values of shape {X.shape}, but there are {len(questions)} rows by their questions.")
        if X.shape[1] != (width := width or X.shape[1]):
            raise MismatchError(f"Layer {number} has d_model {X.shape[1]}, but the layers before it have {width}.")
        yield _resampled(number, X, plan)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What all layers share: where the rows of each question and class lie, their resamples, and the draws.

    Attributes:
        rows: Rows of each cell (a question's rows of one class).
        counts: How often each row of a cell counts in each of its resamples, `[resample, row]`; the first line counts each once.
        high: Whether a cell's rows enter with a plus.
        factors: Weight of each resample of each cell in each draw's direction, `[draws, cell x resample]`.
        once: Weight of each cell in the estimate itself.
    """

    rows: list[Rows]
    counts: list[Singles]
    high: Bools
    factors: Singles
    once: Floats
    n: int
    k: int
    method: str

    @classmethod
    def of(cls, questions: Sequence[str], labels: Sequence[bool] | None, draws: int, rows_too: bool, seed: int) -> _Plan:
        y = np.ones(len(questions), dtype=np.bool_) if labels is None else check_labels(labels, len(questions))
        codes = np.unique(np.asarray(questions), return_inverse=True)[1] if len(questions) else np.zeros(0, dtype=np.int64)
        k = int(codes.max()) + 1 if len(codes) else 0
        if k < 2 or draws < 1:
            raise EmprobeError(f"A bootstrap of {draws} draws from {k} question(s) was asked for; it needs a draw and two questions.")
        rng = np.random.default_rng(seed)
        times = rng.multinomial(k, np.full(k, 1 / k), draws)
        size = max(int(times.max()), POOL // k) if rows_too else 1
        picks = _picks(times, size, rng) if rows_too else times.astype(np.float32)[:, :, None]
        rows, counts, high, question = [], [], [], []
        for q, members in enumerate(np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])):
            m = len(members)
            drawn = rng.multinomial(m, np.full(m, 1 / m), size) if rows_too else np.ones((1, m))
            for side in np.unique(y[members]):
                here = y[members] == side
                rows.append(_together(members[here]))
                counts.append(np.concatenate([np.ones((1, int(here.sum()))), drawn[:, here]]).astype(np.float32))
                high.append(bool(side))
                question.append(q)
        factors, once = _factors(picks[:, question], counts, np.array(high))
        stages = "questions, then rows," if rows_too else "questions"
        method = f"bootstrap of {k} {stages} {len(factors)} draws"
        return cls(rows, counts, np.array(high), factors, once, len(y), k, method)


def _picks(times: NDArray[np.int64], size: int, rng: np.random.Generator) -> Singles:
    """Which of its question's `size` resamples each drawn copy takes, no two the same in a draw: 0 or 1, `[draws, question, size]`."""
    keys = rng.random((*times.shape, size), dtype=np.float32)
    return (np.argsort(np.argsort(keys, axis=2), axis=2) < times[:, :, None]).astype(np.float32)


def _together(members: NDArray[np.int64]) -> Rows:
    """A slice where rows lie side by side: taking it copies nothing."""
    return slice(int(members[0]), int(members[-1]) + 1) if np.ptp(members) == len(members) - 1 else members


def _factors(picks: Singles, counts: list[Singles], high: Bools) -> tuple[Singles, Floats]:
    """Weights of the resamples' sums in each draw, and of the cells' own sums in the estimate; draws without a class are left out."""
    sizes = np.stack([c.sum(axis=1) for c in counts]).astype(np.float64)
    factors, once = np.zeros(picks.shape, dtype=np.float32), np.zeros(len(high))
    whole = np.ones(len(picks), dtype=np.bool_)
    for side in np.unique(high):
        here, sign = high == side, 1.0 if side else -1.0
        n = (picks[:, here] * sizes[here, 1:]).sum(axis=(1, 2))
        whole &= n > 0
        factors[:, here] = sign * picks[:, here] / np.maximum(n, 1)[:, None, None]
        once[here] = sign / sizes[here, 0].sum()
    if not whole.any():
        raise EmprobeError("No resample of the questions holds rows of both classes. Give more questions.")
    return factors[whole].reshape(int(whole.sum()), -1), once


def _resampled(number: int, X: NDArray[Any], plan: _Plan) -> ResampledDirection:
    sums = [counts.astype(X.dtype, copy=False) @ X[rows] for rows, counts in zip(plan.rows, plan.counts, strict=True)]
    own = np.stack([s[0] for s in sums]).astype(np.float64)
    if not np.isfinite(own).all():
        bad = np.flatnonzero(~np.isfinite(X).all(axis=1))
        raise EmprobeError(
            f"Layer {number} holds NaN or infinity, first in row {bad[0] if len(bad) else '(its sum)'}. Capture it in float32."
        )
    d = plan.once @ own
    square = float(d @ d)
    if not square > 0:
        raise EmprobeError(
            f"The rows of layer {number} do not differ (mean difference 0), so there is no direction. Are the weights equal?"
        )
    along, across = _deviations(sums, own, d, plan)
    cosine = (1 + along) / np.sqrt((1 + along) ** 2 + across)
    sine = np.sqrt(across.mean() * plan.k / (plan.k - 1)), np.sqrt(np.quantile(across, [0.025, 0.975]) * plan.k / (plan.k - 1))
    low, value, high = (float(np.sqrt(max(1 - s * s, 0.0))) for s in (sine[1][1], sine[0], sine[1][0]))
    low_c, high_c = np.quantile(cosine, [0.025, 0.975])
    mean = float(np.clip(cosine.mean(), low_c, high_c))
    return ResampledDirection(
        layer=number,
        vector=d / np.sqrt(square),
        raw_norm=float(np.sqrt(square)),
        stability=Estimate(mean, float(low_c), float(high_c), plan.n, plan.k, plan.method + ", their middle 95 %"),
        truth=Estimate(min(max(value, low), high), low, high, plan.n, plan.k, plan.method + ", deviations across the estimate"),
    )


def _deviations(sums: list[NDArray[Any]], own: Floats, d: Floats, plan: _Plan) -> tuple[Floats, Floats]:
    """Each draw's deviation from the estimate d: along it, in norms of d, and the square of what is across it, in squared norms."""
    means = {side: own[plan.high == side].sum(axis=0) / sum(c[0].sum() for c, h in zip(plan.counts, plan.high, strict=True) if h == side)
             for side in (False, True) if (plan.high == side).any()}  # fmt: skip
    # About the class's mean, so that the deviations come out small instead of as differences of large numbers.
    apart = [
        s[1:] - c[1:].sum(axis=1, keepdims=True) * means[bool(h)].astype(s.dtype)
        for s, c, h in zip(sums, plan.counts, plan.high, strict=True)
    ]
    table = np.concatenate(apart)
    square = float(d @ d)
    along = plan.factors @ (table @ d.astype(table.dtype)) / square
    length = np.einsum("ij,ij->i", plan.factors @ (table @ table.T), plan.factors) / square
    return along.astype(np.float64), np.maximum(length.astype(np.float64) - along.astype(np.float64) ** 2, 0.0)
