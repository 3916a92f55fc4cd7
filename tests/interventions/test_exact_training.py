"""Gradients flow through interventions, checkpointed blocks are steered as they were, and training inside a block trains what it should."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from emprobe.errors import EmprobeError
from emprobe.interventions import Ablate, Add, Cap, SetProjection, When, Where, intervene
from emprobe.interventions.kernels import State, kernels_of
from emprobe.interventions.tokens import Tokens
from emprobe.models import Checkpoint, load_model
from tests.fixtures.models import Architecture, Checkpoints
from tests.interventions.by_hand import FAMILIES, direction

D = 8


@pytest.fixture
def model(checkpoints_of: Callable[[Architecture], Checkpoints]) -> Checkpoint:
    return load_model(checkpoints_of("llama").base)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_analytic_ones(name: str) -> None:
    v, e = direction(D), direction(D, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    tokens = Tokens((2, 3), torch.device("cpu"), mask=mask)
    edits = FAMILIES[name].make(v, e).edits(3)
    ((kernel, _),) = kernels_of([(0, edit) for edit in edits], 1)
    hidden = torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: kernel.write(h, State(tokens)), (hidden,))
    (found,) = torch.autograd.grad(kernel.write(hidden, State(tokens)).square().sum(), hidden)
    again = hidden.detach().clone().requires_grad_()
    made = [FAMILIES[name].by_hand(h, v.vector, e.vector) if on else h for h, on in zip(again.flatten(0, 1), mask.flatten(), strict=True)]
    (wanted,) = torch.autograd.grad(torch.stack(made).square().sum(), again)
    torch.testing.assert_close(found, wanted)


def test_rowwise_gradients_are_the_analytic_ones() -> None:
    v, e = direction(D), direction(D, seed=1)
    edits = [(0, Add(v, 1.0).edits(3)[0]), (1, Ablate(e).edits(3)[0])]
    ((kernel, _),) = kernels_of(edits, 3)
    state = State(Tokens((3, 2), torch.device("cpu")), plan_of_row=torch.tensor([1, 0, 2]))
    hidden = torch.randn(3, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: kernel.write(h, state), (hidden,))


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for width in range(6, 6 + n):
        mask = torch.ones(3, width, dtype=torch.long)
        mask[0, : width // 3] = 0
        made.append((torch.randint(5, 200, (3, width), generator=generator), mask))
    return made


def loss_of(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss
    return loss


def checkpointing(model: Any, reentrant: bool) -> None:
    # transformers 5.23 has another name for it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


OPERATORS: dict[str, Callable[[Checkpoint], list[Any]]] = {
    "resid_post": lambda c: [Add(direction(c), 1.0)],
    "everywhere": lambda c: [
        Ablate(direction(c, site="resid_mid")),
        SetProjection(direction(c, site="attn_out", seed=2), 1.0, unit="abs"),
        Cap(direction(c, site="mlp_out", seed=3), max=0.1, unit="abs", where=Where(exclude_first=True)),
        Add(direction(c, layer=2, site="mlp_out"), 1.0, when=When(direction(c, site="mlp_out"), above=0.0)),
    ],
    "every write": lambda c: [Ablate(direction(c), site="writes")],
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", OPERATORS)
def test_checkpointing_changes_neither_gradients_nor_receipts(model: Checkpoint, where: str, reentrant: bool) -> None:
    """Two forward passes of different shapes before one backward pass: a block that runs again must know which one it belongs to."""
    found = []
    for checkpointed in (False, True):
        hf = model.hf.train()
        hf.zero_grad()
        if checkpointed:
            checkpointing(hf, reentrant)
            hf.enable_input_require_grads()
        before = [vars(block).get("_gradient_checkpointing_func") for block in model.blocks]
        with intervene(model, *OPERATORS[where](model)) as receipt:
            sum((loss_of(hf, *batch) for batch in batches(2)), torch.zeros(())).backward()
            counted = receipt.as_dict()
        assert before == [vars(block).get("_gradient_checkpointing_func") for block in model.blocks]
        found.append((counted, [p.grad.clone() for p in hf.parameters() if p.grad is not None]))
    (counts, gradients), (again, others) = found
    assert counts == again
    assert len(gradients) == len(others) > 10
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_adapter_trains_inside_a_block_and_the_base_does_not_move(model: Checkpoint, checkpointed: bool) -> None:
    """Preventative steering: the vector is added while training, and gone afterwards."""
    base = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    peft: Any = get_peft_model(model.hf, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    if checkpointed:
        checkpointing(model.hf, False)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    ((ids, mask),) = batches(1)
    with intervene(model, Add(direction(model), 0.5), Ablate(direction(model, seed=4), layers="all")) as receipt:
        for _ in range(12):
            peft.train()
            optimizer.zero_grad()
            loss = loss_of(peft, ids, mask)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0]
    assert receipt.as_dict()[0]["positions"] == 12 * int(mask.sum())
    for name, parameter in peft.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")])


def test_a_receipt_keeps_no_graph_alive(model: Checkpoint) -> None:
    ((ids, mask),) = batches(1)
    with intervene(model, Add(direction(model), 0.5), Ablate(direction(model, site="resid_mid"))) as receipt:
        out = model.hf(ids, attention_mask=mask)
        kept = weakref.ref(out.logits)
        assert out.logits.requires_grad
        del out
        gc.collect()
        assert kept() is None
        assert receipt.as_dict()[0]["positions"] == int(mask.sum())


def test_a_block_may_be_used_in_inference_mode_and_then_trained_in(model: Checkpoint) -> None:
    ((ids, mask),) = batches(1)
    with intervene(model, Ablate(direction(model)), Add(direction(model), 1.0), SetProjection(direction(model, layer=2), 1.0)):
        with torch.inference_mode():
            model.hf(ids, attention_mask=mask)
        loss_of(model.hf, ids, mask).backward()
    assert all(math.isfinite(float(p.grad.norm())) for p in model.hf.parameters() if p.grad is not None)


def test_an_embedding_pass_cannot_know_special_tokens(model: Checkpoint) -> None:
    with pytest.raises(EmprobeError, match="called with embeddings, so which tokens are special"):  # noqa: SIM117
        with intervene(model, Add(direction(model), 1.0, where=Where(exclude_special=True))):
            model.hf(inputs_embeds=torch.zeros(1, 3, model.d_model))
