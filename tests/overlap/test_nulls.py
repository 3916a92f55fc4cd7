"""Every null has the law it is named for: the cheap draws are the naive ones in distribution, and p is uniform where nothing is there."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import subspace_angles

from emprobe.errors import EmprobeError
from emprobe.overlap import Subspace, covariance, false_discovery, nulls, overlap, overlap_layers
from emprobe.overlap.frames import FrameLaw
from emprobe.overlap.measures import Side
from emprobe.overlap.nulls import drawn_nulls

D, K = 24, 3
RNG = np.random.default_rng(0)
FIXED = np.linalg.qr(RNG.normal(size=(D, 4)))[0].T
FEW = RNG.normal(size=(15, D)) * np.linspace(4, 0.2, D) + 3
MANY = RNG.normal(size=(90, D)) * np.linspace(4, 0.2, D) + 3


def same_law(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov-Smirnov p of two samples having one law."""
    return float(stats.ks_2samp(one, other, method="asymp").pvalue)


def cheap(law: FrameLaw, k: int, draws: int, fixed: np.ndarray = FIXED) -> np.ndarray:
    """Squared cosines of random subspaces with a fixed one, `[draws, min(k, 4)]`, ascending."""
    images = np.concatenate(list(law.images(fixed, k, draws, 0)))
    return np.sort(np.linalg.svd(images, compute_uv=False) ** 2)


def naive(draw: Any, draws: int) -> np.ndarray:
    """The same by drawing vectors in d_model, orthonormalising them, and scipy's angles."""
    found = []
    for _ in range(draws):
        basis = np.linalg.qr(draw().T)[0]
        found.append(np.sort(np.cos(subspace_angles(basis, FIXED.T)) ** 2))
    return np.array(found)


@pytest.mark.parametrize("k", [1, 3, 22])
def test_cheap_haar_is_naive_haar(k: int) -> None:
    rng = np.random.default_rng(1)
    ours, theirs = cheap(nulls.haar(), k, 3000), naive(lambda: rng.normal(size=(k, D)), 3000)
    for column in range(ours.shape[1]):
        if theirs[:, column].std() > 1e-9:
            assert same_law(ours[:, column], theirs[:, column]) > 1e-3
    assert ours == pytest.approx(ours.clip(0, 1), abs=1e-9)


@pytest.mark.parametrize("rows", [FEW, MANY, MANY.astype(np.float32)], ids=["fewer rows than d_model", "more", "float32"])
@pytest.mark.parametrize("k", [1, 5])
def test_cheap_covariance_matched_is_gaussian_with_that_covariance(rows: np.ndarray, k: int) -> None:
    rng = np.random.default_rng(2)
    covariance = np.cov(rows.astype(np.float64).T)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0))
    ours, theirs = cheap(nulls.covariance_matched(rows), k, 3000), naive(lambda: rng.normal(size=(k, D)) @ root.T, 3000)
    for column in range(ours.shape[1]):
        assert same_law(ours[:, column], theirs[:, column]) > 1e-3


def test_matched_to_steep_rows_is_far_from_isotropic() -> None:
    # The KS tests above can fail: these two laws are not one.
    axes = np.eye(4, D)
    matched, isotropic = cheap(nulls.covariance_matched(MANY), 3, 300, axes), cheap(nulls.haar(), 3, 300, axes)
    assert same_law(matched[:, -1], isotropic[:, -1]) < 1e-6


def test_a_coarse_gram_matrix_gives_the_same_law(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RNG.normal(size=(40, D)) * np.linspace(2, 0.5, D) + 30
    fine = cheap(nulls.covariance_matched(rows), 3, 3000)
    monkeypatch.setattr(covariance, "COARSE_FROM", 2)
    coarse = cheap(nulls.covariance_matched(rows), 3, 3000)
    assert not np.array_equal(fine, coarse)
    for column in range(3):
        assert same_law(fine[:, column], coarse[:, column]) > 1e-3


@pytest.mark.parametrize("coarse_from", [2, 500])
def test_a_huge_dimension_leaves_the_others_their_precision(coarse_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "COARSE_FROM", coarse_from)
    # Activations have dimensions whose variance is 1e8 times the others'; the rest of the span must not be rounding.
    rows = RNG.normal(size=(15, D))
    rows[:, 5] *= 1e4
    rng = np.random.default_rng(4)
    centred = rows - rows.mean(axis=0)
    theirs = naive(lambda: rng.normal(size=(4, 15)) @ centred, 2000)
    assert same_law(cheap(nulls.covariance_matched(rows), 4, 2000)[:, 0], theirs[:, 0]) > 1e-3


def test_activation_differences_are_differences_of_distinct_rows() -> None:
    # Among three rows there are three differences, so a vector has three overlaps only.
    rows = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    seen = cheap(nulls.activation_differences(rows), 1, 200, np.array([[1.0, 0.0]]))
    assert sorted(set(seen.ravel().round(9))) == [0.0, 0.5, 1.0]


def test_squared_cosines_of_random_unit_vectors_are_beta() -> None:
    drawn = cheap(nulls.haar(), 1, 4000, FIXED[:1])[:, 0]
    assert stats.kstest(drawn, stats.beta(0.5, (D - 1) / 2).cdf).pvalue > 1e-3
    plane = cheap(nulls.haar(), 1, 4000, FIXED[:2])[:, 0]
    assert stats.kstest(plane, stats.beta(1, (D - 2) / 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("k_a", "k_b"), [(1, 1), (3, 4), (4, 2), (20, 4)])
def test_the_mean_overlap_of_random_subspaces(k_a: int, k_b: int) -> None:
    # Summed cos² has mean k_a k_b / d; our mean squared cosine divides by the smaller dimension, so that equal spans give 1.
    drawn = cheap(nulls.haar(), k_a, 4000, FIXED[:k_b])
    error = drawn.sum(axis=1).std() / 4000**0.5
    assert drawn.sum(axis=1).mean() == pytest.approx(k_a * k_b / D, abs=4 * error)
    a, b = (Subspace.from_directions(list(torch.from_numpy(RNG.normal(size=(k, D))))) for k in (k_a, k_b))
    null = overlap(a, b, nulls=["analytic"]).mean_squared_cosine.null
    assert null is not None
    assert null.mean == pytest.approx(max(k_a, k_b) / D)


def test_the_analytic_law_of_a_vector_is_the_drawn_one() -> None:
    vector, plane = torch.from_numpy(FIXED[0] + 0.3 * RNG.normal(size=D)), Subspace.from_directions(list(torch.from_numpy(FIXED[1:3])))
    found = overlap(vector, plane, nulls=["analytic", "haar"], draws=4000).nulls["mean_squared_cosine"]
    exact, drawn = found["analytic"], found["haar"]
    assert exact.p is not None
    assert drawn.p is not None
    assert exact.p == pytest.approx(drawn.p, abs=0.03)
    assert (exact.low, exact.high) == pytest.approx((drawn.low, drawn.high), abs=0.02)
    assert exact.percentile == pytest.approx(1 - exact.p)


@pytest.mark.parametrize("name", ["haar", "covariance_matched", "activation_differences", "permutation"])
def test_p_is_uniform_where_nothing_is_there(name: str) -> None:
    rng = np.random.default_rng(5)
    scale = np.linspace(3, 0.3, D)
    rows = rng.normal(size=(40, D)) * scale
    labels, groups = [0, 1] * 20, [i // 4 for i in range(40)]
    law = {
        "haar": lambda: nulls.haar(),
        "covariance_matched": lambda: nulls.covariance_matched(rows),
        "activation_differences": lambda: nulls.activation_differences(rows),
        "permutation": lambda: nulls.permutation(rows, labels, groups),
    }[name]()
    ps = []
    for seed in range(200):
        # The first of 61 exchangeable draws takes the place of the value.
        found = next(iter(law.images(FIXED[:1], 1, 1, 10_000 + seed)))
        value = float((found**2).sum())
        angle = float(np.arccos(value**0.5))
        values = dict.fromkeys(("mean_squared_cosine", "explained_l2"), value) | dict.fromkeys(
            ("projection_fraction", "cosine"), value**0.5
        )
        values |= {"angle_1": angle, "grassmann_distance": angle}
        null = drawn_nulls(law, values, 1, Side(FIXED[:1]), None, 60, seed)
        ps.append(null["mean_squared_cosine"].p)
        assert null["angle_1"].p == pytest.approx(null["mean_squared_cosine"].p, abs=1e-9)
    assert stats.kstest(ps, "uniform").pvalue > 1e-3


def test_a_permutation_keeps_labels_in_their_groups_and_finds_a_real_contrast() -> None:
    rng = np.random.default_rng(6)
    labels, groups = [0, 1] * 20, [i // 2 for i in range(40)]
    rows = rng.normal(size=(40, D)) + np.outer(labels, 5 * FIXED[0])
    law = nulls.permutation(rows, labels, groups)
    for _ in range(20):
        shuffled = law._shuffled(rng)
        assert all(shuffled[2 * g] + shuffled[2 * g + 1] == 1 for g in range(20))
    direction = torch.from_numpy(law.contrasts(law.labels) @ rows)[0]
    assert direction.numpy() == pytest.approx(rows[1::2].mean(axis=0) - rows[::2].mean(axis=0))
    found = overlap(direction, torch.from_numpy(FIXED[0]), nulls=[law], draws=199).cosine
    assert found.null is not None
    assert found.null.p == pytest.approx(1 / 200)


def test_nulls_of_rows_weigh_those_rows() -> None:
    train, evaluation = RNG.normal(size=(20, D)) + 1, RNG.normal(size=(7, D)) + 1
    a, b = Subspace.from_deltas(train, k=K), Subspace.from_deltas(evaluation, k=2)
    found = overlap(a, b, nulls=["haar"], rows_b=evaluation, resamples=0, draws=3000).explained_l2.null
    assert found is not None
    # Whatever the rows, a random span holds k / d of their squared norm.
    assert found.mean == pytest.approx(K / D, rel=0.05)


def test_false_discovery_is_benjamini_and_hochbergs() -> None:
    p = [0.001, 0.02, 0.03, 0.8]
    assert false_discovery(p) == pytest.approx([0.004, 0.04, 0.04, 0.8])
    assert false_discovery(p[::-1]) == pytest.approx([0.8, 0.04, 0.04, 0.004])


def test_covariance_matched_needs_less_than_its_input_again() -> None:
    rows = np.random.default_rng(7).normal(size=(500, 4000))
    tracemalloc.start()
    cheap(nulls.covariance_matched(rows), 5, 50, np.eye(5, 4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * rows.nbytes
    assert peak < 4000 * 4000 * 8 / 3


EQUAL = np.ones((5, D))


@pytest.mark.parametrize(
    ("law", "k", "message"),
    [
        (lambda: nulls.covariance_matched(FEW[:1]), 1, "1 row, which has no covariance"),
        (lambda: nulls.covariance_matched(np.zeros((0, D))), 1, "nothing to span"),
        (lambda: nulls.covariance_matched(EQUAL), 1, "All 5 rows of the null are equal"),
        (lambda: nulls.covariance_matched(np.where(np.eye(15, D, 1) > 0, np.nan, FEW)), 1, "row 0 of 15"),
        (lambda: nulls.covariance_matched(FEW), 15, "15 rows span at most 14 dimensions about their mean; 15 were asked"),
        (lambda: nulls.covariance_matched(np.outer(np.arange(9), np.ones(D))), 2, "rows that span fewer"),
        (lambda: nulls.activation_differences(FEW), 8, "8 differences of disjoint pairs need 16 rows, and there are 15"),
        (lambda: nulls.haar(), D + 1, f"random subspace of {D + 1} dimensions was asked for in d_model {D}"),
        (lambda: nulls.permutation(FEW, [0] * 15), 1, "15 rows that all bear the label 0"),
        (lambda: nulls.covariance_matched(FEW.astype(complex)), 1, "of type complex128, not real numbers"),
        (lambda: nulls.permutation(FEW, ["a", None, "b"] * 5), 1, "Row 1 of 15 bears the label None, as do 4 others: no class"),
        (lambda: nulls.permutation(FEW, np.array([0.0, 1.0, np.nan] * 5)), 1, "Row 2 of 15 bears the label nan, as do 4 others"),
        (lambda: nulls.permutation(FEW, [0, 1]), 1, "15 rows came with 2 labels"),
        (lambda: nulls.permutation(FEW, [0] * 7 + [1] * 8, [0] * 7 + [1] * 8), 1, "in each all rows bear one label, so nothing can move"),
        (lambda: nulls.permutation(FEW, [0, 1, 2] * 5), 1, "3 classes gives 2 dimension.s., and 1 were asked"),
    ],
)
def test_a_null_that_cannot_be_drawn(law: Any, k: int, message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        list(law().images(FIXED, k, 5, 0))


def test_groups_of_any_names_are_told_apart() -> None:
    law = nulls.permutation(FEW[:8], [0, 1] * 4, ["1", "1", 1, 1, None, None, "x", "x"])
    assert [group.tolist() for group in law.groups] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("p", [[], [0.5, 1.5], [0.5, float("nan")]])
def test_p_values_that_are_none(p: list[float]) -> None:
    with pytest.raises(EmprobeError, match="Give one or more in 0..1"):
        false_discovery(p)


def test_no_draws_are_no_null() -> None:
    with pytest.raises(EmprobeError, match="A null of 0 draws"):
        overlap(torch.ones(3), torch.ones(3), draws=0)


def test_labels_may_be_an_array_a_tensor_or_of_several_types() -> None:
    plain = nulls.permutation(FEW, [0, 1, 1] * 5)
    for labels in (np.array([0, 1, 1] * 5), torch.tensor([0, 1, 1] * 5), ["a", (1, 2), (1, 2)] * 5):
        assert nulls.permutation(FEW, labels).labels.tolist() == plain.labels.tolist()


def test_a_tail_too_small_for_a_number_is_not_nothing() -> None:
    axes = torch.eye(4000, dtype=torch.float64)
    null = overlap(axes[0], axes[0], nulls=["analytic"]).nulls["mean_squared_cosine"]["analytic"]
    assert null.p == 0
    assert str(null).endswith(", p < 1e-300")
    assert "<1e-300" in repr(overlap_layers({3: axes[0]}, {3: axes[0]}, nulls=["analytic"]))
