"""Intervals cover what they promise, merge and permute as the theorems say, and never speak of nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from emprobe.errors import EmprobeError, MismatchError
from emprobe.stats import (
    Moments,
    clustered_interval,
    effective_n,
    null_of,
    paired_difference,
    percentile_of,
    permutation_p,
    share_removed,
    wilson,
)
from emprobe.types import Estimate, Null

LEVEL_Z = 1.959963984540054


def names(questions: int, answers: int) -> list[str]:
    return [f"q{i}" for i in range(questions) for _ in range(answers)]


# ---- Wilson


@pytest.mark.parametrize(("successes", "n", "level"), [(0, 10, 0.95), (3, 10, 0.95), (10, 10, 0.95), (81, 263, 0.95), (7, 40, 0.8)])
def test_wilson_is_scipys(successes: int, n: int, level: float) -> None:
    theirs = scipy_stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert wilson(successes, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_by_hand() -> None:
    # 5 of 10: centre 1/2, half-width z/(1 + z²/n) sqrt(1/40 + z²/400).
    half = LEVEL_Z / (1 + LEVEL_Z**2 / 10) * math.sqrt(1 / 40 + LEVEL_Z**2 / 400)
    assert wilson(5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(EmprobeError, match="Give 0 <= successes <= n"):
        wilson(successes, n)


# ---- one mean


def beta_binomial(rng: np.random.Generator, questions: int, answers: int, rate: float, correlation: float) -> np.ndarray:
    """Rows of 0 and 1 whose questions have rates of their own (intra-question correlation as given)."""
    total = 1 / correlation - 1
    rates = rng.beta(rate * total, (1 - rate) * total, questions) if correlation < 1 else (rng.random(questions) < rate).astype(float)
    return (rng.random((questions, answers)) < rates[:, None]).astype(float).ravel()


@pytest.mark.parametrize(
    ("questions", "answers", "rate", "correlation"),
    [(30, 4, 0.5, 0.3), (30, 4, 0.3, 1e-6), (12, 20, 0.4, 0.2), (60, 1, 0.35, 0.5)],
    ids=["questions differ", "questions agree", "few questions", "one answer each"],
)
def test_intervals_cover_the_truth(questions: int, answers: int, rate: float, correlation: float) -> None:
    rng = np.random.default_rng(5)
    clusters = names(questions, answers)
    reps = 800
    hits = 0
    for _ in range(reps):
        interval = clustered_interval(beta_binomial(rng, questions, answers, rate, correlation), clusters, draws=400)
        hits += interval.low <= rate <= interval.high
    assert 0.92 <= hits / reps <= 0.98


def test_a_rare_rate_is_covered_too() -> None:
    # Here the plain bootstrap covers about three times in four: many draws hold no event at all.
    rng = np.random.default_rng(6)
    clusters = names(20, 5)
    rows = [beta_binomial(rng, 20, 5, 0.03, 0.2) for _ in range(500)]
    hits = [(found := clustered_interval(x, clusters, draws=400)).low <= 0.03 <= found.high for x in rows]
    assert np.mean(hits) >= 0.94


def test_questions_that_differ_make_the_interval_wider_than_the_naive_one() -> None:
    values = [1.0] * 100 + [0.0] * 100
    clusters = names(8, 25)
    clustered, naive = clustered_interval(values, clusters), clustered_interval(values, None)
    # Whole questions are 0 or 1, so the design effect is 25 and the interval five times as wide, and Student's t for 8 adds to it.
    assert 4 < (clustered.high - clustered.low) / (naive.high - naive.low) < 8
    assert (clustered.n, clustered.clusters, naive.clusters) == (200, 8, 200)


def test_one_row_a_question_is_the_ordinary_bootstrap() -> None:
    x = np.random.default_rng(1).normal(size=400)
    ours = clustered_interval(x, [f"q{i}" for i in range(400)], draws=20_000)
    theirs = scipy_stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.004)


def test_the_interval_of_a_mean_has_the_students_width() -> None:
    # Ten clusters of equal size: the cluster-robust t interval is the textbook's, on the ten means.
    x = np.random.default_rng(3).normal(size=(10, 6))
    ours = clustered_interval(x.ravel(), names(10, 6), draws=40_000)
    half = scipy_stats.t.ppf(0.975, 9) * x.mean(axis=1).std(ddof=1) / math.sqrt(10)
    assert (ours.high - ours.low) / 2 == pytest.approx(half, rel=0.05)


def test_same_seed_same_interval_whatever_the_order_of_rows() -> None:
    rng = np.random.default_rng(4)
    x, clusters = rng.integers(0, 2, 60), names(15, 4)
    order = rng.permutation(60)
    one, two = clustered_interval(x, clusters), clustered_interval(x[order], [clusters[i] for i in order])
    assert one == clustered_interval(x, clusters)
    assert (one.low, one.high) == pytest.approx((two.low, two.high), abs=1e-12)
    noise = rng.normal(size=60)
    assert clustered_interval(noise, clusters).low != clustered_interval(noise, clusters, seed=1).low


def test_a_rate_of_zero_has_an_upper_end_as_if_each_question_counted_once() -> None:
    found = clustered_interval([0] * 240, names(60, 4))
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(wilson(0, 60)[1])
    assert "Wilson at effective n 60.0" in found.method
    mirrored = clustered_interval([1] * 240, names(60, 4))
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1.0))


def test_one_question_says_so_and_takes_wilson_of_its_rows() -> None:
    found = clustered_interval([0, 0, 0, 0, 0, 0], ["q"] * 6)
    assert found.clusters == 1
    assert found.method.startswith("one cluster only, its rows taken as independent")
    assert found.high == pytest.approx(wilson(0, 6)[1])


def test_a_single_row_still_has_an_interval() -> None:
    found = clustered_interval([1], ["q"])
    assert (found.value, found.n, found.high) == (1, 1, 1)
    assert found.low == pytest.approx(wilson(1, 1)[0])


def test_equal_rows_that_are_no_proportion_show_no_doubt_and_say_so() -> None:
    found = clustered_interval([80.0, 80.0, 80.0], ["a", "b", "c"])
    assert found.low == found.high == 80
    assert "all rows are equal" in found.method


def test_nothing_nan_and_wrong_lengths_are_refused() -> None:
    with pytest.raises(EmprobeError, match="nothing can be said of nothing"):
        clustered_interval([], [])
    with pytest.raises(EmprobeError, match="1 are NaN or infinite"):
        clustered_interval([1.0, math.nan], ["a", "b"])
    with pytest.raises(MismatchError, match="2 rows and 1 cluster names"):
        clustered_interval([1.0, 0.0], ["a"])
    with pytest.raises(EmprobeError, match="level 95"):
        clustered_interval([1.0, 0.0], ["a", "b"], level=95)
    with pytest.raises(EmprobeError, match="shape \\(1, 2\\)"):
        clustered_interval([[1.0, 0.0]], ["a"])
    with pytest.raises(EmprobeError, match="0 draws"):
        clustered_interval([1.0, 0.0], ["a", "b"], draws=0)


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40))
def test_an_interval_of_a_rate_holds_its_value_and_stays_between_0_and_1(rows: list[tuple[int, bool]]) -> None:
    found = clustered_interval([float(hit) for _, hit in rows], [question for question, _ in rows], draws=50)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


def test_the_effective_n_lies_between_questions_and_rows() -> None:
    clusters = names(10, 5)
    assert effective_n([0] * 50, clusters) == pytest.approx(10)
    assert effective_n([1] * 25 + [0] * 25, clusters) == pytest.approx(10)
    assert effective_n([1, 0, 1, 0, 1] * 10, clusters) > 35
    assert effective_n([0, 1, 0], ["a", "b", "c"]) == 3


# ---- two conditions


def test_a_matched_difference_is_narrower_than_its_two_rates() -> None:
    # Questions differ widely and the condition shifts all alike: matched draws cancel the questions.
    rng = np.random.default_rng(7)
    level = rng.normal(0, 10, 40).repeat(4)
    a, b = level + 1 + rng.normal(0, 0.1, 160), level + rng.normal(0, 0.1, 160)
    found = paired_difference(a, b, names(40, 4))
    assert found.value == pytest.approx(1, abs=0.05)
    assert found.high - found.low < 0.1 < clustered_interval(a, names(40, 4)).high - clustered_interval(a, names(40, 4)).low


def test_a_difference_with_itself_is_exactly_zero() -> None:
    x = np.random.default_rng(8).normal(size=40)
    found = paired_difference(x, x, names(10, 4))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_difference_covers_the_truth() -> None:
    rng = np.random.default_rng(9)
    clusters = names(25, 4)
    hits = 0
    for _ in range(500):
        a, b = beta_binomial(rng, 25, 4, 0.6, 0.3), beta_binomial(rng, 25, 4, 0.35, 0.3)
        found = paired_difference(a, b, clusters, draws=400)
        hits += found.low <= 0.25 <= found.high
    assert 0.92 <= hits / 500 <= 0.98


def test_conditions_may_have_lost_different_rows_to_missing_scores() -> None:
    found = paired_difference([1, 1, 0, 0], [0, 0, 0], ["p", "p", "q", "r"], ["p", "q", "r"])
    assert (found.value, found.n, found.clusters) == (0.5, 7, 3)


def test_conditions_on_other_questions_are_refused() -> None:
    with pytest.raises(MismatchError, match="share no question"):
        paired_difference([1, 0], [0, 0], ["a", "b"], ["c", "d"])
    with pytest.raises(MismatchError, match="2 and 1 rows"):
        paired_difference([1, 0], [0], ["a", "b"])


def test_the_share_removed_is_that_of_the_rates() -> None:
    rng = np.random.default_rng(10)
    tuned, ablated = beta_binomial(rng, 50, 4, 0.8, 0.3), beta_binomial(rng, 50, 4, 0.2, 0.3)
    found = share_removed(tuned, ablated, names(50, 4))
    assert found.value == pytest.approx(1 - ablated.mean() / tuned.mean())
    assert found.low < 0.75 < found.high < 1


def test_the_share_removed_covers_the_truth() -> None:
    rng = np.random.default_rng(11)
    clusters = names(30, 4)
    hits = 0
    for _ in range(500):
        tuned, ablated = beta_binomial(rng, 30, 4, 0.75, 0.2), beta_binomial(rng, 30, 4, 0.15, 0.2)
        found = share_removed(tuned, ablated, clusters, draws=400)
        hits += found.low <= 0.8 <= found.high
    assert 0.92 <= hits / 500 <= 0.98


def test_a_rare_rest_is_covered_too() -> None:
    rng = np.random.default_rng(14)
    clusters = names(20, 4)
    pairs = [(beta_binomial(rng, 20, 4, 0.8, 0.2), beta_binomial(rng, 20, 4, 0.02, 0.2)) for _ in range(400)]
    removed = [share_removed(tuned, ablated, clusters, draws=300) for tuned, ablated in pairs]
    differences = [paired_difference(tuned, ablated, clusters, draws=300) for tuned, ablated in pairs]
    assert np.mean([found.low <= 1 - 0.02 / 0.8 <= found.high for found in removed]) >= 0.94
    assert np.mean([found.low <= 0.78 <= found.high for found in differences]) >= 0.92


def test_everything_removed_still_leaves_doubt() -> None:
    found = share_removed([1] * 40, [0] * 40, names(10, 4))
    assert (found.value, found.high) == (1, 1)
    # MOVER by hand with the two Wilson ends at an effective n of ten: 1 - u / sqrt(l (2 - l)).
    low, high = wilson(10, 10)[0], wilson(0, 10)[1]
    assert found.low == pytest.approx(1 - high / math.sqrt(low * (2 - low)))


def test_one_answer_left_is_a_rare_rate_and_says_how_it_was_treated() -> None:
    one_left = share_removed([1, 0] * 20, [1] + [0] * 39, names(10, 4))
    assert one_left.method.endswith("widened by MOVER of Wilson intervals")
    # A single event cannot show more than one of many: the interval is no narrower than that of none left at all.
    none_left = share_removed([1, 0] * 20, [0] * 40, names(10, 4))
    assert one_left.low <= none_left.low
    common = share_removed([1, 1, 1, 0] * 10, [1, 1, 0, 0] * 10, names(10, 4))
    assert "MOVER" not in common.method


def test_nothing_to_remove_is_an_error_and_not_a_share() -> None:
    with pytest.raises(EmprobeError, match="tuned rate is 0 in 3 rows: there is nothing to remove"):
        share_removed([0, 0, 0], [0, 0, 0], ["a", "b", "c"])


def test_an_ablation_that_harms_has_a_negative_share() -> None:
    assert share_removed([1, 0, 0, 0], [1, 1, 0, 0], ["a", "b", "c", "d"]).value == -1


def test_one_question_compares_rates_by_wilson_and_refuses_means() -> None:
    found = paired_difference([1, 1, 1], [0, 0, 0], ["q"] * 3)
    assert found.method.startswith("one cluster only")
    assert found.low < 1 == found.value == found.high
    with pytest.raises(EmprobeError, match="at least two questions"):
        paired_difference([1.5, 2.5], [0.5, 0.7], ["q"] * 2)


# ---- nulls


def test_permutation_p_counts_the_value_among_the_draws() -> None:
    assert permutation_p(2, [1, 2, 3]) == 0.75
    assert permutation_p(9, range(19)) == pytest.approx(11 / 20)
    assert permutation_p(100, range(19)) == pytest.approx(1 / 20)
    assert percentile_of(100, range(19)) == pytest.approx(19 / 20)
    with pytest.raises(EmprobeError, match="nothing can be said of nothing"):
        permutation_p(1, [])
    with pytest.raises(EmprobeError, match="not a number"):
        permutation_p(math.nan, [1])


def test_permutation_p_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(12)
    found = []
    for _ in range(400):
        x = rng.normal(size=20)
        shuffled = rng.permuted(np.tile(x, (199, 1)), axis=1)
        found.append(permutation_p(x[:10].mean() - x[10:].mean(), shuffled[:, :10].mean(axis=1) - shuffled[:, 10:].mean(axis=1)))
    assert scipy_stats.kstest(found, "uniform").pvalue > 0.01


# ---- moments


@given(st.integers(0, 10_000), st.lists(st.integers(1, 7), min_size=1, max_size=6), st.booleans())
def test_merged_parts_are_the_whole_in_any_order(seed: int, sizes: list[int], full: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(1e3, 1, (sum(sizes) + 1, 3))
    parts = [Moments.from_rows(rows, full=full) for rows in np.split(x, np.cumsum(sizes))]
    whole = Moments.from_rows(x, full=full)
    for order in (range(len(parts)), rng.permutation(len(parts))):
        merged = parts[order[0]]
        for i in order[1:]:
            merged = merged.merge(parts[i])
        assert merged.n == whole.n
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-10, atol=1e-8)


def test_moments_are_numpys() -> None:
    x = np.random.default_rng(13).normal(size=(50, 4)).astype(np.float32)
    diagonal, full = Moments.from_rows(x), Moments.from_rows(x, full=True)
    np.testing.assert_allclose(full.covariance, np.cov(x.astype(np.float64).T), rtol=1e-12)
    np.testing.assert_allclose(diagonal.variance, np.var(x.astype(np.float64), axis=0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(full.variance, diagonal.variance, rtol=1e-12)
    assert diagonal.mean.dtype == np.float64


def test_moments_refuse_what_they_cannot_say() -> None:
    one = Moments.from_rows([[1.0, 2.0]])
    with pytest.raises(EmprobeError, match="needs two rows, and there was 1"):
        _ = one.variance
    with pytest.raises(EmprobeError, match="full=True"):
        _ = Moments.from_rows([[1.0], [2.0]]).covariance
    with pytest.raises(EmprobeError, match="shape \\[n, d\\]"):
        Moments.from_rows(np.empty((0, 3)))
    with pytest.raises(EmprobeError, match="1 hold NaN"):
        Moments.from_rows([[1.0], [math.nan]])
    with pytest.raises(MismatchError, match="cannot be merged"):
        one.merge(Moments.from_rows([[1.0, 2.0]], full=True))


# ---- an estimate without an interval, and beside its null


def test_an_absent_interval_is_nowhere_a_number() -> None:
    point = Estimate.point(0.25, n=3, method="two bases")
    assert not point.has_interval
    assert not point.low > 0
    assert (point.as_dict()["low"], point.as_dict()["high"]) == (None, None)
    assert (str(point), point.percent) == ("0.250 (no interval)", "25.0 % (no interval)")


@pytest.mark.parametrize(("low", "high"), [(math.nan, 1.0), (0.0, math.nan), (-math.inf, 1.0)])
def test_half_an_interval_is_none(low: float, high: float) -> None:
    with pytest.raises(EmprobeError, match="is not a number"):
        Estimate(0.5, low, high, n=3, clusters=3, method="x")


def test_a_null_stands_beside_the_value_only_where_it_was_asked() -> None:
    null = null_of("permutation", 5.0, [1.0, 2.0, 3.0])
    assert null == Null("permutation", 3, 2.0, 1.05, 2.95, 0.75, 0.25)
    assert str(null) == "permutation 2.000 [1.050, 2.950], p 0.25"
    beside = Estimate(5.0, 4.0, 6.0, n=3, clusters=3, method="x", null=null)
    assert beside.as_dict()["null"] == {
        "name": "permutation", "draws": 3, "mean": 2.0, "low": 1.05, "high": 2.95, "percentile": 0.75, "p": 0.25
    }  # fmt: skip
    assert "null" not in Estimate(5.0, 4.0, 6.0, n=3, clusters=3, method="x").as_dict()
    assert str(Null("analytic", 0, 0.1)) == "analytic 0.100"
