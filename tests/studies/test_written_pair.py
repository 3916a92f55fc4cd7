"""Ground truth: two checkpoints that differ by one known vector in one known block, found, removed and put back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from emprobe.activations import PairActivations
from emprobe.capture import capture
from emprobe.directions import Direction, fit_direction, fit_directions
from emprobe.errors import EmprobeError
from emprobe.interventions import Ablate, Add, MeanAblate, SetProjection, intervene
from emprobe.models import Checkpoint, load_pair
from emprobe.models.pair import CheckpointPair
from emprobe.organisms.written import Kind, WrittenPair, written_pair, written_questions

LAYER, N_LAYERS, SCALE = 2, 4, 3.0
Written = tuple[WrittenPair, CheckpointPair, PairActivations]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Written]:
    made: dict[Kind, Written] = {}

    def get(kind: Kind) -> Written:
        if kind not in made:
            truth = written_pair(tmp_path_factory.mktemp(kind) / "pair", layer=LAYER, n_layers=N_LAYERS, scale=SCALE, kind=kind, seed=3)
            pair = load_pair(truth.base, truth.tuned)
            made[kind] = truth, pair, capture(pair, written_questions(12), positions="last_prompt_token", progress=False)
        return made[kind]

    return get


@pytest.fixture
def constant(written: Callable[[Kind], Written]) -> Written:
    return written("constant")


def logits(checkpoint: Checkpoint, operator: Any = None) -> torch.Tensor:
    ids = torch.arange(6, 26).reshape(2, 10)
    block: Any = intervene(checkpoint, operator) if operator else nullcontext()
    with block, checkpoint.active() as model, torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("kind", ["constant", "rank1"])
def test_the_direction_is_recovered(written: Callable[[Kind], Written], kind: Kind) -> None:
    truth, _, acts = written(kind)
    found = fit_direction(acts, layer=LAYER)
    cosine = float(found.vector @ truth.direction.double())
    assert abs(cosine) > 0.999
    if kind == "constant":
        assert cosine > 0, "positive is tuned"
        assert found.raw_norm == pytest.approx(SCALE, abs=1e-4)
        assert found.split_half == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ["constant", "rank1"])
def test_blocks_below_are_bit_equal_and_get_no_direction(written: Callable[[Kind], Written], kind: Kind) -> None:
    _, _, acts = written(kind)
    for layer in range(LAYER):
        assert torch.equal(acts.base.at(layer), acts.tuned.at(layer))
    assert set(fit_directions(acts)) == set(range(LAYER, N_LAYERS))
    with pytest.raises(EmprobeError, match=r"do not differ at layer 1"):
        fit_direction(acts, layer=LAYER - 1)


def test_what_is_said_of_it_is_what_was_written(constant: Written) -> None:
    truth, _, acts = constant
    found = fit_directions(acts)
    assert found[LAYER].sign == "positive is tuned"
    moved = acts.tuned.at(LAYER).double() - acts.base.at(LAYER).double()
    torch.testing.assert_close(moved, (SCALE * truth.direction.double()).expand_as(moved), rtol=0, atol=1e-5)
    # Above the block the written vector is carried on by the residual stream, among what later blocks make of it.
    assert float(found[LAYER + 1].vector @ truth.direction.double()) > 0.5


def test_added_to_base_it_is_tuned_and_taken_from_tuned_it_is_base(constant: Written) -> None:
    _, pair, acts = constant
    found = fit_direction(acts, layer=LAYER)
    base, tuned = logits(pair.base), logits(pair.tuned)
    assert float((base - tuned).abs().max()) > 0.1, "there is something to undo"
    torch.testing.assert_close(logits(pair.base, Add(found, 1, unit="raw")), tuned, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(pair.tuned, Add(found, -1, unit="raw")), base, rtol=0, atol=1e-4)


def test_ablated_both_models_are_one(constant: Written) -> None:
    """They differ along one line only, so wherever that line's projection is put, the rest is the same."""
    _, pair, acts = constant
    found = fit_direction(acts, layer=LAYER)
    for operator in (Ablate(found), MeanAblate(found), SetProjection(found, 0.5)):
        torch.testing.assert_close(logits(pair.tuned, operator), logits(pair.base, operator), rtol=0, atol=1e-4)


def projection(checkpoint: Checkpoint, found: Direction, operator: Any) -> tuple[float, float]:
    """Largest projection left at any token kept (the means of all tokens), and the norm there."""
    with intervene(checkpoint, operator):
        acts = capture(checkpoint, written_questions(12), layers=[LAYER], positions="all_tokens", progress=False)
    x = acts.at(LAYER).double()
    return float((x @ found.vector).abs().max()), float(x.norm(dim=-1).max())


def test_ablation_is_exact(constant: Written) -> None:
    _, pair, acts = constant
    found = fit_direction(acts, layer=LAYER)
    left, norm = projection(pair.tuned, found, Ablate(found))
    assert left <= 1e-6 * norm
    put, _ = projection(pair.tuned, found, SetProjection(found, 2.5, unit="abs"))
    assert put == pytest.approx(2.5, abs=1e-5)


def test_the_direction_found_on_disk_does_the_same(constant: Written, tmp_path: Path) -> None:
    _, pair, acts = constant
    found = fit_direction(acts, layer=LAYER)
    found.save(tmp_path / "direction.safetensors")
    again = Direction.load(tmp_path / "direction.safetensors")
    assert torch.equal(logits(pair.base, Add(again, 1, unit="raw")), logits(pair.base, Add(found, 1, unit="raw")))
