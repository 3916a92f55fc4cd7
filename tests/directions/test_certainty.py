"""Reliabilities, cosines and resamples: parities with brute force, coverage in simulation, and refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import ks_2samp, ortho_group

from emprobe.directions import Design, bf16_rounding, observed_cosine, reliability, resample_directions, split_half, top_energy, true_cosine
from emprobe.directions.cells import Cells
from emprobe.errors import EmprobeError, MismatchError

Floats = NDArray[np.float64]


def names(questions: int, rows: int) -> list[str]:
    return [f"q{i:03}" for i in range(questions) for _ in range(rows)]


def noisy(rng: np.random.Generator, d: int, questions: int, rows: int, between: float, within: float) -> Floats:
    """Noise of rows whose questions have noise of their own."""
    shared = rng.normal(0, between, (questions, 1, d))
    return np.asarray((shared + rng.normal(0, within, (questions, rows, d))).reshape(-1, d))


def paired(deltas: Floats, questions: list[str]) -> Design:
    X = np.zeros((2 * len(deltas), deltas.shape[1]))
    X[1::2] = deltas
    return Design(X, np.tile([False, True], len(deltas)), tuple(q for q in questions for _ in range(2)), True, 0)


def labelled(seed: int = 0, questions: int = 12, rows: int = 6, d: int = 7, effect: float = 1.0) -> Design:
    rng = np.random.default_rng(seed)
    y = rng.random(questions * rows) < 0.4
    X = noisy(rng, d, questions, rows, 0.5, 1.0) + 3
    X[:, 0] += effect * y
    return Design(X, y, tuple(names(questions, rows)), False, 0)


def units(seed: int, d: int) -> Floats:
    v = np.random.default_rng(seed).normal(size=d)
    return np.asarray(v / np.linalg.norm(v))


# ---- sums, halves, reliability


@pytest.mark.parametrize("design", [labelled(), paired(noisy(np.random.default_rng(1), 5, 9, 4, 1, 1) + 1, names(9, 4))])
def test_sums_by_question_hold_the_difference_of_means(design: Design) -> None:
    expected = design.X[design.y].mean(axis=0) - design.X[~design.y].mean(axis=0)
    np.testing.assert_allclose(Cells.of(design).difference, expected, atol=1e-12)


def test_split_halves_are_those_of_refitting() -> None:
    design = labelled(effect=2.0)
    found = split_half(design, splits=400)
    rng = np.random.default_rng(3)
    cosines = []
    for _ in range(400):
        first = (rng.permutation(12) < 6)[design.codes]
        a, b = (design.X[h & design.y].mean(axis=0) - design.X[h & ~design.y].mean(axis=0) for h in (first, ~first))
        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.half == pytest.approx(np.mean(cosines), abs=4 * np.std(cosines) / 20)
    assert found.full == pytest.approx(2 * found.half / (1 + found.half))


def test_the_reliability_is_the_expected_squared_cosine_with_the_truth() -> None:
    # E cos² = effect² / (effect² + noise), noise = d (between² + within² / rows) / questions.
    d, questions, rows = 40, 25, 4
    rng = np.random.default_rng(4)
    effect, noise = 1.2, d * (0.5**2 + 0.8**2 / rows) / questions
    found, cosines = [], []
    for _ in range(150):
        u = units(int(rng.integers(1 << 30)), d)
        design = paired(effect * u + noisy(rng, d, questions, rows, 0.5, 0.8), names(questions, rows))
        found.append(reliability(design))
        v = design.X[1::2].mean(axis=0)
        cosines.append((v @ u) ** 2 / (v @ v))
    assert np.mean(found) == pytest.approx(effect**2 / (effect**2 + noise), abs=0.03)
    assert np.mean(found) == pytest.approx(np.mean(cosines), abs=0.03)


def test_certainty_turns_with_the_rows_and_knows_no_sign() -> None:
    design = labelled(effect=2.0)
    turn = np.asarray(ortho_group.rvs(7, random_state=0))
    others = [
        Design(design.X @ turn + 5, design.y, design.questions, False, 0),
        Design(design.X, ~design.y, design.questions, False, 0),
    ]
    for other in others:
        assert reliability(other) == pytest.approx(reliability(design))
        assert split_half(other).half == pytest.approx(split_half(design).half)
    flipped = Design(design.X, ~design.y, design.questions, False, 0)
    assert true_cosine(design, flipped).value == pytest.approx(-1)


def test_one_question_or_nothing_is_refused() -> None:
    deltas = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(EmprobeError, match="reliability needs rows of each class from at least two questions, and one class has 1"):
        reliability(paired(deltas, ["q"] * 4))
    with pytest.raises(EmprobeError, match="split-half cosine needs rows of each class from at least two questions"):
        split_half(Design(deltas, np.array([True, False, False, False]), ("a", "b", "c", "d"), False, 0))
    with pytest.raises(EmprobeError, match="do not differ at layer 0"):
        reliability(paired(0 * deltas, list("abcd")))


# ---- two directions


@pytest.mark.parametrize(
    ("d", "questions", "effect", "between", "within", "rho", "shared"),
    [
        (32, 25, 1.8, 0.5, 0.8, 0.6, False),
        (32, 25, 1.8, 0.5, 0.8, 0.6, True),
        (256, 50, 1.0, 0.3, 0.5, 0.8, False),
        (64, 30, 3.0, 0.5, 0.5, 0.0, False),
        (64, 20, 2.0, 0.5, 0.5, 1.0, False),
    ],
    ids=["own noise", "noise in common", "as much noise as signal", "unrelated", "equal directions"],
)
def test_the_true_cosine_is_covered_where_the_observed_one_is_not(
    d: int, questions: int, effect: float, between: float, within: float, rho: float, shared: bool
) -> None:
    rows = 4
    rng = np.random.default_rng(6)
    hits, observed, found = 0, [], []
    for rep in range(250):
        basis = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
        one, two = basis[0], rho * basis[0] + math.sqrt(1 - rho**2) * basis[1]
        noise, other = (noisy(rng, d, questions, rows, between, within) for _ in range(2))
        other = (noise + other) / math.sqrt(2) if shared else other
        designs = [paired(effect * v + n, names(questions, rows)) for v, n in ((one, noise), (two, other))]
        estimate = true_cosine(*designs, draws=200, seed=rep)
        hits += estimate.low <= rho <= estimate.high
        found.append(estimate.value)
        observed.append(observed_cosine(*designs, draws=2).value)
    assert 0.92 <= hits / 250 <= 0.98
    assert np.mean(found) == pytest.approx(rho, abs=0.02)
    # Own noise lowers the observed cosine; noise in common also enters its numerator, and raises it here.
    power, noise_power = effect**2, d * (between**2 + within**2 / rows) / questions
    expected = (rho * power + (noise_power / math.sqrt(2) if shared else 0)) / (power + noise_power)
    assert np.mean(observed) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("both", [True, False], ids=["questions with both classes", "questions of one class each"])
def test_the_true_cosine_of_labelled_rows_is_covered(both: bool) -> None:
    d, questions, rho = 64, 40, 0.7
    rng = np.random.default_rng(7)
    hits = 0
    for rep in range(400):
        basis = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
        rows = rng.integers(2, 6, questions)
        of = [f"q{i:03}" for i, n in enumerate(rows) for _ in range(n)]
        y = rng.random(len(of)) < 0.4 if both else np.repeat(np.arange(questions) % 2 == 0, rows)
        designs = []
        for v in (basis[0], rho * basis[0] + math.sqrt(1 - rho**2) * basis[1]):
            X = 0.5 * np.repeat(rng.normal(size=(questions, d)), rows, axis=0) + 0.5 * rng.normal(size=(len(of), d)) + np.outer(y, 3 * v)
            designs.append(Design(X, y, tuple(of), False, 0))
        estimate = true_cosine(*designs, draws=200, seed=rep)
        hits += estimate.low <= rho <= estimate.high
    assert 0.92 <= hits / 400 <= 0.98


def test_the_observed_cosine_has_its_draws_spread_about_its_value() -> None:
    rng = np.random.default_rng(8)
    one, two = (paired(units(1, 10) + noisy(rng, 10, 30, 3, 0.5, 0.5), names(30, 3)) for _ in range(2))
    found = observed_cosine(one, two)
    a, b = (x.X[1::2].mean(axis=0) for x in (one, two))
    assert found.value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.low < found.value < found.high
    assert (found.clusters, found.n) == (30, 180)


def test_an_unreliable_direction_is_not_divided_by() -> None:
    rng = np.random.default_rng(9)
    sure, unclear, noise = (
        paired(effect * units(0, 50) + noisy(rng, 50, 20, 3, size, size), names(20, 3))
        for effect, size in ((5.0, 0.1), (1.6, 1.0), (0.0, 1.0))
    )
    assert reliability(noise) < 0.2 < reliability(unclear)
    with pytest.raises(EmprobeError, match=r"their reliabilities are 1\.00 and -?0\.[01]\d, and below 0\.2 .* observed cosine, -?0\.\d"):
        true_cosine(sure, noise)
    with pytest.raises(EmprobeError, match=r"no value in \d+ of 1000 resamples of 20 questions \(reliabilities 1\.00 and 0\.\d\d\)"):
        true_cosine(sure, unclear)
    with pytest.raises(MismatchError, match="d_model 50 and 3 have no cosine"):
        observed_cosine(sure, paired(np.ones((4, 3)), list("abcd")))


# ---- resamples


def brute_force(X: Floats, questions: list[str], y: NDArray[np.bool_] | None, rows_too: bool, draws: int, seed: int) -> Floats:
    """Cosines with the estimate of directions from questions, then rows, drawn one by one."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(np.asarray(questions) == q) for q in sorted(set(questions))]

    def direction(rows: NDArray[np.int64]) -> Floats | None:
        if y is None:
            return np.asarray(X[rows].mean(axis=0))
        if y[rows].all() or not y[rows].any():
            return None
        return np.asarray(X[rows][y[rows]].mean(axis=0) - X[rows][~y[rows]].mean(axis=0))

    d = direction(np.arange(len(X)))
    assert d is not None
    found = []
    for _ in range(draws):
        drawn = [members[i] for i in rng.integers(len(members), size=len(members))]
        rows = np.concatenate([rng.choice(m, len(m)) if rows_too else m for m in drawn])
        if (v := direction(rows)) is not None:
            found.append(v @ d / np.linalg.norm(v) / np.linalg.norm(d))
    return np.array(found)


@pytest.mark.parametrize("rows_too", [True, False])
@pytest.mark.parametrize("with_labels", [True, False])
def test_resamples_have_the_distribution_of_drawing_one_by_one(rows_too: bool, with_labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    design = labelled(seed=5, questions=8, rows=4, d=6, effect=1.5)
    X = np.concatenate([design.X[4:], design.X[:4]])  # not in the order of the names
    questions = [*design.questions[4:], *design.questions[:4]]
    y = np.concatenate([design.y[4:], design.y[:4]]) if with_labels else None
    X = X if with_labels else X - 2.5
    # Draws of one call share sums, so that for this test few are taken from each of many calls.
    caught: list[Floats] = []
    import emprobe.directions.resampling as module

    kept = module._estimate

    def catch(cosines: Floats, *rest: object) -> object:
        caught.append(cosines)
        return kept(cosines, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_estimate", catch)
    for seed in range(300):
        next(resample_directions([X], questions, None if y is None else y.tolist(), draws=4, rows_too=rows_too, seed=seed))
    ours = np.concatenate(caught[::2])
    theirs = brute_force(X, questions, y, rows_too, 1200, seed=1)
    assert ks_2samp(ours, theirs).pvalue > 0.01
    # And it can tell: the other scheme is another distribution where rows matter.
    assert ks_2samp(ours, brute_force(X, questions, y, not rows_too, 1200, seed=2)).pvalue < 0.01


@pytest.mark.parametrize(
    ("d", "questions", "rows", "effect", "between", "within"),
    [
        (64, 20, 5, 1.0, 0.5, 0.5),
        (64, 30, 4, 1.5, 0.0, 1.0),
        (16, 25, 5, 1.0, 0.7, 0.5),
        (200, 25, 4, 1.5, 0.3, 1.0),
        (1024, 20, 4, 2.0, 0.3, 0.5),
    ],
    ids=["questions differ", "rows only", "few dimensions", "many dimensions", "far more dimensions than questions"],
)
def test_the_cosine_with_the_truth_is_covered(d: int, questions: int, rows: int, effect: float, between: float, within: float) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for rep in range(300):
        u = units(int(rng.integers(1 << 30)), d)
        X = effect * u + noisy(rng, d, questions, rows, between, within)
        found = next(resample_directions([X], names(questions, rows), draws=300, rows_too=False, seed=rep))
        hits += found.truth.low <= abs(found.vector @ u) <= found.truth.high
    assert 0.92 <= hits / 300 <= 0.98


def test_two_questions_leave_much_doubt() -> None:
    X = noisy(np.random.default_rng(3), 8, 2, 15, 0.5, 1.0) + 1
    found = next(resample_directions([X], names(2, 15))).truth
    assert found.low < found.value - 0.1


def test_float32_and_float64_agree_and_the_direction_is_exact() -> None:
    rng = np.random.default_rng(2)
    X = (noisy(rng, 300, 20, 8, 1, 1) + 1 + 50 * (np.arange(300) == 7)).astype(np.float32)
    y = [bool(i % 2) for i in range(160)]
    for labels in (None, y):
        single, double = (next(resample_directions([x], names(20, 8), labels, draws=200)) for x in (X, X.astype(np.float64)))
        assert float(single.vector @ double.vector) > 1 - 1e-9
        for part in ("stability", "truth"):
            one, two = getattr(single, part), getattr(double, part)
            assert (one.value, one.low, one.high) == pytest.approx((two.value, two.low, two.high), abs=1e-4)
    exact = X.astype(np.float64).mean(axis=0)
    found = next(resample_directions([X], names(20, 8)))
    np.testing.assert_allclose(found.vector * found.raw_norm, exact, rtol=1e-5)


def test_layers_are_taken_one_by_one_and_share_their_draws() -> None:
    X = np.random.default_rng(3).normal(size=(40, 6)) + 1
    alive = []

    def layers() -> Iterator[Floats]:
        for number in range(3):
            alive.append(number)
            yield X

    stream = resample_directions(layers(), names(10, 4))
    first = next(stream)
    assert alive == [0]
    assert first.stability == next(stream).stability
    assert [found.layer for found in stream] == [2]


def test_unusable_layers_are_named() -> None:
    X = np.ones((8, 3))
    bad = X.copy()
    bad[5, 1] = np.nan
    with pytest.raises(EmprobeError, match="Layer 1 holds NaN or infinity, first in row 5"):
        list(resample_directions([X, bad], names(4, 2)))
    with pytest.raises(MismatchError, match=r"Layer 0 has values of shape \(7, 3\), but there are 8 rows"):
        list(resample_directions([X[:7]], names(4, 2)))
    with pytest.raises(MismatchError, match="Layer 1 has d_model 2, but the layers before it have 3"):
        list(resample_directions([X, X[:, :2]], names(4, 2)))
    with pytest.raises(EmprobeError, match="rows of layer 0 do not differ"):
        list(resample_directions([0 * X], names(4, 2)))
    with pytest.raises(EmprobeError, match=r"1000 draws from 1 question\(s\)"):
        list(resample_directions([X], ["q"] * 8))
    with pytest.raises(EmprobeError, match=r"from 0 question\(s\)"):
        list(resample_directions([X[:0]], []))
    with pytest.raises(EmprobeError, match="nothing to contrast: 8 of 8"):
        list(resample_directions([X], names(4, 2), [True] * 8))


# ---- energy and rounding


def test_energy_and_rounding() -> None:
    v = np.random.default_rng(0).normal(size=1000)
    assert top_energy(v, 1000) == pytest.approx(1)
    assert top_energy(np.eye(9)[3]) == 1
    assert 0.005 < top_energy(v) < 0.1
    # A difference far smaller than the means that it is taken between is lost; about 2^-9 of the means, that is.
    rng = np.random.default_rng(1)
    mean = rng.normal(size=4000)
    lost = [bf16_rounding(mean, mean + scale * rng.normal(size=4000)) for scale in (1.0, 0.1, 0.01)]
    assert lost[0] < 0.01 < lost[1] < 0.1 < lost[2]
    with pytest.raises(EmprobeError, match="two equal means"):
        bf16_rounding(mean, mean)
    with pytest.raises(EmprobeError, match="give k between 1 and 3"):
        top_energy([1.0, 2, 3], 5)
    with pytest.raises(EmprobeError, match="shapes .2. and .1. were given"):
        bf16_rounding([1.0, 2], [1.0])
    with pytest.raises(EmprobeError, match="two finite ones"):
        bf16_rounding([math.nan], [1.0])
    with pytest.raises(EmprobeError, match="with 1 NaN or infinite values"):
        top_energy([math.nan, 1.0, 2.0], 1)
    with pytest.raises(EmprobeError, match="it has none"):
        top_energy(np.zeros(9))


@pytest.mark.parametrize("power", [-120, 120])
def test_float32_rows_of_any_size_resample_alike(power: int) -> None:
    rng = np.random.default_rng(4)
    rows = (rng.normal(size=(24, 10)) + 0.5).astype(np.float32)
    questions = [f"q{i // 3}" for i in range(24)]
    usual, extreme = (next(resample_directions([X], questions, draws=50)) for X in (rows, np.ldexp(rows, power)))
    assert extreme.vector == pytest.approx(usual.vector)
    assert extreme.raw_norm == pytest.approx(usual.raw_norm * 2.0**power)
    for name in ("stability", "truth"):
        one, two = getattr(usual, name), getattr(extreme, name)
        assert (two.value, two.low, two.high) == pytest.approx((one.value, one.low, one.high), abs=1e-5)
