"""A control vector holds exactly what the hooks add, says who wrote it, and refuses by name what llama.cpp cannot do."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from emprobe.directions import Direction
from emprobe.directions.importers import import_direction
from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.interventions import Ablate, Add, Operator, Plan, SetProjection, When, Where
from emprobe.interventions.export.gguf import CONVENTION, NAME, write_control_vector
from emprobe.interventions.export.registry import export
from emprobe.models import Checkpoint, load_model
from emprobe.overlap import random_directions
from tests.fixtures.models import Checkpoints


@pytest.fixture(scope="module")
def model(llama: Checkpoints) -> Checkpoint:
    return load_model(llama.base)


def direction(checkpoint: Checkpoint, layer: int, seed: int = 0) -> Direction:
    return Direction.from_vector(random_directions(1, checkpoint.d_model, seed)[0], layer=layer, resid_norm=5.0)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: np.array(t.data) for t in reader.tensors}


def test_what_is_read_back_is_bit_equal_to_what_the_hooks_add(model: Checkpoint, tmp_path: Path) -> None:
    a, b, c = direction(model, 1), direction(model, 1, seed=1), direction(model, 2, seed=2)
    plan = Plan.of(Add(a, 0.7), Add(c, -3.0, unit="abs"), Add(b, 2.0, unit="raw"))
    write_control_vector(plan, model, tmp_path)
    fields, tensors = contents(tmp_path / NAME)
    expected = {1: 0.7 * 5.0 * a.vector + 2.0 * b.raw_norm * b.vector, 2: -3.0 * c.vector}
    assert list(tensors) == ["direction.1", "direction.2"]
    for layer, vector in expected.items():
        found = tensors[f"direction.{layer}"]
        assert found.dtype == np.float32
        assert found.ndim == 1
        np.testing.assert_array_equal(found, vector.float().numpy())
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    assert fields["emprobe.convention"] == CONVENTION
    assert fields["emprobe.plan_hash"] == plan.hash
    assert fields["emprobe.fingerprint"] == model.fingerprint


def test_all_layers_but_block_0(model: Checkpoint, tmp_path: Path) -> None:
    write_control_vector(Plan.of(Add(direction(model, 1), 1.0, layers=[1, 2])), model, tmp_path)
    assert list(contents(tmp_path / NAME)[1]) == ["direction.1", "direction.2"]
    with pytest.raises(
        EmprobeError, match=r"Add\(1 resid\) at resid_post\[0\] cannot be a control vector: llama.cpp keeps none for block 0"
    ):
        write_control_vector(Plan.of(Add(direction(model, 1), 1.0, layers="all")), model, tmp_path)


def test_the_importer_reads_the_direction_back_at_the_block_that_its_convention_names(model: Checkpoint, tmp_path: Path) -> None:
    path, given = tmp_path / NAME, direction(model, 2)
    write_control_vector(Plan.of(Add(given, 0.5)), model, tmp_path)
    found = import_direction(path, layer=2)
    assert (found.layer, found.site) == (2, "resid_post")
    assert "emprobe's" in found.provenance["imported"]["index_convention"]
    assert not found.provenance["imported"].get("cautions"), "the file says who wrote it"
    with pytest.raises(EmprobeError, match="was written by emprobe and says its convention"):
        import_direction(path, layer=1, convention="llama.cpp")
    assert found.raw_norm == pytest.approx(2.5, rel=1e-6)
    # The file is float32: a unit vector of it agrees to its rounding, and the vector itself bit for bit.
    again = (found.vector * found.raw_norm).float()
    torch.testing.assert_close(again, (2.5 * given.vector).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda d: Ablate(d), r"adds the same vector at every token, so it cannot express Ablate\. .*to the target gguf_lora"),
        (lambda d: SetProjection(d, 1.0, unit="abs"), "cannot express SetProjection"),
        (lambda d: Add(d, 1.0, site="mlp_out"), r"at mlp_out\[1\] cannot be a control vector: llama.cpp adds at a block's output"),
        (lambda d: Add(d, 1.0, where=Where(prompt=False)), "names the generation, but the target 'gguf' acts at every token"),
        (lambda d: Add(d, 1.0, where=Where(exclude_first=True)), "without position 0, but the target 'gguf' acts"),
        (
            lambda d: Add(d, 1.0, when=When(d, above=0.0)),
            "acts only where x·v > 0 at resid_post.1., but the target 'gguf' knows no condition",
        ),
        (lambda d: Add(d, 1e39), "reaches .*e.39, which float32 cannot hold"),
        (lambda d: Add(d, 1.0, layers=9), "layer 9"),
    ],
)
def test_what_a_control_vector_cannot_express_is_refused_by_name(model: Checkpoint, tmp_path: Path, operator: Any, message: str) -> None:
    made: Operator = operator(direction(model, 1))
    with pytest.raises(EmprobeError, match=message):
        write_control_vector(Plan.of(made), model, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("name", ["a:b", "a,b"])
def test_paths_that_llama_cpp_takes_apart_are_refused(model: Checkpoint, tmp_path: Path, name: str) -> None:
    with pytest.raises(EmprobeError, match=f"has '{name[1]}' in its path .*a{name[1]}b.*, at which llama.cpp splits its arguments"):
        export(Plan.of(Add(direction(model, 1), 1.0)), model, "gguf", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_card_prints_the_command(model: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "my vector"
    made = export(Plan.of(Add(direction(model, 1), 1.0, layers=[1, 2])), model, "gguf", out)
    _, server, client = made.serve
    assert shlex.split(server) == [
        *(
            "llama-server",
            "-m",
            "model.gguf",
            "--control-vector",
            str(out / "control_vector.gguf"),
            "--control-vector-layer-range",
            "1",
            "2",
        )
    ]
    assert shlex.split(client)[3:5] == ["--control-vector-scaled", f"{out / 'control_vector.gguf'}:0.5"]
    assert made.card["facts"] == {"norm added at block 1": pytest.approx(5), "norm added at block 2": pytest.approx(5)}


def test_without_gguf_the_extra_is_named(model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"Writing .*control_vector.gguf needs the package 'gguf'.*emprobe\[gguf\]"):
        write_control_vector(Plan.of(Add(direction(model, 1), 1.0)), model, tmp_path)
