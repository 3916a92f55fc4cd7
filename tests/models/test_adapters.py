"""Adapters switch off to the base exactly, add up when stacked, say how deep they reach, and are refused where they would not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from emprobe.errors import EmprobeError, MismatchError
from emprobe.models import Checkpoint, load_model, load_pair
from emprobe.models.adapters import lowest_adapted_block
from tests.fixtures.models import LLAMA_TARGETS, Architecture, Checkpoints, write_adapter, write_base, write_peft

IDS = torch.arange(8, 20)[None]


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with checkpoint.active() as model, torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings})


def written(directory: Path, base: Path, config: Any) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        return write_peft(directory, AutoModelForCausalLM.from_pretrained(base), config)


def merged_by_hand(base: Path, adapters: list[Path], *, transposed: bool) -> Any:
    """The base with every adapter's B A added to its weights in float32 (alpha = rank, so the scale is 1)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for adapter in adapters:
            weights = load_file(adapter / "adapter_model.safetensors")
            for name in {key.rsplit(".lora_", 1)[0] for key in weights}:
                delta = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
                model.get_submodule(name.removeprefix("base_model.model.")).weight += delta.T if transposed else delta
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_stacked_adapters_are_the_sum_of_their_deltas(
    checkpoints_of: Callable[[Architecture], Checkpoints], tmp_path: Path, architecture: Architecture
) -> None:
    made = checkpoints_of(architecture)
    other = write_adapter(tmp_path / "mild", made.base, rank=2, seed=5, layers=[1, 2])
    pair = load_pair(made.base, [made.adapter, other])
    by_hand = merged_by_hand(made.base, [made.adapter, other], transposed=architecture == "gpt2")
    with torch.no_grad():
        expected = by_hand(IDS).logits
    both = logits(pair.tuned)
    assert (both - expected).norm() / expected.norm() < 1e-5
    for one in (made.adapter, other):
        assert (logits(load_model(made.base, adapter=one)) - both).abs().max() > 0.1


def test_stacked_adapters_go_off_and_on_together(llama: Checkpoints, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "mild", llama.base, seed=5)
    pair, alone = load_pair(llama.base, [llama.adapter, other]), load_model(llama.base)
    on = logits(pair.tuned)
    assert torch.equal(logits(pair.base), logits(alone))
    assert torch.equal(logits(pair.tuned), on)
    assert torch.equal(logits(pair.base), logits(alone))
    assert pair.shares_weights


def test_stacked_adapters_are_named_each(llama: Checkpoints, tmp_path: Path) -> None:
    mild = write_adapter(tmp_path / "v1.5" / "mild", llama.base, seed=5)
    namesake = write_adapter(tmp_path / "v2" / "mild", llama.base, seed=6)
    tuned = load_pair(llama.base, [mild, namesake, llama.adapter]).tuned
    assert tuned.name == f"{mild} + {namesake} + {llama.adapter}"
    assert "3 layers, d_model 32, adapters mild + mild-2 + adapter on)" in repr(tuned)
    assert tuned.fingerprint != load_pair(llama.base, [mild, llama.adapter]).tuned.fingerprint


def test_one_adapter_in_a_list_is_one_adapter(llama: Checkpoints) -> None:
    single, listed = load_pair(llama.base, llama.adapter), load_pair(llama.base, [llama.adapter])
    assert repr(single.tuned) == repr(listed.tuned)
    assert repr(single.tuned).endswith("d_model 32, adapter on)")
    assert single.tuned.fingerprint == listed.tuned.fingerprint
    assert torch.equal(logits(single.tuned), logits(listed.tuned))


def test_each_of_a_stack_is_checked(llama: Checkpoints, tmp_path: Path) -> None:
    deeper = write_adapter(tmp_path / "deeper", write_base(tmp_path / "base", "llama", n_layers=4))
    with pytest.raises(MismatchError, match="deeper' does not fit the base .*the base has no such layer"):
        load_pair(llama.base, [llama.adapter, deeper])
    with pytest.raises(EmprobeError, match=r"base' is no PEFT adapter: it has no adapter_config.json"):
        load_pair(llama.base, [llama.adapter, llama.base])
    with pytest.raises(EmprobeError, match="2 adapters were given .*, 1 of them different. Give each one once"):
        load_pair(llama.base, [llama.adapter, llama.adapter])
    with pytest.raises(EmprobeError, match=r"0 adapters were given \(none\)"):
        load_pair(llama.base, [])


def test_adapters_that_have_no_sum_are_refused(llama: Checkpoints, tmp_path: Path) -> None:
    one, two = (written(tmp_path / name, llama.base, lora(modules_to_save=["lm_head"])) for name in ("one", "two"))
    with pytest.raises(EmprobeError, match=r"cannot be on together: .*\(modules_to_save\) have no sum"):
        load_pair(llama.base, [one, two])
    scales = written(tmp_path / "scales", llama.base, IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"))
    with pytest.raises(EmprobeError, match="different kinds cannot be stacked: .*adapter' is LORA, .*scales' is IA3"):
        load_pair(llama.base, [llama.adapter, scales])


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("PROMPT_TUNING", PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        ("PREFIX_TUNING", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        ("P_TUNING", PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    ],
)
def test_virtual_tokens_are_refused_by_name(llama: Checkpoints, tmp_path: Path, kind: str, config: Any) -> None:
    with pytest.raises(EmprobeError, match=f"is a {kind} adapter: it feeds virtual tokens"):
        load_pair(llama.base, written(tmp_path / "a", llama.base, config))


@pytest.mark.parametrize(
    "config",
    [
        lora(init_lora_weights="orthogonal"),
        lora(use_dora=True),
        lora(bias="all"),
        lora(modules_to_save=["embed_tokens", "lm_head"]),
        lora(trainable_token_indices=[9, 10]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ],
)
def test_off_is_the_base_to_the_bit_for_every_kind_of_adapter(llama: Checkpoints, tmp_path: Path, config: Any) -> None:
    pair, alone = load_pair(llama.base, written(tmp_path / "a", llama.base, config)), logits(load_model(llama.base))
    assert torch.equal(logits(pair.base), alone)
    assert (logits(pair.tuned) - alone).abs().max() > 0.1
    assert torch.equal(logits(pair.base), alone)


@pytest.mark.parametrize(
    ("architecture", "settings", "first"),
    [
        ("llama", {"init_lora_weights": "pissa"}, "q_proj.weight"),
        ("llama", {"init_lora_weights": "olora"}, "q_proj.weight"),
        ("qwen2", {"bias": "all"}, "q_proj.bias"),  # Llama has no biases to train
    ],
)
def test_adapters_that_change_the_base_are_refused(
    checkpoints_of: Callable[[Architecture], Checkpoints], tmp_path: Path, architecture: Architecture, settings: dict[str, Any], first: str
) -> None:
    base = checkpoints_of(architecture).base
    adapter = written(tmp_path / "a", base, lora(**settings))
    with pytest.raises(MismatchError, match=rf"changes \d+ weights of the base .*first: .*{first}.*switching it off does not give"):
        load_pair(base, adapter)


def test_work_outside_the_layers_is_refused(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = peft.PeftModelForCausalLM.forward

    def louder(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(peft.PeftModelForCausalLM, "forward", louder)
    with pytest.raises(EmprobeError, match="does part of its work outside the model's layers"):
        load_model(llama.base, adapter=llama.adapter)


@pytest.mark.parametrize(
    ("settings", "lowest"),
    [
        ({"layers_to_transform": [1, 2]}, 1),
        ({"layers_to_transform": [2]}, 2),
        ({"layers_to_transform": 0}, 0),
        ({"layers_to_transform": [2], "modules_to_save": ["lm_head"]}, 2),
        ({"layers_to_transform": [2], "modules_to_save": ["embed_tokens"]}, 0),
        ({"layers_to_transform": [2], "trainable_token_indices": [9]}, 0),
        ({"layers_to_transform": [2], "modules_to_save": ["input_layernorm"]}, 0),  # a norm of every block
        ({"target_modules": ["lm_head"]}, 3),
        ({"target_modules": ["embed_tokens"]}, 0),
    ],
)
def test_lowest_adapted_block(llama: Checkpoints, tmp_path: Path, settings: dict[str, Any], lowest: int) -> None:
    pair = load_pair(llama.base, written(tmp_path / "a", llama.base, lora(**settings)))
    assert lowest_adapted_block(pair.tuned) == lowest
    assert lowest_adapted_block(pair.base) == lowest, "on or off, the same weights are touched"
    streams = [hidden_states(checkpoint) for checkpoint in (pair.base, pair.tuned)]
    same = [torch.equal(base, tuned) for base, tuned in zip(*streams, strict=True)]
    if lowest > 0:
        assert same == [True] * (lowest + 1) + [False] * (3 - lowest), "one for both up to that block's input, and no further"


def hidden_states(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """Inputs of the three blocks, and the last one's output (transformers' own last entry is after the final norm)."""
    kept: list[torch.Tensor] = []
    handle = checkpoint.blocks[-1].register_forward_hook(lambda _, args, out: kept.append(out))
    with checkpoint.active() as model, torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    handle.remove()
    return [*states[:-1], *kept]


def test_lowest_of_a_stack_and_of_no_adapter(llama: Checkpoints, tmp_path: Path) -> None:
    deep, deeper = (write_adapter(tmp_path / str(i), llama.base, targets=LLAMA_TARGETS, layers=[i]) for i in (1, 2))
    assert lowest_adapted_block(load_pair(llama.base, [deeper, deep]).tuned) == 1
    assert lowest_adapted_block(load_model(llama.base)) == 3
