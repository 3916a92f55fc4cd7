"""Exports do what hooks do, read from disk by something else, and refuse by name what they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emprobe.directions import Direction
from emprobe.errors import EmprobeError
from emprobe.interventions import Ablate, Add, Operator, Plan, intervene
from emprobe.interventions.export import export
from emprobe.models import Checkpoint, load_model, load_pair
from emprobe.overlap import Subspace, random_directions
from tests.fixtures.models import Architecture, Checkpoints, copy_of

CheckpointsOf = Callable[[Architecture], Checkpoints]
IDS = torch.arange(2, 26).reshape(2, 12) * 7 % 300
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
WRITERS: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "gpt_neox_sequential", "gpt2")
NORMED: tuple[Architecture, ...] = ("gemma2", "gemma3_text", "olmo2", "olmo3")


def direction(checkpoint: Checkpoint, layer: int = 1, seed: int = 0, site: Any = "resid_post") -> Direction:
    vector = random_directions(1, checkpoint.d_model, seed)[0]
    return Direction.from_vector(2.0 * vector, layer=layer, site=site, resid_norm=5.0)


def subspace(checkpoint: Checkpoint, k: int = 3) -> Subspace:
    return Subspace.from_directions([direction(checkpoint, seed=seed) for seed in range(k)])


def part(checkpoint: Checkpoint, k: int) -> Any:
    return direction(checkpoint) if k == 1 else subspace(checkpoint, k)


def logits(checkpoint: Checkpoint, *operators: Operator | Plan) -> Tensor:
    position_ids = (MASK.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": IDS, "attention_mask": MASK, "position_ids": position_ids}
    with torch.no_grad():
        if not operators:
            with checkpoint.active() as model:
                found = model(**given).logits
        else:
            with intervene(checkpoint, *operators):
                found = checkpoint.hf(**given).logits
    real: Tensor = found[MASK.bool()]
    return real


def off_by(found: Tensor, wanted: Tensor, plain: Tensor) -> float:
    assert float((wanted - plain).abs().max()) > 1e-2, "an intervention that does nothing proves nothing"
    return float((found - wanted).abs().max())


def with_biases_cut(checkpoints: Checkpoints, folder: Path) -> Path:
    """A copy whose biases are zero: then a LoRA without biases says all."""
    own = copy_of(checkpoints, folder).base
    weights = load_file(own / "model.safetensors")
    save_file({n: w * 0 if n.endswith("bias") else w for n, w in weights.items()}, own / "model.safetensors", {"format": "pt"})
    return own


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_orthogonalised_weights_equal_hooks_at_every_write(
    checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture, k: int
) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    before = {n: w.clone() for n, w in checkpoint.hf.state_dict().items()}
    for strength in (1.0, 0.5):
        plan = Plan.of(Ablate(part(checkpoint, k), site="writes", strength=strength))
        out = export(plan, checkpoint, "weights", tmp_path / str(strength)).folder
        assert off_by(logits(load_model(out)), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5
    assert all(torch.equal(w, before[n]) for n, w in checkpoint.hf.state_dict().items())
    assert checkpoint.hf.config.tie_word_embeddings == load_model(checkpoints_of(name).base).hf.config.tie_word_embeddings


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_lora_equals_hooks_at_every_write(checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture, k: int) -> None:
    base = with_biases_cut(checkpoints_of(name), tmp_path)
    checkpoint = load_model(base)
    for strength in (1.0, 0.5):
        plan = Plan.of(Ablate(part(checkpoint, k), site="writes", strength=strength))
        exported = export(plan, checkpoint, "lora", tmp_path / str(strength))
        assert json.loads((exported.folder / "adapter_config.json").read_text())["r"] == k
        assert not (exported.folder / "biases").exists()
        adapted = load_model(base, adapter=exported.folder)
        assert off_by(logits(adapted), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gpt_neox_sequential"])
def test_biases_that_write_along_the_direction_are_a_second_adapter(
    checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture
) -> None:
    base = checkpoints_of(name).base
    checkpoint = load_model(base)
    plan = Plan.of(Ablate(direction(checkpoint), site="writes"))
    out = export(plan, checkpoint, "lora", tmp_path / "out").folder
    whole, first = load_model(base, adapter=[out, out / "biases"]), load_model(base, adapter=out)
    assert off_by(logits(whole), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5
    assert off_by(logits(first), logits(checkpoint, plan), logits(checkpoint)) > 1e-3
    assert "has to be on together with the first" in (out / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_an_adapter_that_is_on_is_exported_with_its_ablation(checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture) -> None:
    where = checkpoints_of(name)
    pair = load_pair(where.base, where.adapter)
    plan = Plan.of(Ablate(direction(pair.tuned), site="writes"))
    lora = export(plan, pair.tuned, "lora", tmp_path / "lora").folder
    merged = export(plan, pair.tuned, "weights", tmp_path / "weights").folder
    adapted = load_model(where.base, adapter=[lora, lora / "biases"] if (lora / "biases").is_dir() else lora)
    wanted, plain = logits(pair.tuned, plan), logits(pair.tuned)
    assert off_by(logits(adapted), wanted, plain) <= 2e-5
    assert off_by(logits(load_model(merged)), wanted, plain) <= 2e-5
    on_base = export(plan, pair.base, "weights", tmp_path / "base").folder
    assert off_by(logits(load_model(on_base)), logits(pair.base, plan), logits(pair.base)) <= 1e-5
    assert "merged" in (merged / "README.md").read_text()


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_added_biases_equal_hooks(checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture, site: Any) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    plan = Plan.of(Add(direction(checkpoint, site=site), 0.5), Add(direction(checkpoint, 0, seed=3, site=site), -1.0, unit="raw"))
    exported = export(plan, checkpoint, "bias", tmp_path / "out")
    assert off_by(logits(load_model(exported.folder)), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5
    if name == "llama":
        assert exported.card["facts"]["settings"] == ("attention_bias=True" if site == "attn_out" else "mlp_bias=True")


@pytest.mark.parametrize("name", ["qwen2", "mistral", "phi3"])
def test_an_architecture_without_the_bias_is_refused(checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    with pytest.raises(EmprobeError, match=r"has no bias at model\.layers\.1\.mlp\.down_proj and no setting that gives it one"):
        export(Plan.of(Add(direction(checkpoint), 0.5)), checkpoint, "bias", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["lora", "weights"])
@pytest.mark.parametrize("name", NORMED)
def test_post_norms_are_refused_by_name(checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture, target: str) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    plan = Plan.of(Ablate(direction(checkpoint), site="writes"))
    with pytest.raises(EmprobeError, match=r"the output of post_attention_layernorm \(\w+\), a norm that stands after the matrix"):
        export(plan, checkpoint, target, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_experts_are_refused_by_name(checkpoints_of: CheckpointsOf, tmp_path: Path) -> None:
    checkpoint = load_model(checkpoints_of("qwen3_moe").base)
    plan = Plan.of(Ablate(direction(checkpoint), site="writes"))
    with pytest.raises(EmprobeError, match="mixes the outputs of several experts"):
        export(plan, checkpoint, "lora", tmp_path / "out")
