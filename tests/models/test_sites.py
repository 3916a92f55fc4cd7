"""Every site is where the model itself says it is, on every architecture; what cannot be shown is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from emprobe.errors import EmprobeError
from emprobe.models import Checkpoint, load_model, load_pair
from emprobe.models.sites import SITES, blocks_of, check_site, decoder_of, hidden_of, taps_of
from emprobe.types import Site
from tests.fixtures.models import ALL_ARCHITECTURES, Architecture, Checkpoints

IDS = torch.tensor([[8, 30, 41, 9, 77, 12, 301, 55, 9, 61], [201, 8, 8, 19, 92, 33, 47, 5, 6, 7]])
SANDWICH = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
LLAMA = {"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"}
NEOX = {"attn_out": "attention.dense", "mlp_out": "mlp.dense_4h_to_h"}
# What adds to the residual stream, read by hand from each architecture's own code: the last weights or norm before the addition.
WRITERS: dict[Architecture, dict[str, str]] = {
    "gpt2": {"attn_out": "attn.c_proj", "mlp_out": "mlp.c_proj"},
    "gpt_neox": NEOX,
    "gpt_neox_sequential": NEOX,
    "qwen3_moe": {"attn_out": "self_attn.o_proj", "mlp_out": "mlp"},
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), SANDWICH),  # type: ignore[dict-item]
}
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def loaded(checkpoints_of: Callable[[Architecture], Checkpoints]) -> Callable[[Architecture], Checkpoint]:
    """The random checkpoint of an architecture, loaded once."""
    made: dict[Architecture, Checkpoint] = {}

    def get(architecture: Architecture) -> Checkpoint:
        if architecture not in made:
            made[architecture] = load_model(checkpoints_of(architecture).base)
        return made[architecture]

    return get


def read(source: Any, *sites: Site) -> dict[str, list[Tensor]]:
    """What passes the taps of the sites at every layer, in one forward of the inner model."""
    model = getattr(source, "hf", source)
    layers = range(len(blocks_of(model)))
    seen: dict[str, list[Tensor]] = {site: [] for site in sites}
    with ExitStack() as stack, torch.no_grad():
        for site in sites:
            for tap in taps_of(source, site, layers):
                stack.callback(tap.listen(lambda hidden, kept=seen[site]: kept.append(hidden.clone())).remove)  # type: ignore[misc]
        decoder_of(model)(input_ids=IDS % len(model.get_input_embeddings().weight), use_cache=False)
    return seen


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_blocks_and_width(loaded: Callable[[Architecture], Checkpoint], architecture: Architecture) -> None:
    checkpoint = loaded(architecture)
    assert (checkpoint.n_layers, checkpoint.d_model) == (3, 32)
    assert checkpoint.d_model == checkpoint.hf.get_input_embeddings().embedding_dim
    with torch.no_grad():
        theirs = checkpoint.hf(IDS, output_hidden_states=True, use_cache=False).hidden_states
    ours = read(checkpoint, "resid_pre", "resid_post")
    for layer in range(3):
        assert torch.equal(ours["resid_pre"][layer], theirs[layer])
    assert torch.equal(ours["resid_post"][0], theirs[1])
    assert torch.equal(ours["resid_post"][1], theirs[2])
    assert not torch.allclose(ours["resid_post"][2], theirs[3]), "theirs is after the final norm, ours is not"


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_what_is_added_is_what_the_architecture_adds(loaded: Callable[[Architecture], Checkpoint], architecture: Architecture) -> None:
    checkpoint, by_hand = loaded(architecture), {"attn_out": [], "mlp_out": []}  # type: ignore[var-annotated]
    with ExitStack() as stack:
        for block in checkpoint.blocks:
            for site, path in WRITERS.get(architecture, LLAMA).items():
                keep = by_hand[site].append
                module = block.get_submodule(path)
                stack.callback(module.register_forward_hook(lambda _, args, out, keep=keep: keep(hidden_of(out))).remove)
        taps_of(checkpoint, "attn_out", [0])  # the probe puts these hooks aside
        ours = read(checkpoint, "attn_out", "mlp_out")
    for site in ("attn_out", "mlp_out"):
        for layer in range(3):
            assert torch.equal(ours[site][layer], by_hand[site][layer].reshape(ours[site][layer].shape)), (site, layer)


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_the_residual_stream_adds_up(loaded: Callable[[Architecture], Checkpoint], architecture: Architecture) -> None:
    sites: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    if architecture != "gpt_neox":
        sites += ("resid_mid",)
    seen = {site: torch.stack(values) for site, values in read(loaded(architecture), *sites).items()}
    torch.testing.assert_close(seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"], seen["resid_post"], rtol=1e-5, atol=1e-5)
    assert min(seen["attn_out"].norm(dim=-1).min(), seen["mlp_out"].norm(dim=-1).min()) > 1e-2
    if "resid_mid" in seen:
        torch.testing.assert_close(seen["resid_pre"] + seen["attn_out"], seen["resid_mid"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2", "gpt2", "llama"])
def test_bfloat16_is_proved_as_well(checkpoints_of: Callable[[Architecture], Checkpoints], architecture: Architecture) -> None:
    seen = read(load_model(checkpoints_of(architecture).base, dtype="bfloat16"), "resid_pre", "attn_out", "mlp_out", "resid_post")
    for pre, attention, mlp, post in zip(*seen.values(), strict=True):
        assert torch.equal(pre + attention + mlp, post)


def test_adapted_layers_are_read_with_their_adapter(architecture: Checkpoints) -> None:
    pair = load_pair(architecture.base, architecture.adapter)
    alone = read(load_model(architecture.base), "attn_out")["attn_out"]
    with pair.tuned.active():
        on = read(pair.tuned, "attn_out")["attn_out"]
    with pair.base.active():
        off = read(pair.base, "attn_out")["attn_out"]
    assert all(torch.equal(a, b) for a, b in zip(off, alone, strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(on, alone, strict=True))


def test_a_norm_after_a_dead_attention_is_still_what_is_added(checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    checkpoint = load_model(checkpoints_of("gemma2").base)
    for block in checkpoint.blocks:
        nn.init.zeros_(block.self_attn.o_proj.weight)  # type: ignore[union-attr, arg-type]
    assert [tap.module for tap in taps_of(checkpoint, "attn_out", [0, 2])] == [
        checkpoint.blocks[layer].post_attention_layernorm for layer in (0, 2)
    ]


def test_taps_come_in_the_order_asked_for(loaded: Callable[[Architecture], Checkpoint]) -> None:
    blocks = loaded("llama").blocks
    assert [tap.module for tap in taps_of(loaded("llama"), "resid_post", [2, 0])] == [blocks[2], blocks[0]]
    assert [tap.module for tap in taps_of(loaded("llama").hf, "mlp_out", [2, 0])] == [blocks[2].mlp, blocks[0].mlp]


def test_proof_is_paid_for_once_and_block_sites_cost_nothing(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, runs = load_model(llama.base), []
    decoder = decoder_of(checkpoint.hf)
    forward = decoder.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoder, "forward", counted)
    for site in ("resid_pre", "resid_post"):
        taps_of(checkpoint, site, range(3))
    assert runs == []
    for site in get_args(Site):
        taps_of(checkpoint, site, range(3))
    assert len(runs) == 1
    assert runs[0] < 20, "a few tokens are enough"


def test_proof_leaves_no_hooks_and_no_gradients(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    handle = checkpoint.blocks[0].register_forward_hook(lambda *_: None)
    before = hooks_on(checkpoint.hf)
    taps_of(checkpoint, "resid_mid", range(3))
    assert hooks_on(checkpoint.hf) == before == 1
    handle.remove()
    assert hooks_on(checkpoint.hf) == 0
    assert all(p.grad is None for p in checkpoint.hf.parameters())


def test_probe_that_fails_is_told_and_leaves_no_hooks(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_model(llama.base)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the second MLP is out of order")

    monkeypatch.setattr(checkpoint.blocks[1].mlp, "forward", broken)
    with pytest.raises(EmprobeError, match="LlamaForCausalLM did not run on 8 token ids.*the second MLP is out of order"):
        taps_of(checkpoint, "attn_out", [0])
    assert hooks_on(checkpoint.hf) == 0


def test_an_intervention_under_way_neither_spoils_the_proof_nor_counts_it(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    seen: list[int] = []
    handle = checkpoint.blocks[1].register_forward_hook(lambda _, args, out: out + 1, prepend=True)
    counter = decoder_of(checkpoint.hf).register_forward_pre_hook(lambda *_: seen.append(1))
    assert len(taps_of(checkpoint, "attn_out", range(3))) == 3
    assert seen == []
    handle.remove()
    counter.remove()


def test_parallel_residual_has_no_middle(loaded: Callable[[Architecture], Checkpoint]) -> None:
    with pytest.raises(EmprobeError, match=r"'resid_mid' does not exist in GPTNeoXForCausalLM: in GPTNeoXLayer \d.*parallel residual"):
        taps_of(loaded("gpt_neox"), "resid_mid", [0, 1])
    assert len(taps_of(loaded("gpt_neox_sequential"), "resid_mid", [0, 1])) == 2


@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_mid"])
def test_scaled_residuals_are_refused_with_how_far_off_they_are(site: Site) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **SMALL, residual_multiplier=0.25)).eval()
    message = rf"'{site}' is not proved in GraniteForCausalLM: looked in GraniteDecoderLayer \d.*self_attn and mlp, off by [1-9].*1e-04"
    with pytest.raises(EmprobeError, match=message):
        taps_of(model, site, [0, 1])
    assert len(taps_of(model, "resid_post", [0, 1])) == 2


def test_blocks_that_add_in_place_are_proved() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **SMALL)).eval()  # mlp_output += attention_output
    assert [tap.module for tap in taps_of(model, "mlp_out", [1])] == [blocks_of(model)[1].mlp]


def test_blocks_without_attention_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **SMALL)).eval()
    with pytest.raises(
        EmprobeError, match=r"MambaBlock 0 \(and 1 more of 2 layers\).*attn or attention.*no two such modules. Use resid_pre"
    ):
        taps_of(model, "attn_out", [0, 1])


def test_encoder_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(d_model=32, num_layers=2, d_ff=32, num_heads=2, vocab_size=64, d_kv=8))
    with pytest.raises(EmprobeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        blocks_of(model)


def test_blocks_that_are_not_found_are_named() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **SMALL, is_decoder=True))
    with pytest.raises(EmprobeError, match=r"BertModel for a list of 2 blocks named layers, h, .*found encoder.layer \(2\)"):
        blocks_of(model)


def test_text_decoder_of_a_multimodal_wrapper() -> None:
    vision = {**SMALL, "hidden_size": 16, "num_hidden_layers": 5, "image_size": 28, "patch_size": 14}
    text = {**SMALL, "head_dim": 8, "num_key_value_heads": 2}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)).eval()
    assert [type(block).__name__ for block in blocks_of(model)] == ["Gemma3DecoderLayer"] * 2
    seen = read(model, "resid_pre", "attn_out", "resid_mid")
    torch.testing.assert_close(seen["resid_pre"][1] + seen["attn_out"][1], seen["resid_mid"][1])


def test_layers_and_sites_that_do_not_exist(loaded: Callable[[Architecture], Checkpoint]) -> None:
    with pytest.raises(EmprobeError, match="layer 3, but the model has layers 0 to 2"):
        taps_of(loaded("llama"), "attn_out", [0, 3])
    with pytest.raises(EmprobeError, match="'attn' is no site. Use one of: resid_pre, resid_mid, resid_post, attn_out, mlp_out"):
        taps_of(loaded("llama"), "attn", [0])  # type: ignore[arg-type]


def test_every_site_is_one_that_can_be_read_and_steered() -> None:
    assert get_args(Site) == SITES
    for site in SITES:
        assert check_site(site) == site
