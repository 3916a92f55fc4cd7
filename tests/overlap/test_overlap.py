"""Overlap is a property of spans: symmetric, basis-free, in its range, as fine as 1e-9 rad, and its interval covers what it should."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emprobe.errors import EmprobeError
from emprobe.overlap import Overlap, Subspace, ceiling, linear_cka, overlap
from emprobe.overlap.measures import Side, mahalanobis, measures
from emprobe.overlap.nulls import covariance_matched
from emprobe.overlap.resampling import Source, bootstrap, interval

RNG = np.random.default_rng(0)
SYMMETRIC = ("mean_squared_cosine", "grassmann_distance", "angle_1")


def random_subspace(rng: np.random.Generator, k: int, d: int) -> Subspace:
    return Subspace.from_directions(list(torch.from_numpy(rng.normal(size=(k, d)))))


def plain(a: Subspace, b: Subspace, **options: Any) -> Overlap:
    return overlap(a, b, nulls=options.pop("nulls", []), **options)


SIZES = st.integers(2, 12).flatmap(lambda d: st.tuples(st.just(d), st.integers(1, d), st.integers(1, d), st.integers(0, 2**31)))


# ---- laws


@given(sizes=SIZES)
def test_symmetric_basis_free_rotation_free_and_in_range(sizes: tuple[int, int, int, int]) -> None:
    d, k_a, k_b, seed = sizes
    rng = np.random.default_rng(seed)
    a, b = random_subspace(rng, k_a, d), random_subspace(rng, k_b, d)
    there, back = plain(a, b), plain(b, a)
    for name in SYMMETRIC:
        assert there.measures[name].value == pytest.approx(back.measures[name].value, abs=1e-7)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    mixed = Subspace.from_directions(list(torch.from_numpy(rng.normal(size=(k_a, k_a)) @ a.basis.numpy() @ rotation)))
    turned = Subspace(b.basis @ torch.from_numpy(rotation), b.share, "turned")
    again = plain(mixed, turned)
    for name, found in there.measures.items():
        if name != "cosine":
            assert again.measures[name].value == pytest.approx(found.value, abs=1e-6)
        low, high = (0, math.inf) if name.startswith(("angle", "grassmann")) else (-1e-12, 1 + 1e-12)
        assert low <= abs(found.value) <= high


@given(sizes=SIZES)
def test_equal_spans_overlap_wholly(sizes: tuple[int, int, int, int]) -> None:
    d, k, _, seed = sizes
    rng = np.random.default_rng(seed)
    a = random_subspace(rng, k, d)
    found = plain(a, Subspace.from_directions(list(a.basis.flip(0) * 3)))
    assert found.mean_squared_cosine.value == pytest.approx(1, abs=1e-12)
    assert found.explained_l2.value == pytest.approx(1, abs=1e-12)
    assert found.grassmann_distance.value < 1e-6


def test_planes_a_billionth_of_a_radian_apart_are_told_apart() -> None:
    axes, angle = torch.eye(50, dtype=torch.float64), 1e-9
    tilted = math.cos(angle) * axes[1] + math.sin(angle) * axes[2]
    a, b = Subspace.from_directions([axes[0], axes[1]]), Subspace.from_directions([axes[0], tilted])
    assert plain(a, b).angles[1].value == pytest.approx(angle, rel=1e-6)
    assert plain(a, b).angles[0].value < 1e-15
    assert plain(a, b).grassmann_distance.value == pytest.approx(angle, rel=1e-6)
    # What the trap would give: the arc cosine of a number that is 1 to the last bit.
    assert math.acos(min(1.0, math.cos(angle))) == 0


def test_a_vector_and_a_plane_by_hand() -> None:
    plane = Subspace.from_directions([torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])])
    found = plain(plane, Subspace.from_directions([torch.tensor([3.0, 0.0, 4.0])]))
    assert found.mean_squared_cosine.value == pytest.approx(0.36)
    assert found.explained_l2.value == pytest.approx(0.36)
    assert found.projection_fraction.value == pytest.approx(0.6)
    assert found.grassmann_distance.value == pytest.approx(math.acos(0.6))


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_cosine_of_two_vectors_keeps_its_sign(signs: tuple[int, int]) -> None:
    found = overlap(signs[0] * torch.tensor([5.0, 0.0]), signs[1] * torch.tensor([0.6, -0.8]))
    assert found.cosine.value == pytest.approx(0.6 * signs[0] * signs[1])


def test_reading_a_measure_that_is_not_there_says_which_are() -> None:
    with pytest.raises(AttributeError, match="no measure 'similarity'; it has angle_1"):
        _ = overlap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).similarity


# ---- of rows: the definitions of the paper, spelled out row by row


@pytest.mark.parametrize("centred", [True, False])
def test_measures_of_rows_are_the_papers_row_by_row(centred: bool) -> None:
    train, evaluation = RNG.normal(size=(30, 8)) + 1, RNG.normal(size=(9, 8)) + 1.5
    a, b = Subspace.from_deltas(train, k=3, centred=centred), Subspace.from_deltas(evaluation, k=2)
    found = overlap(a, b, nulls=["haar"], rows_b=evaluation, resamples=0, draws=50)
    mu = train.mean(axis=0) if centred else np.zeros(8)
    p = a.basis.numpy()
    fractions, cosines, kept, whole = [], [], 0.0, 0.0
    for x in evaluation:
        held = p.T @ (p @ (x - mu))
        fractions.append(np.linalg.norm(held) / np.linalg.norm(x - mu))
        cosines.append((mu + held) @ x / np.linalg.norm(mu + held) / np.linalg.norm(x))
        kept, whole = kept + held @ held, whole + (x - mu) @ (x - mu)
    assert found.projection_fraction.value == pytest.approx(np.mean(fractions))
    assert found.reconstruction_cosine.value == pytest.approx(np.mean(cosines))
    assert found.explained_l2.value == pytest.approx(kept / whole)


def test_mahalanobis_is_the_distance_under_the_inverse_covariance() -> None:
    rows = RNG.normal(size=(200, 4)) @ RNG.normal(size=(4, 4))
    space = Subspace.from_deltas(rows, k=4)
    variances = np.array(space.share) * space.total / (space.n - 1)
    ours = mahalanobis(rows, space.basis.numpy(), variances, rows.mean(axis=0))
    inverse, centred = np.linalg.inv(np.cov(rows.T)), rows - rows.mean(axis=0)
    assert ours == pytest.approx(np.sqrt(np.einsum("ni,ij,nj->n", centred, inverse, centred)))


# ---- intervals


def test_two_bases_show_no_doubt_and_none_is_invented() -> None:
    found = plain(random_subspace(RNG, 2, 9), random_subspace(RNG, 3, 9))
    assert not any(estimate.has_interval for estimate in found.measures.values())
    assert "two bases without the rows behind them" in found.mean_squared_cosine.method
    assert found.as_dict()["measures"]["mean_squared_cosine"]["low"] is None


@pytest.mark.parametrize(("rows", "per_group"), [(80, 1), (160, 4)], ids=["rows alone", "groups of four"])
def test_the_interval_covers_the_true_overlap(rows: int, per_group: int) -> None:
    rng = np.random.default_rng(3)
    d, angle, signal, reps = 6, 0.8, 3.0, 200
    axes = np.eye(d)
    spans = axes[:1], np.cos(angle) * axes[:1] + np.sin(angle) * axes[1:2]
    group = np.arange(rows) // per_group
    hits = 0
    for rep in range(reps):
        sides = []
        for which, span in enumerate(spans):
            strength = np.repeat(rng.normal(size=(rows // per_group, 1)), per_group, axis=0) * signal
            sides.append(Source(strength @ span + rng.normal(size=(rows, d)), group + which * rows, 1, True))
        made = [side.again(np.ones(2 * rows)) for side in sides]
        value = measures(Side(made[0].basis), Side(made[1].basis))["mean_squared_cosine"]
        low, high = interval("mean_squared_cosine", value, bootstrap(*sides, 60, rep)["mean_squared_cosine"], rows // per_group)
        hits += low <= np.cos(angle) ** 2 <= high
    assert 0.92 <= hits / reps <= 0.98


def test_overlap_makes_both_sides_again_and_says_so() -> None:
    x, y = RNG.normal(size=(30, 50)) * 2, RNG.normal(size=(28, 50))
    x[:, 0] *= 5
    y[:, 0] *= 5
    a, b = Subspace.from_deltas(x, k=1), Subspace.from_deltas(y, k=1, centred=False)
    found = plain(a, b, rows_a=x, rows_b=y, groups_a=[f"q{i // 3}" for i in range(30)], resamples=60)
    msc = found.mean_squared_cosine
    assert msc.has_interval
    assert msc.low <= msc.value <= msc.high
    assert (msc.clusters, msc.n) == (10, 58)
    assert msc.method == "bias-corrected bootstrap over 10 and 28 groups, a and b made again in each of 60 draws"


def test_overlap_in_the_rows_span_is_overlap_in_d_model() -> None:
    # Fewer rows than dimensions: the resampling works in the coordinates of the rows' span, which changes no overlap.
    x = RNG.normal(size=(12, 40))
    source = Source(x, np.arange(12), 2, True)
    small = Source(np.linalg.qr(x.T)[1].T, np.arange(12), 2, True)
    fixed = source.again(np.ones(12))
    coordinates = small.again(np.ones(12))
    one, two = bootstrap(source, fixed, 5, 0), bootstrap(small, coordinates, 5, 0)
    assert one["mean_squared_cosine"] == pytest.approx(two["mean_squared_cosine"], abs=1e-9)


def test_the_ceiling_is_one_without_noise_and_falls_with_it() -> None:
    signal = RNG.normal(size=(60, 2)) @ RNG.normal(size=(2, 30))
    noise = RNG.normal(size=(60, 30))
    assert ceiling(signal, k=2).value == pytest.approx(1)
    little, much = (ceiling(signal + scale * noise, k=2, groups=[i // 2 for i in range(60)]).value for scale in (0.3, 3.0))
    assert 1 > little > much > 0
    assert not ceiling(signal, k=2).has_interval


# ---- CKA


def test_cka_does_not_see_rotation_and_scale_and_is_the_feature_form() -> None:
    x, y = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 3))
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    assert linear_cka(x, 7 * x @ rotation + 3, draws=20, resamples=0).value == pytest.approx(1)
    xc, yc = x - x.mean(0), y - y.mean(0)
    feature = np.linalg.norm(yc.T @ xc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
    found = linear_cka(x, y, draws=200, resamples=50)
    assert found.value == pytest.approx(feature)
    assert found.has_interval
    assert found.null is not None
    assert found.null.p is not None
    assert found.null.p > 0.01


# ---- bad input

ROWS = RNG.normal(size=(6, 5))
SPACE = Subspace.from_deltas(ROWS, k=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plain(SPACE, random_subspace(RNG, 1, 4)), "d_model 5 and 4 have no overlap"),
        (lambda: plain(SPACE, SPACE, rows_a=RNG.normal(size=(6, 4))), "rows_a have d_model 4, the subspaces 5"),
        (lambda: plain(SPACE, SPACE, rows_a=ROWS[:1]), "rows_a are 1 rows for a subspace of 2 dimensions"),
        (lambda: plain(SPACE, SPACE, rows_a=RNG.normal(size=(6, 5))), "rows_a do not give the subspace again"),
        (lambda: plain(SPACE, SPACE, rows_a=ROWS, groups_a=["q"] * 5), "6 rows came with 5 group names"),
        (lambda: plain(SPACE, SPACE, rows_a=ROWS, groups_a=["q"] * 6), "rows in one group, which show no doubt"),
        (lambda: plain(SPACE, SPACE, rows_b=np.where(np.eye(6, 5) > 0, np.nan, ROWS)), "row 0 of 6 holds 1 NaN"),
        (lambda: plain(SPACE, SPACE, nulls=["gaussian"]), "null 'gaussian' was asked for by name; by name alone there are analytic, haar"),
        (lambda: plain(SPACE, SPACE, nulls=["covariance_matched"]), "with them, such as nulls.covariance_matched"),
        (lambda: plain(SPACE, SPACE, nulls=[covariance_matched(RNG.normal(size=(9, 4)))]), "null's rows have d_model 4, the subspaces 5"),
        (lambda: ceiling(ROWS, k=1, groups=["q"] * 6), "in one group, which has no halves"),
        (lambda: ceiling(ROWS, k=4), "4 components were asked of 3 rows of a half"),
        (lambda: linear_cka(ROWS, ROWS[:5]), "6 and 5 rows"),
        (lambda: linear_cka(ROWS[:2], ROWS[:2]), "2 rows, which any two sets place alike"),
        (lambda: linear_cka(ROWS, np.ones((6, 3))), "All 6 rows of the second activations are equal"),
    ],
)
def test_what_has_no_overlap_is_refused(call: Any, message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        call()
