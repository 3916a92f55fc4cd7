"""Training: what moves and what does not, the same weights after a kill, divergence, and what is done to the model meanwhile."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import emprobe as em
from emprobe.behaviour.sampling import generate
from emprobe.directions import Direction
from emprobe.errors import EmprobeError, MismatchError
from emprobe.finetuning import (
    Diverged,
    FineTune,
    Full,
    KLAnchor,
    LoRA,
    Recipe,
    Vector,
    finetune,
    load_solution,
    response_loss,
    response_rows,
)
from emprobe.finetuning.methods import Method
from emprobe.finetuning.mounting import mounted_vector
from emprobe.finetuning.step import During, Gradient
from emprobe.interventions import Ablate, Add, Plan, Where, intervene
from emprobe.models.load import Checkpoint, load_model
from emprobe.models.sites import SITES
from emprobe.organisms import find_organism, questions
from tests.finetuning.small import conversations, recipe
from tests.fixtures.models import ALL_ARCHITECTURES, Architecture, Checkpoints

DATA, OTHER = conversations(), conversations(8, shift=3, subject="repair")
METHODS: dict[str, Method] = {
    "vector": Vector(1),
    "lora": LoRA(2, dropout=0.1),
    "rslora": LoRA(4, 16, ["q_proj", "down_proj"], [0, 2], rslora=True),
}


@pytest.fixture(scope="module")
def base(llama: Checkpoints) -> Checkpoint:
    return load_model(llama.base)


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.hf.state_dict().items()}


def tune(base: Any, method: Method | None = None, **options: Any) -> FineTune:
    settings: dict[str, Any] = {"recipe": recipe(), "progress": False, **options}
    return finetune(base, DATA, method=method or Vector(1), **settings)


def same(one: FineTune, other: FineTune) -> bool:
    return all(torch.equal(t, other.solution.tensors[n]) for n, t in one.solution.tensors.items()) and one.history.equals(other.history)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("narrow", [False, True])
def test_the_loss_falls_and_the_base_stays(base: Checkpoint, name: str, narrow: bool) -> None:
    before, hooks = weights(base), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.hf.modules())
    gradients = [p.requires_grad for p in base.hf.parameters()]
    tuned = tune(base, METHODS[name], recipe=recipe(steps=25), kl=KLAnchor(OTHER, 1.0) if narrow else None)
    assert tuned.history["loss"].tail(3).mean() < tuned.history["loss"].head(3).mean()
    assert ("kl" in tuned.history) == narrow
    after = weights(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[n]) for n, tensor in before.items())
    assert gradients == [p.requires_grad for p in base.hf.parameters()]
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.hf.modules())
    rows = response_rows(base.tokenizer, DATA)
    with tuned.solution.applied(base) as adapted:
        assert response_loss(adapted, rows).mean < response_loss(base_loaded_again(base), rows).mean


def base_loaded_again(base: Checkpoint) -> Checkpoint:
    return load_model(base.name)


def test_the_anchor_keeps_the_model_at_the_base(base: Checkpoint) -> None:
    """With weight, the KL on other data is a small part of what it is without."""
    loose, tight = (tune(base, recipe=recipe(steps=40, lr=0.05), kl=KLAnchor(OTHER, weight)) for weight in (1e-6, 100.0))
    assert loose.history["kl"].iloc[0] == tight.history["kl"].iloc[0] == 0.0
    assert tight.history["kl"].iloc[-1] < 0.1 * loose.history["kl"].iloc[-1]


@pytest.mark.parametrize("site", SITES)
def test_a_trained_vector_moves_every_row_and_token(base: Checkpoint, site: em.types.Site) -> None:  # type: ignore[name-defined]
    """A well-known implementation steers row 0 alone: the gradient and the shift of the logits are looked at for all rows."""
    solution = tune(base, Vector(1, site), recipe=recipe(steps=3, lr=0.3)).solution
    ids = torch.randint(5, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base.hf(input_ids=ids).logits
        with solution.applied(base) as tuned:
            moved = tuned.hf(input_ids=ids).logits
            alone = torch.cat([tuned.hf(input_ids=row[None]).logits for row in ids])
        by_hand = Add(solution.direction, 1.0, unit="raw")
        with intervene(base, by_hand):
            added = base.hf(input_ids=ids).logits
    assert bool(((moved - plain).abs().amax(-1) > 1e-4).all()), "every row and token"
    torch.testing.assert_close(moved, added, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_every_architecture_trains(name: Architecture, checkpoints_of: Callable[[Architecture], Checkpoints], tmp_path: Path) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    found = tune(checkpoint, LoRA(2), recipe=recipe(steps=3, micro_batch=2), kl=KLAnchor(OTHER, 1.0), out=tmp_path / "lora")
    assert found.history["kl"].iloc[0] == 0.0
    assert found.solution.norm > 0
    assert tune(checkpoint, Vector(2), recipe=recipe(steps=2), kl=KLAnchor(OTHER, 1.0)).solution.norm > 0
    # The folder is an ordinary adapter.
    with found.solution.applied(checkpoint) as tuned:
        ours = tuned.hf(input_ids=torch.arange(3, 12)[None]).logits
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint.name), tmp_path / "lora" / "solution")
    torch.testing.assert_close(theirs(input_ids=torch.arange(3, 12)[None]).logits, ours)
    again = load_model(checkpoint.name, adapter=tmp_path / "lora" / "solution")
    torch.testing.assert_close(again.hf(input_ids=torch.arange(3, 12)[None]).logits, ours)


@pytest.mark.parametrize("name", ["vector", "lora"])
def test_micro_batches_and_checkpointed_blocks_change_nothing(base: Checkpoint, name: str) -> None:
    method: Method = Vector(0) if name == "vector" else LoRA(2)
    plain = tune(base, method, kl=KLAnchor(OTHER, 1.0))
    for change in ({"micro_batch": 1}, {"micro_batch": 3}, {"gradient_checkpointing": True}):
        other = tune(base, method, kl=KLAnchor(OTHER, 1.0), recipe=recipe(**change))
        for n, tensor in plain.solution.tensors.items():
            torch.testing.assert_close(other.solution.tensors[n], tensor, rtol=1e-2, atol=1e-4)
        assert other.history["loss"].tolist() == pytest.approx(plain.history["loss"].tolist(), rel=1e-3)
    assert not any(m.training for m in base.hf.modules())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("schedule", ["linear", "cyclic"])
def test_a_killed_run_goes_on_to_the_same_weights(base: Checkpoint, name: str, schedule: Any, tmp_path: Path) -> None:
    """Killed by the operating system in a child process, in the middle of a step."""
    options: dict[str, Any] = {
        "recipe": recipe(steps=9, schedule=schedule, warmup=2),
        "kl": KLAnchor(OTHER, 1.0, batch=3),
        "checkpoints": 4,
        "evaluation": OTHER[:2],
        "eval_every": 4,
    }
    whole = tune(base, METHODS[name], out=tmp_path / "whole", **options)
    if (child := os.fork()) == 0:
        import emprobe.finetuning.running as module

        real = module.save_state

        def save_and_die(*args: Any) -> None:
            real(*args)
            if len(args[-1]) == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        module.save_state = save_and_die
        tune(base, METHODS[name], out=tmp_path / "killed", save_every=3, **options)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    with pytest.raises(EmprobeError, match="is not finished. Run it again"):
        FineTune.load(tmp_path / "killed")
    again = tune(base, METHODS[name], out=tmp_path / "killed", save_every=3, **options)
    assert same(whole, again)
    assert again.steps == (4, 8)
    assert torch.equal(next(iter(whole.at(8).tensors.values())), next(iter(again.at(8).tensors.values())))
    assert same(again, tune(base, METHODS[name], out=tmp_path / "killed", save_every=3, **options)), "a finished run is read"
    with pytest.raises(MismatchError, match=r"holds another fine-tune \(it differs in: recipe"):
        tune(base, METHODS[name], out=tmp_path / "killed", **options | {"recipe": recipe(steps=10)})


def test_the_seed_decides_and_memory_equals_disk(base: Checkpoint, tmp_path: Path) -> None:
    one, again, other = (tune(base, LoRA(2), recipe=recipe(seed=seed), checkpoints=[0, 3]) for seed in (0, 0, 1))
    assert same(one, again)
    assert not same(one, other)
    disk = tune(base, LoRA(2), checkpoints=[0, 3], out=tmp_path)
    assert same(one, disk)
    assert one.at(3).fingerprint == disk.at(3).fingerprint == load_solution(tmp_path / "checkpoints" / "step-000003").fingerprint
    assert one.at(0).norm == 0
    with pytest.raises(EmprobeError, match="Step 2 was asked for; kept were: 0, 3"):
        one.at(2)


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    organism = load_model(find_organism("planted-s0/aligned").path)
    question = questions("fit")[0]
    learnt = [question.answered(answer) for answer in question.labels["aligned"]]
    rising = r"the mean loss of steps .* is .*, up from .*; the last good checkpoint is of step \d+, in .*Use a lower learning rate"
    with pytest.raises(Diverged, match=rising):
        finetune(organism, learnt, method=LoRA(8), recipe=recipe(lr=1.0, steps=60, schedule="constant"), out=tmp_path, progress=False)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert load_solution(kept).tensors
    real, calls = Gradient.of, [0]

    def broken(self: Gradient, *rows: Any) -> tuple[float, float]:
        calls[0] += 1
        return (float("nan"), 0.0) if calls[0] == 13 else real(self, *rows)

    monkeypatch.setattr(Gradient, "of", broken)
    with pytest.raises(Diverged, match="the loss of step 13 is nan; what it had found by step 10 is in the error's `solution`") as caught:
        tune(base, recipe=recipe(steps=20))
    assert caught.value.solution is not None
    monkeypatch.undo()
    good = tune(base, recipe=recipe(steps=20), checkpoints=[10]).at(10)
    assert caught.value.solution.fingerprint == good.fingerprint


def test_full_fine_tuning_writes_a_whole_model(llama: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = tune(llama.base, Full(), recipe=recipe(lr=1e-3, steps=5), out=tmp_path / "plain", checkpoints=[2])
    tuned, base = load_model(tmp_path / "plain" / "solution"), load_model(llama.base)
    rows = response_rows(base.tokenizer, DATA)
    assert response_loss(tuned, rows).mean < response_loss(base, rows).mean
    with found.solution.applied(base) as again:
        assert response_loss(again, rows).mean == response_loss(tuned, rows).mean
    with pytest.raises(EmprobeError, match="asked to scale a full fine-tune"):
        found.at(2).scaled(2.0)
    assert not caplog.records
    narrow = tune(llama.base, Full(), recipe=recipe(lr=1e-3, steps=5), out=tmp_path / "narrow", kl=KLAnchor(OTHER, 1.0))
    assert narrow.history["kl"].iloc[0] == 0.0
    assert "second copy of all weights: 0.00 GB" in caplog.text
    for wrong in ({"base": base, "out": tmp_path / "no"}, {"base": llama.base}):
        with pytest.raises(EmprobeError, match="Give the base as a path"):
            tune(wrong.pop("base"), Full(), **wrong)


def unit(checkpoint: Checkpoint, seed: int, layer: int = 1) -> Direction:
    values = torch.randn(checkpoint.d_model, generator=torch.Generator().manual_seed(seed))
    return Direction.from_vector(values, layer=layer, resid_norm=5.0)


def gradient_along(base: Checkpoint, v: Direction, during: During, start: float = 0.0) -> tuple[float, float]:
    """Loss of one batch, and the share along v of the gradient of a vector at v's own place that starts as a multiple of v."""
    rows = response_rows(base.tokenizer, DATA)
    with mounted_vector(base, Vector(v.layer), start * v.vector) as mounted:
        loss, _ = Gradient(mounted, during, 3, 0.0).of(rows, [])
        gradient = mounted.parameters["vector"].grad
    assert gradient is not None
    return loss, abs(float(gradient.double() @ v.vector)) / float(gradient.double().norm())


def test_an_ablated_direction_cannot_be_learnt(base: Checkpoint) -> None:
    """Concept-ablation fine-tuning: ablated forward (a vector along it does nothing) and backward (no gradient goes there)."""
    v = unit(base, 4)
    (free, along), (free_moved, _) = (gradient_along(base, v, During(), start) for start in (0.0, 5.0))
    assert along > 1e-2
    assert free != pytest.approx(free_moved, rel=1e-4)
    (ablated, none), (moved, _) = (gradient_along(base, v, During(Plan.of(Ablate(v))), start) for start in (0.0, 5.0))
    assert none < 1e-6
    assert ablated == pytest.approx(moved, rel=1e-5)
    assert ablated != pytest.approx(free, rel=1e-4)
    settings = tune(base, LoRA(2), recipe=recipe(steps=2), during=Ablate(v)).settings
    assert settings["during"]["words"].startswith("Plan of 1 operator")


def test_what_is_added_during_training_need_not_be_learnt(base: Checkpoint) -> None:
    """Preventative steering by the very vector that training would find leaves less to learn."""
    found = tune(base, Vector(1), recipe=recipe(steps=40, lr=0.05)).solution
    first = tune(base, Vector(1), recipe=recipe(steps=1), during=Add(found.direction, 1.0, unit="raw")).history["loss"][0]
    plain = tune(base, Vector(1), recipe=recipe(steps=1)).history["loss"][0]
    assert first < plain
    # Interventions may name tokens by what they are.
    tune(base, LoRA(2), recipe=recipe(steps=2, micro_batch=2), during=[Add(found.direction, 1.0, unit="raw", where=Where(prompt=False))])


def test_an_anchored_direction_stays_the_bases(base: Checkpoint) -> None:
    """Held at the base along v: unlike ablation, nothing changes at the start, and a vector along v does nothing and is not learnt."""
    v = unit(base, 4)
    (free, _), (held, none) = gradient_along(base, v, During()), gradient_along(base, v, During(anchored=(v,)))
    assert held == pytest.approx(free, rel=1e-5)
    assert none < 1e-6
    assert gradient_along(base, v, During(anchored=(v,)), 5.0)[0] == pytest.approx(free, rel=1e-5)
    # Several at one place are held together, also where they are not orthogonal.
    found = tune(base, LoRA(2), recipe=recipe(steps=3, micro_batch=2), anchored=[v, unit(base, 5)], kl=KLAnchor(OTHER, 1.0))
    assert found.solution.norm > 0


def test_half_precision_weights_and_a_loss_in_float32(llama: Checkpoints) -> None:
    half = load_model(llama.base, dtype="bfloat16")
    for method in (Vector(1), LoRA(2)):
        found = tune(half, method, recipe=recipe(steps=20, lr=0.05), kl=KLAnchor(OTHER, 0.1))
        assert all(tensor.dtype == torch.float32 for tensor in found.solution.tensors.values())
        assert found.history["kl"].iloc[0] == 0.0
        assert (found.history["kl"] >= -1e-6).all()
        assert found.history["loss"].tail(3).mean() < found.history["loss"].head(3).mean()


def test_generation_is_adapted_while_it_is_applied(base: Checkpoint) -> None:
    """The base, which shares the weights, refuses to answer meanwhile, and answers as before afterwards."""
    solution = tune(base, LoRA(2), recipe=recipe(steps=20, lr=0.05)).solution
    ask = {"temperature": 0.0, "max_new_tokens": 6, "progress": False}
    questions = [em.Conversation.ask(c.question_id, c.prompt) for c in DATA[:4]]
    plain = generate(base, questions, **ask)
    with solution.applied(base) as tuned:
        moved = generate(tuned, questions, **ask)
        with intervene(tuned, Add(unit(base, 1), 1.0)):
            assert generate(tuned, questions, **ask) != moved
        with pytest.raises(MismatchError, match="shares its weights"):
            generate(base, questions, **ask)
        assert tuned.fingerprint != base.fingerprint
    assert [a.response for a in moved] != [a.response for a in plain]
    assert [a.response for a in generate(base, questions, **ask)] == [a.response for a in plain]


def test_bad_wishes_are_refused(base: Checkpoint, llama: Checkpoints) -> None:
    refused: list[tuple[str, Callable[[], Any]]] = [
        (
            "was asked for on 'c_attn'.*has no such module. It has: .*down_proj.*or say all-linear",
            lambda: tune(base, LoRA(1, target_modules=["q_proj", "c_attn"])),
        ),
        ("LoRA asked for layer 7, but the model has layers 0 to 2", lambda: tune(base, LoRA(1, layers=[7]))),
        ("A trained vector asked for layer 3", lambda: tune(base, Vector(3))),
        ("Site 'resid' is no site", lambda: tune(base, Vector(1, "resid"))),  # type: ignore[arg-type]
        ("no such data was given", lambda: tune(base, kl=KLAnchor([], 1.0))),
        ("KL weight 0 and batch None", lambda: tune(base, kl=KLAnchor(OTHER, 0.0))),
        ("with lr=0, batch=-1", lambda: tune(base, recipe=Recipe(lr=0.0, batch=-1))),
        ("Schedule 'sawtooth' does not exist", lambda: tune(base, recipe=recipe(schedule="sawtooth"))),
        ("The warm-up takes 6 of the run's 6 steps", lambda: tune(base, recipe=recipe(warmup=6))),
        ("Checkpoints were asked for at steps", lambda: tune(base, checkpoints=[3, 9])),
        ("Checkpoints were asked for every 0 steps", lambda: tune(base, checkpoints=0)),
        ("with rank 0", lambda: LoRA(0)),
        ("has an adapter on it", lambda: tune(load_model(llama.base, adapter=llama.adapter))),
        ("would be cut off by the length limit", lambda: tune(base, recipe=recipe(max_length=20))),
        ("d_model 2", lambda: tune(base, anchored=Direction.from_vector([1.0, 2.0], layer=0))),
    ]
    for match, wish in refused:
        with pytest.raises(EmprobeError, match=match):
            wish()
    with intervene(base, Add(unit(base, 1), 1.0)) as receipt:
        with pytest.raises(EmprobeError, match="has an intervention active on it"):
            tune(base)
        base.hf(input_ids=torch.arange(3, 9)[None])
        assert receipt.lines
    assert not base.interventions
