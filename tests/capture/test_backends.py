"""The three backends read the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from emprobe.capture import capture
from emprobe.capture.backends import backend_of
from emprobe.capture.backends.hooks import Hooks
from emprobe.capture.plan import Padding, row_batch
from emprobe.capture.reading import Reading
from emprobe.errors import EmprobeError
from emprobe.models import CheckpointPair, load_model, load_pair
from tests.capture.reading import PACKAGES, SITES, Of, apart, batch_of, both, needs, read, rows
from tests.capture.test_capture import ROWS
from tests.fixtures.models import ALL_ARCHITECTURES, Architecture, Checkpoints, write_adapter

# What transformer-lens and nnsight warn of when imported and used is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_all_sites_and_layers_agree_with_hooks(checkpoints_of: Of, architecture: Architecture, other: str) -> None:
    assert both(other, [load_model(checkpoints_of(architecture).base)]) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mistral"])
def test_left_padding_agrees_with_hooks(checkpoints_of: Of, architecture: Architecture, other: str) -> None:
    checkpoint = load_model(checkpoints_of(architecture).base)
    assert both(other, [checkpoint], batch_of("left")) < 1e-5


@pytest.mark.parametrize("padding", ["right", "left"])
def test_capture_is_the_same_by_any_backend(architecture: Checkpoints, tmp_path: Path, other: str, padding: Padding) -> None:
    plain = architecture.architecture != "gpt2" or other != "transformer_lens"
    pair = load_pair(architecture.base, architecture.adapter if plain else write_adapter(tmp_path, architecture.base, targets=["c_fc"]))
    sites = ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    rules = ["last_prompt_token", "all_tokens", "prompt_mean", "response_mean", "template_tokens"]
    asked: dict[str, Any] = {"site": sites, "positions": rules, "padding": padding, "token_budget": 256, "progress": False}
    own, theirs = (capture(pair, ROWS, backend=backend, **asked) for backend in ("hooks", other))
    assert own.keys() == theirs.keys()
    for place in own:
        for role in ("base", "tuned"):
            mine, its = (getattr(acts[place], role) for acts in (own, theirs))
            scale = mine.values.pow(2).mean(dim=(0, 2), keepdim=True).sqrt()
            assert float(((its.values - mine.values).abs() / scale).max()) < 1e-5
            assert its.n_tokens == mine.n_tokens
            torch.testing.assert_close(its.token_norm, mine.token_norm, rtol=1e-5, atol=0)


def test_a_batch_is_its_rows_run_one_by_one(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    backend = backend_of(other, [checkpoint], ("resid_post", "mlp_out"), range(3))
    reading = Reading(batch_of())
    backend.run(reading.batch, [reading])
    for i, row in enumerate(rows()):
        alone = Reading(row_batch([0], [row], 0, "right"))
        backend.run(alone.batch, [alone])
        for place, (pooled, _, _) in alone.found.items():
            torch.testing.assert_close(reading.found[place][0][i], pooled[0], rtol=1e-4, atol=1e-5)


def test_pairs_of_one_set_of_weights_agree_adapter_on_and_off(architecture: Checkpoints, tmp_path: Path, other: str) -> None:
    """GPT-2's query, key and value are one matrix, which TransformerLens splits; there the adapter lies elsewhere."""
    plain = architecture.architecture != "gpt2" or other != "transformer_lens"
    adapter = architecture.adapter if plain else write_adapter(tmp_path, architecture.base, targets=["c_fc", "mlp.c_proj"])
    pair = load_pair(architecture.base, adapter)
    base, tuned = pair.base, pair.tuned
    assert both(other, (base, tuned)) < 1e-5
    off, on = read(backend_of(other, (base, tuned), ("resid_post",), [2]), batch_of(), 2)
    assert apart(off, on) > 0.05, "the adapter does nothing, so the test proves nothing"


def test_two_whole_checkpoints_are_two(checkpoints_of: Of, other: str) -> None:
    pair = CheckpointPair(load_model(checkpoints_of("llama").base), load_model(checkpoints_of("llama").base))
    with torch.no_grad():
        for parameter in pair.tuned.hf.parameters():
            parameter.mul_(1.1)
    assert both(other, (pair.base, pair.tuned)) < 1e-5


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "gpt_neox"])
def test_transformer_lens_refuses_an_adapter_in_a_matrix_that_it_splits(checkpoints_of: Of, architecture: Architecture) -> None:
    needs("transformer_lens")
    pair = load_pair(checkpoints_of(architecture).base, checkpoints_of(architecture).adapter)
    with pytest.raises(
        EmprobeError, match=r"does not compute what the model does: '\w+' at layer \d is off by .* fused .* backend='hooks'"
    ):
        backend_of("transformer_lens", (pair.base, pair.tuned), ("resid_post",), range(3))


def test_a_device_map_of_one_device_is_no_obstacle(llama: Checkpoints, other: str) -> None:
    assert both(other, [load_model(llama.base, device_map="cpu")]) < 1e-5


class Matrices(TorchFunctionMode):
    """Counts the linear maps that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


def test_nothing_is_run_beyond_the_last_place_wanted(llama: Checkpoints, other: str) -> None:
    backend = backend_of(other, [load_model(llama.base)], ("resid_post",), [0, 1])
    with Matrices() as counted:
        read(backend, batch_of(), 1)
    assert counted.n == 2 * 7, "two blocks of seven matrices, and no head"


def test_layers_and_sites_come_in_any_order(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    some = read(backend_of(other, [checkpoint], ("mlp_out", "resid_pre"), [2, 0]), batch_of(), 1)[0]
    assert set(some) == {("mlp_out", 2), ("mlp_out", 0), ("resid_pre", 2), ("resid_pre", 0)}
    own = read(Hooks([checkpoint], SITES, range(3)), batch_of(), 1)[0]
    assert apart(some, {place: own[place] for place in some}) < 1e-5


def test_one_backend_after_the_other_on_one_model(architecture: Checkpoints) -> None:
    for name in PACKAGES:
        needs(name)
    checkpoint = load_model(architecture.base)
    for name in ("nnsight", "transformer_lens", "nnsight"):
        assert both(name, [checkpoint]) < 1e-5
