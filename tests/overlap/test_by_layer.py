"""Overlap over layers is overlap at each of them, finds rows and questions itself, and says what it left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from emprobe.activations import Activations, PairActivations
from emprobe.errors import EmprobeError
from emprobe.overlap import OverlapLayers, Subspace, ceiling, false_discovery, nulls, overlap, overlap_layers
from emprobe.report.plots import draw_overlap, overlap_figure

N, D, LAYERS = 24, 16, (2, 4, 6)
RNG = np.random.default_rng(0)


def captured(values: np.ndarray, name: str) -> Activations:
    return Activations(
        values=torch.from_numpy(values).float(), layers=LAYERS, site="resid_post", positions="last_prompt_token",
        keys=tuple((f"q{i // 2}", i % 2) for i in range(N)), tokens=tuple(f"t{i}" for i in range(N)), checkpoint=name, fingerprint=name,
        token_mean=torch.zeros(len(LAYERS), D), token_norm=torch.ones(len(LAYERS)), n_tokens=N,
    )  # fmt: skip


def pair(name: str, *, silent: tuple[int, ...] = ()) -> PairActivations:
    delta = RNG.normal(size=(N, len(LAYERS), D)) * np.r_[5.0, 4.0, np.ones(D - 2)] + 1
    delta[:, [LAYERS.index(layer) for layer in silent]] = 0
    return PairActivations(captured(BASE, "base"), captured(BASE + delta, name))


BASE = RNG.normal(size=(N, len(LAYERS), D)) * np.linspace(3, 1, D)
A, B = pair("a"), pair("b")


def test_the_deltas_of_a_layer_and_their_questions() -> None:
    assert torch.equal(A.at(4), A.delta[:, 1])
    assert A.layers == LAYERS
    assert A.questions == A.base.questions == tuple(f"q{i // 2}" for i in range(N))
    with pytest.raises(EmprobeError, match="Layer 3 was asked for, but layers 2, 4, 6 were captured"):
        A.at(3)
    assert repr(A) == "PairActivations(tuned " + repr(A.tuned) + ", base 'base')"


def test_overlap_takes_rows_and_questions_from_a_pair() -> None:
    spaces = [Subspace.from_deltas(side, k=2, layer=4) for side in (A, B)]
    options: dict[str, Any] = {"nulls": [], "resamples": 12}
    by_hand = overlap(*spaces, rows_a=A.at(4), rows_b=B.at(4), groups_a=A.questions, groups_b=B.questions, **options)
    assert overlap(*spaces, rows_a=A, rows_b=B, **options).as_dict() == by_hand.as_dict()
    assert by_hand.mean_squared_cosine.clusters == N // 2
    with pytest.raises(EmprobeError, match=r"rows_a are activations of layers 2, 4, 6, and the subspace names none. Give .at"):
        overlap(Subspace.from_deltas(A.at(4), k=2), spaces[1], rows_a=A)


def test_every_layer_is_overlap_with_its_ceiling_and_q() -> None:
    names: list[Any] = ["haar", "covariance_matched"]
    found = overlap_layers(A, B, k=2, nulls=names, rows=A.base, draws=50, resamples=12)
    assert [row.layer for row in found] == list(LAYERS)
    assert len(found) == 3
    laws = ["haar", nulls.covariance_matched(A.base.at(4))]
    spaces = [Subspace.from_deltas(side, k=2, layer=4, made_from=f"rows of {side.tuned.checkpoint}") for side in (A, B)]
    by_hand = overlap(*spaces, nulls=laws, rows_a=A, rows_b=B, draws=50, resamples=12)
    assert found.at(4).overlap.as_dict() == by_hand.as_dict()
    halves = [ceiling(side.at(4), k=2, groups=side.questions).value for side in (A, B)]
    assert found.at(4).ceiling == pytest.approx((halves[0] * halves[1]) ** 0.5)
    ps = [row.overlap.nulls["mean_squared_cosine"]["haar"].p for row in found]
    assert [row.q["haar"] for row in found] == pytest.approx(false_discovery(ps))  # type: ignore[arg-type]


def test_it_prints_as_a_table_and_is_drawn_as_it_is() -> None:
    found = overlap_layers(A, pair("half", silent=(2, 4)), k=2, draws=20, resamples=12)
    lines = repr(found).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "6", "analytic", "Layer", "Left"]
    assert lines[-2] == f"Layer 6: {found.at(6).overlap.note}"
    assert lines[-1] == "Left out: layer 2, 4. All 24 deltas there are zero, so they span nothing."
    with pytest.raises(EmprobeError, match="Layer 2 was asked for, but was not compared: All 24 deltas at layer 2 are zero"):
        found.at(2)
    with pytest.raises(EmprobeError, match="Layer 9 was asked for, but was not compared: there are 6"):
        found.at(9)
    assert draw_overlap(found).lines[-1].get_xdata().tolist() == draw_overlap(found.as_dict()).lines[-1].get_xdata().tolist() == [6]  # type: ignore[union-attr]
    assert len(overlap_figure(found).axes) == 2


def test_subspaces_and_directions_of_each_layer_with_rows_of_each_layer() -> None:
    axes = torch.eye(D, dtype=torch.float64)
    one: dict[int, Any] = {layer: Subspace.from_directions([axes[0], axes[1]]) for layer in LAYERS}
    rows = {layer: BASE[:, i] for i, layer in enumerate(LAYERS)}
    found = overlap_layers(one, dict.fromkeys(LAYERS[1:], axes[1]), nulls=["covariance_matched"], rows=rows, draws=20)
    assert [row.layer for row in found] == [4, 6]
    assert [row.overlap.mean_squared_cosine.value for row in found] == pytest.approx([1, 1])
    assert found.at(4).ceiling is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: overlap_layers(A, B), "Side a gives activations, of which subspaces are made. Say exactly one of k= and share="),
        (lambda: overlap_layers(A, B, k=2, layers=[3]), "Layer 3 was asked for, but a has layers 2, 4, 6 and b has layers 2, 4, 6"),
        (lambda: overlap_layers(A, pair("half", silent=(4,)), k=2, layers=[4], resamples=0), "All 24 deltas at layer 4 are zero"),
        (lambda: overlap_layers(A, pair("none", silent=LAYERS), k=2, resamples=0), "No layer is left to compare. All 24 .* centred=False"),
        (lambda: overlap_layers(A, B, k=2, nulls=["covariance_matched"]), "null covariance_matched needs rows .* Give them with rows="),
        (lambda: overlap_layers(A, B, k=2, rows={2: BASE[:, 0]}, resamples=0, draws=9), "rows of the nulls have no layer 4"),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Any, message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        call()


def test_the_record_is_plain() -> None:
    found = OverlapLayers((), {3: "why"})
    assert found.as_dict() == {"record": "OverlapOverLayers", "layers": [], "left_out": {"3": "why"}}
