"""What the backends cannot do is refused by name."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, HeliumConfig

from emprobe.capture.backends import backend_of
from emprobe.capture.backends.hooks import Hooks
from emprobe.directions import Direction
from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.interventions import Add, intervene
from emprobe.models import Checkpoint, load_model
from emprobe.models.bridge import HOOK_NAMES
from emprobe.types import Site
from tests.capture.reading import PACKAGES, Of, apart, batch_of, needs, read, weightless
from tests.fixtures.models import Checkpoints

# What transformer-lens and nnsight warn of when imported and used is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    llama: Checkpoints, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    checkpoint = load_model(llama.base)
    for backend, package in PACKAGES.items():
        with subtests.test(backend):
            for name in [n for n in sys.modules if n.split(".")[0] == backend]:
                monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.setitem(sys.modules, backend, None)
            with pytest.raises(MissingExtraError, match=rf"backend='{backend}' needs .*'{package}'.* pip install 'emprobe\[{package}\]'"):
                backend_of(backend, [checkpoint], ("resid_post",), [0])


def test_a_steered_model_is_refused(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    push = steering(torch.eye(checkpoint.d_model)[0])
    with pytest.raises(EmprobeError, match=f"intervention is active .* backend='{other}'"), intervene(checkpoint, push):
        backend_of(other, [checkpoint], ("resid_post",), [0])


def steering(vector: Tensor) -> Add:
    by_hand: dict[str, Any] = {"contrast": "", "sign": "", "estimator": "", "split_half": None, "n": 1, "questions": 1}
    return Add(Direction(vector, 1, "resid_post", "all_tokens", 1.0, 1.0, 0.0, **by_hand), coefficient=1.0)


@pytest.mark.parametrize(
    ("change", "found"),
    [({"is_quantized": True}, "quantised"), ({"hf_device_map": {"model.layers.0": 0, "model.layers.1": "cpu"}}, "spread over 0, cpu")],
)
def test_weights_of_another_kind_are_refused(llama: Checkpoints, other: str, change: dict[str, Any], found: str) -> None:
    checkpoint = load_model(llama.base)
    vars(checkpoint.hf).update(change)
    with pytest.raises(EmprobeError, match=rf"backend='{other}' .* {found}.* backend='hooks'"):
        backend_of(other, [checkpoint], ("resid_post",), [0])


def test_weights_that_are_not_here_are_refused(llama: Checkpoints, other: str) -> None:
    with pytest.raises(EmprobeError, match="not in memory"):
        backend_of(other, [weightless(llama)], ("resid_post",), [0])


def test_a_site_that_the_model_has_not_is_refused(checkpoints_of: Of, other: str) -> None:
    with pytest.raises(EmprobeError, match="'resid_mid' does not exist in GPTNeoXForCausalLM"):
        backend_of(other, [load_model(checkpoints_of("gpt_neox").base)], ("resid_mid",), [0])


def test_transformer_lens_is_refused_where_its_hook_means_something_else(checkpoints_of: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Gemma 2 the attention's own output is not what is added: a norm comes after it."""
    needs("transformer_lens")
    checkpoint = load_model(checkpoints_of("gemma2").base)
    monkeypatch.setitem(HOOK_NAMES, "attn_out", "attn.hook_out")
    with pytest.raises(EmprobeError, match=r"does not compute what the model does: 'attn_out' at layer 0 is off by"):
        backend_of("transformer_lens", [checkpoint], ("resid_post", "attn_out"), [0, 1])


def test_transformer_lens_says_what_it_did_not_give(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("transformer_lens")
    backend: Any = backend_of("transformer_lens", [load_model(llama.base)], ("resid_post",), [0, 1])
    monkeypatch.setattr(backend.bridges[0], "run_with_hooks", lambda *_, **__: None)
    with pytest.raises(EmprobeError, match=r"gave nothing for 'resid_post' at layer 0 \(and 1 more places\)"):
        backend.run(batch_of(), [lambda *_: None])


def test_a_model_without_a_bridge_is_refused(llama: Checkpoints) -> None:
    needs("transformer_lens")
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 300}
    config = HeliumConfig(hidden_size=32, head_dim=8, pad_token_id=0, **shape)
    model: Any = AutoModelForCausalLM.from_config(config)
    checkpoint = Checkpoint(model.eval(), load_model(llama.base).tokenizer, "helium", "")
    with pytest.raises(EmprobeError, match=r"cannot bridge a HeliumForCausalLM.* Use backend='hooks'"):
        backend_of("transformer_lens", [checkpoint], ("resid_post",), [0])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), KeyError("a bug")])
def test_what_a_reader_raises_comes_out_as_it_was_and_the_next_run_is_whole(llama: Checkpoints, other: str, error: Exception) -> None:
    checkpoint = load_model(llama.base)
    backend = backend_of(other, [checkpoint], ("resid_pre", "resid_post"), range(3))

    def full(site: Site, layer: int, hidden: Tensor) -> None:
        if layer == 1:
            raise error

    with pytest.raises(type(error)):
        backend.run(batch_of(), [full])
    own = read(Hooks([checkpoint], ("resid_pre", "resid_post"), range(3)), batch_of(), 1)[0]
    assert apart(own, read(backend, batch_of(), 1)[0]) < 1e-5
