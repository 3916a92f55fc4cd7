"""A GGUF LoRA holds the change of each writing matrix that amounts to the hooks, in the shapes that llama.cpp reads."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from emprobe.directions import Direction
from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.interventions import Ablate, Add, MeanAblate, Operator, Plan, Where, intervene
from emprobe.interventions.export.gguf_lora import CONVENTION, NAME, write_gguf_lora
from emprobe.interventions.export.registry import export
from emprobe.models import Checkpoint, load_model
from emprobe.overlap import Subspace, random_directions
from tests.fixtures.models import Architecture, Checkpoints, write_base

IDS = torch.tensor([[7, 91, 300, 12, 5, 44]])
MODULES = {"token_embd": "model.embed_tokens", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}


@pytest.fixture(scope="module")
def model(llama: Checkpoints) -> Checkpoint:
    return load_model(llama.base)


def direction(checkpoint: Checkpoint, layer: int = 1, seed: int = 0) -> Direction:
    return Direction.from_vector(random_directions(1, checkpoint.d_model, seed)[0], layer=layer, resid_norm=5.0)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: np.array(t.data) for t in reader.tensors}


def logits(hf: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = hf(IDS).logits
    return found


def hooked(checkpoint: Checkpoint, *operators: Operator) -> torch.Tensor:
    with intervene(checkpoint, *operators):
        return logits(checkpoint.hf)


def applied(hf: Any, path: Path, scale: float = 1.0) -> Any:
    """A copy of the model, changed as llama.cpp's documentation of the file says."""
    fields, tensors = contents(path)
    changed = copy.deepcopy(hf)
    for name, a in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        b = tensors[name.removesuffix("a") + "b"]
        *block, kind, _, _ = name.split(".")
        module = changed.get_submodule(f"model.layers.{block[1]}.{MODULES[kind]}" if block else MODULES[kind])
        assert a.dtype == b.dtype == np.float32
        delta = a @ b.T if kind == "token_embd" else b @ a
        module.weight.data += scale * fields["adapter.lora.alpha"] / b.shape[1] * torch.tensor(delta)
    return changed


def plans(checkpoint: Checkpoint) -> dict[str, Operator]:
    one, two = direction(checkpoint), direction(checkpoint, seed=1)
    return {
        "one": Ablate(one, site="writes"),
        "half": Ablate(one, 0.5, site="writes"),
        "plane": Ablate(Subspace.from_directions([one, two]), site="writes"),
        "one MLP": Ablate(one, site="mlp_out", layers=2),
    }


@pytest.mark.parametrize("kind", ["one", "half", "plane", "one MLP"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_matrices_changed_by_the_file_are_the_hooks(architecture: Architecture, kind: str, checkpoints_of: Any, tmp_path: Path) -> None:
    checkpoint = load_model(checkpoints_of(architecture).base)
    operator = plans(checkpoint)[kind]
    write_gguf_lora(Plan.of(operator), checkpoint, tmp_path)
    expected = hooked(checkpoint, operator)
    assert float((expected - logits(checkpoint.hf)).abs().max()) > 0.1
    torch.testing.assert_close(logits(applied(checkpoint.hf, tmp_path / NAME)), expected, rtol=0, atol=1e-5)


def test_several_ranks_share_one_alpha(model: Checkpoint, tmp_path: Path) -> None:
    plane = Subspace.from_directions([direction(model), direction(model, seed=1)])
    operators = [Ablate(plane, site="mlp_out", layers=2), Ablate(direction(model, seed=2), site="attn_out", layers=1)]
    write_gguf_lora(Plan.of(*operators), model, tmp_path)
    torch.testing.assert_close(logits(applied(model.hf, tmp_path / NAME)), hooked(model, *operators), rtol=0, atol=1e-5)


def test_names_shapes_and_keys_are_those_that_llama_cpp_reads(model: Checkpoint, tmp_path: Path) -> None:
    plan = Plan.of(Ablate(direction(model), site="writes"))
    made = export(plan, model, "gguf_lora", tmp_path / "out")
    fields, tensors = contents(tmp_path / "out" / NAME)
    matrices = ["token_embd", *(f"blk.{i}.{part}" for i in range(3) for part in ("attn_output", "ffn_down"))]
    assert set(tensors) == {f"{matrix}.weight.lora_{side}" for matrix in matrices for side in "ab"}
    d, inner, vocabulary = model.d_model, model.hf.config.intermediate_size, model.hf.config.vocab_size
    # ggml names dimensions the other way round: these are [ne1, ne0].
    assert tensors["blk.2.ffn_down.weight.lora_a"].shape == (1, inner)
    assert tensors["blk.2.ffn_down.weight.lora_b"].shape == (d, 1)
    assert tensors["token_embd.weight.lora_a"].shape == (vocabulary, 1)
    assert tensors["token_embd.weight.lora_b"].shape == (d, 1)
    keys = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha", "emprobe.convention", "emprobe.plan_hash")
    assert [fields[key] for key in keys] == ["llama", "adapter", "lora", 1.0, CONVENTION, plan.hash]
    _, server, client = made.serve
    assert shlex.split(server) == ["llama-server", "-m", "model.gguf", "--lora", str(tmp_path / "out" / NAME)]
    assert shlex.split(client)[-2:] == ["--lora-scaled", f"{tmp_path / 'out' / NAME}:0.5"]


def test_with_an_adapter_on_it_is_the_change_of_the_merged_weights(llama: Checkpoints, tmp_path: Path) -> None:
    tuned = load_model(llama.base, adapter=llama.adapter)
    operator = Ablate(direction(tuned), site="writes")
    write_gguf_lora(Plan.of(operator), tuned, tmp_path)
    merged = copy.deepcopy(tuned.model).merge_and_unload()
    torch.testing.assert_close(logits(applied(merged, tmp_path / NAME)), hooked(tuned, operator), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda d: Ablate(d), r"Ablate at resid_post\[1\] changes what earlier blocks have written"),
        (lambda d: Ablate(d, site="writes", where=Where(prompt=False)), "names the generation, but the target 'gguf_lora' acts at every"),
        (lambda d: Add(d, 1.0), "takes nothing away.*Use the target gguf"),
        (
            lambda d: MeanAblate(Direction.from_vector(d.vector, layer=1, site="mlp_out"), mean=2.0),
            "down_proj adds whatever its input.*by 2",
        ),
    ],
)
def test_what_a_lora_cannot_express_is_refused_by_name(model: Checkpoint, tmp_path: Path, operator: Any, message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        write_gguf_lora(Plan.of(operator(direction(model))), model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("gemma2", r"writes at attn_out\[0\].*a norm that stands after the matrix"),
        ("olmo2", "a norm that stands after the matrix"),
        ("phi3", "is a phi3, and LoRAs for llama.cpp were compared with hooks only on llama, mistral, qwen2, qwen3"),
        ("gpt2", r"c_proj adds whatever its input \(its bias\) would have to change"),
    ],
)
def test_models_that_a_lora_does_not_fit_are_refused_by_name(
    architecture: Architecture, message: str, checkpoints_of: Any, tmp_path: Path
) -> None:
    checkpoint = load_model(checkpoints_of(architecture).base)
    with pytest.raises(EmprobeError, match=message):
        write_gguf_lora(Plan.of(Ablate(direction(checkpoint), site="writes")), checkpoint, tmp_path)


def test_tied_embeddings_are_refused_since_llama_cpp_stops_on_them(tmp_path: Path) -> None:
    checkpoint = load_model(write_base(tmp_path / "base", "qwen2"))
    checkpoint.hf.config.tie_word_embeddings = True
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(EmprobeError, match="ties its output matrix to its embedding.*Export the target weights"):
        write_gguf_lora(Plan.of(Ablate(direction(checkpoint), site="writes")), checkpoint, out)
    write_gguf_lora(Plan.of(Ablate(direction(checkpoint), site="mlp_out")), checkpoint, out)


def test_without_gguf_the_extra_is_named(model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"emprobe\[gguf\]"):
        write_gguf_lora(Plan.of(Ablate(direction(model), site="writes")), model, tmp_path)
