"""`remote=True`: a plan as it is sent to NDIF, and what is refused before anything is. Nothing here leaves this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from emprobe.errors import EmprobeError
from emprobe.interventions import Add
from emprobe.interventions.runtimes import runtime_of
from emprobe.models import load_model
from tests.fixtures.models import ARCHITECTURES, Checkpoints
from tests.interventions.remote_runs import REMOTE_PLANS, on_the_hub
from tests.interventions.runtime_plans import PLANS, Of, along, assert_same_counts, needs, prompts

# What transformer-lens and nnsight warn of when imported and used is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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
