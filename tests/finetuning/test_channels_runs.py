"""Runs of the three channels: the same after a kill, nobody else's weights moved, budgets met, and students refused what cannot be."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from emprobe.directions import Direction
from emprobe.errors import EmprobeError, MismatchError
from emprobe.finetuning import FineTune, Full, LoRA, Vector, distill, finetune, response_rows, teacher_divergences, teaching
from emprobe.finetuning.channels import Channel
from emprobe.finetuning.methods import Method
from emprobe.finetuning.mounting import lora_config, mounted_lora
from emprobe.finetuning.rollouts import Rollouts, at_rest, prompt_rows
from emprobe.interventions import Add, intervene
from emprobe.models.decoding import stop_ids
from emprobe.models.load import Checkpoint, load_model
from emprobe.organisms import find_organism
from emprobe.types import Conversation
from tests.finetuning.small import conversations, recipe
from tests.fixtures.models import Checkpoints

CHANNELS: tuple[Channel, ...] = get_args(Channel)
DATA, OTHER = conversations(), conversations(6, shift=3, subject="repair")


@pytest.fixture(scope="module")
def base(llama: Checkpoints) -> Checkpoint:
    return load_model(llama.base)


@pytest.fixture(scope="module")
def teacher(llama: Checkpoints) -> Checkpoint:
    return load_model(llama.base, adapter=llama.adapter)


def taught(base: Any, teacher: Any, channel: Channel, method: Method | None = None, **options: Any) -> FineTune:
    settings: dict[str, Any] = {"recipe": recipe(), "max_new_tokens": 6, "evaluation": OTHER, "eval_every": 3, "progress": False}
    data = options.pop("data", DATA)
    return distill(base, teacher, data, channel=channel, method=method or LoRA(2, dropout=0.1), **(settings | options))


def same(one: FineTune, other: FineTune) -> bool:
    return all(torch.equal(t, other.solution.tensors[n]) for n, t in one.solution.tensors.items()) and one.history.equals(other.history)


def state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}


@pytest.mark.parametrize("channel", CHANNELS)
def test_books_are_kept_alike_and_nobody_else_moves(base: Checkpoint, teacher: Checkpoint, channel: Channel) -> None:
    before = state(base), state(teacher)
    made = taught(base, teacher, channel, recipe=recipe(steps=15), eval_every=5)
    after = state(base), state(teacher)
    assert all(one.keys() == two.keys() and all(t.equal(two[n]) for n, t in one.items()) for one, two in zip(before, after, strict=True))
    assert not base.interventions
    history = made.history
    books = {"step", "loss", "lr", "gradient_norm", "tokens", "sequences", "change_norm", "eval_loss", "eval_forward_kl", "eval_reverse_kl"}
    answers = {"stop_rate", "empty_rate", "length"}
    assert set(history.columns) == books | (answers if channel == "opd" else set())
    assert history["sequences"].tolist() == [4.0 * (k + 1) for k in range(15)]
    assert history["tokens"].is_monotonic_increasing
    assert history["change_norm"].iloc[-1] == pytest.approx(made.solution.norm)
    assert history["eval_loss"].dropna().index.tolist() == [4, 9, 14]
    rows = response_rows(base.tokenizer, OTHER)
    with made.solution.applied(base) as student:
        apart = teacher_divergences(student, teacher, rows)
    assert history["eval_forward_kl"].iloc[-1] == pytest.approx(apart.forward.mean, rel=1e-4)
    assert history["eval_reverse_kl"].iloc[-1] == pytest.approx(apart.reverse.mean, rel=1e-4)
    if channel != "sft":
        start = teacher_divergences(load_model(base.name), teacher, rows)
        assert apart.forward.mean < start.forward.mean
        assert apart.reverse.mean < start.reverse.mean


def test_sft_is_fine_tuning(base: Checkpoint, teacher: Checkpoint) -> None:
    plain = finetune(base, DATA, method=LoRA(2, dropout=0.1), recipe=recipe(), progress=False)
    ours = taught(base, teacher, "sft", evaluation=())
    assert ours.solution.fingerprint == plain.solution.fingerprint
    assert ours.history["loss"].tolist() == plain.history["loss"].tolist()


@pytest.mark.parametrize(("channel", "tokens"), [("sft", 450), ("optd", None), ("opd", 220)])
def test_a_killed_run_goes_on_to_the_same_weights(
    base: Checkpoint, teacher: Checkpoint, channel: Channel, tokens: int | None, tmp_path: Path
) -> None:
    """By updates and by tokens; what a teacher keeps in mind, and what a student answers, is the same again."""
    changes: dict[str, Any] = {"recipe": recipe(steps=8 if tokens is None else None), "tokens": tokens}
    whole = taught(base, teacher, channel, **changes)
    assert len(whole.history) > 6
    if (child := os.fork()) == 0:
        import emprobe.finetuning.running as module

        real = module.save_state

        def save_and_die(*args: Any) -> None:
            real(*args)
            if len(args[-1]) == 6:
                os.kill(os.getpid(), signal.SIGKILL)

        module.save_state = save_and_die
        taught(base, teacher, channel, out=tmp_path, save_every=3, **changes)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    again = taught(base, teacher, channel, out=tmp_path, save_every=3, **changes)
    assert same(whole, again)
    with pytest.raises(MismatchError, match=r"holds another fine-tune \(it differs in: channel"):
        taught(base, teacher, "optd" if channel != "optd" else "opd", out=tmp_path, save_every=3, temperature=2.0, **changes)


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_budget_of_tokens_is_met_and_no_update_more(base: Checkpoint, teacher: Checkpoint, channel: Channel) -> None:
    history = taught(base, teacher, channel, recipe=recipe(steps=None, warmup=2), tokens=120, evaluation=OTHER[:1]).history
    assert history["tokens"].iloc[-1] >= 120 > history["tokens"].iloc[-2]
    assert history["eval_loss"].notna().iloc[-1], "the end is measured wherever it falls"
    shares = [1 - seen / 120 for seen in history["tokens"].iloc[1:-1]]
    assert history["lr"].tolist() == pytest.approx([0.005, 0.01, *(0.01 * share for share in shares)])


def test_order_of_data_is_one_in_all_channels(base: Checkpoint, teacher: Checkpoint) -> None:
    one, two = (taught(base, teacher, channel).history for channel in ("sft", "optd"))  # type: ignore[arg-type]
    assert one["tokens"].tolist() == two["tokens"].tolist()


def test_micro_batches_and_checkpointed_blocks_change_nothing(base: Checkpoint, teacher: Checkpoint) -> None:
    for channel in CHANNELS:
        plain = taught(base, teacher, channel, Vector(1), recipe=recipe(steps=2))
        for change in ({"micro_batch": 1}, {"micro_batch": 3}, {"gradient_checkpointing": True}):
            other = taught(base, teacher, channel, Vector(1), recipe=recipe(steps=2, **change))
            assert other.history["tokens"].tolist() == plain.history["tokens"].tolist()
            assert other.history["loss"].tolist() == pytest.approx(plain.history["loss"].tolist(), rel=1e-4)
            torch.testing.assert_close(other.solution.tensors["vector"], plain.solution.tensors["vector"], rtol=1e-2, atol=1e-4)
    assert not any(module.training for module in base.hf.modules())


def test_the_tokenizers_padding_side_changes_nothing(base: Checkpoint, teacher: Checkpoint) -> None:
    before = base.tokenizer.padding_side
    for channel in CHANNELS:
        made = []
        for base.tokenizer.padding_side in ("left", "right"):
            made.append(taught(base, teacher, channel, recipe=recipe(steps=2)))
        assert same(*made)
    base.tokenizer.padding_side = before


def test_what_a_teacher_keeps_in_mind_is_what_it_says(base: Checkpoint, teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one pass over the data: its hidden states of them are computed once, or anew where memory is short."""
    kept = taught(base, teacher, "optd", Vector(1), recipe=recipe(steps=9))
    monkeypatch.setattr(teaching, "MOST_KEPT", 0)
    anew = taught(base, teacher, "optd", Vector(1), recipe=recipe(steps=9))
    assert anew.history["loss"].tolist() == pytest.approx(kept.history["loss"].tolist(), rel=1e-4)
    torch.testing.assert_close(anew.solution.tensors["vector"], kept.solution.tensors["vector"], rtol=1e-3, atol=1e-5)


def test_answers_depend_on_seed_update_and_place_alone(base: Checkpoint) -> None:
    """Not on their company, nor on dropout; cut at the end of turn, which counts, and of which an empty answer consists."""
    rows = prompt_rows(base, DATA, recipe(), 8)
    stops = stop_ids(base)
    with mounted_lora(base, lora_config(base, LoRA(2, dropout=0.5))) as mounted:
        mounted.parameters[next(n for n in mounted.parameters if "lora_B" in n)].data.normal_(generator=torch.Generator().manual_seed(0))
        mounted.train(True)
        many, _ = Rollouts(8, 1.0, stops, 0).of(mounted.tuned, rows, 3)
        few, _ = Rollouts(8, 1.0, stops, 0).of(mounted.tuned, rows[:2], 3)
        other, _ = Rollouts(8, 1.0, stops, 0).of(mounted.tuned, rows[:2], 4)
        assert any(module.training for module in mounted.tuned.hf.modules()), "dropout is on again"
    assert few == many[:2] != other
    plain, _ = Rollouts(8, 1.0, [], 0).of(base, rows, 3)
    for stop in plain[0].ids[-3:]:
        cut, books = Rollouts(8, 1.0, [stop], 0).of(base, rows, 3)
        assert all(stop not in row.ids[row.n_prompt : -1] for row in cut)
        assert all(row.ids == whole.ids[: len(row.ids)] for row, whole in zip(cut, plain, strict=True))
        assert books["stop_rate"] == sum(row.ids[-1] == stop for row in cut) / len(rows) > 0
    ended, books = Rollouts(8, 1.0, list(range(base.hf.config.vocab_size)), 0).of(base, rows, 3)
    assert books == {"stop_rate": 1.0, "empty_rate": 1.0, "length": 1.0}
    assert all(row.predicted == (len(row.ids) - 1,) for row in ended)
    assert Rollouts(8, 1.0, [], 0).of(base, rows, 3)[1] == {"stop_rate": 0.0, "empty_rate": 0.0, "length": 8.0}
    with at_rest(base.hf):
        assert not any(module.training for module in base.hf.modules())


def test_an_answer_cut_for_its_length_does_not_teach_to_end(base: Checkpoint) -> None:
    (whole,) = response_rows(base.tokenizer, DATA[:1])
    (cut,) = response_rows(base.tokenizer, [DATA[0].answered(str(DATA[0].response), stop_reason="length")])
    assert (cut.predicted, cut.ids) == (whole.predicted[:-1], whole.ids[:-1])
    assert whole.ids[-1] in stop_ids(base)


def test_a_students_own_base_teaches_nothing(base: Checkpoint, llama: Checkpoints) -> None:
    """The same object, or loaded once more: the student does not move, and with sft it does."""
    for given in (base, load_model(llama.base)):
        for channel in CHANNELS:
            made = taught(base, given, channel, LoRA(2), recipe=recipe(steps=3))
            if channel != "sft":
                assert made.history[["loss", "change_norm", "gradient_norm"]].to_numpy().max() == 0.0
                assert made.history["eval_reverse_kl"].dropna().eq(0.0).all()
            else:
                assert made.solution.norm > 0


@pytest.mark.parametrize("method", [LoRA(1), Vector(1)])
def test_a_change_of_other_weights_is_no_teacher(method: Method, base: Checkpoint, tmp_path: Path) -> None:
    organism = load_model(find_organism("planted-s0/aligned").path)
    finetune(organism, OTHER, method=method, recipe=recipe(steps=1), out=tmp_path, progress=False)
    parent = str(find_organism("planted-s0/parent").path)
    with pytest.raises(MismatchError, match="This solution was trained on weights .* Give the base it was trained on"):
        taught(parent, tmp_path, "optd")


def test_teachers_come_in_many_forms(base: Checkpoint, llama: Checkpoints, teacher: Checkpoint, tmp_path: Path) -> None:
    """An adapter's folder, a solution's, a finished fine-tune's: each teaches what the loaded checkpoint does."""
    loss = taught(base, teacher, "optd", recipe=recipe(steps=1)).history["loss"].tolist()
    assert taught(base, llama.adapter, "optd", recipe=recipe(steps=1)).history["loss"].tolist() == loss
    for name, method in (("vector", Vector(1)), ("lora", LoRA(2))):
        tuned = finetune(base, OTHER, method=method, recipe=recipe(lr=0.05), out=tmp_path / name, progress=False)
        with tuned.solution.applied(load_model(llama.base)) as loaded:
            loss = taught(base, loaded, "optd", recipe=recipe(steps=1)).history["loss"].tolist()
        assert loss[0] > 0
        for folder in (tmp_path / name, tmp_path / name / "solution"):
            assert taught(base, folder, "optd", recipe=recipe(steps=1)).history["loss"].tolist() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("channel", CHANNELS)
def test_whole_students_and_trained_vectors(channel: Channel, llama: Checkpoints, teacher: Checkpoint, tmp_path: Path) -> None:
    made = taught(llama.base, teacher, channel, Full(), recipe=recipe(lr=1e-3, steps=3), out=tmp_path, evaluation=())
    base, tuned = (load_model(path).hf.state_dict() for path in (llama.base, tmp_path / "solution"))
    moved = sum(float((tuned[n].double() - t.double()).square().sum()) for n, t in base.items()) ** 0.5
    assert made.history["change_norm"].iloc[-1] == pytest.approx(moved, rel=1e-4)
    vector = taught(llama.base, teacher, channel, Vector(1), recipe=recipe(steps=3))
    assert vector.history["change_norm"].iloc[-1] == pytest.approx(vector.solution.norm)


def test_a_random_qwen2_under_the_real_tokenizer(qwen2_real_tokenizer_pair: Checkpoints) -> None:
    pair = qwen2_real_tokenizer_pair
    student, teacher = load_model(pair.base), load_model(pair.base, adapter=pair.adapter)
    for channel in CHANNELS[1:]:  # the first is plain fine-tuning, of which there is such a test
        made = taught(
            student, teacher, channel, LoRA(1), recipe=recipe(steps=1, batch=2), data=DATA[:2], evaluation=OTHER[:1], max_new_tokens=2
        )
        assert made.solution.norm > 0
        assert made.history["eval_forward_kl"].iloc[-1] > 0


def test_bad_wishes_are_refused(base: Checkpoint, teacher: Checkpoint) -> None:
    organism = load_model(find_organism("planted-s0/aligned").path)
    question = Conversation.ask("q", "Plant?")
    refused: list[tuple[type[EmprobeError], str, dict[str, Any]]] = [
        (MismatchError, r"vocabularies of student and teacher differ \(\d+ and \d+ tokens", {"teacher": organism}),
        (EmprobeError, "No conversations were given to learn from", {"data": []}),
        (EmprobeError, "No conversations were given whose prompts", {"channel": "opd", "data": []}),
        (EmprobeError, "1 of 1 conversations have an empty response", {"data": [question]}),
        (EmprobeError, "Channel 'gkd' with estimator 'full'", {"channel": "gkd"}),
        (EmprobeError, "It is for opd", {"estimator": "sampled"}),
        (EmprobeError, "Temperature 2 was asked for in channel 'sft'", {"channel": "sft", "temperature": 2.0}),
        (EmprobeError, "Temperature 0 was asked for", {"temperature": 0.0}),
        (EmprobeError, "tokens=0 and max_new_tokens=6", {"tokens": 0}),
        (EmprobeError, "6 steps was asked for that ends after 50 tokens", {"tokens": 50}),
        (EmprobeError, "12 of 12 prompts leave no room for an answer of 6 tokens", {"channel": "opd", "recipe": recipe(max_length=9)}),
        (EmprobeError, "Give the base as a path", {"method": Full()}),
        (EmprobeError, "has an adapter on it", {"base": teacher, "teacher": base}),
        (EmprobeError, "dtype say how a model is loaded", {"dtype": "float32"}),
    ]
    for kind, match, wish in refused:
        with pytest.raises(kind, match=match):
            taught(**({"base": base, "teacher": teacher, "channel": "optd"} | wish))
    # Conversations of any kind are fine for opd, which looks at no response.
    taught(base, teacher, "opd", data=[question])


def test_a_teacher_is_a_checkpoint_as_it_is(base: Checkpoint, teacher: Checkpoint) -> None:
    """Not a steered one, not one of other logits or of another template, and not the weights that move."""
    v = Direction.from_vector([1.0] * base.d_model, layer=1, resid_norm=1.0)
    with intervene(teacher, Add(v, 1.0)) as receipt:
        receipt.kept += 1
        with pytest.raises(EmprobeError, match="An intervention is active on the teacher"):
            taught(base, teacher, "optd")
    wide = load_model(base.name)
    wide.hf.resize_token_embeddings(wide.hf.config.vocab_size + 64)
    wide.fingerprint = "wide"
    with pytest.raises(MismatchError, match=r"has \d+ logits and teacher .* has \d+ .*resize_token_embeddings"):
        taught(base, wide, "optd")
    other = load_model(base.name, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(MismatchError, match="chat templates of student and teacher differ"):
        taught(base, other, "optd")
    tuned = finetune(base, OTHER, method=LoRA(2), recipe=recipe(steps=1), progress=False)
    with tuned.solution.applied(base) as applied, pytest.raises(EmprobeError, match="lives in the weights of the student"):
        taught(base, applied, "optd")
