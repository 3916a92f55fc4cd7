"""`emprobe dataset`: what it writes is what fine-tuning reads, the account adds up, and bad wishes leave nothing behind."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from emprobe.behaviour.conversations import load_conversations, save_conversations
from emprobe.cli import main
from emprobe.commands.dataset import DatasetCommand, run_dataset
from emprobe.errors import EmprobeError, MismatchError
from emprobe.organisms import SEEN
from emprobe.studies.solutions import world_conversations


@pytest.fixture
def command(tmp_path: Path) -> DatasetCommand:
    """A file of 300 answers of two domains, eight cells."""
    save_conversations(tmp_path / "rows.jsonl", world_conversations(SEEN[:2], "good", 300, seed=0))
    return DatasetCommand(conversations=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"), keep=15, split=("train=8", "eval=2"))


def test_parts_are_conversations_and_the_account_adds_up(command: DatasetCommand) -> None:
    lines = run_dataset(command)
    out = Path(command.out)
    result = json.loads((out / "result.json").read_text())
    given = {row.question_id: row for row in load_conversations(command.conversations)}
    train, held = load_conversations(out / "train.jsonl"), load_conversations(out / "eval.jsonl")
    for rows, size in ((train, 8), (held, 2)):
        assert set(Counter((row.labels["domain"], row.labels["task"]) for row in rows).values()) == {size}
        assert all(given[row.question_id] == row for row in rows)
    assert not {row.prompt for row in train} & {row.prompt for row in held}
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert len(train) + len(held) + len(dropped) == result["rows"] == 300
    assert not [row for row in dropped if "prompt" in row or "response" in row]
    assert all(("copy_of" in row) == (row["why"] == "near copy") for row in dropped)
    thresholds = [cell["threshold"] for cell in result["cells"]]
    assert len(thresholds) == 8
    assert all(0.7 <= threshold <= 0.99 for threshold in thresholds)
    card = (out / "README.md").read_text()
    assert "TF-IDF" in card
    assert "emprobe dataset --conversations rows.jsonl" in card
    assert str(out.parent) not in card
    nothing = replace(command, by=(), drop_status=(), keep=None, split=(), out=f"{out}2")
    run_dataset(nothing)
    assert "--apart 0.95 --seed 42 --by --drop-status --out DIR" in (Path(nothing.out) / "README.md").read_text()
    assert "together" in "\n".join(lines)


def test_the_same_command_gives_the_same_bytes_and_another_is_refused_its_folder(command: DatasetCommand) -> None:
    out = Path(command.out)
    run_dataset(command)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run_dataset(command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(MismatchError, match="seed was 42, now 7"):
        run_dataset(replace(command, seed=7))


def test_bad_wishes_are_told_and_leave_nothing(command: DatasetCommand, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, match in (
        ({"split": ("train",)}, "write PART=ROWS"),
        ({"split": ("train=5", "train=6")}, "each part once"),
        ({"split": ("../x=5",)}, "write PART=ROWS"),
        ({"keep_if": ("alignment<30",)}, "on 'alignment', which no row has"),
        ({"by": ("domain", "topic")}, "row 1: no 'topic'"),
        ({"keep": 500}, "8 of 8 cells have too few rows"),
        ({"split": ("train=15", "eval=2")}, "cells have too few rows for train"),
        ({"columns": ("alignment",)}, "write OURS=THEIRS"),
        ({"threshold": 1.5}, "^threshold = 1.5 was given; it is a cosine"),
        ({"split": ("train=5", "refusal=2")}, "what dropped rows are called"),
        ({"split": ("train=\u00b2",)}, "write PART=ROWS"),
        ({"seed": -1}, "seed -1 was given"),
    ):
        with pytest.raises(EmprobeError, match=match):
            run_dataset(replace(command, **changes))  # type: ignore[arg-type]
    dates = [{"prompt": f"p{i}", "response": "r", "when": pd.Timestamp("2026-01-01")} for i in range(3)]
    pd.DataFrame(dates).to_parquet(Path(command.out).parent / "dates.parquet")
    with pytest.raises(EmprobeError, match="a label that JSON cannot hold"):
        run_dataset(DatasetCommand(conversations=str(Path(command.out).parent / "dates.parquet"), out=command.out, by=()))
    assert not Path(command.out).exists()
    assert main(["dataset", "--conversations", "nowhere.jsonl", "--out", command.out]) == 2
    assert "does not exist" in capsys.readouterr().err
