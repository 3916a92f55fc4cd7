"""Intervals of rows that belong together in two ways: coverage in simulation, and what they are where theory says it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from emprobe.clusters import BOTH, Draws, Resampling, means, ratio
from emprobe.errors import EmprobeError
from emprobe.stats import clustered_interval
from emprobe.types import Estimate


def crossed(
    rng: np.random.Generator,
    cells: int,
    prompts: int,
    rate: float,
    spread: tuple[float, float],
    *,
    answers: int = 1,
    nested: bool = False,
    unequal: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows of 0 and 1 of a mean of `rate` over all cells and prompts there could be, whose probits vary by cell and by prompt."""
    of_cell, of_prompt = rng.normal(0, spread[0], cells), rng.normal(0, spread[1], prompts)
    cell, prompt = (index.ravel() for index in np.indices((cells, prompts)))
    if nested:
        kept = prompt % cells == cell
    elif unequal:  # cells with anything from a twentieth to all of the prompts
        kept = rng.random(len(cell)) < (rng.random(cells) ** 3 + 0.05)[cell]
    else:
        kept = np.ones(len(cell), dtype=bool)
    cell, prompt = np.repeat(cell[kept], answers), np.repeat(prompt[kept], answers)
    threshold = stats.norm.ppf(rate) * np.sqrt(1 + spread[0] ** 2 + spread[1] ** 2)
    x = threshold + of_cell[cell] + of_prompt[prompt] + rng.normal(size=len(cell)) > 0
    return x.astype(np.float64), {"prompts": prompt, "cells": cell}


DESIGNS = {
    "rows are independent": ((12, 60, 0.4, (0, 0)), {}),
    "cells differ": ((12, 60, 0.5, (0.5, 0)), {}),
    "prompts differ": ((12, 60, 0.3, (0, 1)), {}),
    "both differ, four answers": ((12, 60, 0.3, (0.4, 0.8)), {"answers": 4}),
    "few of both": ((6, 24, 0.4, (0.4, 0.8)), {"answers": 2}),
    "prompts within cells": ((12, 120, 0.5, (0.4, 0.8)), {"nested": True, "answers": 2}),
    "cells of unequal size": ((30, 50, 0.15, (0.4, 0.7)), {"unequal": True}),
    "many cells": ((40, 40, 0.3, (0.5, 0.5)), {}),
}


@pytest.mark.parametrize("design", DESIGNS)
def test_the_interval_over_both_covers_the_truth(design: str) -> None:
    arguments, more = DESIGNS[design]
    rng, reps, hits = np.random.default_rng(5), 400, 0
    for seed in range(reps):
        x, clusterings = crossed(rng, *arguments, **more)
        (found,) = means(x[:, None], clusterings, Resampling(draws=400, seed=seed))
        hits += found.low <= arguments[2] <= found.high
    # 0.92 to 0.98, and a simulation's own error at its end.
    assert 0.91 <= hits / reps <= 0.985


def test_one_way_alone_does_not_cover_what_varies_in_two() -> None:
    rng, reps = np.random.default_rng(6), 200
    hits = dict.fromkeys(("prompts", "cells", BOTH), 0)
    for seed in range(reps):
        x, clusterings = crossed(rng, 12, 60, 0.3, (0.4, 0.8))
        (found,) = means(x[:, None], clusterings, Resampling(draws=300, seed=seed))
        for name in hits:
            hits[name] += found.intervals[name].low <= 0.3 <= found.intervals[name].high
    assert hits["prompts"] < 0.88 * reps < 0.92 * reps <= hits[BOTH]
    assert hits["cells"] < hits[BOTH]


@pytest.mark.parametrize("rate", [0.005, 0.03, 0.98])
def test_near_zero_and_one_it_covers_at_least_as_often_and_is_no_whole_range(rate: float) -> None:
    rng, reps = np.random.default_rng(7), 150
    widths, hits = [], 0
    for seed in range(reps):
        x, clusterings = crossed(rng, 12, 60, rate, (0.2, 0.4))
        (found,) = means(x[:, None], clusterings, Resampling(draws=200, seed=seed))
        hits += found.low <= rate <= found.high
        widths.append(found.high - found.low)
    assert hits / reps >= 0.93
    assert np.median(widths) < 0.15


def test_the_ratio_of_two_groups_covers_the_truth() -> None:
    rng, reps, hits = np.random.default_rng(8), 300, 0
    for seed in range(reps):
        # The same cells have a high rate on one half of the prompts and a lower one on the other.
        lift = rng.normal(0, 0.3, 12)
        x, y = ((rng.normal(size=(12, 60)) + lift[:, None] < stats.norm.ppf(rate) * np.sqrt(1.09)).astype(float) for rate in (0.4, 0.8))
        cells, prompts = (index.ravel() for index in np.indices((12, 60)))
        one, two = {"prompts": prompts, "cells": cells}, {"prompts": prompts + 60, "cells": cells}
        found = ratio(x.ravel(), y.ravel(), one, two, Resampling(draws=300, seed=seed))
        hits += found.low <= 0.5 <= found.high
    assert 0.91 <= hits / reps <= 0.985


def test_a_draw_takes_the_same_cells_in_both_sides_of_a_ratio() -> None:
    # Every cell halves its own rate, whatever it is: matched draws cancel the cells.
    levels = np.repeat([0.2, 0.4, 0.6, 0.8, 1.0, 0.4], 100)
    cells, within = np.repeat(np.arange(6), 100), np.tile(np.arange(100), 6)
    x, y = (within < 50 * levels).astype(float), (within < 100 * levels).astype(float)
    found = ratio(x, y, {"cells": cells}, {"cells": cells})
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_with_one_clustering_it_is_the_clustered_interval() -> None:
    rng = np.random.default_rng(9)
    x, codes = rng.integers(0, 2, 200).astype(float), np.repeat(np.arange(40), 5)
    (ours,), theirs = means(x[:, None], {"clusters": codes}), clustered_interval(x, [f"{code:02d}" for code in codes])
    assert ours.method == theirs.method
    assert (ours.value, ours.low, ours.high) == pytest.approx((theirs.value, theirs.low, theirs.high), abs=1e-12)


def test_the_width_over_both_is_that_of_the_two_way_variance() -> None:
    # Cameron, Gelbach and Miller by hand for a balanced table of means: V_a + V_b - V_ab.
    rng = np.random.default_rng(10)
    table = 50 + rng.normal(0, 4, (30, 1)) + rng.normal(0, 3, (1, 40)) + rng.normal(0, 5, (30, 40))
    cells, prompts = (index.ravel() for index in np.indices(table.shape))
    (found,) = means(table.reshape(-1, 1), {"cells": cells, "prompts": prompts}, Resampling(draws=20_000))
    of_cells, of_prompts = table.mean(axis=1).var(ddof=1) / 30, table.mean(axis=0).var(ddof=1) / 40
    both = of_cells + of_prompts - table.var() / table.size
    df = both**2 / (of_cells**2 / 29 + of_prompts**2 / 39)
    assert (found.high - found.low) / 2 == pytest.approx(stats.t.ppf(0.975, df) * np.sqrt(both), rel=0.03)
    assert found.method.startswith("bootstrap over 30 cells and 40 prompts, crossed")


def test_crossing_one_way_with_itself_changes_next_to_nothing() -> None:
    # Only the degrees of freedom do, since the ways are taken for different ones: 12 of Student's in place of 24.
    rng = np.random.default_rng(11)
    codes = np.repeat(np.arange(25), 8)
    x = (rng.random(200) < rng.random(25)[codes]).astype(float)
    (found,) = means(x[:, None], {"prompts": codes, "cells": codes}, Resampling(draws=8000))
    one, both = found.intervals["prompts"], found.intervals[BOTH]
    assert both.high - both.low == pytest.approx((one.high - one.low) * stats.t.ppf(0.975, 12) / stats.t.ppf(0.975, 24), rel=0.03)


def test_owens_crossed_draws_are_too_wide_where_rows_are_independent() -> None:
    # His theorem: the variance of the rows' own noise is counted three times, so the interval is sqrt(3) as wide.
    rng = np.random.default_rng(12)
    table = rng.normal(size=(40, 50))
    weights_a, weights_b = (rng.multinomial(k, np.full(k, 1 / k), 4000).astype(float) for k in table.shape)
    theirs = (((weights_a @ table) * weights_b).sum(axis=1) / table.size).std()
    cells, prompts = (index.ravel() for index in np.indices(table.shape))
    (ours,) = means(table.reshape(-1, 1), {"cells": cells, "prompts": prompts}, Resampling(draws=4000))
    assert theirs == pytest.approx(np.sqrt(3 / table.size), rel=0.08)
    assert (ours.high - ours.low) / (2 * 1.96) < 0.8 * theirs


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_every_interval_holds_its_value_and_stays_between_0_and_1(rows: list[tuple[int, int, bool]]) -> None:
    cells, prompts, hits = (np.array(column) for column in zip(*rows, strict=True))
    (found,) = means(hits.astype(float)[:, None], {"prompts": prompts, "cells": cells}, Resampling(draws=50))
    for one in (found, *found.intervals.values()):
        assert 0 <= one.low <= one.value <= one.high <= 1
    assert found.low < found.high


def test_a_single_cluster_is_left_out_and_without_any_rows_stand_alone() -> None:
    x = np.array([[1.0], [0.0], [1.0], [0.0]])
    (found,) = means(x, {"prompts": np.array([3, 3, 9, 9]), "cells": np.zeros(4, dtype=np.int64)})
    assert list(found.intervals) == ["prompts"]
    (alone,) = means(x, {"prompts": np.zeros(4, dtype=np.int64)})
    assert (alone.clusters, alone.method[:16]) == (1, "one cluster only")


def test_columns_share_their_draws_and_seeds_matter() -> None:
    rng = np.random.default_rng(13)
    x, codes = rng.normal(size=(60, 1)), np.repeat(np.arange(15), 4)
    one, two = means(np.hstack([x, x]), {"prompts": codes})
    assert (one.low, one.high) == (two.low, two.high)
    (other,) = means(x, {"prompts": codes}, Resampling(seed=1))
    assert other.low != one.low


def test_what_cannot_be_estimated_is_refused() -> None:
    ones = np.ones((4, 1))
    codes = np.array([0, 0, 1, 1])
    with pytest.raises(EmprobeError, match="nothing can be said of nothing"):
        means(np.empty((0, 1)), {})
    with pytest.raises(EmprobeError, match="3 clusterings were given \\(a, b, c\\)"):
        means(ones, {"a": codes, "b": codes, "c": codes})
    with pytest.raises(EmprobeError, match="which is 0 in 4 rows"):
        ratio(np.ones(4), np.zeros(4), {"a": codes}, {"a": codes})
    with pytest.raises(EmprobeError, match="level 95"):
        means(ones, {"a": codes}, Resampling(level=95))
    with pytest.raises(EmprobeError, match="1 are NaN"):
        means(np.array([[1.0], [np.nan]]), {})


def test_any_statistic_of_sums_has_intervals() -> None:
    rng = np.random.default_rng(14)
    columns = np.column_stack([rng.normal(3, 1, 200), np.ones(200)])
    found = Draws(columns, {"prompts": np.arange(200)}, Resampling()).estimate(lambda sums: np.log(sums[..., 0] / sums[..., 1]))
    assert found.value == pytest.approx(np.log(columns[:, 0].mean()))
    assert 0 < found.high - found.low < 0.2


def test_the_intervals_stand_in_the_json() -> None:
    (found,) = means(np.array([[1.0], [0.0], [1.0], [1.0]]), {"prompts": np.array([0, 1, 0, 1]), "cells": np.array([0, 0, 1, 1])})
    written = found.as_dict()["intervals"]
    assert list(written) == ["prompts", "cells", "both"]
    assert (written["both"]["low"], written["both"]["high"]) == (found.low, found.high)
    assert set(written["cells"]) == {"low", "high", "clusters", "method"}
    assert isinstance(found.intervals["cells"], Estimate)
    assert "intervals" not in Estimate(0.5, 0.4, 0.6, 3, 3, "x").as_dict()


def test_two_clusters_that_disagree_leave_a_wide_interval_over_both():
    prompts, bases = np.tile(np.arange(40), 2), np.repeat([0, 1], 40)
    values = np.where(bases == 0, 0.1, 0.9) + np.random.default_rng(0).normal(0, 0.05, 80)
    (found,) = means(values[:, None], {"prompts": prompts, "bases": bases})
    of_bases = found.intervals["bases"]
    # Two bases at .1 and .9 say next to nothing of a third; answering many prompts changes nothing in that.
    assert found.high - found.low > 0.9 * (of_bases.high - of_bases.low)
