"""Matching on a covariate: bins of it, which of them hold both kinds of prompts, and how well they balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Codes = NDArray[np.int64]
FEWEST = 2
"""Prompts of each half that a bin needs."""


@dataclass(frozen=True, eq=False)
class Matching:
    """Bins of a covariate and their common support.

    Attributes:
        bins: Number of each unit's bin, `[n]`.
        kept: Units in bins with enough prompts of both halves, `[n]`.
        exact: Whether a bin is one value of the covariate.
        lines: By bin: `low`, `high` (its range), prompts above and at most the median of what is studied, and whether it is kept.
        prompts: Prompts with at least one unit left, and those without.
        imbalance: Difference of the matched covariate between the halves, in its standard deviations: of all units, and of those kept
            within bins.
    """

    bins: Codes
    kept: Bools
    exact: bool
    lines: tuple[dict[str, Any], ...]
    prompts: tuple[int, int]
    imbalance: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "exact": self.exact,
            "bins": list(self.lines),
            "prompts_kept": self.prompts[0],
            "prompts_dropped": self.prompts[1],
            "imbalance_before": self.imbalance[0],
            "imbalance_after": self.imbalance[1],
        }


def match(values: Floats, high: Bools, prompts: Codes, bins: int = 5) -> Matching:
    """Bin units by a covariate, exactly where it takes few values, else at its quantiles.

    Args:
        values: The covariate to match on, `[n]`.
        high: Whether the unit is in the upper half of what is studied.
        prompts: Number of each unit's prompt.
        bins: At most so many; five leave about a tenth of a linear confounder's bias, which the regression within bins takes.

    Source: Iacus, King & Porro (2012), Political Analysis 20, 1-24 (coarsened exact matching); Cochran (1968), Biometrics 24, 295-313
        (five classes).

    Example:
        >>> found = match(np.array([0.0, 0, 0, 0, 1, 1]), np.array([True, True, False, False, True, True]), np.arange(6))
        >>> found.kept.tolist(), found.prompts
        ([True, True, True, True, False, False], (4, 2))
    """
    distinct = np.unique(values)
    exact = len(distinct) <= bins
    edges = distinct[1:] if exact else np.unique(np.quantile(values, np.arange(1, bins) / bins))
    codes = np.searchsorted(edges, values, side="right").astype(np.int64)
    kept, lines = np.zeros(len(values), dtype=np.bool_), []
    for code in np.unique(codes):
        own = codes == code
        counts = [len(np.unique(prompts[own & side])) for side in (high, ~high)]
        whole = min(counts) >= FEWEST
        kept |= own & whole
        ends = float(values[own].min()), float(values[own].max())
        lines.append({"low": ends[0], "high": ends[1], "prompts_above": counts[0], "prompts_below": counts[1], "kept": whole})
    left = len(np.unique(prompts[kept]))
    imbalance = _gap(values, high, np.zeros_like(codes)), _gap(values[kept], high[kept], codes[kept])
    spread = float(values.std())
    return Matching(
        codes,
        kept,
        exact,
        tuple(lines),
        (left, len(np.unique(prompts)) - left),
        (imbalance[0] / spread, imbalance[1] / spread) if spread else (0.0, 0.0),
    )


def _gap(values: Floats, high: Bools, bins: Codes) -> float:
    """Mean difference between the halves within bins, bins weighted by their units."""
    total = 0.0
    for code in np.unique(bins):
        own = bins == code
        if (own & high).any() and (own & ~high).any():
            total += own.mean() * (values[own & high].mean() - values[own & ~high].mean())
    return float(total)
