"""`emprobe overlap`: from files to a table, a figure and a card, with nulls of given rows, and refusals before anything is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emprobe.activations import Activations
from emprobe.commands.overlap import OverlapCommand, run_overlap
from emprobe.directions import Direction
from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap import Subspace
from emprobe.report.overlap_plots import draw_overlap

D, N, LAYERS = 20, 24, (3, 5)


def activations(path: Path, seed: int, shift: float, name: str) -> str:
    """Rows that vary most along two axes which all share, with a mean shift along the first."""
    values = np.random.default_rng(seed).normal(size=(N, len(LAYERS), D)) * np.r_[6.0, 5.0, np.ones(D - 2)]
    values[..., 0] += shift
    Activations(
        values=torch.from_numpy(values).float(), layers=LAYERS, site="resid_post", positions="last_prompt_token",
        keys=tuple((f"q{i // 2}", i % 2) for i in range(N)), tokens=tuple(f"t{i}" for i in range(N)), checkpoint=name, fingerprint=name,
        token_mean=torch.zeros(len(LAYERS), D), token_norm=torch.ones(len(LAYERS)), n_tokens=N,
    ).save(path)  # fmt: skip
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    made = {name: activations(tmp_path / f"{name}.safetensors", seed, seed * 1.0, name) for seed, name in enumerate(("base", "one", "two"))}
    for layer in LAYERS:
        vector = torch.zeros(D, dtype=torch.float64)
        vector[0] = 1
        Direction(
            vector=vector, layer=layer, site="resid_post", positions="last_prompt_token", raw_norm=1.0, resid_norm=2.0, base_projection=0.0,
            contrast="c", sign="s", estimator="e", split_half=None, n=4, questions=2,
        ).save(tmp_path / f"direction-{layer}.safetensors")  # fmt: skip
        made[f"direction-{layer}"] = str(tmp_path / f"direction-{layer}.safetensors")
    Subspace.from_deltas(np.eye(4, D), k=2, centred=False, layer=3).save(tmp_path / "space.safetensors")
    return made | {"space": str(tmp_path / "space.safetensors")}


def test_last_digits_of_float32_make_no_subspace(files: dict[str, str], tmp_path: Path) -> None:
    base = Activations.load(files["base"])
    moved = base.values + torch.linspace(1, 2, N)[:, None, None] * torch.linspace(-1, 1, D)
    replace(base, values=moved, checkpoint="rank1").save(tmp_path / "rank1.safetensors")
    sides = {"a": (files["base"], str(tmp_path / "rank1.safetensors")), "b": (files["base"], files["one"])}
    with pytest.raises(EmprobeError, match="2 components were asked of deltas at layer 3 of rank 1 after centring"):
        run_overlap(OverlapCommand(**sides, out=str(tmp_path / "out"), k=2, draws=20, resamples=0))
    assert not (tmp_path / "out").exists()


def flattened(path: Path, acts: Activations, values: torch.Tensor) -> str:
    """The same rows with values of its own at the first layer."""
    replace(acts, values=torch.stack([values.float(), acts.values[:, 1]], dim=1)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        (torch.zeros(N, D), "All 24 deltas there are zero, so they span nothing."),
        (torch.ones(N, D), "All 24 deltas there are equal but for rounding, so nothing is left after centring."),
        (
            torch.linspace(1, 2, N)[:, None] * torch.linspace(-1, 1, D),
            "2 components were asked of deltas there of rank 1 after centring (24 rows).",
        ),
    ],
    ids=["silent", "equal", "rank 1"],
)
def test_a_layer_that_cannot_carry_the_subspace_is_left_out_with_its_reason(
    files: dict[str, str], tmp_path: Path, delta: torch.Tensor, reason: str
) -> None:
    base, one = (Activations.load(files[name]) for name in ("base", "one"))
    flat = flattened(tmp_path / "flat.safetensors", one, base.values[:, 0] + delta)
    sides: dict[str, Any] = {"a": (files["base"], flat), "b": (files["base"], files["two"]), "k": 2, "draws": 20, "resamples": 20}
    lines = run_overlap(OverlapCommand(**sides, out=str(tmp_path / "out")))
    assert f"Left out: layer 3. {reason}" in lines
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [row["layer"] for row in result["layers"]] == [5]
    assert list(result["left_out"]) == ["3"]
    assert "Left out: layer 3." in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(EmprobeError, match=r"at layer 3 .* or give --no-centred, which keeps the rows' mean"):
        run_overlap(OverlapCommand(**sides, layers=(3,), out=str(tmp_path / "asked")))
    assert not (tmp_path / "asked").exists()


def test_a_layer_whose_halves_cannot_carry_it_is_left_out_too(files: dict[str, str], tmp_path: Path) -> None:
    # All rows but one question's lie on a line: two dimensions with that question, one without.
    values = torch.outer(torch.arange(N), torch.arange(D)).float()
    values[0, 0] += 50
    flat = flattened(tmp_path / "flat.safetensors", Activations.load(files["one"]), values)
    sides: dict[str, Any] = {"a": (flat,), "b": (files["two"],), "k": 2, "draws": 20}
    for resamples, reason in (
        (0, "2 components were asked of rows of a half of rank 1"),
        (20, "without one of their groups the 24 rows have"),
    ):
        lines = run_overlap(OverlapCommand(**sides, resamples=resamples, out=str(tmp_path / f"out{resamples}")))
        assert reason in next(line for line in lines if line.startswith("Left out: layer 3."))


def test_single_layers_left_over_are_not_compared_with_one_another(files: dict[str, str], tmp_path: Path) -> None:
    base, one, two = (Activations.load(files[name]) for name in ("base", "one", "two"))
    first = flattened(tmp_path / "first.safetensors", one, base.values[:, 0])
    second = str(tmp_path / "second.safetensors")
    replace(two, values=torch.stack([two.values[:, 0], base.values[:, 1]], dim=1)).save(second)
    with pytest.raises(
        EmprobeError, match=r"No layer is left to compare. All 24 deltas at layer 3 .* All 24 deltas at layer 5 .*--no-centred"
    ):
        run_overlap(OverlapCommand((files["base"], first), (files["base"], second), str(tmp_path / "out"), k=2, draws=20, resamples=0))


def test_two_deltas_over_layers(files: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = OverlapCommand(
        a=(files["base"], files["one"]), b=(files["base"], files["two"]), rows=(files["base"],), out=str(out), k=2, draws=200, resamples=40
    )
    lines = run_overlap(command)
    result = json.loads((out / "result.json").read_text())
    assert [row["layer"] for row in result["layers"]] == list(LAYERS)
    for row in result["layers"]:
        found, placed = row["measures"]["mean_squared_cosine"], row["nulls"]["mean_squared_cosine"]
        assert found["low"] <= found["value"] <= found["high"]
        assert found["clusters"] == N // 2
        # All that the two share is what every row has: far above the isotropic null, and less so above the covariance-matched one.
        assert placed["haar"]["p"] < 0.01
        assert placed["haar"]["high"] < placed["covariance_matched"]["mean"] < found["value"]
        assert set(row["false_discovery"]) == {"haar", "covariance_matched", "activation_differences"}
        assert row["false_discovery"]["haar"] >= placed["haar"]["p"] - 1e-12
        assert 0 < row["ceiling"] <= 1
    assert {path.name for path in out.iterdir()} == {"run.json", "result.json", "README.md", "overlap.png"}
    assert "covariance_matched" in "\n".join(lines)
    assert "a**: Subspace(rows of one" in (out / "README.md").read_text()
    before = (out / "result.json").read_bytes(), (out / "overlap.png").read_bytes()
    run_overlap(command)
    assert before == ((out / "result.json").read_bytes(), (out / "overlap.png").read_bytes())


def test_directions_with_a_subspace_and_of_two_layers(files: dict[str, str], tmp_path: Path) -> None:
    lines = run_overlap(OverlapCommand((files["direction-3"],), (files["space"],), str(tmp_path / "one")))
    row = json.loads((tmp_path / "one" / "result.json").read_text())["layers"][0]
    assert row["measures"]["mean_squared_cosine"] | {"null": None} == {
        "value": 1.0, "low": None, "high": None, "n": 5, "clusters": 5, "level": 0.95, "null": None,
        "method": "two bases without the rows behind them, which show no doubt",
    }  # fmt: skip
    assert (row["layer"], row["ceiling"]) == (3, None)
    assert lines[1].split()[:3] == ["3", "1x2", "1.000"]
    run_overlap(OverlapCommand((files["direction-3"],), (files["direction-5"],), str(tmp_path / "two")))
    assert json.loads((tmp_path / "two" / "result.json").read_text())["layers"][0]["layer"] is None


def test_the_figure_draws_value_and_every_null(files: dict[str, str], tmp_path: Path) -> None:
    command = OverlapCommand((files["one"],), (files["two"],), str(tmp_path / "out"), k=2, rows=(files["base"],), draws=50, resamples=20)
    run_overlap(command)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    ax = draw_overlap(result)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]  # type: ignore[union-attr]
    assert {"isotropic null, mean and 95 %", "covariance-matched null, mean and 95 %", "noise ceiling of half the rows"} <= set(labels)
    line = next(line for line in ax.lines if line.get_label() == "mean squared cosine, 95 % interval")
    assert list(line.get_ydata()) == [row["measures"]["mean_squared_cosine"]["value"] for row in result["layers"]]
    assert list(line.get_xdata()) == list(LAYERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": ("one",), "b": ("two",)}, "exactly one of --k and --share"),
        ({"a": ("one",), "b": ("two",), "k": 1, "share": 0.5}, "exactly one of --k and --share"),
        ({"a": ("one",), "b": ("two",), "k": 1, "layers": (4,)}, "Layer 4 was asked for, but a has layers 3, 5 and b has layers 3, 5"),
        ({"a": ("direction-3", "direction-3"), "b": ("space",)}, "two files of layer 3"),
        ({"a": ("one", "space"), "b": ("space",)}, "takes direction or subspace files, or one or two files of activations; 2 were given"),
        ({"a": ("one",), "b": ("two",), "k": 1, "nulls": ("covariance_matched",)}, "Give them with --rows"),
        (
            {"a": ("one",), "b": ("two",), "k": 1, "nulls": ("gaussian",)},
            "there are covariance_matched, activation_differences, haar, analytic",
        ),
        ({"a": ("nowhere",), "b": ("two",), "k": 1}, "is not a file"),
        ({"a": ("one",), "b": ("two",), "k": 30}, "k = 30 dimensions was asked for in d_model 20"),
    ],
)
def test_refused_before_anything_is_written(files: dict[str, str], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    named = {name: tuple(files.get(f, f) for f in value) if name in ("a", "b") else value for name, value in options.items()}
    with pytest.raises(EmprobeError, match=message):
        run_overlap(OverlapCommand(**named, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_same_folder_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    run_overlap(OverlapCommand((files["direction-3"],), (files["space"],), str(tmp_path / "out")))
    with pytest.raises(MismatchError, match="holds another run: seed differs"):
        run_overlap(OverlapCommand((files["direction-3"],), (files["space"],), str(tmp_path / "out"), seed=1))
