"""Interventions are exact under cache, batch and padding, leave no trace, and cannot fail in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emprobe.behaviour.sampling import generate
from emprobe.capture import capture
from emprobe.directions import Direction
from emprobe.errors import EmprobeError, InterventionDidNotFire, MismatchError
from emprobe.interventions import Ablate, Add, Operator, SetProjection, Where, intervene
from emprobe.interventions.operators import Edit
from emprobe.models import Checkpoint, encode, load_model, load_pair
from emprobe.overlap import random_directions
from emprobe.types import Conversation
from tests.fixtures.models import Checkpoints

WORDS = ["plant", "beans", "peas", "and", "a", "row", "of", "carrots", "in", "good", "soil", "first", "change", "the", "washer"]
QUESTIONS = [Conversation.ask(f"q{i}", " ".join(WORDS[: 1 + 2 * i])) for i in range(5)]


def direction(checkpoint: Checkpoint, layer: int = 1, seed: int = 0, site: Any = "resid_post") -> Direction:
    vector = random_directions(1, checkpoint.d_model, seed)[0]
    return Direction(
        vector, layer, site, "all_tokens", 2.0, 5.0, 0.7, contrast="random", sign="", estimator="", split_half=None, n=1, questions=1
    )


PLANS: dict[str, Callable[[Direction], Operator]] = {
    "add": lambda d: Add(d, 1.5),
    "ablate": lambda d: Ablate(d),
    "ablate to mean": lambda d: Ablate(d, to="base_mean"),
    "set": lambda d: SetProjection(d, 3.0, unit="abs"),
    "add to generation": lambda d: Add(d, 1.5, where=Where(prompt=False)),
    "add to prompt": lambda d: Add(d, 1.5, where=Where(generation=False)),
}


def greedy_without_cache(checkpoint: Checkpoint, question: Conversation, operator: Operator, steps: int) -> str:
    """One row, no padding, the whole sequence anew at every step: the plainest thing that generation can mean."""
    ids = list(encode(checkpoint.tokenizer, question).ids)
    n_prompt = len(ids)
    with intervene(checkpoint, operator) as receipt, torch.no_grad():
        receipt.prompt_lengths = torch.tensor([n_prompt])
        for _ in range(steps):
            ids.append(int(checkpoint.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == checkpoint.tokenizer.eos_token_id:
                break
    kept = ids[n_prompt:-1] if ids[-1] == checkpoint.tokenizer.eos_token_id else ids[n_prompt:]
    return str(checkpoint.tokenizer.decode(kept, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("plan", PLANS)
def test_batched_cached_and_padded_equal_single_uncached(architecture: Checkpoints, plan: str) -> None:
    checkpoint = load_model(architecture.base)
    operator = PLANS[plan](direction(checkpoint))
    with intervene(checkpoint, operator):
        batched = generate(checkpoint, QUESTIONS, temperature=0, max_new_tokens=6, progress=False)
    for question, answer in zip(QUESTIONS, batched, strict=True):
        assert answer.response == greedy_without_cache(checkpoint, question, operator, 6)


def test_steering_changes_the_answers(architecture: Checkpoints) -> None:
    checkpoint = load_model(architecture.base)
    plain = generate(checkpoint, QUESTIONS, temperature=0, max_new_tokens=6, progress=False)
    with intervene(checkpoint, Add(direction(checkpoint), 5)):
        steered = generate(checkpoint, QUESTIONS, temperature=0, max_new_tokens=6, progress=False)
    assert all(a.response != b.response for a, b in zip(plain, steered, strict=True)), "every batch row moves, the last as the first"


@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_captured_after_is_before_plus_the_dose(architecture: Checkpoints, site: Any) -> None:
    checkpoint = load_model(architecture.base)
    d = direction(checkpoint, site=site)
    before = capture(checkpoint, QUESTIONS, site=site, layers=[0, 1], progress=False)
    with intervene(checkpoint, Add(d, 2.0)):
        after = capture(checkpoint, QUESTIONS, site=site, layers=[0, 1], progress=False)
    moved = after - before
    assert torch.equal(after.at(0), before.at(0)), "what lies below is untouched"
    expected = (2.0 * d.resid_norm * d.vector).expand(len(QUESTIONS), -1)
    torch.testing.assert_close(moved[:, 1], expected, rtol=1e-4, atol=1e-4)


def test_ablation_leaves_nothing_or_the_mean(architecture: Checkpoints) -> None:
    checkpoint = load_model(architecture.base)
    d = direction(checkpoint)
    for operator, left in ((Ablate(d), 0.0), (Ablate(d, to="base_mean"), d.base_projection)):
        with intervene(checkpoint, operator):
            acts = capture(checkpoint, QUESTIONS, layers=1, progress=False)
        projection = acts.at(1).double() @ d.vector
        scale = float(acts.at(1).norm(dim=-1).max())
        assert float((projection - left).abs().max()) <= 1e-6 * scale


@given(st.integers(0, 2**20), st.floats(-50, 50), st.sampled_from(["add", "set"]))
def test_edit_laws(seed: int, amount: float, kind: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 4, 16, generator=generator)
    vector = random_directions(1, 16, seed)[0]
    mask = torch.rand(3, 4, generator=generator) > 0.3
    edit = Edit(0, "resid_post", vector, kind, amount, 1.0, Where(), "")
    edited, before, after = edit.apply(hidden, mask)
    assert torch.equal(edited[~mask], hidden[~mask]), "what is not named is bit-equal"
    across = edited.double() - hidden.double()
    along = (across @ vector)[..., None] * vector
    torch.testing.assert_close(across, along, rtol=0, atol=1e-4), "only the named direction moves"
    if kind == "set":
        again, _, _ = edit.apply(edited, mask)
        torch.testing.assert_close(again, edited, rtol=0, atol=1e-4)
    torch.testing.assert_close((after - before)[mask].double(), (across @ vector)[mask], rtol=1e-3, atol=1e-3)


def test_a_dose_of_nothing_is_bit_identical(architecture: Checkpoints) -> None:
    checkpoint = load_model(architecture.base)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        plain = checkpoint.hf(ids).logits
        with intervene(checkpoint, Add(direction(checkpoint), 0.0)):
            steered = checkpoint.hf(ids).logits
    assert torch.equal(plain, steered)


def test_units_agree(llama: Checkpoints) -> None:
    d = direction(load_model(llama.base))
    assert d.dose(1, "resid") == d.dose(2.5, "raw") == d.dose(5, "abs") == 5.0


def test_operators_at_one_layer_act_in_order(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    d = direction(checkpoint)
    for operators, left in (((Add(d, 1), Ablate(d)), 0.0), ((Ablate(d), Add(d, 1)), 5.0)):
        with intervene(checkpoint, *operators):
            acts = capture(checkpoint, QUESTIONS, layers=1, progress=False)
        torch.testing.assert_close(acts.at(1).double() @ d.vector, torch.full((5,), left, dtype=torch.float64), rtol=0, atol=1e-4)


# ---- the receipt


def test_receipt_counts_what_happened(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    prompt_tokens = sum(len(encode(checkpoint.tokenizer, q).ids) for q in QUESTIONS)
    with intervene(checkpoint, Add(direction(checkpoint), 1.0)) as receipt:
        answers = generate(checkpoint, QUESTIONS, temperature=0, max_new_tokens=6, progress=False)
    (line,) = receipt.as_dict()
    assert line["rows"] == len(QUESTIONS)
    assert line["positions_in_prompt"] == prompt_tokens, "padding is not counted"
    assert all(a.stop_reason == "length" for a in answers), "no row stopped early, so every step counts"
    assert line["positions_in_generation"] == 5 * len(QUESTIONS), "the last new token is never fed back"
    assert line["projection_after"] == pytest.approx(line["projection_before"] + 5.0, abs=1e-3)
    assert line["mean_relative_change"] > 0
    assert "Add(1 resid)" in str(receipt)


def test_silence_is_refused(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    with (
        pytest.raises(InterventionDidNotFire, match="never ran: no forward pass reached"),
        intervene(checkpoint, Add(direction(checkpoint), 1)),
    ):
        pass
    only_generation = Add(direction(checkpoint), 1, where=Where(prompt=False))
    with pytest.raises(InterventionDidNotFire, match="steered no position"), intervene(checkpoint, only_generation):
        generate(checkpoint, QUESTIONS, max_new_tokens=1, progress=False)


def test_steering_another_model_than_the_one_that_runs_is_refused(llama: Checkpoints) -> None:
    one, two = load_model(llama.base), load_model(llama.base)
    with pytest.raises(InterventionDidNotFire), intervene(one, Add(direction(one), 1)):
        generate(two, QUESTIONS, max_new_tokens=2, progress=False)


def test_steering_the_base_does_not_steer_the_tuned_that_shares_its_weights(llama: Checkpoints) -> None:
    pair = load_pair(llama.base, llama.adapter)
    with (
        pytest.raises(MismatchError, match="shares its weights, so it would be steered too"),
        intervene(pair.base, Add(direction(pair.base), 1)),
    ):
        generate(pair.tuned, QUESTIONS, max_new_tokens=2, progress=False)


def test_naming_generated_tokens_needs_to_know_where_prompts_end(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    plan = Add(direction(checkpoint), 1, where=Where(prompt=False))
    with pytest.raises(EmprobeError, match="nobody said where each prompt ends"), intervene(checkpoint, plan):
        checkpoint.hf(torch.arange(6)[None])


# ---- no trace


@pytest.mark.parametrize("accident", [None, RuntimeError, KeyboardInterrupt])
def test_no_trace_is_left(architecture: Checkpoints, accident: type[BaseException] | None) -> None:
    pair = load_pair(architecture.base, architecture.adapter)
    checkpoint = pair.base
    modules = list(checkpoint.model.modules())
    ids = torch.arange(6)[None]

    def state() -> tuple[torch.Tensor, list[int]]:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
        with checkpoint.active() as model, torch.no_grad():
            return model(ids).logits, hooks

    logits, hooks = state()
    try:
        with intervene(checkpoint, Add(direction(checkpoint), 3), Ablate(direction(checkpoint, layer=2))):
            checkpoint.hf(ids)
            if accident:
                raise accident
    except (RuntimeError, KeyboardInterrupt):
        pass
    after, hooks_after = state()
    assert torch.equal(logits, after)
    assert hooks == hooks_after
    assert checkpoint.interventions == []
    assert checkpoint.switch is not None
    assert checkpoint.switch.on


def test_a_bad_layer_leaves_no_hook_of_the_good_one(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    with pytest.raises(EmprobeError, match="asked for layer 9, but the model has layers 0 to 2"):  # noqa: SIM117
        with intervene(checkpoint, Add(direction(checkpoint), 1), Add(direction(checkpoint, layer=9), 1)):
            pass
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in checkpoint.hf.modules())


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: Add(d, 1, unit="norms"), "Unit 'norms' does not exist"),
        (lambda d: Ablate([]), "no direction"),
        (lambda d: Ablate([d, d]), "two directions at one layer"),
        (lambda d: Ablate(d, to="mean"), "to='mean'"),
        (lambda d: Ablate(d, to="base_mean", layers=[0, 1]), "takes one direction and to='zero'"),
        (lambda d: Where(prompt=False, generation=False), "names no tokens"),
        (lambda d: replace(d, vector=d.vector * 2), "one finite unit vector"),
        (lambda d: replace(d, vector=d.vector * float("nan")), "one finite unit vector"),
        (lambda d: Add(replace(d, vector=random_directions(1, 7, 0)[0]), 1), "d_model 7, but .* has d_model 32"),
        (lambda d: Add(replace(d, site="mlp_out"), 1), "'mlp_out' is not supported yet"),
    ],
)
def test_what_makes_no_sense_is_refused(llama: Checkpoints, make: Callable[[Direction], Any], message: str) -> None:
    checkpoint = load_model(llama.base)
    with pytest.raises(EmprobeError, match=message):  # noqa: SIM117
        with intervene(checkpoint, make(direction(checkpoint))):
            pass


def test_no_operator_is_refused(llama: Checkpoints) -> None:
    with pytest.raises(EmprobeError, match="no operator"), intervene(load_model(llama.base)):
        pass
