"""Correlation over clusters: parity with scipy, a p that is uniform under the null, and clusters that count once."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from emprobe.errors import EmprobeError
from emprobe.studies.correlation import clustered_correlation


def test_parity_with_scipy() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(60)
    y = np.exp(x) + rng.standard_normal(60)
    assert clustered_correlation(x, y, draws=50, permutations=50).value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert clustered_correlation(x, y, kind="spearman", draws=50, permutations=50).value == pytest.approx(stats.spearmanr(x, y).statistic)


def test_rows_that_are_repeated_do_not_make_it_surer() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 12))
    once = clustered_correlation(x, y)
    often = clustered_correlation(np.repeat(x, 20), np.repeat(y, 20), np.repeat(np.arange(12), 20).tolist())
    assert often.value == pytest.approx(once.value)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert once.null is not None
    assert often.null is not None
    assert often.null.p == once.null.p


def test_p_is_uniform_where_clusters_mean_nothing() -> None:
    rng = np.random.default_rng(2)
    names = np.repeat(np.arange(10), 5).tolist()
    found = []
    for _ in range(150):
        x, y = (np.repeat(rng.standard_normal(10), 5) + 0.1 * rng.standard_normal(50) for _ in range(2))
        null = clustered_correlation(x, y, names, draws=2, permutations=99).null
        assert null is not None
        found.append(null.p)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.1) < 0.2


def test_what_has_no_correlation_is_told() -> None:
    with pytest.raises(EmprobeError, match="4 numbers that are all equal"):
        clustered_correlation([1, 2, 3, 4], [2, 2, 2, 2])
    with pytest.raises(EmprobeError, match="over 2 clusters, which show no doubt"):
        clustered_correlation([1, 2, 3, 4], [1, 2, 3, 5], ["a", "a", "b", "b"])
