"""Directions: the estimator keeps scikit-learn's contract, planted shifts are found, and doubt is stated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from emprobe.activations import Activations, PairActivations
from emprobe.directions import Direction, fit_direction, fit_directions
from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap import cosine_null, random_directions

D = 24


def activations(values: torch.Tensor, questions: int = 10) -> Activations:
    rows = len(values)
    flat = values.double().reshape(-1, values.shape[1], D)
    return Activations(
        values=values.float(),
        layers=tuple(range(values.shape[1])),
        site="resid_post",
        positions="all_tokens",
        keys=tuple((f"q{i % questions}", i // questions) for i in range(rows)),
        tokens=tuple(str(i) for i in range(rows)),
        checkpoint="made",
        fingerprint="0",
        token_mean=flat.mean(dim=0),
        token_norm=flat.norm(dim=-1).mean(dim=0),
        n_tokens=rows,
    )


def pair(shift: torch.Tensor, noise: float, rows: int = 60, seed: int = 0) -> PairActivations:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, 2, D, generator=generator)
    tuned = base.clone()
    tuned[:, 1] += shift.float() + noise * torch.randn(rows, D, generator=generator)
    return PairActivations(activations(base), activations(tuned))


def test_a_planted_shift_is_found_with_its_size_and_sign() -> None:
    planted = random_directions(1, D, seed=3)[0]
    found = fit_direction(pair(4 * planted, noise=0.0), layer=1)
    assert float(found.vector @ planted) > 1 - 1e-9
    assert found.raw_norm == pytest.approx(4, abs=1e-5)
    assert found.split_half == pytest.approx(1)
    assert (found.n, found.questions) == (60, 10)


def test_mean_difference_of_a_pair_is_the_mean_of_the_deltas() -> None:
    acts = pair(random_directions(1, D, seed=3)[0], noise=1.0)
    found = fit_direction(acts, layer=1)
    torch.testing.assert_close(found.vector * found.raw_norm, acts.delta[:, 1].mean(dim=0), rtol=1e-6, atol=1e-6)


def test_split_half_falls_with_noise() -> None:
    planted = random_directions(1, D, seed=3)[0]
    sure, unsure = (fit_direction(pair(planted, noise), layer=1).split_half for noise in (0.1, 3.0))
    assert sure is not None
    assert unsure is not None
    assert sure > 0.95 > unsure


def test_split_half_of_one_question_is_unknown_not_a_number() -> None:
    acts = pair(random_directions(1, D, seed=3)[0], 0.1)
    alone = [replace(a, keys=tuple(("q", i) for i in range(len(a)))) for a in (acts.base, acts.tuned)]
    assert fit_direction(PairActivations(*alone), layer=1).split_half is None


def test_labels_contrast_rows_within_one_model() -> None:
    planted = random_directions(1, D, seed=5)[0]
    labels = [i % 3 == 0 for i in range(90)]
    values = torch.randn(90, 1, D, generator=torch.Generator().manual_seed(1)) * 0.01
    values[labels, 0] += 2 * planted.float()
    found = fit_direction(activations(values), layer=0, labels=labels, contrast="misaligned-aligned")
    assert float(found.vector @ planted) > 0.999
    assert found.contrast == "misaligned-aligned"


def test_another_linear_estimator_takes_its_place() -> None:
    planted = random_directions(1, D, seed=5)[0]
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    found = fit_direction(pair(6 * planted, noise=0.5), layer=1, estimator=lda)
    assert found.estimator == "LinearDiscriminantAnalysis(shrinkage='auto', solver='lsqr')"
    assert float(found.vector @ planted) > 0.8


def test_layers_where_nothing_differs_are_left_out() -> None:
    assert list(fit_directions(pair(random_directions(1, D, seed=1)[0], 0.1))) == [1]


def test_no_difference_anywhere_is_an_error() -> None:
    acts = pair(torch.zeros(D), 0.0)
    with pytest.raises(EmprobeError, match="equal activations at every layer"):
        fit_directions(acts)
    with pytest.raises(EmprobeError, match="do not differ at layer 0"):
        fit_direction(acts, layer=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([True] * 60, "nothing to contrast: 60 of 60"),
        ([False] * 60, "nothing to contrast: 0 of 60"),
        ([True, False], "2 entries for 60 rows"),
    ],
)
def test_labels_that_do_not_fit(labels: list[bool], message: str) -> None:
    acts = pair(random_directions(1, D, seed=1)[0], 0.1).tuned
    with pytest.raises(EmprobeError, match=message):
        fit_direction(acts, layer=1, labels=labels)


def test_wrong_uses_are_refused() -> None:
    acts = pair(random_directions(1, D, seed=1)[0], 0.1)
    with pytest.raises(EmprobeError, match="Give acts.base or acts.tuned"):
        fit_direction(acts, layer=1, labels=[True] * 60)
    with pytest.raises(EmprobeError, match="needs a pair's activations"):
        fit_direction(acts.base, layer=1)
    with pytest.raises(EmprobeError, match="Layer 7 was asked for, but layers 0, 1 were captured"):
        fit_direction(acts, layer=7)


def test_save_and_load(tmp_path: Path) -> None:
    found = fit_direction(pair(random_directions(1, D, seed=1)[0], 0.1), layer=1)
    found.save(tmp_path / "v.safetensors")
    back = Direction.load(tmp_path / "v.safetensors")
    assert torch.equal(back.vector, found.vector)
    assert back.card() == found.card()


@pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(b"no"), lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:60])])
def test_unreadable_files_are_told(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "v.safetensors"
    fit_direction(pair(random_directions(1, D, seed=1)[0], 0.1), layer=1).save(path)
    spoil(path)
    with pytest.raises(EmprobeError, match="could not be read as safetensors|is not a file"):
        Direction.load(path)


def test_cosines_of_other_widths_are_refused() -> None:
    one = fit_direction(pair(random_directions(1, D, seed=1)[0], 0.1), layer=1)
    other = replace(one, vector=random_directions(1, 7, seed=1)[0])
    with pytest.raises(MismatchError, match="d_model 24 and 7"):
        one.cosine(other)
    assert one.cosine(one) == pytest.approx(1)


def test_the_null_of_the_cosine_is_that_of_random_directions() -> None:
    fixed, drawn = random_directions(1, D, seed=1)[0], random_directions(4000, D, seed=2)
    cosines = (drawn @ fixed).abs().numpy()
    assert np.quantile(cosines, 0.95) == pytest.approx(cosine_null(D), abs=0.015)
    assert torch.equal(random_directions(5, D, 2), drawn[:5]), "a draw does not depend on how many are drawn"
