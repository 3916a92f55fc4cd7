"""The same plan in other runtimes: the same logits, the same tokens, the same receipt, or a refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, HeliumConfig

from emprobe.errors import EmprobeError, InterventionDidNotFire, MissingExtraError
from emprobe.interventions import Add, Where, intervene
from emprobe.interventions.runtimes import RUNTIMES, Runtime, runtime_of
from emprobe.models import Checkpoint, load_model, load_pair
from emprobe.models.bridge import HOOK_NAMES
from tests.fixtures.models import ARCHITECTURES, Architecture, Checkpoints
from tests.interventions.remote_runs import REMOTE_PLANS, on_the_hub
from tests.interventions.runtime_plans import LENGTHS, PLANS, along, prompts

# What transformer-lens and nnsight warn of when imported and used is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PACKAGES = {"transformer_lens": "transformer-lens", "nnsight": "nnsight"}
STEPS = 8
Of = Callable[[Architecture], Checkpoints]


def needs(runtime: str) -> None:
    if not find_spec(runtime):
        pytest.skip(f"{PACKAGES[runtime]} is not installed")


@pytest.fixture(params=list(PACKAGES))
def other(request: pytest.FixtureRequest) -> str:
    """Each runtime but `hooks`, by name."""
    needs(request.param)
    return str(request.param)


def counts(runtime: Runtime) -> list[dict[str, Any]]:
    assert runtime.receipt is not None
    return runtime.receipt.as_dict()


def assert_same_counts(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a == {k: pytest.approx(v, rel=1e-3, abs=1e-4) if isinstance(v, float) else v for k, v in b.items()}


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


@pytest.fixture(scope="session")
def sent(checkpoints_of: Of) -> dict[str, dict[str, Any]]:
    """What came back from plans sent through nnsight's serialisation, in a process of its own.

    There emprobe's functions are as they were written, without the checks that the suite puts round them, which do not travel.
    """
    needs("nnsight")
    found = [checkpoints_of(name) for name in ARCHITECTURES]
    folders = [part for c in found for part in (c.architecture, str(c.base), str(c.adapter))]
    command = [sys.executable, "-m", "tests.interventions.remote_runs", *folders]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {f"{entry['architecture']}, {entry['plan']}": entry for entry in json.loads(ran.stdout.splitlines()[-1])}


@pytest.mark.parametrize("plan", REMOTE_PLANS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_plan_is_sent_to_ndif_whole_and_its_receipt_comes_back(sent: dict[str, dict[str, Any]], architecture: str, plan: str) -> None:
    entry = sent[f"{architecture}, {plan}"]
    assert entry["logits_apart"] < 1e-5
    assert entry["effect"] > 1e-2, "the plan does something"
    assert entry["same_tokens"]
    for theirs, own in entry["counts"]:
        assert_same_counts(theirs, own)
    assert entry["asked"] == [[True, "someone/tuned", None]] * 2


def test_remote_names_the_adapter(sent: dict[str, dict[str, Any]]) -> None:
    assert sent["llama, adapter"]["asked"] == [[True, "someone/base", None], [True, "someone/base", "someone/adapter"]]


@pytest.fixture
def ndif(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of NDIF, which does not answer."""
    needs("nnsight")
    import nnsight
    from nnsight.modeling.mixins.remotable import Remotable

    asked: list[Any] = []

    class Refusing:
        def __call__(self, tracer: Any) -> None:
            raise RuntimeError("Model is not served.\nTraceback ...")

    def backend(self: Any, remote: Any, *_: Any) -> Any:
        asked.append(remote)
        return Refusing()

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a key")
    monkeypatch.setattr(Remotable, "_remote_backend", backend)
    return asked


def test_what_ndif_cannot_do_is_refused_before_any_work(llama: Checkpoints, ndif: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight

    here = load_model(llama.base)
    there = on_the_hub(here)
    with pytest.raises(EmprobeError, match="which is no hub id"):
        runtime_of("nnsight", here, PLANS["add"](here), remote=True)
    runtime = runtime_of("nnsight", there, PLANS["add"](there), remote=True)
    with pytest.raises(EmprobeError, match="Leave sampler out"):
        runtime.generate(*prompts(), max_new_tokens=2, sampler=lambda ids, scores: scores)
    with torch.device("meta"):
        empty = replace(there, model=AutoModelForCausalLM.from_config(here.hf.config).eval())
    with pytest.raises(EmprobeError, match=r"'mlp_out' was asked of 'someone/tuned', whose weights are not here"):
        runtime_of("nnsight", empty, Add(along(here, 1, "mlp_out"), 1.0), remote=True)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    with pytest.raises(EmprobeError, match="knows no NDIF key.*NDIF_API_KEY"):
        runtime_of("nnsight", there, PLANS["add"](there), remote=True)
    assert not ndif


def test_what_fails_at_the_server_is_told_in_one_message(llama: Checkpoints, ndif: list[Any]) -> None:
    checkpoint = on_the_hub(load_model(llama.base))
    runtime = runtime_of("nnsight", checkpoint, PLANS["add"](checkpoint), remote=True)
    for ask in (lambda: runtime.logits(*prompts()), lambda: runtime.generate(*prompts(), max_new_tokens=2)):
        with pytest.raises(EmprobeError, match=r"NDIF did not run 'someone/tuned': Model is not served\. nnsight\.ndif_status"):
            ask()
    assert ndif == [True, True]
