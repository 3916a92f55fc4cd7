"""Losses and divergences: streamed equal whole, gradients equal autograd's, and a KL is never negative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.finetuning import LoRA, LoRASolution, Vector, VectorSolution, kl_to_base, per_token_weight, response_loss, response_rows
from emprobe.finetuning import losses as losses_module
from emprobe.finetuning.losses import check_kl, cross_entropies, divergences, head_of, hidden_at_targets, kl_of
from emprobe.finetuning.mounting import lora_config, mounted_lora, mounted_vector, plain_config
from emprobe.finetuning.rows import Batch, Row
from emprobe.models.load import Checkpoint, load_model
from tests.finetuning.small import conversations
from tests.fixtures.models import ALL_ARCHITECTURES, Architecture, Checkpoints


@pytest.fixture(scope="module")
def base(llama: Checkpoints) -> Checkpoint:
    return load_model(llama.base)


@pytest.fixture(scope="module")
def rows(base: Checkpoint) -> list[Row]:
    return response_rows(base.tokenizer, conversations(8))


def vector(base: Checkpoint, size: float = 1.0) -> VectorSolution:
    values = torch.randn(base.d_model, generator=torch.Generator().manual_seed(3))
    return VectorSolution(size * values, 1, "resid_post")


def whole_logits(checkpoint: Checkpoint, row: Row) -> Tensor:
    """Log-probabilities of the tokens that count, by the model's own forward pass on one row, in float64."""
    with torch.no_grad(), checkpoint.active() as model:
        logits = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    return logits[[i - 1 for i in row.predicted]].double().log_softmax(-1)


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_heads_make_the_models_own_logits(name: Architecture, checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    rows = response_rows(checkpoint.tokenizer, conversations(5))
    found = response_loss(checkpoint, rows)
    for row, total in zip(rows, found.sums, strict=True):
        logs = whole_logits(checkpoint, row)
        expected = -sum(float(logs[k, row.ids[i]]) for k, i in enumerate(row.predicted))
        assert float(total) == pytest.approx(expected, rel=1e-4)
    assert found.tokens.tolist() == [len(row.predicted) for row in rows]


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_streamed_kl_is_the_cached_kl(base: Checkpoint, rows: list[Row], scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    solution = vector(base, scale)
    cached = [whole_logits(base, row) for row in rows]
    with solution.applied(base) as tuned:
        expected = [float((p.exp() * (p - whole_logits(tuned, row))).sum()) for p, row in zip(cached, rows, strict=True)]
    for size in (2**22, 3 * 397):
        monkeypatch.setattr(losses_module, "LOGITS_AT_ONCE", size)
        found = kl_to_base(base, solution, rows)
        assert found.sums.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_kl_of_the_base_to_itself_is_nothing(base: Checkpoint, rows: list[Row]) -> None:
    assert kl_to_base(base, vector(base, 0.0), rows).sums.tolist() == [0.0] * len(rows)
    with mounted_lora(base, lora_config(base, LoRA(2))) as mounted:
        fresh = LoRASolution(
            {n: p.detach().clone() for n, p in mounted.parameters.items()}, plain_config(mounted.tuned.model.peft_config["default"], "base")
        )
    assert kl_to_base(base, fresh, rows).sums.tolist() == [0.0] * len(rows)


def test_kl_of_nearly_equal_distributions_is_not_below_zero() -> None:
    """Logits far from zero, whose normalisers round: the plain sum falls far below zero, and ours does not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 50_000, generator=generator) + 1000
    p, q = logits.log_softmax(-1), (logits + 1e-4 * torch.randn(60, 50_000, generator=generator) + 333).log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).min()) < -5e-7
    assert float(kl_of(p, q).min()) > -1e-8
    far = 3 * torch.randn(60, 50_000, generator=generator)
    exact = (p.double().exp() * (p.double() - far.double().log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl_of(p, far.log_softmax(-1)).double(), exact, rtol=1e-4, atol=1e-4)


def test_a_token_that_the_base_cannot_say_adds_nothing() -> None:
    p, q = torch.tensor([[0.0, 0.0, -torch.inf]]).log_softmax(-1), torch.zeros(1, 3).log_softmax(-1)
    assert float(kl_of(p, q)) == pytest.approx(torch.log(torch.tensor(1.5)).item())


def test_a_negative_kl_is_an_error() -> None:
    check_kl(torch.tensor([0.0, -9e-7]))
    with pytest.raises(EmprobeError, match=r"KL to the base came out as low as -0.01 \(1 of 2 tokens below -1e-06\)"):
        check_kl(torch.tensor([0.5, -0.01]))


@pytest.mark.parametrize("at_once", [2**22, 3 * 397])
def test_gradients_are_those_of_the_whole_logits(base: Checkpoint, rows: list[Row], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "LOGITS_AT_ONCE", at_once)
    batch = Batch.of(rows, 0, base.device)
    with mounted_vector(base, Vector(1), 0.5 * torch.ones(base.d_model)) as mounted:
        model, (v,) = base.hf, mounted.parameters.values()
        with torch.no_grad(), mounted.base():
            frozen = hidden_at_targets(model, batch)
            base_logs = model(input_ids=batch.ids).logits[:, :-1][batch.predicted[:, 1:]].log_softmax(-1)

        def plain() -> tuple[Tensor, Tensor]:
            logs = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1][batch.predicted[:, 1:]].log_softmax(-1)
            nll = -logs.gather(1, batch.targets[:, None]).sum()
            return nll, (base_logs.exp() * (base_logs - logs)).sum()

        for which, streamed in (
            (0, lambda: cross_entropies(hidden_at_targets(model, batch), batch.targets, mounted.head, 0.25)),
            (1, lambda: divergences(hidden_at_targets(model, batch), frozen, mounted.head, mounted.base_head, 0.25)),
        ):
            v.grad = None
            value = plain()[which]
            (0.25 * value).backward()
            wanted, v.grad = v.grad, None
            found = streamed()
            torch.testing.assert_close(found.sum(), value.detach(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(v.grad, wanted, rtol=1e-3, atol=1e-5)


def test_weights_of_released_code() -> None:
    assert per_token_weight(1e6, 152_064) == pytest.approx(6.576, abs=1e-3)
    with pytest.raises(EmprobeError, match="A vocabulary of 0"):
        per_token_weight(1.0, 0)


def test_no_rows(base: Checkpoint) -> None:
    with pytest.raises(EmprobeError, match="no rows"):
        response_loss(base, [])


def test_an_unknown_head_is_refused(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    real = type(base.hf).forward

    def doubled(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        out = real(self, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(type(base.hf), "forward", doubled)
    with pytest.raises(EmprobeError, match="How LlamaForCausalLM makes logits"):
        head_of(base.hf)
