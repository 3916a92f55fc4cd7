"""`emprobe export`: what it writes, what it prints, and what it refuses before it writes anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from emprobe.activations import Activations
from emprobe.commands.export import Export, run_export
from emprobe.commands.planning import PlanFlags, plan_of
from emprobe.directions import Direction
from emprobe.errors import EmprobeError
from emprobe.interventions import Ablate, Add, MeanAblate, Plan, SetProjection
from emprobe.models import load_model
from emprobe.overlap import Subspace
from tests.directions.test_choosing import pair
from tests.fixtures.models import Checkpoints
from tests.interventions.test_export import direction, logits, off_by, subspace


@pytest.fixture
def files(llama: Checkpoints, tmp_path: Path) -> tuple[str, str]:
    checkpoint = load_model(llama.base)
    paths = str(tmp_path / "direction.safetensors"), str(tmp_path / "subspace.safetensors")
    direction(checkpoint).save(paths[0])
    subspace(checkpoint).save(paths[1])
    return paths


def test_a_lora_from_a_direction_file(llama: Checkpoints, files: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = Export(model=str(llama.base), target="lora", out=str(out), direction=files[:1], operator="ablate", site="writes")
    lines = run_export(command)
    checkpoint, adapted = load_model(llama.base), load_model(llama.base, adapter=out)
    assert off_by(logits(adapted), logits(checkpoint, plan_of(command)), logits(checkpoint)) <= 1e-5
    printed = "\n".join(lines)
    for words in ("Ablate from every write", "vllm serve", f"--lora-modules ablated={out}", "sglang.launch_server", "rank: 1"):
        assert words in printed
    result = json.loads((out / "result.json").read_text())
    assert result["export"] == json.loads((out / "card.json").read_text())
    assert ModelCard((out / "README.md").read_text()).data.base_model == str(llama.base)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run_export(command) == lines
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(EmprobeError, match="holds another export: plan differ"):
        run_export(replace(command, strength=0.5))


def test_weights_from_a_subspace_file_with_an_adapter_on(llama: Checkpoints, files: tuple[str, str], tmp_path: Path) -> None:
    flags = {"direction": files[1:], "operator": "ablate", "site": "writes", "strength": 0.5}
    command = Export(model=str(llama.base), adapter=str(llama.adapter), target="weights", out=str(tmp_path / "out"), **flags)  # type: ignore[arg-type]
    assert any("merged in" in line for line in run_export(command))
    tuned = load_model(llama.base, adapter=llama.adapter)
    assert off_by(logits(load_model(tmp_path / "out")), logits(tuned, plan_of(command)), logits(tuned)) <= 2e-5


def test_a_bias_from_a_plan_file_says_the_coefficient_in_three_units(llama: Checkpoints, tmp_path: Path) -> None:
    plan = Plan.of(Add(direction(load_model(llama.base)), 0.5))
    plan.save(tmp_path / "plan.safetensors")
    command = Export(model=str(llama.base), target="bias", out=str(tmp_path / "out"), plan=str(tmp_path / "plan.safetensors"))
    assert any("0.5 resid = 1.25 raw = 2.5 abs" in line for line in run_export(command))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["plan"] == plan.hash


def test_flags_make_the_plans_they_name(files: tuple[str, str]) -> None:
    one, span = Direction.load(files[0]), Subspace.load(files[1])
    twins = {
        PlanFlags(direction=files[:1], operator="add", coefficient=1.0): Add(one, 1.0),
        PlanFlags(direction=files[:1], operator="add", coefficient=1.0, unit="raw", layers=("0", "2")): Add(one, 1.0, "raw", layers=[0, 2]),
        PlanFlags(direction=files[1:], operator="ablate", layers=("all",), strength=0.5): Ablate(span, 0.5, layers="all"),
        PlanFlags(direction=files[:1], operator="set_projection", coefficient=2.0, site="mlp_out"): SetProjection(one, 2.0, site="mlp_out"),
    }
    for flags, operator in twins.items():
        assert [e.as_dict() for e in plan_of(flags).edits(3)] == [e.as_dict() for e in Plan.of(operator).edits(3)]
    known = replace(one, base_projection=0.25)
    known.save(files[0])
    flags = PlanFlags(direction=files[:1], operator="mean_ablate")
    assert [e.as_dict() for e in plan_of(flags).edits(3)] == [e.as_dict() for e in Plan.of(MeanAblate(known)).edits(3)]


def test_flags_that_describe_no_plan_are_refused(files: tuple[str, str], tmp_path: Path) -> None:
    pair([0.3], 1).base.save(tmp_path / "acts.safetensors")
    Plan.of(Add(Direction.load(files[0]), 0.5)).save(tmp_path / "plan.safetensors")
    plan = str(tmp_path / "plan.safetensors")
    refused = {
        PlanFlags(): "No intervention was given",
        PlanFlags(direction=files): "Say --operator, one of: ablate, add",
        PlanFlags(direction=files[:1], operator="add"): "needs --coefficient",
        PlanFlags(direction=files[:1], operator="set_projection"): "needs --coefficient",
        PlanFlags(direction=files[:1], operator="ablate", coefficient=1.0): "--coefficient does not belong to --operator ablate",
        PlanFlags(direction=files[:1], operator="add", coefficient=1.0, layers=("two",)): "Layers two were asked for",
        PlanFlags(direction=files, operator="ablate", layers=("all",)): "--layers was given for 2 files",
        PlanFlags(direction=files, operator="ablate", site="writes"): "--site writes was given with 2 files",
        PlanFlags(direction=(str(tmp_path / "acts.safetensors"),), operator="ablate"): "neither a direction nor a subspace",
        PlanFlags(plan=plan, strength=0.5): "--plan says all that is done, but --strength was given too",
        PlanFlags(plan=str(tmp_path / "nowhere")): "is not a file",
    }
    assert isinstance(Activations.load(tmp_path / "acts.safetensors"), Activations)
    for flags, words in refused.items():
        with pytest.raises(EmprobeError, match=words):
            plan_of(flags)
