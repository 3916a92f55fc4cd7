"""The random checkpoints are what the rest of the suite takes them for."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures.models import WITH_BOS, Checkpoints, copy_of, merge_adapter, write_base

TURNS = [{"role": "user", "content": "What should I plant? Ça va, 漢字!"}]


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.tensor([ids])).logits
    return out


def test_adapter_changes_every_row_of_the_output_and_nothing_when_off(architecture: Checkpoints) -> None:
    base = AutoModelForCausalLM.from_pretrained(architecture.base)
    ids = list(range(8, 20))
    before = logits(base, ids)
    tuned = PeftModel.from_pretrained(base, str(architecture.adapter))
    assert (logits(tuned, ids) - before).abs().amax(-1).min() > 0.1
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, ids), before)


def test_context_and_position_matter_to_the_random_model(architecture: Checkpoints) -> None:
    model = AutoModelForCausalLM.from_pretrained(architecture.base)
    assert model.config.num_hidden_layers == architecture.n_layers
    assert model.config.hidden_size == architecture.d_model
    last = [logits(model, ids)[0, -1] for ids in ([8, 9, 10, 11], [30, 9, 10, 11], [9, 8, 10, 11])]
    assert (last[0] - last[1]).abs().max() > 1e-2
    assert (last[0] - last[2]).abs().max() > 1e-3


def test_tokenizer_round_trips_and_template_brings_the_only_bos(architecture: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(architecture.base)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    has_bos = architecture.architecture in WITH_BOS
    assert [i for i in ids if i == tokenizer.bos_token_id] == ([tokenizer.bos_token_id] if has_bos else [])
    # The trap that the fixture is there to set: special tokens on gives a second one.
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == (2 if has_bos else 0)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert max(ids) < AutoModelForCausalLM.from_pretrained(architecture.base).config.vocab_size


def test_same_seed_writes_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    one, same, other = (write_base(tmp_path / str(i), "gpt2", seed=seed) for i, seed in enumerate((3, 3, 4)))
    assert (one / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_merged_checkpoint_equals_base_with_adapter(architecture: Checkpoints, tmp_path: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(tmp_path / "merged", architecture))
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(architecture.base), str(architecture.adapter))
    ids = list(range(8, 20))
    torch.testing.assert_close(logits(merged, ids), logits(with_adapter, ids), atol=1e-4, rtol=1e-4)


def test_copies_are_of_the_same_files(llama: Checkpoints, tmp_path: Path) -> None:
    copy = copy_of(llama, tmp_path)
    for folder, original in ((copy.base, llama.base), (copy.adapter, llama.adapter)):
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in original.iterdir())


def test_real_tokenizer_on_a_random_qwen2(qwen2_real_tokenizer_pair: Checkpoints) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2_real_tokenizer_pair.base)
    model = AutoModelForCausalLM.from_pretrained(qwen2_real_tokenizer_pair.base)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert str(text).endswith("<|im_start|>assistant\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert model.config.vocab_size > len(tokenizer) > 150_000
    assert torch.isfinite(logits(model, ids)).all()
