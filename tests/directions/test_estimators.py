"""Estimators keep scikit-learn's contract, agree with independent implementations, and turn with the data."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any
from unittest import SkipTest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import ortho_group
from sklearn.covariance import ledoit_wolf, ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LinearRegression
from sklearn.utils.estimator_checks import estimator_checks_generator

from emprobe.directions import ESTIMATORS, Leace, MeanDifference, PairedPCA, estimator_of
from emprobe.directions.estimators import fitted
from emprobe.directions.shrinkage import ledoit_wolf_weight, whitened, whitened_dense
from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.moments import Moments

Floats = NDArray[np.float64]
HAS_LEACE = importlib.util.find_spec("concept_erasure") is not None
needs_leace = pytest.mark.skipif(not HAS_LEACE, reason="concept-erasure is not installed")
NAMES = [pytest.param(name, marks=needs_leace if name == "leace" else ()) for name in ESTIMATORS]


def classes(n: int, d: int, seed: int = 0, effect: float = 1.5) -> tuple[Floats, NDArray[np.bool_]]:
    """Balanced rows in pairs, shifted along all axes, with unequal variances and correlated features."""
    rng = np.random.default_rng(seed)
    y = np.tile([False, True], n // 2)
    X = rng.normal(size=(n, d)) * np.linspace(0.5, 2, d) + rng.normal(size=(n, 1))
    return X + effect * y[:, None] * rng.normal(size=d), y


def unit(vector: Floats) -> Floats:
    return np.asarray(vector / np.linalg.norm(vector)).reshape(-1)


def contract(estimator: Any) -> tuple[int, dict[str, str]]:
    """How many of scikit-learn's checks pass, and what those say that fail; a check that skips itself stops none of the others."""
    passed, told = 0, {}
    for made, check in estimator_checks_generator(estimator):
        try:
            check(made)
            passed += 1
        except SkipTest:
            pass
        except Exception as error:
            told[str(check)] = f"{error!r} {error.__cause__!r} {error.__context__!r}"
    return passed, told


@pytest.mark.parametrize(
    "estimator",
    [
        MeanDifference(),
        MeanDifference(whiten=True),
        MeanDifference(whiten=True, shrinkage=0.1),
        pytest.param(Leace(), marks=needs_leace),
    ],
    ids=["plain", "whitened", "whitened, a tenth", "leace"],
)
def test_scikit_learns_contract(estimator: Any) -> None:
    passed, told = contract(estimator)
    assert told == {}
    assert passed >= 50


def test_scikit_learns_contract_as_far_as_rows_come_in_pairs() -> None:
    passed, told = contract(PairedPCA())
    # What fails has classes of unequal size, and is told so; nothing else fails.
    assert [check for check, why in told.items() if "pairs the rows of two classes in order" not in why] == []
    assert passed >= 30


# ---- laws


@pytest.mark.parametrize("name", NAMES)
def test_a_direction_turns_and_shifts_with_the_rows_and_changes_sign_with_the_labels(name: str) -> None:
    X, y = classes(60, 8)
    turn = np.asarray(ortho_group.rvs(8, random_state=1))
    found = unit(fitted(estimator_of(name), X, y)[0])
    shifted = unit(fitted(estimator_of(name), X + 7 * np.arange(8), y)[0])
    np.testing.assert_allclose(shifted, found, atol=1e-4)
    np.testing.assert_allclose(unit(fitted(estimator_of(name), X, ~y)[0]), -found, atol=1e-4)
    # Its penalty is a sum over axes, and scikit-learn's automatic shrinkage scales each axis first: these two know the axes.
    if name not in ("logistic_l1", "lda"):
        np.testing.assert_allclose(unit(fitted(estimator_of(name), X @ turn, y)[0]), found @ turn, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_finds_a_planted_direction(name: str) -> None:
    rng = np.random.default_rng(2)
    planted = unit(rng.normal(size=20))
    y = np.tile([False, True], 300)
    X = rng.normal(size=(600, 20)) + 3 * np.outer(y, planted)
    assert unit(fitted(estimator_of(name), X, y)[0]) @ planted > 0.95


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("d", [50, 400])
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_a_planted_direction_is_recovered_at_the_rate_theory_gives(n: int, d: int, ratio: float) -> None:
    # Difference of two means of n/2 rows: the effect along u plus noise of variance 4 sigma² / n in each of d dimensions, so
    # cos² = (effect + e1)² / ((effect + e1)² + |e_rest|²), whose mean is close to the ratio of the means of top and bottom.
    sigma, reps = 1.0, 200
    effect = ratio * np.sqrt(4 * sigma**2 * d / n) + 0.3
    s2 = 4 * sigma**2 / n
    rng = np.random.default_rng(n + d)
    y = np.arange(n) % 2 == 1
    found = []
    for _ in range(reps if n * d < 50_000 else 60):
        X = rng.normal(size=(n, d)) * sigma
        X[y, 0] += effect
        v = MeanDifference().fit(X, y).coef_[0]
        found.append(v[0] ** 2 / (v @ v))
    expected = (effect**2 + s2) / (effect**2 + s2 * d)
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(len(found)) + 2 / d)


# ---- whitening


def pooled(X: Floats, y: NDArray[np.bool_]) -> Floats:
    return np.concatenate([X[~y] - X[~y].mean(axis=0), X[y] - X[y].mean(axis=0)])


@pytest.mark.parametrize(("n", "d"), [(60, 8), (20, 35)])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5])
def test_whitened_is_the_direction_of_linear_discriminant_analysis(n: int, d: int, shrinkage: float) -> None:
    X, y = classes(n, d)
    ours = MeanDifference(whiten=True, shrinkage=shrinkage).fit(X, y)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (20, 35), (30, 30)])
def test_the_row_space_gives_what_the_dense_matrix_gives(n: int, d: int) -> None:
    X, y = classes(n, d)
    residuals = pooled(X, y)
    theirs, weight = ledoit_wolf(residuals, assume_centered=True)
    assert ledoit_wolf_weight(residuals) == pytest.approx(weight, rel=1e-10)
    assert weight == pytest.approx(ledoit_wolf_shrinkage(residuals, assume_centered=True))
    difference = X[y].mean(axis=0) - X[~y].mean(axis=0)
    found = MeanDifference(whiten=True).fit(X, y)
    assert found.shrinkage_ == pytest.approx(weight)
    np.testing.assert_allclose(found.coef_[0], np.linalg.solve(theirs, difference), rtol=1e-8)
    np.testing.assert_allclose(
        whitened(difference, residuals, 0.2), whitened_dense(difference, residuals.T @ residuals / n, 0.2), rtol=1e-8
    )


def test_fully_shrunk_is_the_plain_difference() -> None:
    X, y = classes(20, 35)
    plain = MeanDifference().fit(X, y).coef_
    np.testing.assert_allclose(unit(MeanDifference(whiten=True, shrinkage=1).fit(X, y).coef_), unit(plain), rtol=1e-10)


def test_a_wide_matrix_is_never_squared() -> None:
    X, y = classes(12, 20_000)  # d x d would take 3.2 GB
    assert np.isfinite(MeanDifference(whiten=True).fit(X, y).coef_).all()


@pytest.mark.parametrize(("n", "d"), [(60, 8), (20, 35)])
def test_no_shrinkage_of_a_singular_covariance_is_refused(n: int, d: int) -> None:
    X, y = classes(n, d)
    X[:, 3] = 1.0
    with pytest.raises(ValueError, match="has no inverse: some combination of features is constant within both classes"):
        MeanDifference(whiten=True, shrinkage=0.0).fit(X, y)


@pytest.mark.parametrize("shrinkage", ["always", -0.1, 1.5])
def test_other_shrinkages_are_refused(shrinkage: Any) -> None:
    with pytest.raises(ValueError, match=r"must be 'auto' or a number from 0"):
        MeanDifference(whiten=True, shrinkage=shrinkage).fit(*classes(20, 4))


# ---- streamed


@given(st.integers(0, 1000), st.integers(1, 4))
def test_streamed_moments_give_the_direction_of_the_rows(seed: int, parts: int) -> None:
    X, y = classes(40, 5, seed)
    groups = []
    for side in (False, True):
        chunks = [Moments.from_rows(rows, full=True) for rows in np.array_split(X[y == side], parts)]
        merged = chunks[0]
        for chunk in chunks[1:]:
            merged = merged.merge(chunk)
        groups.append(merged)
    for estimator in (MeanDifference(), MeanDifference(whiten=True, shrinkage=0.3)):
        streamed, batch = estimator.fit_moments(*groups).coef_.copy(), estimator.fit(X, y).coef_
        np.testing.assert_allclose(streamed, batch, rtol=1e-8, atol=1e-10)


def test_moments_that_cannot_be_whitened_are_refused() -> None:
    low, high = (Moments.from_rows(rows) for rows in (np.zeros((3, 2)), np.ones((3, 2))))
    assert MeanDifference().fit_moments(low, high).predict([[0.9, 0.9]]) == [1]
    with pytest.raises(ValueError, match="needs the full scatter"):
        MeanDifference(whiten=True, shrinkage=0.5).fit_moments(low, high)


# ---- paired component


def test_the_paired_component_is_that_of_numpys_svd_with_the_sign_of_the_mean() -> None:
    for n, d in ((40, 6), (10, 30)):
        X, y = classes(n, d)
        D = X[y] - X[~y]
        theirs = np.linalg.svd(D)[2][0]
        theirs *= np.sign(D.mean(axis=0) @ theirs)
        found = PairedPCA().fit(X, y)
        np.testing.assert_allclose(unit(found.coef_), theirs, atol=1e-8)
        assert float(np.linalg.norm(found.coef_)) == pytest.approx(float(D.mean(axis=0) @ theirs))
        assert found.explained_share_ == pytest.approx(np.linalg.svd(D)[1][0] ** 2 / (D**2).sum())


def test_a_line_that_pairs_follow_with_both_signs_is_found_where_the_mean_is_lost() -> None:
    rng = np.random.default_rng(0)
    planted = unit(rng.normal(size=50))
    signs = np.where(np.arange(100) % 20 < 11, 1.0, -1.0)
    X = rng.normal(size=(200, 50))
    X[1::2] = X[::2] + 2 * signs[:, None] * planted + 0.3 * rng.normal(size=(100, 50))
    y = np.tile([False, True], 100)
    component, mean = (unit(e.fit(X, y).coef_) for e in (PairedPCA(), MeanDifference()))
    assert component @ planted > 0.99 > 0.8 > mean @ planted
    assert PairedPCA().fit(X, y).sign_t_ < 2, "and it says that its sign is a guess"


def test_pairs_without_a_sign_without_difference_or_without_partners_are_refused() -> None:
    y = [0, 1, 0, 1]
    with pytest.raises(ValueError, match="so it has no sign"):
        PairedPCA().fit([[0.0, 0], [1, 0], [0, 0], [-1, 0]], y)
    with pytest.raises(ValueError, match="2 pairs do not differ at all"):
        PairedPCA().fit([[0.0, 0], [0, 0], [1, 0], [1, 0]], y)
    with pytest.raises(ValueError, match="1 and 3 rows"):
        PairedPCA().fit([[0.0], [1], [2], [3]], [0, 1, 1, 1])


# ---- LEACE


@needs_leace
def test_leace_reads_along_the_whitened_difference_and_erases_all_that_is_linear() -> None:
    X, y = classes(400, 6)
    found = Leace(shrinkage=False).fit(X, y)
    difference = X[y].mean(axis=0) - X[~y].mean(axis=0)
    np.testing.assert_allclose(unit(found.coef_), unit(np.linalg.solve(np.cov(X.T), difference)), atol=1e-6)
    assert abs(unit(found.left_) @ unit(difference)) == pytest.approx(1, abs=1e-8)
    assert found.coef_[0] @ difference == pytest.approx(1)
    erased = X - np.outer((X - X.mean(axis=0)) @ found.coef_[0], found.left_) * np.linalg.norm(difference) / np.linalg.norm(found.left_)
    assert LinearRegression().fit(erased, y).score(erased, y) < 1e-8


@needs_leace
def test_leace_of_a_weak_concept_is_not_dropped_in_silence() -> None:
    X, y = classes(400, 6, effect=1e-3)
    assert np.isfinite(Leace().fit(X, y).coef_).all()
    with pytest.raises(ValueError, match="means of the two classes are equal"):
        Leace().fit(np.tile([[1.0, 2.0], [3.0, 5.0]], (4, 1)), [0, 0, 1, 1] * 2)


def test_leace_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'emprobe\[leace\]'"):
        Leace().fit(*classes(20, 4))


# ---- registry


def test_the_registry_gives_fresh_ones_and_refuses_others() -> None:
    assert estimator_of("ridge") is not estimator_of("ridge")
    mine = MeanDifference(whiten=True)
    assert estimator_of(mine) is not mine
    assert estimator_of(mine).whiten
    with pytest.raises(EmprobeError, match="no estimator 'svm'. Use one of mean_difference"):
        estimator_of("svm")
    for wrong in (MeanDifference, 3):
        with pytest.raises(EmprobeError, match="is no scikit-learn estimator"):
            estimator_of(wrong)


def test_an_estimator_that_cannot_be_fitted_or_is_not_linear_is_told_in_one_message() -> None:
    X, y = classes(20, 4)
    from sklearn.neighbors import KNeighborsClassifier

    with pytest.raises(EmprobeError, match=r"coefficients of shape \(0,\) for 4 features"):
        fitted(KNeighborsClassifier(), X, y)
    with pytest.raises(EmprobeError, match="could not be fitted to 20 rows of 4 features"):
        fitted(LinearDiscriminantAnalysis(solver="lsqr", shrinkage=7), X, y)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_feature_gets_no_weight(name: str) -> None:
    X, y = classes(60, 8)
    X[:, 2] = 5.0
    assert abs(unit(fitted(estimator_of(name), X, y)[0])[2]) < 1e-9
