"""Differences of means with their bootstrap, layer by layer, at little more than the cost of reading the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from emprobe.directions.cells import class_means, question_deviations, without_diagonal
from emprobe.directions.design import Bools, check_labels
from emprobe.errors import EmprobeError, MismatchError
from emprobe.types import Estimate

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Rows = slice | NDArray[np.int64]

POOL = 384
"""Resampled questions that are summed once a layer, in all; draws pick among them."""


@dataclass(frozen=True, eq=False)
class ResampledDirection:
    """A difference of means at one layer and what resampling says of it.

    Attributes:
        layer: As counted in the layers given, from 0.
        vector: Unit vector, float64.
        raw_norm: Norm of the difference of means.
        stability: Cosine between the direction and those of resamples of questions (then rows): their mean and middle 95 %.
        truth: Cosine between the direction and the true one, 0 to 1, with a 95 % interval (see `resample_directions`).
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
    rows_too: bool = True,
    seed: int = 0,
) -> Iterator[ResampledDirection]:
    """The difference of means and its bootstrap at each layer, one layer in memory at a time.

    A draw takes as many questions as there are, with replacement; then each drawn question's rows are drawn again, with replacement
    (without `rows_too` it brings all its rows). The same draws serve every layer.

    How it is fast: a direction is linear in its rows, so a draw needs sums only. For each question a few row resamples are summed (by
    one small matrix product), a draw picks for every copy of a question another of them, and norms and cosines of all draws come from
    the inner products of these sums. Each draw by itself has exactly the two-stage distribution, since no sum is used twice in it;
    different draws share sums.

    `stability` says how far another sample like this one, with its noise on top of this one's, would turn the direction. It is no
    interval for the truth: noise has lengthened the estimate, and the second stage counts the noise within questions twice. `truth`
    is: with d the estimate and e its error across d, sin² = ‖e‖² / ‖d‖², and e is drawn by giving the deviations of the questions
    from d random signs (scaled by k / (k - 1) for k questions), which has the error's mean square and, in many dimensions too, its
    spread; drawing questions with replacement does not.

    Args:
        layers: Arrays `[row, d_model]`, float32 or float64; may be read from disk or made one by one. For a pair, tuned minus base.
        questions: The question of each row. Rows of one question that lie together are not copied.
        labels: One truth value per row for a contrast within one checkpoint; without them rows are differences, and are averaged.
        draws: Resamples.
        rows_too: In `stability`, draw rows within questions, too.
        seed: Same seed, same draws.

    Raises:
        EmprobeError: No rows, fewer than two questions, unusable labels, NaN or infinity (row and layer named), or no difference.
        MismatchError: If a layer's rows are not as many as the questions, or layers differ in width.

    Source: Davison & Hinkley (1997), Bootstrap Methods and their Application, section 3.8; Liu (1988), Annals of Statistics 16,
        1696-1708 (random signs).

    Example:
        >>> rows = np.array([[2.0, 1], [2, -1], [2, 1], [2, -1]])
        >>> found = next(resample_directions([rows], ["a", "b", "c", "d"]))
        >>> found.vector, found.raw_norm
        (array([1., 0.]), 2.0)
    """
    plan = _Plan.of(questions, labels, draws, rows_too, seed)
    table: NDArray[Any] | None = None
    for number, values in enumerate(layers):
        X = np.asarray(values)
        if X.ndim != 2 or len(X) != len(questions):
            raise MismatchError(f"Layer {number} has values of shape {X.shape}, but there are {len(questions)} rows by their questions.")
        X = X if X.dtype == np.float32 else X.astype(np.float64)
        if table is None:
            table = np.empty((len(plan.rows), len(plan.counts[0]) - 1, X.shape[1]), X.dtype)
        if X.shape[1] != table.shape[2]:
            raise MismatchError(f"Layer {number} has d_model {X.shape[1]}, but the layers before it have {table.shape[2]}.")
        yield _resampled(number, X, plan, table)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What all layers share: where the rows of each question and class lie, their resamples, and the draws.

    Attributes:
        rows: Rows of each cell (a question's rows of one class).
        counts: How often each row of a cell counts in each of its resamples, `[resample, row]`; the first line counts each once.
        high: Whether a cell's rows enter with a plus.
        factors: Weight of each resample of each cell in each draw's direction, `[draws, cell x resample]`.
        once: Weight of each cell in the estimate itself.
        question: Number of each cell's question.
        signs: Random signs of the questions' deviations, `[draws, question]`, and random `shares` in 0..1, one a draw.
    """

    rows: list[Rows]
    counts: list[Singles]
    high: Bools
    factors: Singles
    once: Floats
    question: NDArray[np.int64]
    signs: Floats
    shares: Floats
    n: int
    k: int
    method: str

    @property
    def sizes(self) -> Floats:
        """Rows of each cell."""
        return np.array([counts.shape[1] for counts in self.counts], dtype=np.float64)

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
        signs = rng.choice([-1.0, 1.0], size=(draws, k))
        return cls(rows, counts, np.array(high), factors, once, np.array(question), signs, rng.random(draws), len(y), k, method)


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


def _resampled(number: int, X: NDArray[Any], plan: _Plan, table: NDArray[Any]) -> ResampledDirection:
    scale = _scale(X)
    own = _sum_up(X, plan, scale, table)
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
    along, across = _deviations(own, d, plan, table)
    cosine = (1 + along) / np.sqrt((1 + along) ** 2 + across)
    sine = np.sqrt(_squared_sines(own, d, plan))
    return ResampledDirection(
        layer=number,
        vector=d / np.sqrt(square),
        raw_norm=float(np.sqrt(square)) / scale,
        stability=_estimate(cosine, plan.n, plan.k, f"{plan.method}, their middle 95 %"),
        truth=_estimate(
            np.sqrt(np.maximum(1 - sine**2, 0.0)), plan.n, plan.k, f"random signs of {plan.k} questions' deviations, {len(sine)} draws"
        ),
    )


def _estimate(cosines: Floats, n: int, k: int, method: str) -> Estimate:
    low, high = (float(end) for end in np.quantile(cosines, [0.025, 0.975]))
    return Estimate(min(max(float(cosines.mean()), low), high), low, high, n, k, method)


def _scale(X: NDArray[Any]) -> float:
    """A power of two that brings the largest of some rows near 1, so that no square leaves the range of float32."""
    largest = float(np.abs(X[:: max(1, len(X) // 16)]).max())
    return float(2.0 ** -np.clip(np.frexp(largest)[1], -100, 120)) if 0 < largest < np.inf else 1.0


def _sum_up(X: NDArray[Any], plan: _Plan, scale: float, table: NDArray[Any]) -> Floats:
    """Fill `table[cell, resample]` with the sums of the resamples; returns each cell's own sum, `[cell, d_model]`. All times `scale`."""
    own = np.empty((len(plan.rows), X.shape[1]))
    found = np.empty((table.shape[1] + 1, X.shape[1]), X.dtype)
    for cell, (rows, counts) in enumerate(zip(plan.rows, plan.counts, strict=True)):
        np.matmul((counts * scale).astype(X.dtype), X[rows], out=found)
        own[cell], table[cell] = found[0], found[1:]
    return own


def _deviations(own: Floats, d: Floats, plan: _Plan, table: NDArray[Any]) -> tuple[Floats, Floats]:
    """Each draw's deviation from the estimate d: along it, in norms of d, and the square of what is across it, in squared norms."""
    square = float(d @ d)
    means = {side: mean.astype(table.dtype) for side, mean in class_means(own, plan.sizes, plan.high).items()}
    shift = np.empty_like(table[0])
    for cell, counts in enumerate(plan.counts):
        # About the class's mean, so that the deviations come out small instead of as differences of large numbers.
        np.multiply.outer(counts[1:].sum(axis=1).astype(table.dtype), means[bool(plan.high[cell])], out=shift)
        table[cell] -= shift
    flat = table.reshape(-1, table.shape[2])
    along = (plan.factors @ (flat @ d.astype(flat.dtype))).astype(np.float64) / square
    length = np.einsum("ij,ij->i", plan.factors @ (flat @ flat.T), plan.factors).astype(np.float64) / square
    return along, np.maximum(length - along**2, 0.0)


def _squared_sines(own: Floats, d: Floats, plan: _Plan) -> Floats:
    """Squared length, in squared norms of d, of the questions' deviations across d added up with random signs."""
    deviations = question_deviations(own, plan.sizes, plan.high, plan.once, plan.question, plan.k)
    square = float(d @ d)
    deviations -= np.outer(deviations @ d / square, d)
    gram = deviations @ deviations.T
    mean_square = float(gram.trace())
    # k (k - 1) products of different questions stand for the k² of an infinite sample.
    products = without_diagonal(gram) * np.sqrt(plan.k / (plan.k - 1))
    drawn = np.maximum(mean_square + np.einsum("ij,ij->i", plan.signs @ products, plan.signs), 0.0) * plan.k / (plan.k - 1)
    # The error's mean square is itself estimated, from k - 1 deviations in as many dimensions as they effectively fill;
    # of two questions, whose deviations are one line, no more than that one is known.
    crossed = float((products**2).sum())
    filled = mean_square**2 / crossed if plan.k > 2 and crossed > 0 else 1.0
    degrees = (plan.k - 1) * filled
    return np.asarray(drawn / square * degrees / chi2.isf(plan.shares, degrees))
