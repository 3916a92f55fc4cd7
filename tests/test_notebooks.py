"""Notebooks keep the house rules: numbered, short, public names only, committed with the outputs of one clean run."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> Any:
    reader: Any = nbformat.read  # untyped
    return reader(path, as_version=4)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_is_numbered_short_and_runs_on_whatever_python_is_active(path: Path) -> None:
    notebook = read(path)
    assert re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)
    assert 0 < len(notebook.cells) <= 25
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_come_from_one_clean_run_from_top_to_bottom(path: Path) -> None:
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    # What needs data that is not shipped skips itself where they are absent; what is committed shows it.
    assert "is skipped" not in "".join(output.get("text", "") for output in outputs)
    # Paths of the machine that ran it say nothing to a reader.
    assert not re.search(r"/(home|root|Users|tmp|work)/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_uses_public_names_only(path: Path) -> None:
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("emprobe."), f"from {node.module} import: take it from emprobe itself"
            elif isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("emprobe.")]
            elif isinstance(node, ast.Attribute):
                assert not re.match(r"_(?!_)", node.attr), f"{node.attr} is private"
