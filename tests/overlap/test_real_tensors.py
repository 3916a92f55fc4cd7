"""On public directions: the cosines that are known of them, and what is left of a trait subspace's overlap beside either null.

The traits' subspace is the span of their three persona vectors at one index; it is compared between two position rules. The covariance of
the second null is that of all six sets of vectors at the other indices, each of norm 1, the tested index and three on either side left
out. So it asks whether the same three traits are nearer than mixtures of persona vectors from elsewhere in the model. Its limits: these
rows are directions and not activations, few (about 170), and hold the tested traits at distant indices, which makes it stricter.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from emprobe.overlap import Overlap, Subspace, nulls, overlap

TRAITS, RULES, LEFT_OUT = ("evil", "impolite", "sycophantic"), ("response_avg", "prompt_last"), 3
Vectors = dict[tuple[str, str], torch.Tensor]


@pytest.fixture(scope="module")
def folder() -> Path:
    asked = os.environ.get("EMPROBE_SHARED_DATA")
    found = (Path(asked) if asked else Path(__file__).resolve().parents[3] / "shared" / "data") / "directions"
    if not found.is_dir():
        pytest.skip(f"public directions are not at {found}; point EMPROBE_SHARED_DATA at a folder with directions/")
    return found


@pytest.fixture(scope="module")
def persona(folder: Path) -> Vectors:
    """[37, 2560] each; index k is the input of block k, the last is after the final norm."""

    def read(trait: str, rule: str) -> torch.Tensor:
        found: torch.Tensor = torch.load(folder / f"q3_4b_{trait}_{rule}.pt", weights_only=True)  # noqa: TID251 - what the peers wrote
        return found.double()

    return {(trait, rule): read(trait, rule) for trait in TRAITS for rule in RULES}


def between_rules(persona: Vectors, index: int) -> Overlap:
    spans = [Subspace.from_directions([persona[trait, rule][index] for trait in TRAITS]) for rule in RULES]
    others = [j for j in range(1, 36) if abs(j - index) > LEFT_OUT]
    rows = torch.cat([(found / found.norm(dim=1, keepdim=True))[others] for found in persona.values()])
    return overlap(spans[0], spans[1], nulls=[nulls.covariance_matched(rows), "haar", "analytic"], draws=400)


def test_evil_and_impolite_are_as_near_as_is_known(persona: Vectors) -> None:
    found = overlap(persona["evil", "response_avg"][20], persona["impolite", "response_avg"][20], nulls=["analytic"])
    assert found.cosine.value == pytest.approx(0.67, abs=0.005)
    assert found.nulls["mean_squared_cosine"]["analytic"].high is not None
    assert found.nulls["mean_squared_cosine"]["analytic"].high < 0.003


@pytest.mark.parametrize(("layer", "cosine"), [(16, 0.62), (20, 0.77), (28, 0.81), (40, 0.54)])
def test_one_direction_over_the_layers_is_as_near_as_is_known(folder: Path, layer: int, cosine: float) -> None:
    raw = torch.from_numpy(np.load(folder / "qwen2.5-14b_em_direction.npz")["raw"])
    assert raw.shape == (48, 5120)
    assert overlap(raw[24], raw[layer], nulls=["analytic"]).cosine.value == pytest.approx(cosine, abs=0.0051)


def test_trait_subspaces_overlap_far_above_isotropy_and_less_so_above_what_is_alike_anyway(persona: Vectors) -> None:
    found = between_rules(persona, 20)
    value, beside = found.mean_squared_cosine.value, found.nulls["mean_squared_cosine"]
    assert value == pytest.approx(0.170, abs=0.001)
    assert beside["analytic"].mean == pytest.approx(3 / 2560)
    assert value > 100 * beside["haar"].mean
    assert 3 < value / beside["covariance_matched"].mean < 10
    assert beside["covariance_matched"].p == pytest.approx(1 / 401)


def test_late_layers_overlap_no_more_than_persona_vectors_do_anyway(persona: Vectors) -> None:
    beside = between_rules(persona, 30).nulls["mean_squared_cosine"]
    assert beside["haar"].p == pytest.approx(1 / 401)
    assert beside["covariance_matched"].p is not None
    assert beside["covariance_matched"].p > 0.5
