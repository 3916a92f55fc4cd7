"""`verify` finds what agrees, what refuses, and what does not do what the hooks do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from emprobe.cli import main
from emprobe.directions import Direction
from emprobe.errors import EmprobeError
from emprobe.interventions import Ablate, Add, Plan
from emprobe.interventions import verify as module
from emprobe.interventions.verify import verify
from emprobe.models import Checkpoint, load_model
from emprobe.overlap import random_directions
from tests.fixtures.models import Checkpoints

EXPORTS = ("lora", "weights", "gguf")


@pytest.fixture
def model(llama: Checkpoints) -> Checkpoint:
    return load_model(llama.base)


def direction(checkpoint: Checkpoint) -> Direction:
    return Direction.from_vector(random_directions(1, checkpoint.d_model, 3)[0], layer=1, resid_norm=5.0)


def test_what_agrees_and_what_cannot_express_the_plan(model: Checkpoint) -> None:
    found = verify(Plan.of(Ablate(direction(model), site="writes")), model, runtimes=(), targets=EXPORTS)
    status = {check.name: check.status for check in found.checks}
    assert status == {"lora": "ok", "weights": "ok", "gguf": "refused"}
    assert found.effect > 100 * found.allowed, "the plan does something"
    assert all(check.deviation is not None and check.deviation < 1e-5 for check in found.checks if check.status == "ok")
    assert "refused: A control vector adds the same vector at every token, so it cannot express Ablate." in " ".join(str(found).split())
    assert max(map(len, str(found).splitlines())) <= 120, "reasons go on below"


def test_a_control_vector_is_read_back_bit_by_bit(model: Checkpoint) -> None:
    (check,) = verify(Plan.of(Add(direction(model), 0.5)), model, runtimes=(), targets=("gguf",)).checks
    assert (check.status, check.deviation) == ("ok", 0.0)


def test_what_differs_is_found(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that ablates another direction agrees with nobody."""
    plan, other = (
        Plan.of(Ablate(Direction.from_vector(random_directions(1, model.d_model, s)[0], layer=1), site="writes")) for s in (1, 2)
    )
    right = module.export
    monkeypatch.setattr(module, "export", lambda _, *rest: right(other, *rest))
    found = verify(plan, model, runtimes=(), targets=("weights",))
    assert [check.name for check in found.differs] == ["weights"]
    assert "differs" in str(found)


def test_padding_and_seed_are_stated_by_what_is_given(model: Checkpoint) -> None:
    plan = Plan.of(Add(direction(model), 0.5))
    ids, mask = torch.arange(8).reshape(2, 4), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert verify(plan, model, ids=ids, mask=mask, runtimes=(), targets=()).n_tokens == 7


def test_unknown_names_are_refused(model: Checkpoint) -> None:
    with pytest.raises(EmprobeError, match="asked for vllm. Use runtimes transformer_lens, nnsight and targets lora"):
        verify(Plan.of(Add(direction(model), 1)), model, runtimes=("vllm",))


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command(llama: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    direction(load_model(llama.base)).save(tmp_path / "v.safetensors")
    arguments = ["verify", "--model", str(llama.base), "--direction", str(tmp_path / "v.safetensors"), "--operator", "ablate"]
    arguments += ["--site", "writes", "--targets", "lora", "gguf", "--runtimes", "nnsight", "--out", str(tmp_path / "out")]
    assert main([*arguments, *["--json"] * as_json]) == 0
    printed = capsys.readouterr().out
    result: dict[str, Any] = json.loads((tmp_path / "out" / "result.json").read_text())
    if as_json:
        assert json.loads(printed) == result
    else:
        assert "Ablate from every write" in printed
        assert "Nothing that ran differs." in printed
    assert [check["name"] for check in result["checks"]] == ["nnsight", "lora", "gguf"]
    assert "emprobe verify --direction" in (tmp_path / "out" / "README.md").read_text()
