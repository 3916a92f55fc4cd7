"""Layers and places are chosen on some questions and reported on others, against nulls that choose as freely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import kstest, norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from emprobe.activations import Activations, PairActivations
from emprobe.directions import Design, Direction, choose, design_of, fit_direction, layer_profile
from emprobe.directions.detection import auroc_estimate, auroc_of, crossfit_scores, folds_of
from emprobe.directions.estimators import estimator_of
from emprobe.errors import EmprobeError, MismatchError
from emprobe.report.plots import draw_certainty, draw_detection, profile_figure

D = 12


def activations(values: NDArray[np.float64], rows: int, positions: str = "all_tokens") -> Activations:
    n, layers, _ = values.shape
    return Activations(
        values=torch.from_numpy(values).float(),
        layers=tuple(range(layers)),
        site="resid_post",
        positions=positions,
        keys=tuple((f"q{i // rows:03}", i % rows) for i in range(n)),
        tokens=tuple(str(i) for i in range(n)),
        checkpoint="made",
        fingerprint="0",
        token_mean=torch.zeros(layers, D, dtype=torch.float64),
        token_norm=torch.ones(layers, dtype=torch.float64),
        n_tokens=n,
    )


def pair(effects: list[float], seed: int = 0, questions: int = 24, rows: int = 2, positions: str = "all_tokens") -> PairActivations:
    """Tuned is base plus noise and, at each layer, this much of one axis; rows of a question share half of the noise."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(questions * rows, len(effects), D))
    shared = rng.normal(size=(questions, 1, len(effects), D)).repeat(rows, axis=1).reshape(base.shape)
    tuned = base + 0.5 * shared + 0.5 * rng.normal(size=base.shape)
    tuned[:, :, 0] += effects
    return PairActivations(activations(base, rows, positions), activations(tuned, rows, positions))


# ---- AUROC


def test_the_auroc_is_scikit_learns_also_with_ties_and_over_folds() -> None:
    rng = np.random.default_rng(0)
    scores, y = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    questions = [f"q{i % 9}" for i in range(60)]
    one_fold = np.zeros(60, dtype=np.int64)
    assert auroc_of(scores[None], y[None], one_fold)[0] == pytest.approx(roc_auc_score(y, scores))
    assert auroc_estimate(scores, y, questions).value == pytest.approx(roc_auc_score(y, scores))
    folds = rng.integers(0, 3, 60)
    pairs = [(y[folds == f].sum() * (~y[folds == f]).sum(), roc_auc_score(y[folds == f], scores[folds == f])) for f in range(3)]
    expected = sum(n * a for n, a in pairs) / sum(n for n, _ in pairs)
    assert auroc_of(scores[None], y[None], folds)[0] == pytest.approx(expected)
    assert auroc_estimate(scores, y, questions, folds).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("questions", "rows", "between", "within_question"),
    [(30, 4, 0.7, True), (40, 3, 0.0, True), (60, 3, 0.7, False)],
    ids=["questions differ", "questions agree", "labels of whole questions"],
)
def test_the_intervals_cover_with_clustered_rows(questions: int, rows: int, between: float, within_question: bool) -> None:
    rng = np.random.default_rng(3)
    true = norm.cdf(1.0 / np.sqrt(2 * (between**2 + 1)))
    hits = 0
    names = [f"q{i // rows}" for i in range(questions * rows)]
    for rep in range(400):
        y = (
            np.tile([True, False], questions * rows)[: questions * rows]
            if within_question
            else np.arange(questions * rows) // rows % 2 == 0
        )
        # Pairs of one question share its effect, but they are few among all pairs.
        scores = y + np.repeat(rng.normal(0, between, questions), rows) + rng.normal(size=questions * rows)
        found = auroc_estimate(scores, y, names, draws=300, seed=rep)
        hits += found.low <= true <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_a_perfect_score_of_few_questions_still_has_doubt() -> None:
    found = auroc_estimate(np.arange(8.0), np.arange(8) > 3, list("abcdabcd"))
    assert (found.value, found.high) == (1, 1)
    assert found.low < 0.6
    assert "Wilson" in found.method
    alone = auroc_estimate(np.arange(8.0), np.arange(8) > 3, ["q"] * 8)
    assert (alone.low, alone.high) == (0, 1)
    with pytest.raises(EmprobeError, match="no fold of the 8 rows holds both"):
        auroc_estimate(np.arange(8.0), np.arange(8) >= 0, list("abcdabcd"))


def test_scores_come_from_directions_of_other_questions() -> None:
    design = design_of(pair([1.0]), 0)
    folds = folds_of(design.codes, 4, seed=0)
    assert len({(q, f) for q, f in zip(design.questions, folds, strict=True)}) == 24, "a question lies in one fold"
    for name in ("mean_difference", "ridge"):
        scores = crossfit_scores(design, folds, design.y[None], estimator_of(name))
        spoiled = Design(design.X.copy(), design.y.copy(), design.questions, True, 0)
        spoiled.y[folds == 2] ^= True  # the labels of a fold have no part in its own scores
        again = crossfit_scores(spoiled, folds, spoiled.y[None], estimator_of(name))
        np.testing.assert_allclose(again[:, folds == 2], scores[:, folds == 2], atol=1e-12)
        assert not np.allclose(again[:, folds != 2], scores[:, folds != 2])
    with pytest.raises(EmprobeError, match=r"30 folds of 24 question\(s\)"):
        folds_of(design.codes, 30, seed=0)


# ---- nulls


@pytest.mark.parametrize("scheme", ["sign flips per question", "labels within questions", "labels between questions"])
def test_relabellings_keep_what_is_exchangeable(scheme: str) -> None:
    design = null_design(scheme, np.random.default_rng(0))
    assert design.scheme == scheme
    drawn = design.null_labels(200, seed=0)
    assert (drawn.sum(axis=1) == design.y.sum()).all()
    codes = design.codes
    for q in range(int(codes.max()) + 1):
        inside = drawn[:, codes == q]
        if scheme == "labels within questions":
            assert (inside.sum(axis=1) == design.y[codes == q].sum()).all()
        if scheme == "sign flips per question":
            assert (inside[:, ::2] != inside[:, 1::2]).all(), "partners keep unequal labels"
            assert (inside[:, ::2] == inside[:, :1]).all(), "all pairs of a question swap together"
        if scheme == "labels between questions":
            assert (inside == inside[:, :1]).all()
    assert len({row.tobytes() for row in drawn}) > 100


def null_design(scheme: str, rng: np.random.Generator) -> Design:
    """Questions whose rows resemble each other, and classes that do not differ."""
    questions, rows = 14, 4
    X = rng.normal(size=(questions, 1, 5)) + rng.normal(size=(questions, rows, 5))
    names = tuple(f"q{i:02}" for i in range(questions) for _ in range(rows))
    if scheme == "sign flips per question":
        X[:, 1::2] += rng.normal(size=(questions, 1, 5)) * rng.choice([-1, 1], size=(questions, 1, 1))
        return Design(X.reshape(-1, 5), np.tile([False, True], questions * rows // 2), names, True, 0)
    whole = np.repeat(rng.permutation(questions) < 6, rows)
    y = whole if scheme == "labels between questions" else rng.random(questions * rows) < 0.4
    return Design(X.reshape(-1, 5), y, names, False, 0)


@pytest.mark.parametrize("scheme", ["sign flips per question", "labels within questions", "labels between questions"])
def test_permutation_p_is_uniform_under_the_null(scheme: str) -> None:
    rng = np.random.default_rng(11)
    estimator = estimator_of("mean_difference")
    found = []
    for rep in range(250):
        design = null_design(scheme, rng)
        folds = folds_of(design.codes, 4, seed=rep)
        labels = np.concatenate([design.y[None], design.null_labels(39, rep)])
        scores = auroc_of(crossfit_scores(design, folds, labels, estimator), labels, folds)
        found.append((1 + (scores[1:] >= scores[0]).sum() - rng.random()) / 40)  # a p of 40 steps, spread within its step
    assert kstest(found, "uniform").pvalue > 0.01


def test_the_p_of_the_chosen_maximum_is_uniform_and_the_naive_one_is_not() -> None:
    naive, corrected, tested = [], [], []
    for rep in range(120):
        found = choose({"a": pair([0.0] * 6, seed=rep, questions=12)}, permutations=39, seed=rep)
        corrected.append(found.p_max)
        tested.append(found.p_test)
        design = design_of(pair([0.0] * 6, seed=rep, questions=12), found.layer).select(
            np.isin(design_of(pair([0.0], seed=rep, questions=12), 0).questions, found.dev_questions)
        )
        folds = folds_of(design.codes, 5, rep)
        labels = np.concatenate([design.y[None], design.null_labels(39, rep)])
        scores = auroc_of(crossfit_scores(design, folds, labels, estimator_of()), labels, folds)
        naive.append((1 + (scores[1:] >= scores[0]).sum()) / 40)
    for values in (corrected, tested):
        assert kstest(np.array(values) - np.random.default_rng(0).random(120) / 40, "uniform").pvalue > 0.01
    assert np.mean(np.array(naive) <= 0.05) > 0.15 > np.mean(np.array(corrected) <= 0.05)


# ---- choosing


def test_the_planted_place_is_chosen_and_reported_on_other_questions() -> None:
    candidates = {"weak": pair([0.0, 0.2], 1, positions="last_prompt_token"), "strong": pair([0.3, 2.5, 0.5], 1)}
    found = choose(candidates, permutations=99)
    assert (found.name, found.layer) == ("strong", 1)
    assert len(found.candidates) == 5
    assert {c.positions for c in found.candidates} == {"all_tokens", "last_prompt_token"}
    assert not set(found.dev_questions) & set(found.test_questions)
    assert (len(found.dev_questions), len(found.test_questions)) == (16, 8)
    assert found.p_max == found.p_test == 0.01
    # By hand: fitted to the development rows, scored on the test rows.
    design = design_of(candidates["strong"], 1)
    dev = np.isin(design.questions, found.dev_questions)
    v = design.X[dev & design.y].mean(axis=0) - design.X[dev & ~design.y].mean(axis=0)
    assert found.test.value == pytest.approx(roc_auc_score(design.y[~dev], design.X[~dev] @ v))
    assert found.test.clusters == 8
    assert "Layer 1 of strong was chosen among 5" in str(found)


def test_what_test_questions_hold_has_no_part_in_the_choice() -> None:
    acts = pair([0.3, 1.0, 0.5], 1)
    found = choose({"a": acts}, permutations=19)
    spoiled = acts.tuned.values.clone()
    for row, (question, _) in enumerate(acts.tuned.keys):
        if question in found.test_questions:
            spoiled[row, 0] += 100
    again = choose({"a": PairActivations(acts.base, replace(acts.tuned, values=spoiled))}, permutations=19)
    assert (again.layer, again.candidates, again.p_max) == (found.layer, found.candidates, found.p_max)


def test_layer_auto_fits_the_chosen_layer_on_development_questions_and_carries_the_report() -> None:
    acts = pair([0.3, 2.5, 0.5], 1)
    v = fit_direction(acts, layer="auto", permutations=19)
    choice = v.provenance["choice"]
    assert (v.layer, choice["layer"], v.questions, v.n) == (1, 1, 16, 32)
    assert choice["test"]["value"] > 0.8
    rows = [i for i, (q, _) in enumerate(acts.base.keys) if q in choice["dev_questions"]]
    torch.testing.assert_close(v.vector * v.raw_norm, acts.delta[rows, 1].mean(dim=0), rtol=1e-6, atol=1e-6)


def test_labels_of_whole_questions_are_spread_over_both_parts() -> None:
    acts = pair([3.0], 2, questions=20).base
    labels = [i // 2 % 5 == 0 for i in range(40)]  # 4 of 20 questions
    values = acts.values.clone()
    values[labels, 0, 3] += 4
    found = choose({"a": replace(acts, values=values)}, labels=labels, permutations=19)
    assert found.scheme == "labels between questions"
    assert found.test.value > 0.9
    with pytest.raises(EmprobeError, match="development questions hold rows of one class only"):
        choose({"a": acts}, labels=[i < 2 for i in range(40)])


def test_equal_layers_are_no_candidates_and_unusable_ones_are_told() -> None:
    acts = pair([1.0, 1.0])
    half = PairActivations(acts.base, replace(acts.tuned, values=torch.stack([acts.base.values[:, 0], acts.tuned.values[:, 1]], dim=1)))
    assert [c.layer for c in choose({"a": half}, permutations=9).candidates] == [1]
    with pytest.raises(EmprobeError, match="equal activations at every layer"):
        choose({"a": PairActivations(acts.base, acts.base)})
    with pytest.raises(EmprobeError, match="no candidates"):
        choose({})
    with pytest.raises(MismatchError, match="'a' and 'b' hold different rows"):
        choose({"a": acts, "b": pair([1.0], questions=12)})
    with pytest.raises(EmprobeError, match="at least 4 of them, and there are 3"):
        choose({"a": pair([1.0], questions=3)})
    with pytest.raises(EmprobeError, match="test_share = 1 was given"):
        choose({"a": acts}, test_share=1)


# ---- profile


def test_the_profile_tells_planted_from_empty_layers() -> None:
    rows = layer_profile(pair([0.0, 2.0, 0.0]), permutations=99, draws=200)
    assert [row.layer for row in rows] == [0, 1, 2]
    empty, planted, _ = rows
    assert planted.p == 0.01 < 0.05 < empty.p
    assert planted.q == pytest.approx(0.03)
    assert planted.auroc.low > planted.null_p95 > 0.5
    assert planted.truth is not None
    assert empty.truth is not None
    assert empty.truth.low < 0.6 < planted.truth.low
    assert planted.spearman_brown == pytest.approx(2 * planted.split_half / (1 + planted.split_half))  # type: ignore[operator]
    assert planted.as_dict()["auroc"]["clusters"] == 24


def test_the_profile_prints_and_is_drawn_as_it_is() -> None:
    acts = pair([0.0, 2.0])
    found = layer_profile(acts, permutations=19, draws=50)
    assert len(found) == 2
    assert (found.site, found.positions) == (acts.base.site, acts.base.positions)
    assert [line.split()[0] for line in repr(found).splitlines()] == ["layer", "0", "1"]
    for draw in (draw_detection, draw_certainty):
        ax = draw(found)
        assert "layer taken" not in {line.get_label() for line in ax.lines}
        assert ax.get_xlabel() == f"layer ({acts.base.site})"
        taken = next(line for line in draw(found, layer=1).lines if line.get_label() == "layer taken")
        assert list(taken.get_xdata()) == [1, 1]  # type: ignore[arg-type]
    assert len(profile_figure(found, layer=1).axes) == 2


def test_a_direction_says_how_its_layer_was_chosen(tmp_path: Path) -> None:
    acts = pair([0.0, 2.0])
    v = fit_direction(acts, layer="auto", permutations=19)
    v.save(tmp_path / "v.safetensors")
    for choice in (v.choice, Direction.load(tmp_path / "v.safetensors").choice):
        assert choice == choose({"acts": acts}, permutations=19)
    assert str(v.choice).startswith(
        "Layer 1 was chosen among 2 by cross-fitted AUROC on 16 questions (p of the maximum 0.05, sign flips per"
    )
    assert fit_direction(acts, layer=1).choice is None
    several = choose({"one": acts, "two": acts}, permutations=9)
    assert str(several).startswith("Layer 1 of one was chosen among 4")


@pytest.mark.parametrize("estimator", ["ridge", "paired_pca"])
def test_the_profile_of_other_estimators_has_no_interval_that_only_means_have(estimator: str) -> None:
    row = layer_profile(pair([2.0], questions=12), estimator=estimator, permutations=19)[0]
    assert row.truth is None is row.stability
    assert row.auroc.value > 0.7


# ---- bad input


def test_paired_components_need_pairs_and_rows_need_to_differ() -> None:
    acts = pair([1.0])
    labels = [i % 2 == 0 for i in range(48)]
    with pytest.raises(EmprobeError, match="paired_pca needs rows in pairs"):
        fit_direction(acts.base, layer=0, labels=labels, estimator="paired_pca")
    same = replace(acts.base, values=torch.ones_like(acts.base.values))
    with pytest.raises(EmprobeError, match="All 48 rows are equal at layer 0: every feature is constant"):
        fit_direction(same, layer=0, labels=labels)
    with pytest.raises(EmprobeError, match=r"labels holds \[0, 1, 2\]"):
        fit_direction(acts.base, layer=0, labels=[i % 3 for i in range(48)])  # type: ignore[misc]
    with pytest.raises(EmprobeError, match=r"found coefficients of norm 0 at layer 0"):
        fit_direction(acts, layer=0, estimator=LogisticRegression(C=1e-9, l1_ratio=1.0, solver="liblinear"))


def test_what_is_not_finite_is_named_by_row_question_and_layer() -> None:
    acts = pair([1.0, 1.0]).base
    values = acts.values.clone()
    values[7, 1, 2] = torch.inf
    with pytest.raises(EmprobeError, match=r"not finite, first at row 7 \(question 'q003'\), layer 1"):
        replace(acts, values=values)


def test_a_component_says_how_sure_its_sign_is_and_every_direction_how_far_the_means_lie_apart_along_it() -> None:
    acts = pair([2.0])
    found = fit_direction(acts, layer=0, estimator="paired_pca")
    assert "standard errors from 0" in found.sign
    for name in ("paired_pca", "ridge", "lda", "logistic_l2"):
        v = fit_direction(acts, layer=0, estimator=name)
        assert v.raw_norm == pytest.approx(float(acts.delta[:, 0].mean(dim=0) @ v.vector))
        assert v.raw_norm <= fit_direction(acts, layer=0).raw_norm
