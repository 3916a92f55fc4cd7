"""Correlations over cells: whether what is learnt well spreads far, and whether two grids are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from emprobe.errors import EmprobeError, MismatchError
from emprobe.stats import null_of
from emprobe.studies.transfer.cell_rates import Cell, CellRate
from emprobe.types import Estimate

Floats = NDArray[np.float64]
FEWEST = 4
"""Pairs below which a correlation has no interval (Fisher's z has n - 3 in its denominator)."""


def correlation(x: Floats, y: Floats, *, permutations: int = 999, seed: int = 0) -> Estimate:
    """Pearson's r of independent pairs, its interval by Fisher's z, its null by exchanging one side.

    Args:
        x: `[n]`.
        y: `[n]`.
        permutations: Of the null.
        seed: Of the null.

    Raises:
        EmprobeError: If there are fewer than four pairs, or one side does not vary.

    Example:
        >>> round(correlation(np.array([0.0, 1, 2, 3]), np.array([1.0, 3, 5, 6]), permutations=19).value, 3)
        0.99
    """
    n = len(x)
    if n < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise EmprobeError(f"A correlation was asked of {n} pairs; it needs at least {FEWEST}, and both sides must vary.")
    found = stats.pearsonr(x, y)
    value, ends = float(found.statistic), found.confidence_interval()
    rng = np.random.default_rng(seed)
    null = null_of("exchanged pairs", value, [float(np.corrcoef(x, rng.permutation(y))[0, 1]) for _ in range(permutations)])
    low, high = (value, value) if abs(value) > 1 - 1e-12 else (float(ends.low), float(ends.high))
    return Estimate(value, low, high, n, n, f"Fisher's z over {n} pairs", null=null)


def learnt_and_spread(
    cells: Sequence[CellRate], elsewhere: Mapping[Cell, float] | None = None, *, permutations: int = 999, seed: int = 0
) -> dict[str, Any]:
    """Rate in the trained cell itself against the rate elsewhere, over trained cells: the data-level form of reliability.

    A trained cell with a high rate everywhere, for whatever reason, makes both high: this shows that they go together, not why.

    Args:
        cells: The grid's rates.
        elsewhere: Rate of each trained cell on other questions, such as a general set.
        permutations: Of the null.
        seed: Of the null.

    Returns:
        `general` (`None` without other questions) and `neither` (the mean over cells where domain and task both differ), each a
        correlation with its null, or `why` there is none; `cells`, the numbers behind them.

    Source: arXiv 2605.12798's released scores: r .68, .57 and .70 over 12 trained cells of three models.
    """
    own = {cell.trained: cell.rate for cell in cells if cell.relation == "same_cell" and cell.n}
    far: dict[Cell, list[float]] = {}
    for cell in cells:
        if cell.relation == "neither" and cell.n:
            far.setdefault(cell.trained, []).append(cell.rate)
    sides = {"general": dict(elsewhere or {}), "neither": {name: float(np.mean(rates)) for name, rates in far.items()}}
    found: dict[str, Any] = {}
    for side, rates in sides.items():
        names = [name for name in own if name in rates]
        try:
            x, y = np.array([own[name] for name in names]), np.array([rates[name] for name in names])
            found[side] = correlation(x, y, permutations=permutations, seed=seed).as_dict() if rates else None
        except EmprobeError as error:
            found[side] = {"value": None, "low": None, "high": None, "why": str(error)}
    found["cells"] = [
        {"cell": " ".join(name), "in_cell": own[name], **{side: rates.get(name) for side, rates in sides.items()}} for name in own
    ]
    return found


def grids_agree(a: Sequence[CellRate], b: Sequence[CellRate], *, permutations: int = 999, seed: int = 0) -> dict[str, Any]:
    """Correlation of two grids' rates over the cells that both have.

    `raw` is of the rates as they are, where common main effects (cells that are easy for every model) count; `centred` has the means of
    every trained and every asked cell taken off. The null gives the second grid's trained and asked cells other places, one and the
    same for both where they are the same cells, so that its diagonal stays a diagonal. Intervals leave out one trained cell at a time.

    Raises:
        MismatchError: If fewer than four trained or asked cells are in both.
        EmprobeError: If one grid is constant.

    Source: Mantel (1967), Cancer Research 27, 209-220, for two matrices of any kind; Hubert (1987), Assignment Methods.
    """
    rates = [{(cell.trained, cell.asked): cell.rate for cell in cells if cell.n} for cells in (a, b)]
    common = rates[0].keys() & rates[1].keys()
    trained, asked = (sorted({pair[side] for pair in common}) for side in (0, 1))
    if len(trained) < FEWEST or len(asked) < FEWEST:
        raise MismatchError(
            f"Two grids share {len(trained)} trained and {len(asked)} asked cells; a comparison needs {FEWEST} of each. Are they of the "
            "same domains and tasks?"
        )
    x, y = (np.array([[one.get((t, q), np.nan) for q in asked] for t in trained]) for one in rates)
    x, y = np.where(np.isnan(y), np.nan, x), np.where(np.isnan(x), np.nan, y)
    rng, square = np.random.default_rng(seed), trained == asked
    places = []
    for _ in range(permutations):
        rows = rng.permutation(len(trained))
        places.append((rows, rows if square else rng.permutation(len(asked))))
    found: dict[str, Any] = {"cells": len(common)}
    for name, view in (("raw", lambda m: m), ("centred", _centred)):
        value = _r(view(x), view(y))
        null = null_of("cells in other places", value, [_r(view(x), view(y[np.ix_(*at)])) for at in places])
        left = np.array([_r(view(np.delete(x, i, 0)), view(np.delete(y, i, 0))) for i in range(len(trained))])
        k = len(trained)
        half = float(stats.t.ppf(0.975, k - 1) * np.sqrt((k - 1) / k * ((left - value) ** 2).sum()))
        ends = max(value - half, -1.0), min(value + half, 1.0)
        found[name] = Estimate(value, *ends, len(common), k, f"jackknife over {k} trained cells, Student's t", null=null).as_dict()
    return found


def _centred(values: Floats) -> Floats:
    """Without the means of rows and columns; of a grid with holes, by alternating."""
    left, sweeps = values, 1 if np.isfinite(values).all() else 50
    for _ in range(sweeps):
        left = left - np.nanmean(left, axis=1, keepdims=True)
        left = left - np.nanmean(left, axis=0, keepdims=True)
    return left


def _r(x: Floats, y: Floats) -> float:
    there = np.isfinite(x) & np.isfinite(y)
    a, b = x[there], y[there]
    if len(a) < FEWEST or np.ptp(a) < 1e-12 or np.ptp(b) < 1e-12:
        raise EmprobeError("Two grids were to be compared of which one is constant; there is no correlation of it.")
    return float(np.corrcoef(a, b)[0, 1])
