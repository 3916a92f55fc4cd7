"""Laws of predicting scores from activations: planted truths, uniform p, no leakage, parity with plain pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from emprobe.errors import EmprobeError
from emprobe.stats import permutation_p
from emprobe.studies.priors import (
    Design,
    Folds,
    PCAProjections,
    PromptTable,
    RandomProjections,
    Words,
    family_folds,
    fixed,
    measure,
    nested_lasso,
    nested_ridge,
    one_hot,
    over_folds,
    permuted,
    plain_ridge,
    random_directions,
    verdict,
)
from emprobe.studies.priors.predictors import directions_for

FAMILIES = np.repeat(np.arange(40), 3)
D = 10


def activations(seed: int = 0, n: int = 120) -> np.ndarray:
    """Rows with independent columns, the first far larger than the others, so that it is the first principal direction."""
    return np.random.default_rng(seed).standard_normal((n, D)) * np.array([15, *np.linspace(3, 0.5, D - 1)])


@pytest.fixture(scope="module")
def folds() -> Folds:
    return family_folds(FAMILIES, splits=4, repeats=2, inner=3)


# ---- planted truths


def test_a_linear_score_is_found_by_linear_features_only(folds: Folds) -> None:
    x = activations()
    score = x @ np.arange(1, D + 1)
    assert nested_ridge([PCAProjections(x, D)], score, folds).r2.mean() > 0.999
    assert nested_ridge([RandomProjections(x, D)], score, folds).r2.mean() > 0.999
    assert nested_lasso(PCAProjections(x, D), score, folds).mean() > 0.99
    assert nested_ridge([PCAProjections(x, D, squared=True)], score, folds).r2.mean() < 0.1


def test_a_squared_score_is_found_by_squared_features_only(folds: Folds) -> None:
    x = activations()
    score = (x[:, 0] - x[:, 0].mean()) ** 2
    assert nested_ridge([PCAProjections(x, D, squared=True)], score, folds).r2.mean() > 0.9
    assert nested_ridge([PCAProjections(x, D)], score, folds).r2.mean() < 0.1


def test_the_mean_predicts_nothing_and_a_score_predicts_itself(folds: Folds) -> None:
    score = activations()[:, 0]
    mean = nested_ridge([fixed(np.zeros((120, 0)))], score, folds)
    assert (mean.r2 <= 0).all()
    assert (mean.r == 0).all()
    own = nested_ridge([fixed(score)], score, folds)
    assert own.r2.min() > 0.999
    assert own.r.min() > 0.999
    assert own.rmse.max() < 0.05 * mean.rmse.min()


# ---- parity


@pytest.mark.parametrize("kind", ["pca", "squared", "words", "wide"])
def test_the_closed_form_is_the_plain_pipeline(folds: Folds, kind: str) -> None:
    x = activations(3)
    score = x[:, 1] + np.random.default_rng(1).standard_normal(120)
    names = ["rose", "tulip", "fern", "soup", "bread", "curry"]
    blocks: dict[str, Any] = {
        "pca": PCAProjections(x, 6),
        "squared": PCAProjections(x, 6, squared=True),
        "words": Words(tuple(f"what of the {names[i % 6]} and {names[(i * 7) % 5]}" for i in range(120))),
        "wide": fixed(np.random.default_rng(2).standard_normal((120, 200))),
    }
    fast = nested_ridge([blocks[kind]], score, folds).r2[:, 0]
    assert fast == pytest.approx(plain_ridge(blocks[kind], score, folds), abs=1e-8)


def test_many_targets_at_once_are_each_alone(folds: Folds) -> None:
    x = activations(4)
    targets = np.column_stack([x[:, 0], x[:, 1] + x[:, 2] ** 2, np.random.default_rng(0).standard_normal(120)])
    together = nested_ridge([PCAProjections(x, 5)], targets, folds)
    for column in range(3):
        alone = nested_ridge([PCAProjections(x, 5)], targets[:, column], folds)
        assert together.r2[:, column] == pytest.approx(alone.r2[:, 0], abs=1e-9)
        assert (together.alpha[:, column] == alone.alpha[:, 0]).all()


def test_a_block_of_weight_nothing_is_not_there(folds: Folds) -> None:
    x = activations(5)
    score = x[:, 0] + x[:, 3]
    one, other = fixed(x[:, :2]), fixed(x[:, 2:])
    without = nested_ridge([one], score, folds)
    assert nested_ridge([one, other], score, folds, weights=(0.0,)).r2 == pytest.approx(without.r2)
    chosen = nested_ridge([one, other], score, folds, weights=(0.0, 1.0))
    assert (chosen.weight == 1.0).all()
    assert chosen.r2.mean() > 0.99 > without.r2.mean()


def test_the_interval_is_nadeau_and_bengios(folds: Folds) -> None:
    values = np.array([0.1, 0.2, 0.15, 0.3, 0.25, 0.1, 0.2, 0.3])
    found = over_folds(values, folds)
    variance = values.var(ddof=1) * (1 / 8 + 30 / 90)  # 40 families of 3 in 4 parts
    half = stats.t.ppf(0.975, 7) * np.sqrt(variance)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert found.n == 120
    assert found.clusters == 40
    with pytest.raises(EmprobeError, match="one finite value for each"):
        over_folds(values[:3], folds)


# ---- no leakage


def test_families_are_never_on_both_sides() -> None:
    families = np.random.default_rng(0).integers(0, 30, 100)
    folds = family_folds(families, splits=3, repeats=3, inner=2)
    assert len(folds) == 9
    for repeat in range(3):
        tested = np.concatenate([fold.test for fold in folds.folds[3 * repeat : 3 * repeat + 3]])
        assert sorted(tested) == list(range(100))
    for fold in folds.folds:
        for fit, held in ((fold.train, fold.test), *fold.inner):
            assert not set(families[fit]) & set(families[held])
            assert not set(fit) & set(held)


def test_copies_of_a_prompt_do_not_raise_the_grouped_score() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((40, 60)), 3, axis=0) + 0.01 * rng.standard_normal((120, 60))
    score = np.repeat(rng.standard_normal(40), 3)  # says nothing of x, but copies share it
    grouped = family_folds(FAMILIES, splits=4, repeats=2, inner=3)
    ungrouped = family_folds(range(120), splits=4, repeats=2, inner=3)
    assert nested_ridge([fixed(x)], score, grouped).r2.mean() < 0.05
    assert nested_ridge([fixed(x)], score, ungrouped).r2.mean() > 0.5


def test_nothing_is_fitted_on_test_rows(folds: Folds) -> None:
    x, texts = activations(6), tuple(f"about {word} number {i % 9}" for i, word in enumerate(["roses", "soups"] * 60))
    fold = folds.folds[0]
    changed, others = x.copy(), list(texts)
    changed[fold.test] = 1e3 * np.random.default_rng(1).standard_normal((len(fold.test), D))
    for row in fold.test:
        others[row] = "never seen words"
    for before, after in (
        (PCAProjections(x, 4), PCAProjections(changed, 4)),
        (PCAProjections(x, 4, squared=True), PCAProjections(changed, 4, squared=True)),
        (RandomProjections(x, 4), RandomProjections(changed, 4)),
        (Words(texts), Words(tuple(others))),
    ):
        assert before(fold.train)[fold.train] == pytest.approx(after(fold.train)[fold.train])
        first = Folds((fold,), folds.families, 1)
        ones = [nested_ridge([block], x[:, 0], first) for block in (before, after)]
        assert ones[0].chosen == pytest.approx(ones[1].chosen)
        assert ones[0].alpha == ones[1].alpha


def test_directions_of_a_corpus_do_not_move_with_the_fold(folds: Folds) -> None:
    x, corpus = activations(7), activations(8, 60) + 5
    block = PCAProjections(x, 3, corpus=corpus)
    assert block(folds.folds[0].train) == pytest.approx(block(folds.folds[1].train))
    assert block(folds.folds[0].train).mean(axis=0) == pytest.approx((x - corpus.mean(axis=0)).mean(axis=0) @ _axes(corpus).T)


def _axes(rows: np.ndarray) -> np.ndarray:
    from emprobe.studies.priors import pca_directions

    return pca_directions(rows, 3)


# ---- chance


def test_p_is_uniform_where_nothing_is_to_be_found() -> None:
    """Paraphrases share activations and scores, so that chance which forgets families is another chance."""
    families = np.repeat(np.arange(16), 3)
    folds = family_folds(families, splits=4, repeats=1, inner=2)
    found, naive = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = np.repeat(rng.standard_normal((16, 4)), 3, axis=0) + 0.3 * rng.standard_normal((48, 4))
        score = np.repeat(rng.standard_normal(16), 3) + 0.3 * rng.standard_normal(48)
        for names, into in ((families, found), (np.arange(48), naive))[: 1 + (seed < 40)]:
            drawn = np.column_stack([score, permuted(score, names, 39, seed)])
            r2 = nested_ridge([PCAProjections(x, 3)], drawn, folds).r2.mean(axis=0)
            into.append(permutation_p(r2[0], r2[1:]))
    assert stats.kstest(np.array(found) - np.random.default_rng(0).uniform(0, 1 / 40, 100), "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.05) < 0.12
    assert stats.kstest(naive, "uniform").pvalue < 0.01


def test_permuted_scores_are_those_of_whole_families() -> None:
    families = np.array([0, 0, 1, 1, 2, 2, 3, 4, 5])
    scores = np.array([1.0, 2, 3, 4, 5, 6, 10, 20, 30])
    for draw in permuted(scores, families, 20).T:
        assert {frozenset(draw[families == f]) for f in range(3)} == {frozenset(pair) for pair in ((1.0, 2.0), (3.0, 4.0), (5.0, 6.0))}
        assert sorted(draw[6:]) == [10, 20, 30]
    with pytest.raises(EmprobeError, match="whose size no other family has"):
        permuted(np.arange(6.0), np.array([0, 0, 0, 1, 1, 2]), 5)


# ---- all predictors


def table(score: np.ndarray, **changes: Any) -> PromptTable:
    x = np.stack([activations(1), activations(2)], axis=1)
    given: dict[str, Any] = {
        "scores": score,
        "families": list(FAMILIES),
        "activations": {"base": {"last_prompt_token": x}},
        "labels": {"domain": [f"d{f % 4}" for f in FAMILIES], "task": [f"t{f % 3}" for f in FAMILIES]},
        "texts": [f"word{f % 7} and more" for f in FAMILIES],
        "tokens": [int(f) % 5 + 3 for f in FAMILIES],
        "embeddings": activations(3),
        "base_scores": activations(4)[:, :1],
    }
    return PromptTable(**(given | changes))


SMALL = Design(k=D, splits=4, repeats=2, inner=3, random_seeds=2, permutations=39)


def test_what_activations_add_is_found_with_its_place() -> None:
    x = activations(2)  # layer 1
    score = x[:, 0] + x[:, 4] + 3.0 * (FAMILIES % 4 == 0)
    found = measure(table(score), SMALL)
    assert found["design"]["families"] == 40
    (gain,) = [row for row in found["gain"] if row["group"] == "activations"]
    assert gain["gain"]["low"] > 0.3
    (chosen,) = [row for row in found["chosen"] if row["group"] == "activations"]
    assert list(chosen["places"]) == ["PCA: base, last_prompt_token, layer 1"]
    assert chosen["null"]["p"] == pytest.approx(1 / 40)
    assert chosen["null"]["high"] < 0.2 < chosen["r2"]["low"]
    said = " ".join(verdict(found))
    assert "They add to all baselines together" in said
    # All ten dimensions are read either way.
    assert "Random directions of the base model are not shown to predict worse than principal ones" in said


def test_where_labels_tell_all_it_is_said() -> None:
    cells = {name: i for i, name in enumerate(sorted({(f % 4, f % 3) for f in range(40)}))}
    score = np.random.default_rng(9).standard_normal(len(cells))[[cells[f % 4, f % 3] for f in FAMILIES]]
    score = score + 0.05 * np.random.default_rng(3).standard_normal(120)
    found = measure(table(score), SMALL)
    rows = {row["name"]: row for row in found["predictors"]}
    assert rows["domain x task"]["r2"]["value"] > 0.9 > rows["domain"]["r2"]["value"]
    assert "null" not in rows["mean"]
    said = verdict(found)
    assert any(sentence.startswith("Nothing is shown beyond all baselines together") for sentence in said)
    assert any("domain x task predicts best" in sentence and "No activations reach" in sentence for sentence in said)
    assert any("are not shown to predict scores" in sentence for sentence in said)
    (gain,) = [row for row in found["gain"] if row["group"] == "activations"]
    assert gain["gain"]["low"] <= 0 <= gain["gain"]["high"] + 0.01
    assert gain["left_out"] > 0.2


def row(value: float, low: float, p: float = 0.01, **more: Any) -> dict[str, Any]:
    return {"r2": {"value": value, "low": low, "high": 0.9}, "null": {"p": p}, "source": "base", **more}


@pytest.mark.parametrize(
    ("value", "low", "p", "words"),
    [
        (0.3, 0.1, 0.01, "fine-tuning predict scores after it"),
        (0.3, -0.1, 0.01, "that they predict those of other prompts is not shown"),
        (0.3, 0.1, 0.2, "are not shown to predict scores"),
        (-0.3, -0.5, 0.01, "are not shown to predict scores"),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(value: float, low: float, p: float, words: str) -> None:
    gain = {"r2": row(0.1, 0.0)["r2"], "gain": {"value": 0.0, "low": -0.1, "high": 0.1}, "group": "activations", "source": "base"}
    found = {
        "predictors": [
            {"name": "length", "group": "baseline"} | row(-0.2, -0.4),
            {"name": "all baselines", "group": "baseline"} | row(-0.1, -0.4),
        ],
        "chosen": [row(value, low, p, group="activations"), row(-0.4, -0.5, group="random")],
        "gain": [gain],
        "against_random": [{"source": "base", "difference": gain["gain"]}],
    }
    said = verdict(found)
    assert words in said[0]
    assert ("Neither principal nor random" in said[1]) == (value < 0)
    assert "No baseline alone predicts better than the mean; of them, length comes nearest" in said[-1]


def test_what_is_not_known_is_no_baseline() -> None:
    bare = table(activations(1)[:, 0], labels={}, texts=(), tokens=(), embeddings=None, base_scores=None)
    found = measure(bare, Design(splits=4, repeats=1, inner=3, random_seeds=1, permutations=0, lasso_repeats=0, k=3))
    assert [row["name"] for row in found["predictors"] if row["group"] == "baseline"] == ["mean"]
    assert all("null" not in row and "lasso" not in row for row in found["predictors"])
    assert "chance is unknown" in verdict(found)[0]


def test_every_combination_of_labels_has_a_column() -> None:
    assert one_hot([["a", "b"], ["x", "x"]])(np.arange(2)).tolist() == [[1, 0, 1], [0, 1, 1]]


# ---- refusals


def test_refusals(folds: Folds) -> None:
    with pytest.raises(EmprobeError, match="of 8 families of questions.*Give at least 10 families"):
        family_folds(np.repeat(np.arange(8), 3))
    with pytest.raises(EmprobeError, match="All scores of a part of fold 0 are equal"):
        nested_ridge([fixed(activations())], np.zeros(120), folds)
    with pytest.raises(EmprobeError, match="1 scores are no numbers"):
        nested_ridge([fixed(activations())], np.where(np.arange(120) == 5, np.nan, 1.0), folds)
    with pytest.raises(EmprobeError, match="11 orthonormal directions were asked for in 10 dimensions"):
        random_directions(10, 11, 0)
    with pytest.raises(EmprobeError, match="11 directions were asked for, of activations of width 10"):
        measure(table(activations()[:, 0]), Design(k=11))
    with pytest.raises(EmprobeError, match="10 directions were asked for, of activations of width 10 on 8 prompts, in which there are 7"):
        directions_for(table(activations()[:, 0]), 10, 8)
    with pytest.raises(EmprobeError, match="120 scores were given, but texts has 3 rows"):
        table(activations()[:, 0], texts=("a", "b", "c"))
    corpus = {"base": {"last_prompt_token": np.zeros((5, 2, D))}}
    with pytest.raises(EmprobeError, match="in which there are 4"):
        measure(table(activations()[:, 0], corpus=corpus), Design(k=5))
