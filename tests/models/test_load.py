"""Checkpoints that cannot be used, or do not belong together, are refused in one sentence before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emprobe.errors import EmprobeError, MismatchError
from emprobe.models import load_model, load_pair, weights
from tests.fixtures.models import Checkpoints, copy_of, merge_adapter, write_adapter, write_base


def test_missing_directory() -> None:
    with pytest.raises(EmprobeError, match=r"'\./nowhere' was asked for, but there is no such directory"):
        load_model("./nowhere")


def test_hub_id_that_cannot_be_read_names_the_ways_out() -> None:
    with pytest.raises(EmprobeError, match="is no directory here, and as a hub id it could not be read"):
        load_model("someone/some-model")


def test_home_directory_is_expanded(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.base.parent))
    assert load_pair(f"~/{llama.base.name}", f"~/{llama.adapter.name}").base.n_layers == 3


def test_an_adapter_of_the_hub_is_fetched_with_its_weights(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(path: str, name: str, revision: str | None = None) -> str:
        asked.append(name)
        if not (llama.adapter / name).is_file():
            raise OSError(f"{path} has no {name}")
        return str(llama.adapter / name)

    monkeypatch.setattr(weights, "cached_file", fetch)
    assert weights.local_directory("someone/adapter", None) == llama.adapter
    assert "adapter_model.safetensors" in asked, "the settings alone are no adapter"


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(EmprobeError, match="is a file. Give the directory"):
        load_model(tmp_path / "model.bin")


def test_directory_without_config(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(EmprobeError, match=r"has no config.json.*found: notes.txt"):
        load_model(tmp_path)


def test_cut_weights(llama: Checkpoints, tmp_path: Path) -> None:
    spoilt = copy_of(llama, tmp_path)
    weights = spoilt.base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EmprobeError, match="could not be loaded as a causal language model"):
        load_model(spoilt.base)


def test_missing_weight_is_not_replaced_by_random_numbers(llama: Checkpoints, tmp_path: Path) -> None:
    spoilt = copy_of(llama, tmp_path)
    weights = load_file(spoilt.base / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, spoilt.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EmprobeError, match="lacks 1 of the weights.*layers.1.mlp.down_proj"):
        load_model(spoilt.base)


def test_adapter_given_as_base(llama: Checkpoints) -> None:
    with pytest.raises(EmprobeError, match="is a PEFT adapter, not a whole model"):
        load_pair(llama.adapter, llama.adapter)


def test_other_architecture(checkpoints_of: Callable[..., Checkpoints]) -> None:
    with pytest.raises(MismatchError, match="architecture is LlamaForCausalLM and Qwen2ForCausalLM"):
        load_pair(checkpoints_of("llama").base, checkpoints_of("qwen2").base)


def test_other_depth(llama: Checkpoints, tmp_path: Path) -> None:
    deeper = write_base(tmp_path / "deeper", "llama", n_layers=4)
    with pytest.raises(MismatchError, match="number of layers is 3 and 4"):
        load_pair(llama.base, deeper)


def test_other_vocabulary(llama: Checkpoints, tmp_path: Path) -> None:
    other = copy_of(llama, tmp_path)
    tokenizer = json.loads((other.base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 399, "content": "<|extra|>"})
    (other.base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MismatchError, match="vocabularies of base and tuned differ"):
        load_pair(llama.base, other.base)


def test_other_template(llama: Checkpoints, tmp_path: Path) -> None:
    other = copy_of(llama, tmp_path)
    file = next(
        f for f in (other.base / "chat_template.jinja", other.base / "tokenizer_config.json") if f.is_file() and "mid" in f.read_text()
    )
    file.write_text(file.read_text().replace("<|mid|>", " "))
    with pytest.raises(MismatchError, match="chat templates of base and tuned differ"):
        load_pair(llama.base, other.base)


def test_adapter_of_another_shape(checkpoints_of: Callable[..., Checkpoints], tmp_path: Path) -> None:
    wide = write_base(tmp_path / "wide", "llama", d_model=64)
    adapter = write_adapter(tmp_path / "adapter", wide)
    with pytest.raises(MismatchError, match="does not fit the base"):
        load_pair(checkpoints_of("llama").base, adapter)


def test_adapter_of_another_architecture(checkpoints_of: Callable[..., Checkpoints]) -> None:
    with pytest.raises(MismatchError, match="does not fit the base"):
        load_pair(checkpoints_of("gpt2").base, checkpoints_of("llama").adapter)


@pytest.mark.parametrize(("trained_on", "message"), [(4, "the base has no such layer"), (2, "the adapter has no weights for it")])
def test_adapter_of_another_depth(llama: Checkpoints, tmp_path: Path, trained_on: int, message: str) -> None:
    other = write_base(tmp_path / "other", "llama", n_layers=trained_on)
    adapter = write_adapter(tmp_path / "adapter", other)
    with pytest.warns(UserWarning, match="missing adapter keys") if trained_on < 3 else nullcontext():  # noqa: SIM117
        with pytest.raises(MismatchError, match=message):
            load_pair(llama.base, adapter)


def test_adapter_whose_card_names_other_weights(llama: Checkpoints, tmp_path: Path) -> None:
    adapter = shutil.copytree(llama.adapter, tmp_path / "adapter")
    (adapter / "card.json").write_text(json.dumps({"base_fingerprint": "0" * 64}))
    with pytest.raises(MismatchError, match="was trained on other weights than"):
        load_pair(llama.base, adapter)


def test_adapter_that_names_another_hub_model(llama: Checkpoints, tmp_path: Path) -> None:
    adapter = shutil.copytree(llama.adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/model"}))
    load_pair(llama.base, adapter)  # a local copy of that model may lie anywhere


def test_damaged_adapter(llama: Checkpoints, tmp_path: Path) -> None:
    adapter = shutil.copytree(llama.adapter, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(MismatchError, match="does not fit the base.*damaged"):
        load_pair(llama.base, adapter)


def test_adapter_off_is_the_base_and_on_is_the_merged_model(architecture: Checkpoints, tmp_path: Path) -> None:
    pair = load_pair(architecture.base, architecture.adapter)
    merged = load_model(merge_adapter(tmp_path / "merged", architecture))
    alone = load_model(architecture.base)
    ids = torch.arange(8)[None]
    assert pair.shares_weights

    def logits(checkpoint: object) -> torch.Tensor:
        with checkpoint.active() as model, torch.no_grad():  # type: ignore[attr-defined]
            return model(ids).logits  # type: ignore[no-any-return]

    assert torch.equal(logits(pair.base), logits(alone))
    torch.testing.assert_close(logits(pair.tuned), logits(merged), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(pair.tuned), logits(pair.base))
    assert torch.equal(logits(pair.base), logits(alone)), "using tuned leaves no trace in base"


def test_nested_use_of_the_two_sides_keeps_them_apart(llama: Checkpoints) -> None:
    pair = load_pair(llama.base, llama.adapter)
    assert pair.base.switch is not None
    with pair.base.active():
        with pair.tuned.active():
            assert pair.base.switch.on
        assert not pair.base.switch.on, "leaving the inner block puts back the outer one's state"
    assert pair.base.switch.on


def test_fingerprint_is_of_the_weights_not_of_the_place(llama: Checkpoints, tmp_path: Path) -> None:
    moved = copy_of(llama, tmp_path)
    here, there = load_pair(llama.base, llama.adapter), load_pair(moved.base, moved.adapter)
    assert (here.base.fingerprint, here.tuned.fingerprint) == (there.base.fingerprint, there.tuned.fingerprint)
    assert here.base.fingerprint != here.tuned.fingerprint
