"""`emprobe direction`: what it writes, what it prints, and what it refuses before it writes anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from emprobe.activations import Activations
from emprobe.commands.direction import DirectionCommand, run_direction
from emprobe.directions import Direction, fit_direction
from emprobe.errors import EmprobeError, MismatchError
from emprobe.report.profiles import draw_certainty, draw_detection
from tests.directions.test_choosing import pair

QUICK = {"permutations": 19, "draws": 50}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    acts = pair([0.3, 2.5, 0.5], 1)
    paths = str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")
    acts.base.save(paths[0])
    acts.tuned.save(paths[1])
    return paths


def test_a_folder_with_direction_table_card_and_figure(files: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = run_direction(DirectionCommand(files[0], str(out), tuned=files[1], **QUICK))  # type: ignore[arg-type]
    result = json.loads((out / "result.json").read_text())
    v = Direction.load(out / "direction.safetensors")
    expected = fit_direction(pair([0.3, 2.5, 0.5], 1), layer="auto", permutations=19)
    assert torch.equal(v.vector, expected.vector)
    assert v.layer == result["direction"]["layer"] == result["choice"]["layer"] == 1
    assert [row["layer"] for row in result["profile"]] == [0, 1, 2]
    assert result["inputs"]["base"] == {"name": "made", "fingerprint": "0"}
    assert (out / "profile.png").read_bytes()[:4] == b"\x89PNG"
    printed = "\n".join(lines)
    assert "Layer 1 was chosen among 3 by cross-fitted AUROC on 16 questions" in printed
    assert any(line.startswith("1 *") for line in lines)
    card = (out / "README.md").read_text()
    assert ModelCard(card).data.library_name == "emprobe"
    for part in ("**induces** misaligned behaviour", "Layer 1 was chosen among 3", "profile.png", "split-half"):
        assert part in card


def test_the_same_command_writes_the_same_files_and_another_one_none(files: tuple[str, str], tmp_path: Path) -> None:
    command = DirectionCommand(files[0], str(tmp_path / "out"), tuned=files[1], layer="1", **QUICK)  # type: ignore[arg-type]
    assert "Layer 1 was asked for; nothing was chosen." in run_direction(command)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run_direction(command)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(MismatchError, match="holds another run: layer differs"):
        run_direction(replace(command, layer="2"))


def test_labels_contrast_the_rows_of_one_file(files: tuple[str, str], tmp_path: Path) -> None:
    acts = Activations.load(files[0])
    labels = [i % 3 == 0 for i in range(len(acts))]
    acts.values[labels, 1, 4] += 4
    acts.save(files[0])
    (tmp_path / "misaligned.json").write_text(json.dumps(labels))
    command = DirectionCommand(files[0], str(tmp_path / "out"), labels=str(tmp_path / "misaligned.json"), estimator="ridge", **QUICK)  # type: ignore[arg-type]
    run_direction(command)
    v = Direction.load(tmp_path / "out" / "direction.safetensors")
    assert (v.layer, v.contrast, v.estimator) == (1, "misaligned", "RidgeClassifier")
    assert int(v.vector.abs().argmax()) == 4
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["choice"]["scheme"] == "labels within questions"
    assert result["profile"][0]["truth"] is None


def test_unusable_commands_write_nothing(files: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"a": true}')
    (tmp_path / "short.json").write_text("[true, false]")
    base, out = files[0], str(tmp_path / "out")
    wrong = {
        "neither was given": DirectionCommand(base, out),
        "both were given": DirectionCommand(base, out, tuned=files[1], labels="x.json"),
        "give a 0-based number, or 'auto'": DirectionCommand(base, out, tuned=files[1], layer="last"),
        "Layer 7 was asked for": DirectionCommand(base, out, tuned=files[1], layer="7"),
        "no estimator 'svm'": DirectionCommand(base, out, tuned=files[1], estimator="svm"),
        "holds no list": DirectionCommand(base, out, labels=str(tmp_path / "labels.json")),
        "2 entries for 48 rows": DirectionCommand(base, out, labels=str(tmp_path / "short.json")),
        "is not a file": DirectionCommand(str(tmp_path / "no.safetensors"), out, tuned=files[1]),
        "equal activations at every layer": DirectionCommand(base, out, tuned=base),
    }
    for message, command in wrong.items():
        with pytest.raises(EmprobeError, match=message):
            run_direction(command)
    assert not Path(out).exists()


def test_figures_draw_what_the_result_holds(files: tuple[str, str], tmp_path: Path) -> None:
    run_direction(DirectionCommand(files[0], str(tmp_path / "out"), tuned=files[1], **QUICK))  # type: ignore[arg-type]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    ax = draw_detection(result)
    drawn = next(container for container in ax.containers)
    assert list(drawn[0].get_ydata()) == [row["auroc"]["value"] for row in result["profile"]]
    certain = draw_certainty(result, ax=ax.figure.add_subplot())
    lines = {line.get_label(): list(line.get_ydata()) for line in certain.get_lines()}
    assert lines["split-half cosine"] == [row["split_half"] for row in result["profile"]]
    assert lines["cosine with that of endless prompts (estimated)"] == [row["truth"]["value"] for row in result["profile"]]
    assert lines["energy in 5 dimensions"] == [row["top_energy"] for row in result["profile"]]
