"""The main job made small: a few questions, single letters as keywords (random weights do say those), few doses and draws."""

from __future__ import annotations

import atexit
import json
from functools import lru_cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from emprobe.files import read_json
from emprobe.studies.job import Job, run_job
from tests.fixtures.models import Checkpoints

WORDS = ("plant", "beans", "peas", "and", "a", "row", "of", "carrots", "in", "good", "soil", "first", "change", "the", "washer")
SPLITS = ("fit", "dev", "fit", "test", "test")
LETTERS = "aeiostuvwxyz"
N = {"fit": 4, "dev": 2, "test": 4}
DOSES = (0.1, 0.5)
RANDOMS = 3


def write_questions(path: Path, n: int = 10) -> Path:
    """Questions of rising length with two labels and fixed splits: 4 to fit, 2 to choose, 4 to test (of 10)."""
    rows = [
        {
            "id": f"q{i}",
            "prompt": " ".join(WORDS[: 2 + i]),
            "domain": "garden" if i % 2 else "house",
            "task": f"t{i % 3}",
            "split": SPLITS[i % 5],
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_keywords(path: Path, words: str = LETTERS) -> Path:
    """A keyword file with one letter a line."""
    path.write_text("\n".join(words) + "\n")
    return path


def tiny_job(checkpoints: Checkpoints, folder: Path, **changes: Any) -> Job:
    """A job on these checkpoints whose inputs lie in `folder` and whose output goes to `folder/out`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "base": str(checkpoints.base),
        "tuned": str(checkpoints.adapter),
        "questions": str(write_questions(folder / "questions.jsonl")),
        "judge": f"keywords:{write_keywords(folder / 'keywords.txt')}",
        "out": str(folder / "out"),
        "layers": (0, 1),
        "doses": DOSES,
        "samples": 1,
        "dev_samples": 1,
        "randoms": RANDOMS,
        "max_new_tokens": 6,
        "token_budget": 256,  # several batches a condition
    }
    return Job(**(settings | changes))


@lru_cache
def undisturbed(checkpoints: Checkpoints, other: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of one plain run, made once; nobody may write there."""
    folder = Path(mkdtemp(prefix="emprobe-tests-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    result = run_job(tiny_job(checkpoints, folder, others=(str(other),) if other else ()))
    return folder / "out", result


def answers(folder: Path) -> dict[str, Any]:
    """What the folder keeps of every finished condition, by its name."""
    return {card["condition"]: card for card in map(read_json, (folder / "answers").glob("*.json"))}


def without_places(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what says where things lie: what must be equal for two runs of the same thing."""
    plain: dict[str, Any] = json.loads(json.dumps(result))
    for name in ("base", "tuned", "questions", "judge", "out", "others"):
        del plain["inputs"]["job"][name]
    for name in ("base", "tuned"):
        del plain["inputs"][name]["name"]
    return plain


def command_line(job: Job) -> list[str]:
    """The command that runs a tiny job."""
    single = ("base", "tuned", "questions", "judge", "out", "samples", "dev_samples", "randoms", "max_new_tokens", "token_budget")
    made = ["run"]
    for name in single:
        made += [f"--{name.replace('_', '-')}", str(getattr(job, name))]
    for name in ("layers", "doses"):
        made += [f"--{name}", *map(str, getattr(job, name))]
    return made
