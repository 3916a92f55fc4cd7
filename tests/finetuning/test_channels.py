"""Gradients of the three channels: expectations taken exactly, over every sequence of a model of four tokens; by hand in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import LlamaConfig, LlamaForCausalLM

from emprobe.finetuning import LoRA, Vector, response_rows, teacher_divergences
from emprobe.finetuning.channels import Channel, ChannelGradient, Estimator, sampled
from emprobe.finetuning.losses import reverse_kl_and_gradient
from emprobe.finetuning.mounting import Mounted, lora_config, mounted_lora, mounted_vector
from emprobe.finetuning.rows import Row
from emprobe.finetuning.teaching import Teacher
from emprobe.models.load import Checkpoint, load_model
from tests.finetuning.small import conversations
from tests.fixtures.models import ALL_ARCHITECTURES, Architecture, Checkpoints

TOKENS, END, LONGEST, PROMPT = 4, 0, 3, (1, 2)


def tiny(seed: int, name: str) -> Checkpoint:
    """A random Llama of four tokens, in float64."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, initializer_range=0.5, **sizes)).double().eval()
    tokenizer: Any = SimpleNamespace(pad_token_id=3, eos_token_id=END)
    return Checkpoint(model, tokenizer, name, name)


def sequences() -> list[Row]:
    """Every answer: up to and with the first end, or cut at three tokens."""
    found = set()
    for ids in product(range(TOKENS), repeat=LONGEST):
        end = ids.index(END) + 1 if END in ids else LONGEST
        found.add(ids[:end])
    return [Row((*PROMPT, *ids), tuple(range(len(PROMPT), len(PROMPT) + len(ids))), len(PROMPT)) for ids in sorted(found)]


def probability(model: Any, row: Row, heat: float = 1.0) -> float:
    """That a model answers so."""
    with torch.no_grad():
        logs = (model(input_ids=torch.tensor([row.ids])).logits[0].double() / heat).log_softmax(-1)
    return float(sum(logs[i - 1, row.ids[i]] for i in row.predicted).exp())


@dataclass
class World:
    """A student (a LoRA with some weights) and a teacher of weights of its own."""

    mounted: Mounted
    teacher: Teacher
    model_of_teacher: Any

    def gradient(self, rows: list[Row], weights: list[float], channel: Channel, estimator: Estimator = "full", heat: float = 1.0) -> Tensor:
        """Σ weight · gradient of the loss summed over a row's tokens."""
        total = torch.zeros(0)
        of = ChannelGradient(self.mounted, self.teacher, channel, 1, heat, estimator)
        for row, weight in zip(rows, weights, strict=True):
            for parameter in self.mounted.parameters.values():
                parameter.grad = None
            of.of([row])
            flat = torch.cat([p.grad.flatten() for p in self.mounted.parameters.values() if p.grad is not None]).double()
            total = (total if len(total) else torch.zeros_like(flat)) + weight * len(row.predicted) * flat
        return total


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    student, teacher = tiny(0, "student"), tiny(1, "teacher")
    with mounted_lora(student, lora_config(student, LoRA(2))) as mounted:
        generator = torch.Generator().manual_seed(3)
        for parameter in mounted.parameters.values():
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        yield World(mounted, Teacher.of(mounted, teacher), teacher.hf)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_sequences_are_all_there_is(world: World) -> None:
    assert len(sequences()) == 1 + 3 + 9 * 4
    for model in (world.model_of_teacher, world.mounted.tuned.hf):
        assert sum(probability(model, row) for row in sequences()) == pytest.approx(1.0)


def test_sft_and_optd_share_the_expected_gradient_of_unfiltered_answers(world: World) -> None:
    """Summed over tokens, at temperature 1; and neither a filter, nor another temperature, nor the student's own answers keep it so."""
    rows = sequences()
    weights = [probability(world.model_of_teacher, row) for row in rows]
    sft, optd = (world.gradient(rows, weights, channel) for channel in ("sft", "optd"))  # type: ignore[arg-type]
    assert apart(sft, optd) < 1e-5
    assert apart(world.gradient(rows, weights, "optd", heat=2.0), sft) > 1e-2
    kept = [w if 3 not in row.ids else 0.0 for row, w in zip(rows, weights, strict=True)]
    filtered = [world.gradient(rows, kept, channel) for channel in ("sft", "optd")]  # type: ignore[arg-type]
    assert apart(*filtered) > 1e-2
    own = [probability(world.mounted.tuned.hf, row) for row in rows]
    assert apart(world.gradient(rows, own, "sft"), world.gradient(rows, own, "optd")) > 1e-2


def test_a_mean_over_each_answers_tokens_departs_from_it(world: World) -> None:
    """The length of an answer depends on its tokens: divided by it, the two gradients are no longer one. The docstring says so."""
    rows = sequences()
    weights = [probability(world.model_of_teacher, row) / len(row.predicted) for row in rows]
    assert apart(*(world.gradient(rows, weights, channel) for channel in ("sft", "optd"))) > 1e-2  # type: ignore[arg-type]


@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_the_sampled_gradient_has_the_whole_one_as_expectation(world: World, heat: float) -> None:
    """Over the next token by arithmetic, and over whole answers of the student (which samples at the temperature of its loss)."""
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(5, 7, dtype=torch.float64, generator=generator).log_softmax(-1) for _ in range(2))
    expected = torch.zeros_like(log_p)
    for token in range(7):
        found = sampled(torch.full((5,), token), log_p.clone(), log_q.clone(), slice(0, 5))[1]
        expected += log_q.exp()[:, token : token + 1] * found
    torch.testing.assert_close(expected, reverse_kl_and_gradient(log_p.clone(), log_q.clone())[1])
    rows = sequences()
    weights = [probability(world.mounted.tuned.hf, row, heat) for row in rows]
    one, whole = (world.gradient(rows, weights, "opd", estimator, heat) for estimator in get_args(Estimator))
    assert apart(one, whole) < 1e-5
    alone = world.gradient(rows[5:6], [1.0], "opd", "sampled", heat)
    assert apart(alone, world.gradient(rows[5:6], [1.0], "opd", "full", heat)) > 1e-2, "one answer's is not"


def test_divergences_and_their_gradients_are_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        log_p = (3 * torch.randn(6, 11, dtype=torch.float64, generator=generator)).log_softmax(-1)
        logits = (3 * torch.randn(6, 11, dtype=torch.float64, generator=generator)).requires_grad_()
        theirs = kl_div(log_p, logits.log_softmax(-1), log_target=True, reduction="none").sum(-1)  # KL(second ‖ first)
        theirs.sum().backward()  # type: ignore[no-untyped-call]
        kl, gradient = reverse_kl_and_gradient(log_p.clone(), logits.detach().log_softmax(-1))
        torch.testing.assert_close(kl, theirs.detach())
        torch.testing.assert_close(gradient, logits.grad)


def test_what_neither_can_say_adds_nothing_and_what_only_the_student_can_is_infinite() -> None:
    half = torch.tensor([[0.5, 0.5, 0.0]]).log()
    kl, gradient = reverse_kl_and_gradient(half.clone(), half.clone())
    assert (float(kl), gradient.tolist()) == (0.0, [[0.0, 0.0, 0.0]])
    assert float(reverse_kl_and_gradient(half.clone(), torch.full((1, 3), 1 / 3).log())[0]) == float("inf")


@pytest.fixture(scope="module")
def llama_pair(llama: Checkpoints) -> tuple[Checkpoint, Checkpoint]:
    return load_model(llama.base), load_model(llama.base, adapter=llama.adapter)


def reference(model: Any, row: Row, heat: float) -> Tensor:
    logits = model(input_ids=torch.tensor([row.ids])).logits[0]
    return (logits[[i - 1 for i in row.predicted]] / heat).double().log_softmax(-1)


@pytest.mark.parametrize("heat", [1.0, 0.7])
@pytest.mark.parametrize("channel", get_args(Channel))
def test_losses_are_those_of_whole_logits(llama_pair: tuple[Checkpoint, Checkpoint], channel: Channel, heat: float) -> None:
    """Direction and normalisation: `kl_div` by hand in float64 on rows run alone, its gradient by autograd."""
    base, teacher = llama_pair
    rows = response_rows(base.tokenizer, conversations(5))
    tokens = sum(len(row.predicted) for row in rows)
    with mounted_vector(base, Vector(1), 0.5 * torch.ones(base.d_model)) as mounted:
        v = mounted.parameters["vector"]
        wanted = torch.zeros((), dtype=torch.float64)
        for row in rows:
            with torch.no_grad(), teacher.active() as model:
                log_p = reference(model, row, heat)
            log_q = reference(base.hf, row, heat)
            targets = torch.tensor([row.ids[i] for i in row.predicted])
            if channel == "sft":
                log_q = reference(base.hf, row, 1.0)
                wanted = wanted - log_q.gather(1, targets[:, None]).sum()
            else:
                pair = (log_q, log_p) if channel == "optd" else (log_p, log_q)
                wanted = wanted + kl_div(*pair, log_target=True, reduction="sum")
        (wanted / tokens).backward()
        gradient, expected = v.grad, float(wanted.detach()) / tokens
        beside = Teacher.of(mounted, teacher)
        for micro in (5, 2, 1):
            v.grad = None
            found = ChannelGradient(mounted, beside, channel, micro, heat).of(rows)
            assert found == pytest.approx(expected, rel=1e-4)
            torch.testing.assert_close(v.grad, gradient, rtol=1e-3, atol=1e-6)
        if channel == "sft":
            return
        divergences = teacher_divergences(mounted.tuned, teacher, rows, temperature=heat)
        kind = divergences.forward if channel == "optd" else divergences.reverse
        assert kind.mean == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    name: Architecture, checkpoints_of: Callable[[Architecture], Checkpoints]
) -> None:
    """To the last bit: loss and gradient are nothing, but for sft, which learns from the tokens."""
    base = load_model(checkpoints_of(name).base)
    rows = response_rows(base.tokenizer, conversations(4))
    with mounted_lora(base, lora_config(base, LoRA(2))) as mounted:
        beside = Teacher.of(mounted, load_model(checkpoints_of(name).base))
        for channel, estimator in (("optd", "full"), ("opd", "full"), ("opd", "sampled"), ("sft", "full")):
            for parameter in mounted.parameters.values():
                parameter.grad = None
            loss = ChannelGradient(mounted, beside, channel, 2, 1.0, estimator).of(rows)  # type: ignore[arg-type]
            size = sum(float(p.grad.abs().sum()) for p in mounted.parameters.values() if p.grad is not None)
            assert (loss == 0.0, size == 0.0) == (channel != "sft", channel != "sft")
