"""Exports do what hooks do, read from disk by something else, and refuse by name what they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from emprobe.directions import Direction
from emprobe.errors import EmprobeError
from emprobe.interventions import Ablate, Add, MeanAblate, Operator, Plan, SetProjection, intervene
from emprobe.interventions.export import export
from emprobe.models import Checkpoint, load_model, load_pair
from emprobe.overlap import Subspace, random_directions
from tests.fixtures.models import Architecture, Checkpoints, copy_of, write_base, write_peft

CheckpointsOf = Callable[[Architecture], Checkpoints]
IDS = torch.arange(2, 26).reshape(2, 12) * 7 % 300
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
WRITERS: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "gpt_neox_sequential", "gpt2")
STRENGTH = {1: 1.0, 3: 0.5}
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
    plan = Plan.of(Ablate(part(checkpoint, k), site="writes", strength=STRENGTH[k]))
    out = export(plan, checkpoint, "weights", tmp_path / "out").folder
    assert off_by(logits(load_model(out)), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5
    assert all(torch.equal(w, before[n]) for n, w in checkpoint.hf.state_dict().items())
    assert checkpoint.hf.config.tie_word_embeddings == load_model(checkpoints_of(name).base).hf.config.tie_word_embeddings


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_lora_equals_hooks_at_every_write(checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture, k: int) -> None:
    base = with_biases_cut(checkpoints_of(name), tmp_path)
    checkpoint = load_model(base)
    plan = Plan.of(Ablate(part(checkpoint, k), site="writes", strength=STRENGTH[k]))
    exported = export(plan, checkpoint, "lora", tmp_path / "out")
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


@pytest.mark.parametrize("target", ["lora", "weights"])
def test_a_tied_head_stays_as_it_was(tmp_path: Path, target: str) -> None:
    base = write_base(tmp_path / "base", "qwen2")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    checkpoint = load_model(base)
    assert checkpoint.hf.lm_head.weight is checkpoint.hf.model.embed_tokens.weight
    plan = Plan.of(Ablate(direction(checkpoint), site="writes"))
    exported = export(plan, checkpoint, target, tmp_path / "out")
    found = load_model(exported.folder) if target == "weights" else load_model(base, adapter=exported.folder)
    assert off_by(logits(found), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5
    assert torch.equal(found.hf.lm_head.weight, checkpoint.hf.lm_head.weight)
    assert ("ties its output head" in (exported.folder / "README.md").read_text()) == (target == "weights")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_edits_at_one_place_fold_in_the_order_in_which_they_act(checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    plan = Plan.of(
        Add(direction(checkpoint, seed=2), 0.5),  # acts last, though it is said first
        MeanAblate(direction(checkpoint, site="mlp_out"), mean=1.5),
        Ablate(Subspace.from_directions([direction(checkpoint, seed=s) for s in (3, 4)]), 0.5, layers=1, site="mlp_out"),
        SetProjection(direction(checkpoint, 2, seed=5, site="attn_out"), 2.0, unit="abs"),
        Add(direction(checkpoint, 1, seed=6, site="resid_pre"), -1.0),
        Add(direction(checkpoint, 2, seed=7, site="resid_mid"), 1.0),
    )
    out = export(plan, checkpoint, "weights", tmp_path / "out").folder
    assert off_by(logits(load_model(out)), logits(checkpoint, plan), logits(checkpoint)) <= 2e-5


def test_peft_loads_the_lora_by_itself_and_merges_it(llama: Checkpoints, tmp_path: Path) -> None:
    checkpoint = load_model(llama.base)
    plan = Plan.of(Ablate(subspace(checkpoint), site="writes"))
    out = export(plan, checkpoint, "lora", tmp_path / "out").folder
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 3
    assert set(config["target_modules"]) == {"embed_tokens", "o_proj", "down_proj"}
    wanted, plain = logits(checkpoint, plan), logits(checkpoint)
    model = PeftModel.from_pretrained(load_model(llama.base).hf, str(out)).eval()
    given = {"input_ids": IDS, "attention_mask": MASK, "position_ids": (MASK.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        assert off_by(model(**given).logits[MASK.bool()], wanted, plain) <= 1e-5
        assert off_by(model.merge_and_unload()(**given).logits[MASK.bool()], wanted, plain) <= 1e-5


def test_half_precision_is_rounded_once_and_said(llama: Checkpoints, tmp_path: Path) -> None:
    checkpoint = load_model(llama.base, dtype="bfloat16")
    plan = Plan.of(Ablate(direction(checkpoint), site="writes"))
    exported = export(plan, checkpoint, "weights", tmp_path / "out")
    stored = load_file(exported.folder / "model.safetensors")
    assert {w.dtype for w in stored.values()} == {torch.bfloat16}
    v = direction(checkpoint).vector
    left = max(
        float((v @ w.double()).norm() / w.double().norm()) for n, w in stored.items() if n.endswith(("o_proj.weight", "down_proj.weight"))
    )
    assert 1e-5 < left < 2**-8
    assert exported.card["facts"]["off what was asked by (share of a matrix's norm, from rounding)"] == pytest.approx(left, rel=0.5)
    assert exported.card["facts"]["dtype"] == "bfloat16"
    lora = export(plan, checkpoint, "lora", tmp_path / "lora").folder
    assert {w.dtype for w in load_file(lora / "adapter_model.safetensors").values()} == {torch.float32}


def test_an_adapter_that_does_more_than_add_is_refused_as_a_lora(llama: Checkpoints, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama.base, dtype=torch.float32)
    config = LoraConfig(r=2, use_dora=True, target_modules=["down_proj"], task_type="CAUSAL_LM")
    adapter = write_peft(tmp_path / "dora", model, config)
    tuned = load_model(llama.base, adapter=adapter)
    plan = Plan.of(Ablate(direction(tuned), site="writes"))
    with pytest.raises(EmprobeError, match=r"changes model\.layers\.0\.mlp\.down_proj by more than adding low-rank matrices"):
        export(plan, tuned, "lora", tmp_path / "lora")
    out = export(plan, tuned, "weights", tmp_path / "weights").folder
    assert off_by(logits(load_model(out)), logits(tuned, plan), logits(tuned)) <= 2e-5


def test_embeddings_that_look_rows_up_their_own_way_are_no_lora(tmp_path: Path) -> None:
    checkpoint = load_model(write_base(tmp_path / "opt", "opt"))  # type: ignore[arg-type]
    plan = Plan.of(Ablate(direction(checkpoint, 0, site="resid_pre")))
    with pytest.raises(EmprobeError, match=r"embed_positions \(OPTLearnedPositionalEmbedding\) looks its rows up in a way of its own"):
        export(plan, checkpoint, "lora", tmp_path / "lora")
    out = export(plan, checkpoint, "weights", tmp_path / "weights").folder
    assert off_by(logits(load_model(out)), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5


def test_a_norm_behind_the_embeddings_is_refused(tmp_path: Path) -> None:
    checkpoint = load_model(write_base(tmp_path / "bloom", "bloom"))  # type: ignore[arg-type]
    plan = Plan.of(Ablate(direction(checkpoint, 0, site="resid_pre")))
    with pytest.raises(EmprobeError, match="What enters block 0 of BloomForCausalLM is not the sum of its embeddings"):
        export(plan, checkpoint, "weights", tmp_path / "out")
