"""The three backends read the same numbers, and TransformerLens and nnsight leave the model as they found it.

What needs transformer-lens or nnsight is skipped where it is not installed.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, HeliumConfig

from emprobe.capture import capture
from emprobe.capture.backends import Backend, backend_of
from emprobe.capture.backends.hooks import Hooks
from emprobe.capture.backends.transformer_lens import HOOK_NAMES
from emprobe.capture.backends.twin import twin_of
from emprobe.capture.plan import Batch, Padding, Row, row_batch
from emprobe.capture.reading import Reading
from emprobe.directions import Direction
from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.interventions import Add, intervene
from emprobe.models import Checkpoint, CheckpointPair, load_model, load_pair
from emprobe.models.sites import taps_of
from emprobe.types import Site
from tests.capture.test_capture import ROWS
from tests.fixtures.models import ALL_ARCHITECTURES, Architecture, Checkpoints, write_adapter

PACKAGES = {"transformer_lens": "transformer-lens", "nnsight": "nnsight"}
SITES: tuple[Site, ...] = get_args(Site)
LENGTHS = (17, 9, 4, 12)
Of = Callable[[Architecture], Checkpoints]
# What transformer-lens and nnsight warn of when imported and used is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def needs(backend: str) -> None:
    if not find_spec(backend):
        pytest.skip(f"{PACKAGES[backend]} is not installed")


@pytest.fixture(params=list(PACKAGES))
def other(request: pytest.FixtureRequest) -> str:
    """Each backend but `hooks`, by name."""
    needs(request.param)
    return str(request.param)


def rows(lengths: Sequence[int] = LENGTHS) -> list[Row]:
    """Random token ids, each row read by three rules: its last token, the mean of the tokens after the first, and a span."""
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(5, 250, (n,), generator=generator).tolist()) for n in lengths]
    return [Row(i, ((len(i) - 1,), range(1, len(i)), (0, 2))) for i in ids]


def batch_of(padding: Padding = "right", lengths: Sequence[int] = LENGTHS) -> Batch:
    return row_batch(range(len(lengths)), rows(lengths), 0, 0, padding)


def sites_of(checkpoint: Checkpoint) -> list[Site]:
    """The sites that the model itself proves at all its layers."""
    found: list[Site] = []
    for site in SITES:
        try:
            taps_of(checkpoint, site, range(checkpoint.n_layers))
        except EmprobeError:
            continue
        found.append(site)
    return found


def read(backend: Backend, batch: Batch, n: int) -> list[dict[tuple[Site, int], Tensor]]:
    """Hidden states of the real tokens, per checkpoint and place."""
    found: list[dict[tuple[Site, int], Tensor]] = [{} for _ in range(n)]
    keep = [lambda site, layer, x, f=f: f.__setitem__((site, layer), x[batch.mask.bool()].clone()) for f in found]
    backend.run(batch, keep)
    return found


def apart(left: dict[tuple[Site, int], Tensor], right: dict[tuple[Site, int], Tensor]) -> float:
    """The largest difference anywhere, in units of the layer's RMS."""
    assert left.keys() == right.keys()
    assert left, "nothing was read"
    return max(float((left[p] - right[p]).abs().max() / left[p].pow(2).mean().sqrt()) for p in left)


def both(name: str, checkpoints: Sequence[Checkpoint], batch: Batch | None = None, **options: Any) -> float:
    """How far a backend is from `hooks` on all sites and layers of some checkpoints."""
    batch = batch or batch_of()
    sites, layers = sites_of(checkpoints[0]), range(checkpoints[0].n_layers)
    own = read(backend_of("hooks", checkpoints, sites, layers), batch, len(checkpoints))
    theirs = read(backend_of(name, checkpoints, sites, layers, **options), batch, len(checkpoints))
    return max(apart(a, b) for a, b in zip(own, theirs, strict=True))


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
        alone = Reading(row_batch([0], [row], 0, 0, "right"))
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


def test_a_device_map_of_one_device_is_no_obstacle(llama: Checkpoints, other: str) -> None:
    assert both(other, [load_model(llama.base, device_map="cpu")]) < 1e-5


def test_a_wrapped_model_is_let_go(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    backend_of(other, [checkpoint], ("resid_post",), [0])
    gone = weakref.ref(checkpoint.hf)
    del checkpoint
    gc.collect()
    assert gone() is None


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


# What they cannot do


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


# NDIF


def weightless(checkpoints: Checkpoints) -> Checkpoint:
    """A checkpoint as one has it of a model that fits nowhere: modules on the device meta, and the tokenizer."""
    loaded = load_model(checkpoints.base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded.hf.config).eval()
    return Checkpoint(model, loaded.tokenizer, "someone/large", "")


def on_the_hub(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint under a hub id."""
    name = {"none": "someone/tuned", "off": "someone/base", "on": "someone/adapter"}[checkpoint.adapter]
    checkpoint.hf.name_or_path = "someone/base"
    return replace(checkpoint, name=name)


@dataclass
class Ndif:
    """A stand-in for NDIF's servers: what was asked of them, and the model that they hold where the client has none."""

    asked: list[tuple[Any, str, str | None]] = field(default_factory=list)
    held: Any = None


@pytest.fixture
def ndif(monkeypatch: pytest.MonkeyPatch) -> Ndif:
    """Traces go through nnsight's serialisation, with emprobe and the tests out of reach, and are run in this process."""
    needs("nnsight")
    import nnsight
    from nnsight.intervention.backends.local import LocalSimulationBackend
    from nnsight.modeling.mixins.remotable import Remotable

    server = Ndif()

    def backend(self: Any, remote: Any, *_: Any) -> Any:
        server.asked.append((remote, self.repo_id, self._remoteable_get_env().get("peft")))
        if server.held is not None:
            for name, module in server.held.named_modules():
                mine = self._module.get_submodule(name)
                mine._parameters, mine._buffers = module._parameters, module._buffers
        return LocalSimulationBackend(self)

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a key")
    monkeypatch.setattr(Remotable, "_remote_backend", backend)
    return server


@pytest.mark.parametrize("padding", ["right", "left"])
def test_remote_reaches_the_server_and_its_readings_come_back(architecture: Checkpoints, ndif: Ndif, padding: Padding) -> None:
    checkpoint = on_the_hub(load_model(architecture.base))
    assert both("nnsight", [checkpoint], batch_of(padding), remote=True) < 1e-5
    assert ndif.asked == [(True, "someone/tuned", None)]


def test_remote_pairs_name_base_and_adapter(llama: Checkpoints, ndif: Ndif) -> None:
    pair = load_pair(llama.base, llama.adapter)
    assert both("nnsight", [on_the_hub(c) for c in (pair.base, pair.tuned)], remote=True) < 1e-5
    assert ndif.asked == [(True, "someone/base", None), (True, "someone/base", "someone/adapter")]


def test_remote_works_without_weights(architecture: Checkpoints, ndif: Ndif) -> None:
    """The server holds the weights; the client has modules without any."""
    places: tuple[tuple[Site, ...], list[int]] = ("resid_pre", "resid_post"), [0, 2]
    real = load_model(architecture.base)
    ndif.held = real.hf
    found = read(backend_of("nnsight", [weightless(architecture)], *places, remote=True), batch_of(), 1)[0]
    assert apart(read(Hooks([real], *places), batch_of(), 1)[0], found) < 1e-5
    assert ndif.asked == [(True, "someone/large", None)]


def test_sites_inside_a_block_need_the_weights(llama: Checkpoints, ndif: Ndif) -> None:
    with pytest.raises(EmprobeError, match=r"'mlp_out' was asked of 'someone/large', whose weights are not here"):
        backend_of("nnsight", [weightless(llama)], ("resid_post", "mlp_out"), [0], remote=True)


def test_what_is_not_on_the_hub_is_refused_for_remote(llama: Checkpoints, ndif: Ndif) -> None:
    with pytest.raises(EmprobeError, match=r"remote=True was asked for .*base', which is no hub id"):
        backend_of("nnsight", [load_model(llama.base)], ("resid_post",), [0], remote=True)


def test_a_missing_key_is_named_before_any_work(llama: Checkpoints, ndif: Ndif, monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    with pytest.raises(EmprobeError, match="knows no NDIF key.*NDIF_API_KEY"):
        backend_of("nnsight", [on_the_hub(load_model(llama.base))], ("resid_post",), [0], remote=True)
    assert not ndif.asked


def test_what_fails_at_the_server_is_told_in_one_message(llama: Checkpoints, ndif: Ndif, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.intervention.backends.local import LocalSimulationBackend
    from nnsight.intervention.backends.remote import RemoteError

    def fail(*_: Any) -> None:
        raise RemoteError("Model is not served.\nTraceback ...")

    monkeypatch.setattr(LocalSimulationBackend, "__call__", fail)
    backend = backend_of("nnsight", [on_the_hub(load_model(llama.base))], ("resid_post",), [0], remote=True)
    with pytest.raises(EmprobeError, match=r"NDIF did not run 'someone/tuned': Model is not served\. nnsight\.ndif_status"):
        backend.run(batch_of(), [lambda *_: None])


def test_a_twin_takes_no_hooks_along(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    handle = checkpoint.blocks[0].register_forward_hook(lambda *_: 1 / 0)
    twin = twin_of(checkpoint.hf)
    twin(batch_of().ids)
    with pytest.raises(ZeroDivisionError):
        checkpoint.hf(batch_of().ids)
    handle.remove()
