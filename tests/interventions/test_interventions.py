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
from emprobe.interventions import Ablate, Add, Cap, MeanAblate, Operator, Plan, Rotate, SetProjection, When, Where, intervene
from emprobe.interventions.kernels import Single, State
from emprobe.interventions.tokens import Tokens
from emprobe.models import Checkpoint, encode, load_model, load_pair
from emprobe.overlap import Subspace, random_directions
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
    "ablate to mean": lambda d: MeanAblate(d),
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
    for operator, left in ((Ablate(d), 0.0), (MeanAblate(d), d.base_projection)):
        with intervene(checkpoint, operator):
            acts = capture(checkpoint, QUESTIONS, layers=1, progress=False)
        projection = acts.at(1).double() @ d.vector
        scale = float(acts.at(1).norm(dim=-1).max())
        assert float((projection - left).abs().max()) <= 1e-6 * scale


LAWS: dict[str, Callable[[Direction, Direction], Operator]] = {
    "add": lambda d, e: Add(d, 3.0, unit="abs"),
    "ablate": lambda d, e: Ablate(d),
    "ablate half": lambda d, e: Ablate(d, strength=0.5),
    "ablate a plane": lambda d, e: Ablate(Subspace.from_directions([d, e])),
    "mean": lambda d, e: MeanAblate(d, mean=1.5),
    "mean in a plane": lambda d, e: MeanAblate(Subspace.from_directions([d, e]), mean=torch.ones(D, dtype=torch.float64)),
    "set": lambda d, e: SetProjection(d, -2.0, unit="abs"),
    "set in a plane": lambda d, e: SetProjection(Subspace.from_directions([d, e]), [1.0, -1.0]),
    "cap": lambda d, e: Cap(d, min=-0.2, max=0.3, unit="abs"),
    "cap in a plane": lambda d, e: Cap(Subspace.from_directions([d, e]), max=0.4),
    "turn": lambda d, e: Rotate([d, e], by=30.0),
    "turn to": lambda d, e: Rotate([d, e], to=200.0),
}
D = 16


def unit(seed: int) -> Direction:
    return Direction.from_vector(random_directions(1, D, seed)[0], layer=0, resid_norm=5.0)


def carried_out(operator: Operator, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    (edit,) = operator.edits(1)
    return Single(edit).write(hidden, State(Tokens((len(mask), mask.shape[1]), mask.device, mask=mask)))


@pytest.mark.parametrize("law", LAWS)
@given(seed=st.integers(0, 2**20))
def test_laws_of_operators(law: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 4, D, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=generator) > 0.3
    one, two = unit(seed), unit(seed + 1)
    operator = LAWS[law](one, two)
    edited = carried_out(operator, hidden, mask)
    (edit,) = operator.edits(1)
    assert torch.equal(edited[~mask], hidden[~mask]), "what is not named is bit-equal"
    across = edited - hidden
    torch.testing.assert_close(across, across @ edit.basis.T @ edit.basis, rtol=0, atol=1e-12), "nothing moves outside the span"
    before, after = hidden[mask] @ edit.basis.T, edited[mask] @ edit.basis.T
    again = carried_out(operator, edited, mask)
    if law in ("ablate", "ablate a plane", "mean", "mean in a plane", "set", "set in a plane", "cap", "cap in a plane", "turn to"):
        torch.testing.assert_close(again, edited, rtol=0, atol=1e-12), "what was brought to a place stays there"
    match law:
        case "add":
            torch.testing.assert_close(after, before + 3.0)
        case "ablate half":
            torch.testing.assert_close(after, before / 2)
        case "ablate" | "ablate a plane":
            assert float(after.abs().max()) < 1e-12 if mask.any() else True
        case "mean":
            torch.testing.assert_close(after, torch.full_like(after, 1.5))
        case "mean in a plane":
            torch.testing.assert_close(after, (edit.basis.sum(dim=1)).expand_as(after))
        case "set":
            torch.testing.assert_close(after, torch.full_like(after, -2.0))
        case "cap":
            torch.testing.assert_close(after, before.clamp(-0.2, 0.3))
        case "cap in a plane":
            assert bool((after.norm(dim=-1) <= 0.4 + 1e-12).all())
        case "turn" | "turn to":
            torch.testing.assert_close(edited.norm(dim=-1), hidden.norm(dim=-1)), "a rotation keeps norms"


@given(seed=st.integers(0, 2**20), degrees=st.floats(-360, 360))
def test_rotation_turns_by_and_to_the_angle_asked(seed: int, degrees: float) -> None:
    hidden = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    one, two = unit(seed), unit(seed + 1)
    (edit,) = Rotate([one, two], by=degrees).edits(1)
    angle = torch.atan2(*(hidden @ edit.basis.T).flip(-1).unbind(-1))
    turned, brought = (
        carried_out(Rotate([one, two], **how), hidden, everywhere) @ edit.basis.T for how in ({"by": degrees}, {"to": degrees})
    )
    for found, wanted in ((turned, angle + torch.tensor(degrees).deg2rad()), (brought, torch.tensor(degrees).deg2rad().double())):
        off = torch.atan2(found[..., 1], found[..., 0]) - wanted
        assert float(torch.cos(off).min()) > 1 - 1e-9
    torch.testing.assert_close(edit.basis[0], one.vector, msg="the first direction is where angles start")


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
    head, shown = str(receipt).splitlines()
    assert " ".join(head.split()) == "operator place forwards rows positions in prompt generated |dh|/|h| x·v before after"
    assert shown.startswith("Add(1 resid)  resid_post[")
    assert shown.split()[3:8] == [str(line[k]) for k in ("forwards", "rows", "positions", "positions_in_prompt", "positions_in_generation")]
    assert repr(receipt) == str(receipt), "a notebook shows the table too"


def test_silence_is_refused(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    with (
        pytest.raises(InterventionDidNotFire, match="never ran: no forward pass reached"),
        intervene(checkpoint, Add(direction(checkpoint), 1)),
    ):
        pass
    only_generation = Add(direction(checkpoint), 1, where=Where(prompt=False))
    with (
        pytest.raises(InterventionDidNotFire, match=r"steered no position with the generation\..*read again at the next step"),
        intervene(checkpoint, only_generation),
    ):
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
        (lambda d: Ablate([d, d], layers=[0, 1]), "takes one direction or subspace"),
        (lambda d: Ablate(d, layers="every"), "layers='every' was asked for. Use 'all'"),
        (lambda d: Ablate(d, site="writes", layers=[1]), "every write of the model, so it takes no layers"),
        (lambda d: Ablate(d, strength=float("nan")), "strength of nan"),
        (lambda d: Add(d, 1, site="writes"), "Only Ablate takes 'writes'"),
        (lambda d: Add(Subspace.from_directions([d]), 1), "takes a Direction, but was given a Subspace"),
        (lambda d: MeanAblate(d, layers=[0, 1]), "takes neither layers nor site"),
        (lambda d: MeanAblate(replace(d, base_projection=None)), "mean projection on the direction .* which is unknown"),
        (lambda d: MeanAblate(Subspace.from_directions([d])), "needs to know the mean"),
        (lambda d: MeanAblate(d, mean=torch.zeros(5)), "mean of d_model 5 for a span in d_model 32"),
        (lambda d: SetProjection(Subspace.from_directions([d]), [1.0, 2.0]), "2 values for 1 dimensions"),
        (lambda d: SetProjection(Subspace.from_directions([d]), 1.0, unit="raw"), "a subspace has no norm of its own"),
        (lambda d: Cap(d), "no bound"),
        (lambda d: Cap(d, min=2, max=1), "leaves no room"),
        (lambda d: Cap(Subspace.from_directions([d]), min=1), "give max="),
        (lambda d: Rotate([d, d], by=10), "span no plane"),
        (lambda d: Rotate(d, by=10), "given 1 dimensions"),
        (lambda d: Rotate([d, replace(d, vector=random_directions(1, 32, 9)[0])]), "exactly one of by= and to="),
        (lambda d: Where(prompt=False, prompt_positions=[-1]), "contradicts itself"),
        (lambda d: Where(prompt_positions=[]), "names no token of the prompt"),
        (lambda d: Where(generation_window=(-2, None)), "not known while it is being generated"),
        (lambda d: Where(prompt_window=(4, 2)), "ends before it begins"),
        (lambda d: When(d), "no bound"),
        (lambda d: When(d, above=2, below=1), "never holds"),
        (lambda d: Add(d, 1, when=When(replace(d, layer=2), above=0)), "which the model comes to later"),
        (lambda d: Add(replace(d, resid_norm=None), 1), "a unit without a norm"),
        (lambda d: replace(d, vector=d.vector * 0), "one finite unit vector"),
        (lambda d: Direction.from_vector(torch.zeros(32), layer=0), "points somewhere, but got shape .32,. with norm 0"),
        (lambda d: Plan((Add(d, 1), Ablate(d)), conflicts="error"), "write at one place, and conflicts='error'"),
        (lambda d: Plan((Add(d, 1),), conflicts="first"), "conflicts='first' was asked for"),
        (lambda d: d, "given a Direction. Give operators"),
        (lambda d: Where(prompt=False, generation=False), "names no tokens"),
        (lambda d: replace(d, vector=d.vector * 2), "one finite unit vector"),
        (lambda d: replace(d, vector=d.vector * float("nan")), "one finite unit vector"),
        (lambda d: Add(replace(d, vector=random_directions(1, 7, 0)[0]), 1), "d_model 7, but .* has d_model 32"),
        (lambda d: Add(replace(d, site="head_out"), 1), "'head_out' is no site"),
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
