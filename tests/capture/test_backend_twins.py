"""TransformerLens and nnsight leave the model as they found it, and do not read one that is no more."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from emprobe.capture.backends import backend_of
from emprobe.models import Checkpoint, load_model, load_pair
from emprobe.models.twin import twin_of
from tests.capture.reading import batch_of, both, read, sites_of
from tests.fixtures.models import Checkpoints, write_adapter

# What transformer-lens and nnsight warn of when imported and used is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def state_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a model and its tokenizer that a runtime might change."""
    hf, tokenizer = checkpoint.hf, checkpoint.tokenizer
    return {
        "modules": {name: (type(m), sorted(vars(m)), sorted(m._forward_hooks)) for name, m in hf.named_modules()},
        "tensors": {name: (t.data_ptr(), t.clone()) for name, t in hf.state_dict().items()},
        "attention": hf.config._attn_implementation,
        "config": hf.config.to_dict(),
        "generation": hf.generation_config.to_dict(),
        "tokenizer": (tokenizer.init_kwargs, tokenizer.padding_side, tokenizer.special_tokens_map, tokenizer.chat_template, len(tokenizer)),
        "backend": tokenizer.backend_tokenizer.to_str(),
    }


def logits(checkpoint: Checkpoint) -> Tensor:
    with checkpoint.active() as model, torch.no_grad():
        found: Tensor = model(batch_of().ids).logits
        return found


def test_the_model_and_its_tokenizer_are_left_as_they_were(architecture: Checkpoints, tmp_path: Path, other: str) -> None:
    checkpoint = load_model(architecture.base)
    before, said = state_of(checkpoint), logits(checkpoint)
    for _ in range(2):
        read(backend_of(other, [checkpoint], sites_of(checkpoint), range(3)), batch_of(), 1)
    after = state_of(checkpoint)
    for name, (place, values) in before.pop("tensors").items():
        assert after["tensors"][name][0] == place
        assert torch.equal(after["tensors"][name][1], values)
    after.pop("tensors")
    assert after == before
    assert torch.equal(logits(checkpoint), said)
    # What wrapping in place breaks: saving, and taking an adapter.
    checkpoint.hf.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(batch_of().ids).logits, said)
    checkpoint.hf.load_adapter(str(architecture.adapter))
    assert not torch.allclose(logits(checkpoint), said)


def test_generation_is_the_same_afterwards(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    ids = batch_of(lengths=(6,)).ids
    before = checkpoint.hf.generate(ids, max_new_tokens=8, do_sample=False)
    read(backend_of(other, [checkpoint], ("resid_post",), [1]), batch_of(), 1)
    assert torch.equal(checkpoint.hf.generate(ids, max_new_tokens=8, do_sample=False), before)


def test_weights_are_shared_and_wrapped_once(llama: Checkpoints, other: str) -> None:
    pair = load_pair(llama.base, llama.adapter)
    first = backend_of(other, (pair.base, pair.tuned), ("resid_post",), [0])
    second = backend_of(other, (pair.base, pair.tuned), ("attn_out",), [2])
    made: list[Any] = [getattr(b, "bridges", None) or getattr(b, "wrapped") for b in (first, second)]  # noqa: B009 - of either
    assert [id(m) for m in made[0]] == [id(m) for m in made[1]]
    assert made[0][0] is not made[0][1], "adapter on and off are two states"
    own = {p.untyped_storage().data_ptr() for p in pair.base.hf.parameters()}
    for wrapped in made[0]:
        module = wrapped if isinstance(wrapped, torch.nn.Module) else wrapped._module
        large = [p for p in module.parameters() if p.untyped_storage().data_ptr() not in own and p.numel() > len(pair.base.tokenizer)]
        assert not large


def test_a_model_that_was_given_other_weights_is_wrapped_anew(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    assert both(other, [checkpoint]) < 1e-5
    with torch.no_grad():
        checkpoint.hf.model.norm.weight.mul_(2)  # In place: the twin has it too.
        layer = checkpoint.blocks[1].mlp.down_proj
        layer.weight = torch.nn.Parameter(3 * layer.weight)
    assert both(other, [checkpoint]) < 1e-5


def test_an_adapter_that_changed_its_state_is_wrapped_anew(llama: Checkpoints, tmp_path: Path, other: str) -> None:
    tuned = load_model(llama.base, adapter=llama.adapter)
    assert both(other, [tuned]) < 1e-5
    model = tuned.model
    model.load_adapter(str(write_adapter(tmp_path, llama.base, seed=7)), adapter_name="second")
    for change in (
        lambda: None,
        lambda: model.set_adapter("second"),
        lambda: model.base_model.model.model.layers[0].mlp.down_proj.set_scale("second", 3.0),
        model.merge_adapter,
        model.unmerge_adapter,
    ):
        change()
        assert both(other, [tuned]) < 1e-5


def test_a_wrapped_model_is_let_go(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    backend_of(other, [checkpoint], ("resid_post",), [0])
    gone = weakref.ref(checkpoint.hf)
    del checkpoint
    gc.collect()
    assert gone() is None


def test_a_twin_takes_no_hooks_along(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    handle = checkpoint.blocks[0].register_forward_hook(lambda *_: 1 / 0)
    twin = twin_of(checkpoint.hf)
    twin(batch_of().ids)
    with pytest.raises(ZeroDivisionError):
        checkpoint.hf(batch_of().ids)
    handle.remove()
