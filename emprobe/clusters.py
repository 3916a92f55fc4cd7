"""Means with one interval for each way in which their rows belong together, and one for two ways at once.

Answers to one question resemble each other, and so do all answers of one fine-tune. Where every fine-tune answered every question,
neither clustering alone shows the whole doubt: in simulations with both kinds of resemblance, intervals over questions alone held the
truth in 71 to 88 % of cases, over fine-tunes alone in 84 to 92 %, and over both in 93 to 95 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import stats as scipy_stats

from emprobe._resampling import (
    Codes,
    Floats,
    design_effect,
    is_proportion,
    normal_quantile,
    number_pairs,
    ratio_interval,
    resample,
    usable_rows,
    wilson,
)
from emprobe.errors import EmprobeError
from emprobe.types import Estimate

Statistic = Callable[[Floats], Floats]
"""Column sums `[..., c]` to the number `[...]`; sums over no rows may give NaN or infinity."""
Clusterings = Mapping[str, Codes]
"""By name (`prompts`, `cells`), the number of each row's cluster, `[n]` from 0."""

SPARSE = 5.0  # with fewer effective rows than this on either side, a proportion's bootstrap alone is too narrow
BOTH = "both"


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn: the coverage aimed at, the bootstrap draws, and their seed (same seed, same interval).

    Raises:
        EmprobeError: If level is no share, there is no draw, or the seed is negative.
    """

    level: float = 0.95
    draws: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        normal_quantile(self.level)
        if self.draws < 1 or self.seed < 0:
            raise EmprobeError(
                f"A bootstrap of {self.draws} draws with the seed {self.seed} was asked for; it needs at least one draw, 2000 for an "
                "interval, and a seed of 0 or more."
            )


def means(columns: Floats, clusterings: Clusterings, how: Resampling | None = None) -> list[Estimate]:
    """Mean of each column over all rows; all columns share their draws.

    Args:
        columns: `[n, c]`, finite. A column of 0 and 1 is a proportion: where fewer than five effective rows remain on one side, its
            interval is widened to hold Wilson's for the effective n.
        clusterings: At most two. One that has a single cluster shows nothing and is left out; without any, rows are independent.
        how: Level, draws and seed.

    Returns:
        Estimates whose `intervals` hold one for every clustering and, if there are two, the crossed one, `both`, which is the
        estimate's own. See `Draws` for how it is made.

    Raises:
        EmprobeError: If there are no rows, a number is not finite, or there are more than two clusterings.

    Example:
        >>> (found,) = means(np.array([[1.0], [0.0], [1.0], [1.0]]), {"prompts": np.array([0, 0, 1, 1])})
        >>> found.value, found.clusters
        (0.75, 2)
    """
    for column in columns.T:
        usable_rows(column)
    drawn = Draws(np.column_stack([columns, np.ones(len(columns))]), clusterings, how or Resampling())
    found = []
    for i, column in enumerate(columns.T):
        share = is_proportion(column)
        made = drawn.estimate(_mean_of(i), (0.0, 1.0) if share else None, [column] if share else [])
        if not share and np.ptp(column) == 0:
            made = replace(made, method=made.method + "; all rows are equal, so they show no doubt")
        found.append(made)
    return found


def _mean_of(column: int) -> Statistic:
    return lambda sums: sums[..., column] / sums[..., -1]


def ratio(a: Floats, b: Floats, clusterings_a: Clusterings, clusterings_b: Clusterings, how: Resampling | None = None) -> Estimate:
    """Mean of `a` over mean of `b`, two proportions; each draw takes the same clusters in both.

    Args:
        a: Rows of 0 and 1, `[n]`.
        b: Others, `[m]`.
        clusterings_a: As in `means`.
        clusterings_b: The same for `b`, by the same names and in the same numbering.
        how: Level, draws and seed.

    Raises:
        EmprobeError: If the mean of `b` is 0, or as in `means`.

    Example:
        >>> ratio(np.array([1.0, 0.0]), np.array([1.0, 1.0]), {"cells": np.array([0, 1])}, {"cells": np.array([0, 1])}).value
        0.5
    """
    x, y = usable_rows(a), usable_rows(b)
    if not y.any():
        raise EmprobeError(f"A ratio to a rate was asked for which is 0 in {len(y)} rows; there is no such number. Take another reference.")
    columns = np.zeros((len(x) + len(y), 4))
    columns[: len(x), :2] = np.column_stack([x, np.ones(len(x))])
    columns[len(x) :, 2:] = np.column_stack([y, np.ones(len(y))])
    joint = {name: np.concatenate([codes, clusterings_b[name]]) for name, codes in clusterings_a.items()}
    drawn = Draws(columns, joint, how or Resampling())
    return drawn.estimate(
        lambda s: s[..., 0] * s[..., 3] / (s[..., 1] * s[..., 2]), (0.0, np.inf), [x, y], (slice(len(x)), slice(len(x), None))
    )


@dataclass(frozen=True, eq=False)
class Draws:
    """Columns of rows, the ways in which the rows cluster, and bootstrap draws of whole clusters that all statistics share.

    One clustering: its clusters are drawn with replacement, a drawn one bringing all its rows; deviations are scaled by
    sqrt(k / (k - 1)) and Student's t over the normal quantile, since k clusters are few. Two: the deviations of both are added, and
    scaled so that their variance is V_a + V_b - V_ab, with V the cluster-robust variances and V_ab that of the pairs of both, since
    each way holds the rows' own noise; never less than either alone. Student's degrees of freedom are Satterthwaite's.

    Source: Davison & Hinkley (1997), section 3.8 (whole clusters); Cameron, Gelbach & Miller (2011), Journal of Business & Economic
        Statistics 29, 238-249 (two ways). Drawing both ways at once and multiplying the weights (Owen 2007, Annals of Applied
        Statistics 1, 386-411) counts the rows' own noise three times, as that paper shows: 99 % of intervals hold the truth where
        rows do not resemble each other.
    """

    columns: Floats
    clusterings: Clusterings
    how: Resampling

    def __post_init__(self) -> None:
        if not len(self.columns):
            raise EmprobeError("An estimate was asked of no rows: nothing can be said of nothing. Check the filter that led here.")
        if len(self.clusterings) > 2:
            raise EmprobeError(
                f"{len(self.clusterings)} clusterings were given ({', '.join(self.clusterings)}); two at most can be crossed."
            )

    @cached_property
    def ways(self) -> dict[str, tuple[Codes, int]]:
        """The clusterings that have several clusters, numbered anew without gaps, with their number; else every row alone."""
        dense = {name: np.unique(codes, return_inverse=True) for name, codes in self.clusterings.items()}
        found = {name: (codes.astype(np.int64), len(names)) for name, (names, codes) in dense.items() if len(names) > 1}
        return found or {"rows": (np.arange(len(self.columns)), len(self.columns))}

    @cached_property
    def pairs(self) -> Codes:
        """Which rows share both clusters."""
        (a, _), (b, k) = self.ways.values()
        return number_pairs(a, b, k)

    def estimate(
        self,
        statistic: Statistic,
        bounds: tuple[float, float] | None = None,
        shares: list[Floats] | None = None,
        places: tuple[slice, ...] = (slice(None),),
    ) -> Estimate:
        """A number with an interval for every clustering; the crossed one, if there are two, is the estimate's own.

        Args:
            statistic: The number, of column sums.
            bounds: Ends that no interval passes.
            shares: The rows of 0 and 1 whose proportion the number is, or the ratio of whose proportions; none for other numbers.
            places: Which rows these are.
        """
        value = float(statistic(self._totals))
        found = {}
        for name in (*self.ways, *([BOTH] if len(self.ways) == 2 else [])):
            low, high, k, method = self._ends(name, statistic, value)
            alone = [self._alone(name, x, place) for x, place in zip(shares or [], places, strict=False)]
            if any(min(one.value, 1 - one.value) * effective < SPARSE for one, effective in alone):
                ends = (alone[0][0].low, alone[0][0].high) if len(alone) == 1 else ratio_interval(alone[0][0], alone[1][0])
                low, high = min(low, ends[0]), max(high, ends[1])
                method += f", widened by {'Wilson' if len(alone) == 1 else 'MOVER of Wilson intervals'} at effective n "
                method += " and ".join(f"{effective:.1f}" for _, effective in alone)
            if bounds is not None:
                low, high = max(low, bounds[0]), min(high, bounds[1])
            found[name] = Estimate(value, low, high, len(self.columns), k, method, self.how.level)
        own = found[BOTH if BOTH in found else next(iter(found))]
        if self.clusterings and "rows" in found:
            return replace(own, clusters=1, method=f"one cluster only, its rows taken as independent: {own.method}")
        return replace(own, intervals=found)

    def percentiles(self, statistic: Statistic, name: str) -> tuple[float, float]:
        """Plain percentiles of the draws over one clustering, as papers give them: with a dozen clusters, too narrow.

        In simulations of a ratio of two rates over 12 clusters, 87 to 92 % of such 95 % intervals held the truth, and 92 to 96 % of
        those that `estimate` gives.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            found = statistic(self._drawn[name])
        low, high = np.quantile(found[np.isfinite(found)], [0.5 - self.how.level / 2, 0.5 + self.how.level / 2])
        return float(low), float(high)

    # ---- one clustering, and two

    @cached_property
    def _totals(self) -> Floats:
        return np.asarray(self.columns.sum(axis=0))

    @cached_property
    def _drawn(self) -> dict[str, Floats]:
        """Column sums of every draw, `[draws, c]`, by clustering; each has a stream of its own."""
        drawn = {}
        for i, (name, (codes, k)) in enumerate(self.ways.items()):
            table: Floats = np.stack([np.bincount(codes, column, k) for column in self.columns.T], axis=1).astype(np.float64)
            drawn[name] = resample(table, self.how.draws, self.how.seed + i)
        return drawn

    def _deviations(self, name: str, statistic: Statistic, value: float) -> Floats:
        """Draws minus the value, `[draws]`, freed of the bias of few clusters; NaN for a draw that has no such number."""
        k = self.ways[name][1]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (statistic(self._drawn[name]) - value) * np.sqrt(k / max(k - 1, 1))
        return np.where(np.isfinite(found), found, np.nan)

    def _ends(self, name: str, statistic: Statistic, value: float) -> tuple[float, float, int, str]:
        level, words = self.how.level, f"t-scaled, {self.how.draws} draws"
        if name != BOTH:
            k, df = self.ways[name][1], float(self.ways[name][1] - 1)
            deviations, method = self._deviations(name, statistic, value), f"bootstrap over {k} {name}, {words}"
        else:
            (a, (_, k_a)), (b, (_, k_b)) = self.ways.items()
            shrink, df = self._two_ways(statistic)
            deviations = shrink * (self._deviations(a, statistic, value) + self._deviations(b, statistic, value))
            k, method = min(k_a, k_b), f"bootstrap over {k_a} {a} and {k_b} {b}, crossed, {words}"
        if df == 0:  # a single row
            return value, value, k, method
        scale = float(scipy_stats.t.ppf(0.5 + level / 2, df)) / normal_quantile(level)
        low, high = scale * np.nanquantile(np.append(deviations, 0.0), [0.5 - level / 2, 0.5 + level / 2])
        # A skewed set of draws may lie wholly on one side of the value; the interval still holds it.
        return value + min(float(low), 0.0), value + max(float(high), 0.0), k, method

    def _two_ways(self, statistic: Statistic) -> tuple[float, float]:
        """By what factor the sum of both ways' deviations is too wide, inverted; and the degrees of freedom."""
        (_, k_a), (_, k_b) = self.ways.values()
        influence = self.columns @ self._gradient(statistic)
        a, b = (float((np.bincount(codes, influence) ** 2).sum()) * k / (k - 1) for codes, k in self.ways.values())
        if a + b == 0:
            return 1.0, float(min(k_a, k_b) - 1)
        own = float((np.bincount(self.pairs, influence) ** 2).sum())
        both = max(a + b - own, a, b)
        # Satterthwaite's degrees of freedom; where one way is all the doubt, there are not fewer than it has by itself.
        df = both**2 / (a**2 / (k_a - 1) + b**2 / (k_b - 1))
        return float(np.sqrt(both / (a + b))), max(df, float(min(k_a, k_b) - 1))

    def _gradient(self, statistic: Statistic) -> Floats:
        """Of the statistic at the column sums, by central differences, `[c]`."""
        step = np.maximum(np.abs(self._totals), 1.0) * 1e-5
        up, down = statistic(self._totals + np.diag(step)), statistic(self._totals - np.diag(step))
        return np.asarray((up - down) / (2 * step))

    # ---- near 0 and 1

    def _alone(self, name: str, x: Floats, place: slice) -> tuple[Estimate, float]:
        """A proportion with Wilson's interval at its effective n under a clustering, and that n."""
        effects = [design_effect(x, codes[place], k) for codes, k in self.ways.values()]
        if name == BOTH:
            pairs = self.pairs[place]
            effect = max(sum(effects) - design_effect(x, pairs, int(pairs.max()) + 1), *effects)
        else:
            effect = effects[list(self.ways).index(name)]
        value, effective = float(x.mean()), len(x) / effect
        return Estimate(value, *wilson(value * effective, effective, self.how.level), len(x), 1, "Wilson", self.how.level), effective
