"""The command `import`, and what a stored vector tells of its rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from emprobe.commands.importing import Import, run_import
from emprobe.directions import Direction
from emprobe.directions.importers.rounding import rounding_share
from emprobe.errors import MismatchError
from emprobe.files import read_json
from tests.fixtures.peers import D, npy, persona_vectors


def test_the_command_writes_every_layer_with_its_card(tmp_path: Path) -> None:
    path, _ = persona_vectors(tmp_path)
    out = tmp_path / "out"
    lines = run_import(Import(str(path), str(out)))
    result = read_json(out / "result.json")
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["README.md", "result.json", "run.json", *(f"direction-{layer}.safetensors" for layer in range(5))]
    )
    for row in result["layers"]:
        loaded = Direction.load(out / row["file"], layer=row["layer"], site="resid_post", d_model=D)
        assert loaded.raw_norm == row["norm"]
    printed, card = "\n".join(lines), (out / "README.md").read_text()
    for told in ("row k is the input of block k", "the last row is left out", result["source"]["sha256"][:16]):
        assert told in " ".join(printed.split())
        assert told in card
    assert "unknown    residual norm" in printed
    assert "**induces**" in card
    assert run_import(Import(str(path), str(out))) == lines


def test_the_command_writes_one_layer_as_one_file(tmp_path: Path) -> None:
    path, options = npy(tmp_path)
    lines = run_import(Import(str(path), str(tmp_path / "out"), layer=2, d_model=D, **options))
    assert Direction.load(tmp_path / "out" / "direction.safetensors").layer == 2
    assert lines[-1] == f"written to {tmp_path / 'out'}"
    with pytest.raises(MismatchError, match="holds another run"):
        run_import(Import(str(path), str(tmp_path / "out"), layer=3, **options))


def test_the_command_writes_nothing_of_a_width_that_was_not_asked_for(tmp_path: Path) -> None:
    path, options = npy(tmp_path)
    with pytest.raises(MismatchError, match=r"v\.npy was asked to fit d_model 5120, but is of d_model 16"):
        run_import(Import(str(path), str(tmp_path / "out"), d_model=5120, **options))
    assert not (tmp_path / "out").exists()


def bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().double().numpy()


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("outliers", [0, 4])
def test_rounding_before_the_subtraction_is_seen_in_the_difference(spread: float, outliers: int) -> None:
    rng = np.random.default_rng(5)
    scale = np.exp(spread * rng.normal(size=4096))
    scale[:outliers] = 500
    low = scale * rng.normal(size=4096)
    high = low + 0.05 * scale * rng.normal(size=4096)
    difference = bf16(high) - bf16(low)
    truth = np.linalg.norm(difference - (high - low)) / np.linalg.norm(difference)
    assert 0.01 < truth < 0.2
    assert 0.5 < rounding_share(difference) / truth < 2.5
    assert rounding_share(high - low) < 1e-9


def test_dimensions_of_nothing_are_not_rounded() -> None:
    assert rounding_share(np.array([0.0, 1.0, -2.0])) == rounding_share(np.array([1.0, 2.0]))
