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
from emprobe.overlap.resampling import Source, common_coordinates, interval, left_out

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


def test_arrays_are_vectors_and_a_null_may_be_named_alone() -> None:
    found = overlap(np.array([2.0, 0.0]), torch.tensor([0.6, 0.8]), nulls="analytic")
    assert found.cosine.value == pytest.approx(0.6)
    assert set(found.nulls["mean_squared_cosine"]) == {"analytic"}


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


def source(rows: np.ndarray, groups: np.ndarray, k: int) -> Source:
    return Source(rows, groups, Subspace.from_deltas(rows, k=k).basis.numpy(), True)


NEAR, WIDE = (0.92, 0.98), (0.98, 1.0)
"""Ranges of coverage: what 95 % is asked to be, and what it is where noise opens an angle by much of itself."""


def within(share: float, covered: tuple[float, float], reps: int) -> bool:
    """Whether a simulated coverage lies in a range, give or take one standard error of so many repetitions."""
    low, high = (end + side * math.sqrt(end * (1 - end) / reps) for end, side in zip(covered, (-1, 1), strict=True))
    return low <= share <= high


@pytest.mark.parametrize(
    ("questions", "per_question", "d", "k", "signal", "angles", "shared", "covered"),
    [
        (40, 4, 6, 1, 3.0, (0.8, 0.8), False, NEAR),
        (20, 4, 32, 1, 3.0, (0.8, 0.8), False, NEAR),
        (60, 1, 40, 2, 3.0, (0.5, 1.0), False, NEAR),
        (30, 3, 48, 2, 3.0, (0.5, 1.0), True, NEAR),
        (40, 3, 32, 2, 3.0, (1.2, 1.5), False, NEAR),
        (40, 3, 32, 2, 3.0, (0.05, 0.1), False, WIDE),
    ],
    ids=["one direction", "few questions", "rows alone", "same questions on both sides", "nearly orthogonal", "nearly equal"],
)
def test_the_interval_covers_the_true_overlap(
    questions: int,
    per_question: int,
    d: int,
    k: int,
    signal: float,
    angles: tuple[float, float],
    shared: bool,
    covered: tuple[float, float],
) -> None:
    rng, reps, n = np.random.default_rng(3), 200, questions * per_question
    axes, tilt = np.eye(d), np.linspace(*angles, k)[:, None]
    spans = axes[:k], np.cos(tilt) * axes[:k] + np.sin(tilt) * axes[k : 2 * k]
    truth = measures(Side(spans[0]), Side(spans[1]))
    group = np.arange(n) // per_question
    hits = dict.fromkeys(("mean_squared_cosine", "angle_1", f"angle_{k}", "grassmann_distance"), 0)
    for _ in range(reps):
        sides = []
        for which, span in enumerate(spans):
            # Most of a row's strength is its question's.
            strength = 0.7**0.5 * np.repeat(rng.normal(size=(questions, k)), per_question, axis=0) + 0.3**0.5 * rng.normal(size=(n, k))
            rows = (strength * signal * np.linspace(1.5, 1, k)) @ span + rng.normal(size=(n, d))
            sides.append(source(rows, group if shared else group + which * questions, k))
        values, without = measures(sides[0].again(), sides[1].again()), left_out(*sides, 20, 0)
        for name in hits:
            low, high = interval(name, values[name], [found[name] for found in without])
            hits[name] += low <= truth[name] <= high
    assert all(within(found / reps, covered, reps) for found in hits.values()), hits


def test_the_interval_of_a_cosine_keeps_the_signs_of_its_vectors() -> None:
    # A leading component has no sign of its own; made again, it must not turn round.
    rng = np.random.default_rng(8)
    x, y = (rng.normal(size=(60, 1)) * 5 @ v[None, :] + 0.3 * rng.normal(size=(60, 10)) for v in np.eye(10)[:2] + np.eye(10)[1:3] / 4)
    found = plain(Subspace.from_deltas(x, k=1), Subspace.from_deltas(y, k=1), rows_a=x, rows_b=y).cosine
    assert found.high - found.low < 0.1


@pytest.mark.parametrize(("scales", "blurred"), [((4, 3, 1), False), ((4, 3, 2.9), True), ((4, 3, 0), False)])
def test_a_last_component_near_the_next_one_is_told(scales: tuple[float, ...], blurred: bool) -> None:
    x, y = (np.random.default_rng(seed).normal(size=(60, 3)) * scales for seed in (0, 1))
    a, b = (Subspace.from_deltas(rows, k=2) for rows in (x, y))
    note = "Component 2 of a and 2 of b cannot be told from the next one by so few groups: intervals are rough. Try another k."
    found = plain(a, b, rows_a=x, rows_b=y, resamples=20)
    assert found.note == found.as_dict()["note"] == (note if blurred else "")
    assert repr(found).endswith(note) == blurred
    assert plain(a, b).note == ""


def test_more_groups_than_resamples_are_left_out_in_blocks() -> None:
    x = RNG.normal(size=(200, 5)) * [9, 6, 1, 1, 1]
    one, two = (source(x, np.arange(200), 1) for _ in range(2))
    other = Side(np.eye(5)[:1])
    all_of_them, blocks = (left_out(one, other, most, 0) for most in (400, 50))
    assert [len(found[0]["angle_1"]) for found in (all_of_them, blocks)] == [200, 50]
    value = measures(two.again(), other)["angle_1"]
    ends = [interval("angle_1", value, [found[0]["angle_1"]]) for found in (all_of_them, blocks)]
    assert ends[0] == pytest.approx(ends[1], rel=0.35)
    with pytest.raises(EmprobeError, match="from 1 resamples was asked for. Give at least 2"):
        left_out(one, other, 1, 0)


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
    assert msc.method == "jackknife over 10 and 28 groups, a and b made again without each of 10 and 28 blocks of them"


def test_overlap_in_the_rows_span_is_overlap_in_d_model() -> None:
    # Fewer rows than dimensions: the resampling works in the coordinates of the rows' span, which changes no overlap.
    x = RNG.normal(size=(12, 40))
    basis = Subspace.from_deltas(x, k=2).basis.numpy()
    whole = source(x, np.arange(12), 2)
    held, rows = common_coordinates([basis, x])
    assert rows.shape == (12, 14)
    small = Source(rows, np.arange(12), held, True)
    one, two = (left_out(made, made.again(), 20, 0)[0] for made in (whole, small))
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


def test_the_interval_of_cka_covers_the_cka_of_the_law() -> None:
    rng, reps, questions, per_question, d = np.random.default_rng(5), 200, 40, 3, 32
    a, b = (rng.normal(size=(6, d)) * np.geomspace(1, 0.3, 6)[:, None] for _ in range(2))
    cross, own = 0.8**0.5 * a.T @ b, [side.T @ side + 0.25 * np.eye(d) for side in (a, b)]
    truth = float((cross**2).sum() / np.linalg.norm(own[0]) / np.linalg.norm(own[1]))
    group = np.repeat(np.arange(questions), per_question)

    def drawn(width: int) -> np.ndarray:
        return 0.5**0.5 * (rng.normal(size=(questions, width))[group] + rng.normal(size=(len(group), width)))

    hits = 0
    for _ in range(reps):
        z = drawn(6)
        x, y = z @ a + 0.5 * drawn(d), (0.8**0.5 * z + 0.2**0.5 * drawn(6)) @ b + 0.5 * drawn(d)
        found = linear_cka(x, y, groups=group.tolist(), draws=1)
        hits += found.low <= truth <= found.high
    assert within(hits / reps, NEAR, reps), hits


# ---- bad input

ROWS = RNG.normal(size=(6, 5))
SPACE = Subspace.from_deltas(ROWS, k=2)
TWICE = RNG.normal(size=(2, 5)).repeat(3, axis=0)
"""Two different rows, one a group: without either group nothing varies."""
TWO_TEXTS, TWO_WIDE = Subspace.from_deltas(TWICE, k=1), Subspace.from_deltas(TWICE.repeat(3, 0), k=1)


NARROW = RNG.normal(size=(12, 1)) @ RNG.normal(size=(1, 5)) + 1e-7 * RNG.normal(size=(12, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plain(Subspace.from_deltas(NARROW, k=2), SPACE, rows_a=NARROW),
            "rows_a are of rank 1 .* Ask for at most 1, or give resamples=0",
        ),
        (lambda: plain(SPACE, random_subspace(RNG, 1, 4)), "d_model 5 and 4 have no overlap"),
        (lambda: plain(SPACE, SPACE, rows_a=RNG.normal(size=(6, 4))), "rows_a have d_model 4, the subspaces 5"),
        (lambda: plain(SPACE, SPACE, rows_a=ROWS[:1]), "rows_a are 1 rows for a subspace of 2 dimensions"),
        (lambda: plain(SPACE, SPACE, rows_a=RNG.normal(size=(6, 5))), "rows_a do not give the subspace again"),
        (lambda: plain(SPACE, SPACE, rows_a=ROWS, groups_a=["q"] * 5), "6 rows came with 5 group names"),
        (lambda: plain(SPACE, SPACE, rows_a=ROWS, groups_a=["q"] * 6), "rows in one group, which show no doubt"),
        (lambda: plain(SPACE, SPACE, rows_b=np.where(np.eye(6, 5) > 0, np.nan, ROWS)), "row 0 of 6 holds 1 NaN"),
        (lambda: plain(SPACE, SPACE, nulls=[3]), "The null 3 was asked for by name"),
        (lambda: overlap([1.0] * 5, SPACE), "A direction, a tensor or an array of numbers was asked for, but got a list"),
        (lambda: plain(SPACE, SPACE, rows_a=ROWS, resamples=1), "An interval from 1 resamples was asked for"),
        (
            lambda: plain(TWO_TEXTS, SPACE, rows_a=TWICE, groups_a=list("aaabbb")),
            "without one of their groups the 6 rows have fewer than 1",
        ),
        (
            lambda: plain(TWO_WIDE, SPACE, rows_a=TWICE[:, :5].repeat(3, 0), groups_a=list("a" * 9 + "b" * 9)),
            "the 18 rows have fewer than 1",
        ),
        (lambda: ceiling(ROWS, k=1, splits=0), "ceiling of 0 splits"),
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
