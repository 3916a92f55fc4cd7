"""Every site of every architecture is written as the capture reads it; blocks nest in order and leave nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from emprobe.batching import pad
from emprobe.capture import capture
from emprobe.errors import EmprobeError
from emprobe.interventions import Ablate, Add, Operator, SetProjection, Where, intervene
from emprobe.models import Checkpoint, encode, load_model
from emprobe.models.sites import taps_of
from emprobe.types import Conversation, Site
from tests.fixtures.models import ALL_ARCHITECTURES, Architecture, Checkpoints
from tests.interventions.by_hand import direction

QUESTIONS = [Conversation.ask(f"q{n}", " ".join(["beans", "peas", "soil", "row"] * n)) for n in (1, 2, 3)]
SITES: tuple[Site, ...] = get_args(Site)


def load(checkpoints_of: Callable[[Architecture], Checkpoints], architecture: Architecture, **how: Any) -> Checkpoint:
    return load_model(checkpoints_of(architecture).base, **how)


def seen_at(checkpoint: Checkpoint, site: Site, layer: int = 1, *operators: Operator) -> list[Tensor]:
    """Hidden states of all tokens of a left-padded batch at one site, one tensor per row."""
    rows = [list(encode(checkpoint.tokenizer, q).ids) for q in QUESTIONS]
    ids, mask = pad(rows, 0, "left")
    found: list[Tensor] = []
    with ExitStack() as stack:
        for operator in operators:
            stack.enter_context(intervene(checkpoint, operator))
        (tap,) = taps_of(checkpoint, site, [layer])
        stack.callback(tap.listen(lambda hidden: found.append(hidden.detach().clone())).remove)
        with torch.no_grad():
            checkpoint.hf(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    (hidden,) = found
    return [row[on.bool()] for row, on in zip(hidden, mask, strict=True)]


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_at_every_site_what_is_captured_is_what_was_plus_what_was_done(
    architecture: Architecture, checkpoints_of: Callable[[Architecture], Checkpoints]
) -> None:
    checkpoint, proved = load(checkpoints_of, architecture), 0
    for site in SITES:
        d = direction(checkpoint, site=site)
        try:
            before = seen_at(checkpoint, site)
        except EmprobeError:
            with pytest.raises(EmprobeError, match="is not proved|does not exist"):
                seen_at(checkpoint, "resid_post", 1, Add(d, 1.0))
            continue
        proved += 1
        v = d.vector.float()
        for row, (was, added) in enumerate(zip(before, seen_at(checkpoint, site, 1, Add(d, 2.0)), strict=True)):
            torch.testing.assert_close(added, was + 10.0 * v, rtol=1e-5, atol=1e-4, msg=lambda m, s=site, r=row: f"{s}, row {r}: {m}")
        once, twice = (seen_at(checkpoint, site, 1, *[Ablate(d)] * n) for n in (1, 2))
        for was, one, two in zip(before, once, twice, strict=True):
            assert bool(((one.double() @ d.vector).abs() <= 1e-6 * was.double().norm(dim=-1)).all()), site
            torch.testing.assert_close(one, was - (was @ v)[:, None] * v, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(two, one, rtol=0, atol=2e-6 * float(was.norm(dim=-1).max()))
    assert proved >= 4


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_capture_of_answers_agrees_too(architecture: Architecture, checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    checkpoint = load(checkpoints_of, architecture)
    for site in SITES:
        d = direction(checkpoint, site=site)
        before = capture(checkpoint, QUESTIONS, site=site, layers=1, progress=False)
        with intervene(checkpoint, Add(d, 2.0)):
            after = capture(checkpoint, QUESTIONS, site=site, layers=1, progress=False)
        torch.testing.assert_close(after.at(1), before.at(1) + 10 * d.vector.float(), rtol=1e-4, atol=1e-4)


# ---- every write


def orthogonalised(checkpoint: Checkpoint, v: Tensor) -> Checkpoint:
    """The same model with v taken out of every matrix and bias that writes to the residual stream, by hand."""
    made = copy.deepcopy(checkpoint)
    out = torch.eye(len(v), dtype=torch.float64) - torch.outer(v, v)
    writes = ("o_proj", "down_proj", "attn.c_proj", "mlp.c_proj", "attention.dense", "dense_4h_to_h")
    embeds = ("embed_tokens", "wte", "wpe", "embed_in")
    with torch.no_grad():
        for name, module in made.hf.named_modules():
            if name.endswith(embeds):
                module.weight.copy_(module.weight @ out)
            if name.endswith(writes):
                transposed = type(module).__name__ == "Conv1D"
                module.weight.copy_(module.weight @ out if transposed else out @ module.weight)
                if module.bias is not None:
                    module.bias.copy_(out @ module.bias)
    return made


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox", "gpt_neox_sequential"])
def test_ablating_every_write_equals_orthogonal_weights(
    architecture: Architecture, checkpoints_of: Callable[[Architecture], Checkpoints]
) -> None:
    checkpoint = load(checkpoints_of, architecture, dtype="float64")
    d = direction(checkpoint)
    ids = torch.randint(5, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    if checkpoint.hf.config.tie_word_embeddings:
        # Orthogonal embeddings would also read less where they are the head too.
        checkpoint.hf.lm_head.weight = torch.nn.Parameter(checkpoint.hf.lm_head.weight.detach().clone())
    with torch.no_grad():
        wanted, plain = orthogonalised(checkpoint, d.vector).hf(ids).logits, checkpoint.hf(ids).logits
        with intervene(checkpoint, Ablate(d, site="writes")):
            found = checkpoint.hf(ids).logits
        with intervene(checkpoint, Ablate(d, layers="all")):
            at_outputs = checkpoint.hf(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    for other in (plain, at_outputs):
        assert float((found - other).abs().max()) > 1e-3, "ablating a block's output is another thing"


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2", "gemma3_text", "olmo3", "qwen3_moe"])
def test_where_norms_follow_a_write_nothing_of_the_direction_gets_past_them(
    architecture: Architecture, checkpoints_of: Callable[[Architecture], Checkpoints]
) -> None:
    checkpoint = load(checkpoints_of, architecture)
    d = direction(checkpoint)
    for site in ("resid_pre", "resid_mid", "resid_post"):
        for row in seen_at(checkpoint, site, 2, Ablate(d, site="writes")):
            assert bool(((row.double() @ d.vector).abs() <= 1e-6 * row.double().norm(dim=-1)).all())


# ---- order


def test_sites_of_one_block_act_as_the_stream_flows_and_blocks_as_they_were_entered(
    checkpoints_of: Callable[[Architecture], Checkpoints],
) -> None:
    checkpoint = load(checkpoints_of, "llama")
    at: dict[Site, Any] = {site: direction(checkpoint, site=site) for site in SITES}
    v = at["resid_mid"].vector
    mid = lambda *ops: torch.cat(seen_at(checkpoint, "resid_mid", 1, *ops)).double() @ v  # noqa: E731
    zero = torch.zeros(1, dtype=torch.float64)
    for earlier in (Add(at["attn_out"], 1.0), Add(at["resid_pre"], 1.0)):
        for blocks in ([earlier, Ablate(at["resid_mid"])], [Ablate(at["resid_mid"]), earlier]):
            found = mid(*blocks)
            torch.testing.assert_close(found, zero.expand_as(found), rtol=0, atol=1e-4)
        with intervene(checkpoint, Ablate(at["resid_mid"]), earlier):
            found = mid()
        torch.testing.assert_close(found, zero.expand_as(found), rtol=0, atol=1e-4)
    for site in SITES:
        for first, second, left in ((Add(at[site], 1.0), Ablate(at[site]), 0.0), (Ablate(at[site]), Add(at[site], 1.0), 5.0)):
            found = torch.cat(seen_at(checkpoint, site, 1, first, second)).double() @ v
            torch.testing.assert_close(found, torch.full_like(found, left), rtol=0, atol=1e-4)
            found = torch.cat(seen_at(checkpoint, site, 1, first, second, SetProjection(at[site], 3.0, unit="abs"))).double() @ v
            torch.testing.assert_close(found, torch.full_like(found, 3.0), rtol=0, atol=1e-4)


def test_two_models_share_nothing(checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    one, two = load(checkpoints_of, "llama"), load(checkpoints_of, "llama")
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        plain = two.hf(ids).logits
        with intervene(one, Add(direction(one), 1.0)) as receipt:
            assert torch.equal(two.hf(ids).logits, plain)
            steered = one.hf(ids).logits
            with intervene(two, Ablate(direction(two), site="writes")) as other:
                assert torch.equal(one.hf(ids).logits, steered)
                two.hf(ids)
    assert receipt.as_dict()[0]["forwards"] == 2
    assert other.as_dict()[0]["forwards"] == 1


# ---- no trace


def trace_of(checkpoint: Checkpoint) -> list[Any]:
    hooks = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in checkpoint.hf.modules()]
    return [hooks, sorted(vars(checkpoint.hf)), [sorted(vars(block)) for block in checkpoint.blocks], list(checkpoint.interventions)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_blocks_may_be_left_in_any_order(order: tuple[int, ...], checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    checkpoint = load(checkpoints_of, "llama")
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        plain, before = checkpoint.hf(ids).logits, trace_of(checkpoint)
        operators = [
            Add(direction(checkpoint), 1.0),
            Ablate(direction(checkpoint, site="resid_mid")),
            Ablate(direction(checkpoint), site="writes"),
        ]
        blocks = [intervene(checkpoint, operator) for operator in operators]
        for block in blocks:
            block.__enter__()
        checkpoint.hf.generate(ids, max_new_tokens=2)
        for number in order:
            blocks[number].__exit__(None, None, None)
        assert trace_of(checkpoint) == before
        assert torch.equal(checkpoint.hf(ids).logits, plain)
        checkpoint.hf.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("accident", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_accident_in_mid_forward_leaves_nothing(
    accident: type[BaseException], checkpoints_of: Callable[[Architecture], Checkpoints]
) -> None:
    checkpoint = load(checkpoints_of, "llama")
    ids = torch.arange(5, 13)[None]
    plain, before = checkpoint.hf(ids).logits, trace_of(checkpoint)

    def fail(*_: Any) -> None:
        raise accident

    operators = [Add(direction(checkpoint, site=site), 1.0, where=Where(prompt_positions=[-1])) for site in SITES]
    for module in (checkpoint.blocks[2], checkpoint.blocks[1].self_attn.q_proj):
        handle = module.register_forward_hook(fail)
        with (
            pytest.raises(accident),
            intervene(checkpoint, *operators),
            intervene(checkpoint, Ablate(direction(checkpoint), site="writes")),
        ):
            checkpoint.hf.generate(ids, max_new_tokens=2)
        handle.remove()
        assert trace_of(checkpoint) == before
        assert torch.equal(checkpoint.hf(ids).logits, plain)
