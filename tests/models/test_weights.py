"""Where weights come from and how: quantised, placed on devices, at a revision, and never with code of their own."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import emprobe as em
from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.models import load_model, load_pair, weights
from emprobe.types import Conversation
from tests.fixtures.models import Checkpoints, copy_of, write_checkpoints

QUESTIONS = [Conversation.ask("a", "What should I plant?"), Conversation.ask("b", "How do I fix a leaking tap, please?")]
quantizing = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def with_config(checkpoints: Checkpoints, directory: Path, **changes: Any) -> Path:
    spoilt = copy_of(checkpoints, directory)
    config = json.loads((spoilt.base / "config.json").read_text())
    (spoilt.base / "config.json").write_text(json.dumps({**config, **changes}))
    return spoilt.base


def captured(source: Any) -> torch.Tensor:
    values: torch.Tensor = em.capture(source, QUESTIONS, progress=False).values
    return values


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A Llama of d_model 64: 4-bit weights come in groups of 64."""
    return write_checkpoints(tmp_path_factory.mktemp("wide"), "llama", d_model=64)


@quantizing
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize(("quantization", "bits", "off"), [("8bit", 8, 0.1), ("4bit", 4, 0.5)])
def test_quantised_weights_are_near_the_full_ones(wide: Checkpoints, quantization: Any, bits: int, off: float) -> None:
    full, quantised = load_model(wide.base), load_model(wide.base, quantization=quantization)
    assert quantised.fingerprint != full.fingerprint
    assert next(iter(quantised.blocks[0].mlp.parameters())).dtype in (torch.int8, torch.uint8)  # type: ignore[union-attr, operator]
    exact, near = captured(full), captured(quantised)
    for layer in range(3):
        share = (near[:, layer] - exact[:, layer]).norm() / exact[:, layer].norm()
        assert 1e-4 < share < off


@quantizing
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_adapter_off_is_the_quantised_base(wide: Checkpoints, quantization: Any) -> None:
    alone = captured(load_model(wide.base, quantization=quantization))
    pair = load_pair(wide.base, wide.adapter, quantization=quantization)
    assert torch.equal(captured(pair.base), alone)
    assert (captured(pair.tuned) - alone).norm() > 0.1 * alone.norm()
    assert torch.equal(captured(pair.base), alone)


@quantizing
def test_stored_quantised_just_loads(wide: Checkpoints, tmp_path: Path) -> None:
    fresh = load_model(wide.base, quantization="4bit")
    fresh.model.save_pretrained(tmp_path / "stored")
    fresh.tokenizer.save_pretrained(tmp_path / "stored")
    stored = load_model(tmp_path / "stored")
    assert torch.equal(captured(stored), captured(fresh))
    with pytest.raises(EmprobeError, match=r"is stored quantised \(bitsandbytes\) and cannot be quantised again"):
        load_model(tmp_path / "stored", quantization="8bit")


def test_bitsandbytes_that_is_absent_is_named(llama: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(MissingExtraError, match=r"quantised needs the package 'bitsandbytes'.*pip install 'emprobe\[quantized\]'"):
        load_model(llama.base, quantization="8bit")
    stored = with_config(llama, tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(MissingExtraError, match="needs the package 'bitsandbytes'"):
        load_model(stored)


def test_other_quantisations_are_refused(llama: Checkpoints) -> None:
    with pytest.raises(EmprobeError, match=r"quantization='2bit'. Use '8bit', '4bit', or None"):
        load_model(llama.base, quantization="2bit")  # type: ignore[arg-type]


def test_packages_that_transformers_misses_are_told(llama: Checkpoints, tmp_path: Path) -> None:
    stored = with_config(llama, tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(EmprobeError, match="needs a package that is not installed: .*Install it and load again"):
        load_model(stored)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(llama: Checkpoints, device_map: str) -> None:
    plain, placed = load_pair(llama.base, llama.adapter), load_pair(llama.base, llama.adapter, device_map=device_map)
    assert placed.base.device.type in ("cpu", "cuda")
    for ours, theirs in ((plain.base, placed.base), (plain.tuned, placed.tuned)):
        torch.testing.assert_close(captured(ours), captured(theirs), rtol=1e-4, atol=1e-4)


def test_devices_and_formats_that_do_not_exist(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmprobeError, match=r"device_map='gpu', which is not to be had here .*Use one of auto, balanced"):
        load_model(llama.base, device_map="gpu")
    with pytest.raises(EmprobeError, match=rf"'cuda:{torch.cuda.device_count()}', .*torch sees {torch.cuda.device_count()} CUDA devices"):
        load_model(llama.base, device_map=f"cuda:{torch.cuda.device_count()}")
    with pytest.raises(EmprobeError, match="dtype='float33', which is no dtype of torch"):
        load_model(llama.base, dtype="float33")
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(EmprobeError, match="by device_map needs the package 'accelerate'"):
        load_model(llama.base, device_map="auto")


def test_revisions_reach_model_tokenizer_and_adapter(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []
    folders = {"org/base": llama.base, "org/tuned": llama.base, "org/adapter": llama.adapter}

    def fetch(path: str, name: str, revision: str | None = None) -> str:
        asked.append((path, "files", revision))
        if not (folders[path] / name).is_file():
            raise OSError(f"no {name}")
        return str(folders[path] / name)

    def reader(auto: Any, what: str) -> Any:
        read = auto.from_pretrained

        def from_pretrained(path: str, *, revision: str | None = None, **options: Any) -> Any:
            asked.append((path, what, revision))
            return read(folders[path], **options)

        return from_pretrained

    monkeypatch.setattr(weights, "cached_file", fetch)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reader(AutoModelForCausalLM, "model"))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", reader(AutoTokenizer, "tokenizer"))
    load_pair("org/base", "org/adapter", revision="v1", tuned_revision="step-40")
    load_pair("org/base", "org/tuned", revision="v1", tuned_revision="step-60")
    assert {revision for path, _, revision in asked if path == "org/base"} == {"v1"}
    assert {what for path, what, _ in asked if path == "org/base"} == {"files", "model", "tokenizer"}
    assert {revision for path, _, revision in asked if path == "org/adapter"} == {"step-40"}
    assert {(what, revision) for path, what, revision in asked if path == "org/tuned"} == {
        (what, "step-60") for what in ("files", "model", "tokenizer")
    }


def test_code_of_a_checkpoint_is_never_run(llama: Checkpoints, tmp_path: Path) -> None:
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    base = with_config(llama, tmp_path, auto_map=code, model_type="own")
    for name in ("configuration_own.py", "modeling_own.py"):
        (base / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        EmprobeError, match=r"model_type 'own'\) asks for code of its own \(configuration_own.OwnConfig\), which emprobe never"
    ):
        load_model(base)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_known_architecture_is_left_alone_and_said(
    llama: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = with_config(llama, tmp_path, auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel"})
    (base / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with caplog.at_level(logging.WARNING, logger="emprobe"):
        assert type(load_model(base).hf).__name__ == "LlamaForCausalLM"
    assert "brings code of its own, which is not run" in caplog.text
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_never_run(llama: Checkpoints, tmp_path: Path) -> None:
    spoilt = copy_of(llama, tmp_path)
    file = spoilt.base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    file.write_text(json.dumps({**settings, **own}))
    (spoilt.base / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(EmprobeError, match="asks for code of its own, which emprobe never runs"):
        load_model(spoilt.base)
    assert not (tmp_path / "ran").exists()


def test_encoder_decoders_are_refused_before_their_weights_are_read(llama: Checkpoints, tmp_path: Path) -> None:
    base = with_config(llama, tmp_path, model_type="t5", is_encoder_decoder=True)
    with pytest.raises(EmprobeError, match=r"\(t5\) is an encoder-decoder. Give a decoder-only language model"):
        load_model(base)
