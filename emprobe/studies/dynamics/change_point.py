"""Whether a curve over checkpoints jumps: a straight line with a step against the line alone, and against a smooth bend."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from emprobe._resampling import Floats
from emprobe.errors import EmprobeError
from emprobe.stats import permutation_p

LEAST_POINTS = 7
LEVEL = 0.05
Kind = Literal["none", "curved", "abrupt"]


@dataclass(frozen=True)
class ChangePoint:
    """What was found.

    Attributes:
        kind: `abrupt`: a line with a step fits better than the line alone would by chance, and than a cubic with as many parameters;
            `curved`: it bends, and a cubic does as well; `none`: a straight line is enough.
        between: The neighbouring checkpoints between which the step lies best, whatever the kind; `None` where nothing moves.
        low: First checkpoint of the 95 % likelihood interval of that place.
        high: Last one.
        p: Share of straight lines with independent normal noise that show as good a step, at any place.
        step: Height of the step, in units of the curve.
        share: Of the whole way travelled (sum of absolute changes), the part between the two neighbours that differ most, and
            `even_share` what each part of an even drift is.
    """

    kind: Kind
    between: tuple[float, float] | None
    low: float | None
    high: float | None
    p: float
    step: float
    share: float
    even_share: float

    @property
    def found(self) -> bool:
        """Whether there is a change-point."""
        return self.kind == "abrupt"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"between": None if self.between is None else list(self.between)}


def change_point(steps: ArrayLike, values: ArrayLike, *, draws: int = 2000, seed: int = 0) -> ChangePoint:
    """Find where a curve jumps, or say that it does not.

    The p holds for independent noise. Neighbouring checkpoints of one run are alike, so that a bend alone gives a small one: hence the
    comparison with a cubic. It is the largest over all places, and chance is given the same choice.

    Args:
        steps: Of the checkpoints, rising.
        values: At each.
        draws: Of straight lines with noise.
        seed: Of them.

    Raises:
        EmprobeError: Fewer than 7 checkpoints, steps that do not rise, or a value that is no number.

    Source:
        Andrews (1993), Econometrica 61, 821-856 (the largest F over all places, and its own null); what is called a phase transition of
        emergent misalignment: arXiv 2506.11613.

    Example:
        >>> steps = list(range(10))
        >>> change_point(steps, [0.0, 0.1, 0.0, 0.1, 0.0, 5.1, 5.0, 5.1, 5.0, 5.1]).between
        (4.0, 5.0)
        >>> change_point(steps, [3.0 * step for step in steps]).kind
        'none'
    """
    t, y = _checked(steps, values)
    spread = float(((y - y.mean()) ** 2).sum())
    ways = np.abs(np.diff(y))
    even = 1 / len(ways)
    if spread <= 1e-18 * max(1.0, float((y**2).sum())):
        return ChangePoint("none", None, None, None, 1.0, 0.0, 0.0, even)
    share = float(ways.max() / ways.sum())
    line, stepped = _residuals(t, y[None])
    floor = 1e-12 * spread
    line, stepped = line + floor, stepped + floor
    best = int(stepped[0].argmin())
    places = np.arange(2, len(t) - 1)  # the step lies before this checkpoint
    p = permutation_p(_largest_f(line, stepped)[0], _null(tuple(t), draws, seed))
    if line[0] <= 3 * floor:  # exactly straight
        p = 1.0
    cubic = float(np.polynomial.polynomial.polyfit(t - t.mean(), y, 3, full=True)[1][0][0] if _cubic_rank(t) else np.inf) + floor
    kind: Kind = "none" if p > LEVEL else "abrupt" if stepped[0, best] < cubic else "curved"
    likely = places[len(t) * np.log(stepped[0] / stepped[0, best]) <= scipy_stats.chi2.ppf(1 - LEVEL, 1)]
    height = float(np.linalg.lstsq(_design(t, int(places[best])), y, rcond=None)[0][2])
    between = (float(t[places[best] - 1]), float(t[places[best]]))
    return ChangePoint(kind, between, float(t[likely.min() - 1]), float(t[likely.max()]), p, height, share, even)


def _checked(steps: ArrayLike, values: ArrayLike) -> tuple[Floats, Floats]:
    t, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if t.ndim != 1 or t.shape != y.shape or len(t) < LEAST_POINTS:
        raise EmprobeError(
            f"A change-point was looked for in {len(t)} steps and {len(y)} values; {LEAST_POINTS} checkpoints are the fewest that can show "
            "one. Keep more checkpoints."
        )
    if not (np.isfinite(t).all() and np.isfinite(y).all() and (np.diff(t) > 0).all()):
        raise EmprobeError("A change-point was looked for where steps do not rise or a value is no number. Give each checkpoint once.")
    return t, y


def _cubic_rank(t: Floats) -> bool:
    return len(t) > 4


def _design(t: Floats, place: int) -> Floats:
    return np.column_stack([np.ones(len(t)), (t - t.mean()) / np.ptp(t), np.arange(len(t)) >= place]).astype(np.float64)


def _residuals(t: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Squared residuals of curves `[curves, n]`: about the line `[curves]`, and about it with a step at each place `[curves, places]`."""

    def about(design: Floats) -> Floats:
        basis = np.linalg.qr(design)[0]
        return np.asarray(((y - (y @ basis) @ basis.T) ** 2).sum(axis=1))

    stepped = np.stack([about(_design(t, place)) for place in range(2, len(t) - 1)], axis=1)
    return about(_design(t, 0)[:, :2]), stepped


def _largest_f(line: Floats, stepped: Floats) -> Floats:
    return np.asarray((line / stepped.min(axis=1)) - 1)


@lru_cache(maxsize=16)
def _null(steps: tuple[float, ...], draws: int, seed: int) -> Floats:
    """The same of pure noise, which a line and its size do not change."""
    noise = np.random.default_rng(seed).standard_normal((draws, len(steps)))
    return _largest_f(*_residuals(np.array(steps), noise))
