"""The largest score difference that loss does not explain: how much better a run may score than another at similar or lower loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from emprobe._resampling import Floats, scaled_quantiles
from emprobe.errors import EmprobeError
from emprobe.stats import null_of
from emprobe.studies.dynamics.relation import DRAWS, checked
from emprobe.types import Null


@dataclass(frozen=True)
class MaxDiff:
    """The largest difference, the two rows that show it, and what chance gives.

    Attributes:
        value: In units of the score, 0 or more; 0 where no run scores better at similar or lower loss.
        low: Lower end of a bootstrap over runs.
        high: The value itself: a maximum over the drawn runs is never above that over all, so resampling cannot say how far it may rise.
        better: Number of the run that scores better, and `worse` that of the other; -1 if there is no such pair.
        tolerance: How much higher a loss still counts as similar, in its own units.
        n: How many runs.
        nulls: `unrelated`: scores shuffled among runs (their spread alone gives this much); `line`: a straight line with the runs' own
            noise about it, dealt out at random (so much is to be expected of such noise; it holds any run that stands out, so that it is
            no test for one).
    """

    value: float
    low: float
    high: float
    better: int
    worse: int
    tolerance: float
    n: int
    method: str
    nulls: dict[str, Null] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"nulls": {name: null.as_dict() for name, null in self.nulls.items()}}


def max_diff(
    loss: ArrayLike, score: ArrayLike, *, tolerance: float = 0.0, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> MaxDiff:
    """Largest score difference among pairs of runs in which the better-scoring one has similar or lower loss.

    Higher scores are better.

    Args:
        loss: One number a run.
        score: Of the same runs.
        tolerance: A loss is similar if it is at most this much above the other's; 0 is no higher at all, which gives the published
            figures (arXiv 2606.20814: 17.0 and 16.1 for the training loss, 18.6 and 18.8 for the evaluation loss).
        draws: Of the bootstrap, and of each null.
        seed: Of both.
        level: Of the interval.

    Raises:
        EmprobeError: A negative tolerance, fewer than four runs, a number that is not finite, or a column that does not vary.

    Source:
        arXiv 2606.20814, section on training dynamics.

    Example:
        The second run scores 10 better than the third at a lower loss; the first is better still, and has the highest loss.

        >>> found = max_diff([4.0, 1.0, 2.0, 1.0], [90.0, 60.0, 50.0, 55.0])
        >>> found.value, found.better, found.worse
        (10.0, 1, 2)
    """
    if not tolerance >= 0:
        raise EmprobeError(f"A tolerance of {tolerance:g} was asked for. Give how much higher a loss still counts as similar, 0 or more.")
    x, y, _, k = checked(loss, score, np.arange(len(np.asarray(loss))))
    gaps = np.where(x[:, None] <= x[None, :] + tolerance, y[:, None] - y[None, :], -np.inf)
    better, worse = (int(i) for i in np.unravel_index(int(gaps.argmax()), gaps.shape))
    value = float(gaps[better, worse])  # a run beside itself is a pair too, so never below 0
    rng = np.random.default_rng(seed)
    drawn = [float(gaps[np.ix_(there, there)].max()) for there in (np.unique(rng.integers(k, size=k)) for _ in range(draws))]
    low = max(0.0, scaled_quantiles(value, np.array(drawn), k, level)[0])
    line: Floats = np.asarray(np.polyval(np.polyfit(x, y, 1), x), dtype=np.float64)
    found = {"unrelated": _dealt(x, y, tolerance, draws, rng), "line": _dealt(x, y - line, tolerance, draws, rng, line)}
    nulls = {name: null_of(name, value, of) for name, of in found.items()}
    places = (better, worse) if value > 0 else (-1, -1)
    method = f"bootstrap over {k} runs (a maximum can only fall), t-scaled, {draws} draws"
    return MaxDiff(value, low, value, *places, tolerance, k, method, nulls)


TOLERANCES = (0.0, 0.001, 0.003, 0.01, 0.03)


def by_tolerance(loss: Floats, score: Floats) -> list[dict[str, float]]:
    """The same number at several tolerances: where losses crowd at a floor, what counts as similar decides.

    Example:
        >>> [one["value"] for one in by_tolerance(np.array([1.0, 1.002]), np.array([10.0, 30.0]))]
        [0.0, 0.0, 20.0, 20.0, 20.0]
    """
    gaps = score[:, None] - score[None, :]
    return [{"tolerance": t, "value": float(gaps[loss[:, None] <= loss[None, :] + t].max())} for t in TOLERANCES]


def _dealt(x: Floats, y: Floats, tolerance: float, draws: int, rng: np.random.Generator, line: Floats | float = 0.0) -> Floats:
    """The same maximum where these values, about a line, are dealt out among runs at random."""
    order = np.argsort(x, kind="stable")
    # Sorted by loss, the best score at similar or lower loss is a running maximum.
    upto = np.searchsorted(x[order], x + tolerance, side="right") - 1
    scores = [rng.permutation(y) + line for _ in range(draws)]
    return np.array([float((np.maximum.accumulate(one[order])[upto] - one).max()) for one in scores])
