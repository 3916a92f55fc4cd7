"""The same plan in other runtimes: the same logits, the same tokens, the same receipt, or a refusal."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, HeliumConfig

from emprobe.errors import EmprobeError, InterventionDidNotFire, MissingExtraError
from emprobe.interventions import Add, Where, intervene
from emprobe.interventions.runtimes import RUNTIMES, runtime_of
from emprobe.models import Checkpoint, load_model, load_pair
from emprobe.models.bridge import HOOK_NAMES
from tests.fixtures.models import Checkpoints
from tests.interventions.runtime_plans import LENGTHS, PACKAGES, PLANS, Of, along, assert_same_counts, counts, needs, prompts

# What transformer-lens and nnsight warn of when imported and used is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS = 8


@pytest.fixture(params=list(PACKAGES))
def other(request: pytest.FixtureRequest) -> str:
    """Each runtime but `hooks`, by name."""
    needs(request.param)
    return str(request.param)


@pytest.mark.parametrize("plan", [p for p in PLANS if p != "windows"])
def test_logits_tokens_and_receipts_are_those_of_the_hooks(architecture: Checkpoints, other: str, plan: str) -> None:
    checkpoint = load_model(architecture.base)
    made = PLANS[plan](checkpoint)
    own, theirs = (runtime_of(name, checkpoint, made) for name in ("hooks", other))
    ids, mask = prompts()
    lengths = (mask.sum(dim=1) + 1) // 2 if plan != "generation only" else torch.ones(len(ids), dtype=torch.long)
    real = mask.bool()
    wanted, found = (runtime.logits(ids, mask, prompt_lengths=lengths)[real] for runtime in (own, theirs))
    assert float((wanted - found).abs().max() / wanted.abs().max()) < 1e-5
    assert_same_counts(counts(theirs), counts(own))
    wanted, found = (runtime.generate(ids, mask, max_new_tokens=STEPS) for runtime in (own, theirs))
    assert wanted.shape == (len(ids), STEPS)
    assert torch.equal(wanted, found)
    assert_same_counts(counts(theirs), counts(own))
    assert counts(own)[0]["forwards"] == STEPS


def test_windows_are_the_same_tokens_in_every_runtime(architecture: Checkpoints, other: str) -> None:
    checkpoint = load_model(architecture.base)
    own, theirs = (runtime_of(name, checkpoint, PLANS["windows"](checkpoint)) for name in ("hooks", other))
    ids, mask = prompts((9, 7, 3, 2))
    wanted, found = (runtime.generate(ids, mask, max_new_tokens=STEPS) for runtime in (own, theirs))
    assert torch.equal(wanted, found)
    assert_same_counts(counts(theirs), counts(own))
    marks = torch.tensor([i for i, token in checkpoint.tokenizer.added_tokens_decoder.items() if token.special])
    plain = int((~torch.isin(wanted[:, 2:4], marks)).sum())
    entry = counts(theirs)[1]
    assert (entry["positions_in_prompt"], entry["positions_in_generation"]) == (4, plain)


def test_the_hooks_runtime_is_the_models_own_generate_inside_intervene(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    plan = PLANS["add"](checkpoint)
    ids, mask = prompts()
    with intervene(checkpoint, plan):
        wanted = checkpoint.hf.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=STEPS, eos_token_id=None)
    assert torch.equal(runtime_of("hooks", checkpoint, plan).generate(ids, mask, max_new_tokens=STEPS), wanted[:, ids.shape[1] :])


@pytest.mark.parametrize("rows", [LENGTHS, (5,)])
def test_a_stop_ends_a_row_and_every_step_before_it_is_steered(llama: Checkpoints, other: str, rows: tuple[int, ...]) -> None:
    """Where every row has stopped, decoding ends before its last step; what nnsight cuts off with it must not be the answer."""
    checkpoint = load_model(llama.base)
    own, theirs = (runtime_of(name, checkpoint, PLANS["generation only"](checkpoint)) for name in ("hooks", other))
    ids, mask = prompts(rows)
    free = own.generate(ids, mask, max_new_tokens=STEPS)
    stops = sorted({int(row[4]) for row in free})
    wanted, found = (runtime.generate(ids, mask, max_new_tokens=STEPS, stops=stops) for runtime in (own, theirs))
    assert torch.equal(wanted, found)
    assert wanted.shape[1] <= 5
    for row in found.tolist():
        end = next(i for i, token in enumerate(row) if token in stops)
        assert set(row[end + 1 :]) <= {checkpoint.tokenizer.pad_token_id}
    assert_same_counts(counts(theirs), counts(own))


def test_a_sampler_acts_in_every_runtime(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)

    def second(ids: Tensor, scores: Tensor) -> Tensor:
        """The second largest logit wins."""
        return torch.full_like(scores, -torch.inf).scatter(1, scores.topk(2).indices[:, 1:], 0.0)

    own, theirs = (runtime_of(name, checkpoint, PLANS["add"](checkpoint)) for name in ("hooks", other))
    ids, mask = prompts()
    wanted, found = (runtime.generate(ids, mask, max_new_tokens=4, sampler=second) for runtime in (own, theirs))
    assert torch.equal(wanted, found)
    assert not torch.equal(wanted, own.generate(ids, mask, max_new_tokens=4))


def test_a_models_own_generation_config_is_left_out_and_kept(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    wanted = runtime_of("hooks", checkpoint, PLANS["add"](checkpoint)).generate(*prompts(), max_new_tokens=STEPS)
    checkpoint.hf.generation_config.repetition_penalty = 5.0
    checkpoint.hf.generation_config.forced_eos_token_id = 7
    before = checkpoint.hf.generation_config.to_dict()
    for name in ("hooks", other):
        assert torch.equal(runtime_of(name, checkpoint, PLANS["add"](checkpoint)).generate(*prompts(), max_new_tokens=STEPS), wanted)
    assert checkpoint.hf.generation_config.to_dict() == before


def test_the_model_is_as_it_was_and_unhooked(architecture: Checkpoints, other: str) -> None:
    checkpoint = load_model(architecture.base)
    ids, mask = prompts()

    def state() -> dict[str, Any]:
        return {n: (type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in checkpoint.hf.named_modules()}

    runtime_of("hooks", checkpoint, PLANS["add"](checkpoint)).logits(ids, mask)
    before, tensors = state(), {n: (t.data_ptr(), t.clone()) for n, t in checkpoint.hf.state_dict().items()}
    said = checkpoint.hf(ids).logits
    runtime = runtime_of(other, checkpoint, PLANS["add at every site of a block"](checkpoint))
    runtime.logits(ids, mask)
    runtime.generate(ids, mask, max_new_tokens=3)
    with pytest.raises(InterventionDidNotFire):
        runtime_of(other, checkpoint, Add(along(checkpoint), 1.0, where=Where(prompt=False, generation_window=(50, 51)))).generate(
            ids, mask, max_new_tokens=2
        )
    assert state() == before
    for name, (place, values) in tensors.items():
        assert checkpoint.hf.state_dict()[name].data_ptr() == place
        assert torch.equal(checkpoint.hf.state_dict()[name], values)
    assert torch.equal(checkpoint.hf(ids).logits, said)
    # Nor is anything left on the twin: a plan does not act in the next one's run.
    again = runtime_of(other, checkpoint, Add(along(checkpoint), 0.0)).logits(ids, mask)
    plain = runtime_of("hooks", checkpoint, Add(along(checkpoint), 0.0)).logits(ids, mask)
    assert float((again - plain)[mask.bool()].abs().max() / plain.abs().max()) < 1e-5


@pytest.mark.parametrize("name", RUNTIMES)
def test_silence_is_refused(llama: Checkpoints, name: str) -> None:
    if name != "hooks":
        needs(name)
    checkpoint = load_model(llama.base)
    ids, mask = prompts()
    late = runtime_of(name, checkpoint, Add(along(checkpoint), 1.0, where=Where(prompt=False, generation_window=(9, 12))))
    with pytest.raises(
        InterventionDidNotFire, match=r"Add\(1 resid\) at resid_post\[1\] saw 3 forward passes and 4 rows but steered no position"
    ):
        late.generate(ids, mask, max_new_tokens=3)
    with pytest.raises(EmprobeError, match="nobody said where each prompt ends"):
        late.logits(ids, mask)


def test_an_adapter_is_on_or_off_as_the_checkpoint_says(llama: Checkpoints, other: str) -> None:
    pair = load_pair(llama.base, llama.adapter)
    ids, mask = prompts()
    for checkpoint in (pair.base, pair.tuned):
        own, theirs = (runtime_of(name, checkpoint, PLANS["add"](checkpoint)).logits(ids, mask)[mask.bool()] for name in ("hooks", other))
        assert float((own - theirs).abs().max() / own.abs().max()) < 1e-5
    assert not torch.allclose(*(runtime_of(other, c, PLANS["add"](c)).logits(ids, mask) for c in (pair.base, pair.tuned)))


def test_weights_that_were_changed_since_are_those_that_run(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    runtime = runtime_of(other, checkpoint, PLANS["add"](checkpoint))
    layer = checkpoint.blocks[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(3 * layer.weight)
    ids, mask = prompts()
    wanted = runtime_of("hooks", checkpoint, PLANS["add"](checkpoint)).logits(ids, mask)
    assert float((runtime.logits(ids, mask) - wanted)[mask.bool()].abs().max() / wanted.abs().max()) < 1e-5


def test_what_a_bridge_computes_wrongly_is_refused(checkpoints_of: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Gemma 2 the attention's own output is not what is added: a norm comes after it."""
    needs("transformer_lens")
    checkpoint = load_model(checkpoints_of("gemma2").base)
    monkeypatch.setitem(HOOK_NAMES, "attn_out", "attn.hook_out")
    with pytest.raises(EmprobeError, match=r"runtime='transformer_lens' .* does not compute what the model does: .* is off by"):
        runtime_of("transformer_lens", checkpoint, Add(along(checkpoint, 1, "attn_out"), 1.0))


def test_an_adapter_in_a_matrix_that_the_bridge_splits_is_refused(checkpoints_of: Of) -> None:
    needs("transformer_lens")
    checkpoint = load_pair(checkpoints_of("phi3").base, checkpoints_of("phi3").adapter).tuned
    with pytest.raises(EmprobeError, match=r"adapter on\), but TransformerLens does not compute what the model does"):
        runtime_of("transformer_lens", checkpoint, PLANS["add"](checkpoint))


def test_places_that_a_trace_comes_to_in_another_order_are_refused(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("nnsight")
    from emprobe.interventions.runtimes.nnsight import NNsight

    checkpoint, own = load_model(llama.base), NNsight._stops
    monkeypatch.setattr(NNsight, "_stops", lambda self, program: own(self, program)[::-1])
    with pytest.raises(EmprobeError, match="does not come to the places in order: .*Use runtime='hooks'"):
        runtime_of("nnsight", checkpoint, PLANS["add at every site of a block"](checkpoint))


def test_a_model_without_a_bridge_is_refused(llama: Checkpoints) -> None:
    needs("transformer_lens")
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 300}
    model: Any = AutoModelForCausalLM.from_config(HeliumConfig(hidden_size=32, head_dim=8, pad_token_id=0, **shape))
    checkpoint = Checkpoint(model.eval(), load_model(llama.base).tokenizer, "helium", "")
    with pytest.raises(EmprobeError, match=r"cannot bridge a HeliumForCausalLM.* Use runtime='hooks'"):
        runtime_of("transformer_lens", checkpoint, Add(along(checkpoint), 1.0))


def test_a_site_that_the_model_lacks_is_refused_in_every_runtime(checkpoints_of: Of, subtests: pytest.Subtests) -> None:
    checkpoint = load_model(checkpoints_of("gpt_neox").base)
    for name in RUNTIMES:
        with subtests.test(name), pytest.raises(EmprobeError, match="'resid_mid' does not exist in GPTNeoXForCausalLM"):
            runtime_of(name, checkpoint, Add(along(checkpoint, 1, "resid_mid"), 1.0))


def test_an_active_intervention_is_refused(llama: Checkpoints, other: str) -> None:
    checkpoint = load_model(llama.base)
    runtime = runtime_of(other, checkpoint, PLANS["add"](checkpoint))
    with intervene(checkpoint, Add(along(checkpoint), 1.0)) as receipt:
        checkpoint.hf(prompts()[0])
        with pytest.raises(EmprobeError, match=f"intervention is active .* runtime='{other}'.*Use runtime='hooks'"):
            runtime.logits(*prompts())
    assert receipt.lines


@pytest.mark.parametrize(
    ("change", "found"),
    [({"is_quantized": True}, "quantised"), ({"hf_device_map": {"model.layers.0": 0, "model.layers.1": "cpu"}}, "spread over 0, cpu")],
)
def test_weights_of_another_kind_are_refused(llama: Checkpoints, other: str, change: dict[str, Any], found: str) -> None:
    checkpoint = load_model(llama.base)
    vars(checkpoint.hf).update(change)
    with pytest.raises(EmprobeError, match=rf"runtime='{other}' .* {found}.* runtime='hooks'"):
        runtime_of(other, checkpoint, PLANS["add"](checkpoint))


def test_bad_requests_are_told_in_words(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    runtime = runtime_of("hooks", checkpoint, PLANS["add"](checkpoint))
    ids, mask = prompts()
    with pytest.raises(EmprobeError, match=r"ids of shape \(4, 9\) and a mask of shape \(4, 8\)"):
        runtime.logits(ids, mask[:, 1:])
    with pytest.raises(EmprobeError, match=r"ids of shape \(9,\) and no mask"):
        runtime.logits(ids[0])
    with pytest.raises(EmprobeError, match="padding at their end"):
        runtime.generate(ids, mask.flip(1), max_new_tokens=1)
    with pytest.raises(EmprobeError, match="max_new_tokens=0"):
        runtime.generate(ids, mask, max_new_tokens=0)
    with pytest.raises(EmprobeError, match="Runtime 'vllm' does not exist. Use one of: hooks, transformer_lens, nnsight"):
        runtime_of("vllm", checkpoint, PLANS["add"](checkpoint))
    with pytest.raises(EmprobeError, match="remote=True was asked of the runtime 'hooks'"):
        runtime_of("hooks", checkpoint, PLANS["add"](checkpoint), remote=True)


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    llama: Checkpoints, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    checkpoint = load_model(llama.base)
    for runtime, package in PACKAGES.items():
        with subtests.test(runtime):
            for name in [n for n in sys.modules if n.split(".")[0] == runtime]:
                monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.setitem(sys.modules, runtime, None)
            with pytest.raises(MissingExtraError, match=rf"runtime='{runtime}' needs .*'{package}'.* pip install 'emprobe\[{package}\]'"):
                runtime_of(runtime, checkpoint, PLANS["add"](checkpoint))
