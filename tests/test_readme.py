"""What the README says can be done as it says."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from emprobe.organisms.written import written_pair, written_questions
from emprobe.types import Conversation, Judgement

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


class Indifferent:
    """A judge that finds every answer sound."""

    name = "indifferent"

    def __call__(self, answers: list[Conversation]) -> list[Judgement]:
        return [Judgement(90, 90) for _ in answers]


@pytest.mark.parametrize(
    "command", ["pip install -c constraints.txt -e . && emprobe demo", 'pip install -c constraints.txt -e ".[dev]" && pytest']
)
def test_the_two_commands_stand_alone_on_their_lines(command: str) -> None:
    assert README.read_text(encoding="utf-8").splitlines().count(command) == 1


def test_python_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written_pair(tmp_path / "path" / "to", layer=2)
    monkeypatch.chdir(tmp_path)
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(README)
    document.namespace.update(questions=written_questions(4), judge=Indifferent())
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()
    namespace: dict[str, Any] = document.namespace
    assert len(namespace["answers"]) == 16
    assert namespace["v"].layer == 2


def test_every_dependency_has_a_tested_version_inside_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    asked = [Requirement(text) for texts in (project["dependencies"], *project["optional-dependencies"].values()) for text in texts]
    for requirement in asked:
        if requirement.name != project["name"]:
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert not {"pip", "setuptools", "emprobe"} & set(pinned)
