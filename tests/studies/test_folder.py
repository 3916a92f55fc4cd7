"""A folder belongs to one run, and says what differs if another asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import read_json
from emprobe.studies.folder import claim_folder

IDENTITY = {"seed": 0, "base": "abc", "doses": [0.1, 0.5]}


@pytest.mark.parametrize("exists", [True, False])
def test_new_and_empty_folders_are_claimed_and_the_same_run_comes_back(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    assert claim_folder(folder, IDENTITY) == folder
    assert read_json(folder / "run.json") == IDENTITY
    (folder / "answers.txt").write_text("mine")
    assert claim_folder(folder, IDENTITY) == folder


def test_another_run_is_refused_with_every_difference_named(tmp_path: Path) -> None:
    claim_folder(tmp_path / "run", IDENTITY)
    with pytest.raises(MismatchError, match=r"holds another run: seed differs \(seed was 0, now 1\)"):
        claim_folder(tmp_path / "run", IDENTITY | {"seed": 1})
    with pytest.raises(MismatchError, match=r"base, samples, seed differ \(base was 'abc', now None\)"):
        claim_folder(tmp_path / "run", {"seed": 2, "samples": 3, "doses": [0.1, 0.5]})
    assert read_json(tmp_path / "run" / "run.json") == IDENTITY


def test_foreign_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(EmprobeError, match="holds files that are no run of emprobe"):
        claim_folder(tmp_path, IDENTITY)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(EmprobeError, match=r"out cannot be used: File exists. Give another with --out"):
        claim_folder(tmp_path / "out", IDENTITY)


def test_a_damaged_mark_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(EmprobeError, match=r"run.json could not be read as JSON"):
        claim_folder(tmp_path, IDENTITY)
