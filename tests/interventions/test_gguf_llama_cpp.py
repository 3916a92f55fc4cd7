"""llama.cpp itself computes, with our files, the logits that hooks compute in transformers; `--log-cli-level=info` shows how closely."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from emprobe.directions import Direction
from emprobe.interventions import Ablate, Add, Operator, Plan, intervene
from emprobe.interventions.export.registry import export
from emprobe.models import Checkpoint, load_model
from emprobe.overlap import Subspace, random_directions
from tests.fixtures.llama_cpp import LlamaCpp, write_model
from tests.fixtures.models import Architecture, write_base

pytest.importorskip("llama_cpp", reason="llama.cpp is not here to compare with; build it by: pip install llama-cpp-python")
pytestmark = pytest.mark.slow

IDS = [[7, 91, 300, 12, 5, 44, 260, 130, 18, 77, 203, 9], [301, 8], [55]]
TOLERANCE = 1e-4
log = logging.getLogger(__name__)


@dataclass
class Both:
    """One model in both programs."""

    here: Checkpoint
    there: LlamaCpp

    def logits(self, *operators: Operator) -> list[torch.Tensor]:
        """By transformers, hooks and all, row by row."""
        with torch.no_grad():
            if not operators:
                return [self.here.hf(torch.tensor([ids])).logits[0] for ids in IDS]
            with intervene(self.here, *operators):
                return [self.here.hf(torch.tensor([ids])).logits[0] for ids in IDS]

    def difference(self, *operators: Operator) -> float:
        """Largest |Δlogit| between llama.cpp as it is set now and transformers with these operators."""
        return largest([self.there.logits(ids) for ids in IDS], self.logits(*operators))

    def effect(self, *operators: Operator) -> float:
        """Largest |Δlogit| that the operators make."""
        return largest(self.logits(*operators), self.logits())


def largest(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Both]:
    made: dict[Architecture, Both] = {}

    def get(architecture: Architecture) -> Both:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            here = load_model(write_base(folder / "base", architecture, n_layers=4))
            made[architecture] = Both(here, LlamaCpp(write_model(folder / "base.gguf", here.hf)))
            _as_llama_cpp_has_it(here.hf)
        return made[architecture]

    return get


def _as_llama_cpp_has_it(hf: Any) -> None:
    """What differs in llama.cpp on purpose, before any intervention."""
    if hf.config.model_type == "mistral":
        hf.config.sliding_window = None  # Its Llama has no window.
    if hf.config.model_type == "gemma2":
        for block in hf.model.layers:  # Its GELU is a table of half-precision numbers.
            block.mlp.act_fn.register_forward_pre_hook(lambda _, args: (args[0].half().float(),))
            block.mlp.act_fn.register_forward_hook(lambda _, args, output: output.half().float())


def direction(checkpoint: Checkpoint, layer: int, seed: int = 0) -> Direction:
    return Direction.from_vector(random_directions(1, checkpoint.d_model, seed)[0], layer=layer)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_a_control_vector_moves_llama_cpp_as_the_hooks_move_transformers(
    both: Callable[[Architecture], Both], architecture: Architecture, tmp_path: Path
) -> None:
    model = both(architecture)
    plain = model.difference()
    # The last block is among them, and the first that llama.cpp has; two additions meet at block 2.
    adds = [Add(direction(model.here, layer, seed), 3.0, unit="abs") for layer, seed in ((1, 0), (2, 1), (2, 2), (3, 3))]
    export(Plan.of(*adds), model.here, "gguf", tmp_path / "out")
    model.there.set_control_vector(tmp_path / "out" / "control_vector.gguf")
    steered, effect = model.difference(*adds), model.effect(*adds)
    model.there.set_control_vector(tmp_path / "out" / "control_vector.gguf", scale=-0.5)
    scaled = model.difference(*[Add(add.direction, -1.5, unit="abs") for add in adds])
    model.there.set_control_vector(None)
    log.info("%s: plain %.1e, steered %.1e, scaled by -0.5 %.1e; effect %.2f", architecture, plain, steered, scaled, effect)
    assert max(plain, steered, scaled) <= TOLERANCE
    assert effect > 1
    assert model.difference() == plain, "no trace left"


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_lora_moves_llama_cpp_as_the_hooks_move_transformers(
    both: Callable[[Architecture], Both], architecture: Architecture, tmp_path: Path
) -> None:
    model = both(architecture)
    one, plane = direction(model.here, 2), Subspace.from_directions([direction(model.here, 2, seed) for seed in (1, 2, 3)])
    export(Plan.of(Ablate(one, site="writes")), model.here, "gguf_lora", tmp_path / "one")
    export(Plan.of(Ablate(plane, site="writes")), model.here, "gguf_lora", tmp_path / "plane")
    measured = {}
    for name, scale, operator in (
        ("one", 1.0, Ablate(one, site="writes")),
        ("one", 0.4, Ablate(one, 0.4, site="writes")),
        ("plane", 1.0, Ablate(plane, site="writes")),
    ):
        model.there.set_lora(tmp_path / name / "ablation.gguf", scale=scale)
        measured[f"{name} x {scale}"] = model.difference(operator), model.effect(operator)
    model.there.set_lora(None)
    log.info("%s: %s", architecture, ", ".join(f"{name} {off:.1e} (effect {effect:.2f})" for name, (off, effect) in measured.items()))
    assert max(off for off, _ in measured.values()) <= TOLERANCE
    assert min(effect for _, effect in measured.values()) > 1
