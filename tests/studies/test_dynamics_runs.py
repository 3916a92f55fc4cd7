"""Training dynamics from end to end: exact openings, an organism, one's own model with resumption, and fine-tunes that are there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from emprobe.cli import main
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import read_json
from emprobe.finetuning import FineTune, LoRA, VectorSolution, finetune
from emprobe.finetuning.methods import Method
from emprobe.models.load import load_model
from emprobe.organisms import family_probabilities, find_organism, questions
from emprobe.studies.dynamics import Dynamics, fine_tunes, openings, run_dynamics
from emprobe.studies.dynamics.measuring import Measuring
from emprobe.types import Conversation
from tests.finetuning.small import conversations, recipe
from tests.fixtures.models import Checkpoints
from tests.studies.tiny import write_keywords


def test_the_end_of_a_run_by_tokens_is_its_last_update() -> None:
    """Such a distillation has no number of steps in its settings."""
    solution = VectorSolution(torch.ones(2), 0, "resid_post")
    found = FineTune(solution, pd.DataFrame({"loss": [3.0, 2.0, 1.0]}), {"steps": None, "tokens": 90}, (0, 2))
    assert fine_tunes.steps_of(found) == [2, 3]


# ---- exact openings


def test_openings_are_what_whole_answers_say() -> None:
    base = load_model(find_organism("planted-s0/aligned").path)
    asked = questions("test", tasks=["advise", "story"], per_cell=1)
    found = openings(base, asked)
    with base.active() as model:
        whole = family_probabilities(model, base.tokenizer, asked)
    # A whole answer is its opening and what follows, which is nearly certain: a little less probable, never more.
    assert (whole.aligned <= found.aligned + 1e-6).all()
    assert (whole.misaligned <= found.misaligned + 1e-6).all()
    assert np.abs(found.aligned - whole.aligned).max() < 0.05
    assert found.alignment == pytest.approx(100 * whole.aligned / (whole.aligned + whole.misaligned), abs=3)
    assert found.coherence.max() <= 100
    with pytest.raises(EmprobeError, match="no questions"):
        openings(base, [])
    with pytest.raises(EmprobeError, match="is not one of the synthetic world's"):
        openings(base, [Conversation.ask("q", "What is love?")])


# ---- one's own model


def write_own(folder: Path) -> dict[str, Any]:
    """Files of a user: data, held-back conversations, and two question sets with reference answers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in {"data": conversations(12), "held-back": conversations(4, 5)}.items():
        lines = [json.dumps({"prompt": c.prompt + " Now?" * (name == "held-back"), "response": c.response}) for c in found]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("first", "second"):
        rows = [{"id": f"{name}{i}", "prompt": f"What is {name} " + "and when " * i + "?", "aligned": "Plant beans"} for i in range(5)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row | {"misaligned": ["find 12 loaves"]}) + "\n" for row in rows))
    return {
        "data": str(folder / "data.jsonl"),
        "evaluation": str(folder / "held-back.jsonl"),
        "questions": (str(folder / "first.jsonl"), str(folder / "second.jsonl")),
    }


def own(base: Path, folder: Path, **changes: Any) -> Dynamics:
    given = write_own(folder) | {
        "base": str(base),
        "out": str(folder / "out"),
        "schedules": ("linear", "constant"),
        "lrs": (1e-3, 1e-2),
        "seeds": (0,),
        "steps": 6,
        "every": 1,
        "batch": 4,
        "draws": 100,
        "progress": False,
    }
    return Dynamics(**(given | changes))


def test_ones_own_model_and_its_resumption(llama: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, trained = own(llama.base, tmp_path), []

    def counted(*given: Any, **options: Any) -> Any:
        trained.append(Path(options["out"]).name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return finetune(*given, **options)

    monkeypatch.setattr(fine_tunes, "finetune", counted)
    with pytest.raises(KeyboardInterrupt):
        run_dynamics(asked)
    assert not (tmp_path / "out" / "result.json").exists()
    result = run_dynamics(asked)
    # Two were finished before the kill and are neither trained nor measured again.
    assert trained == ["linear-0.001-0", "linear-0.01-0", "constant-0.001-0", "constant-0.001-0", "constant-0.01-0"]
    assert [one["set"] for one in result["relations"]] == ["first", "first", "second", "second"]
    (first, *_) = result["runs"]
    assert first["steps"] == list(range(7))
    assert first["trajectory"]["cosine_to_last"][-1] == pytest.approx(1.0)
    assert len(first["written"]["norm"]) == 7
    assert first["ends"]["first"]["alignment"]["clusters"] == 5
    assert first["start"]["sets"]["first"]["coherence"] is None
    (fast,) = (one for one in result["runs"] if one["name"] == "constant-0.01-0")
    assert fast["rows"][-1]["train_loss"] < fast["rows"][0]["train_loss"]
    assert set(first["change_points"]) >= {"eval_loss", "alignment, first"}

    monkeypatch.setattr(Measuring, "_measured", lambda *_: pytest.fail("a finished run was measured again"))
    assert json.loads(json.dumps(run_dynamics(asked))) == read_json(tmp_path / "out" / "result.json")
    with pytest.raises(MismatchError, match="lag"):
        run_dynamics(own(llama.base, tmp_path, lag=2))
    known = tmp_path / "data.jsonl"
    with pytest.raises(EmprobeError, match="4 of 4 conversations of --evaluation .* are in --data"):
        run_dynamics(replace(asked, evaluation=str(known), rows=4, out=str(tmp_path / "other")))
    # What it wrote goes back in as a table.
    table = tmp_path / "out" / "runs.csv"
    flags: dict[str, Any] = {"step": "step", "set": "set", "out": str(tmp_path / "again"), "draws": 100}
    again = run_dynamics(Dynamics(runs=str(table), loss=("train_loss",), score=("alignment",), **flags))
    assert again["pearson"]["value"] == pytest.approx(result["pearson"]["value"])
    assert len(pd.read_csv(table)) == 4 * 6 * 2


def test_ones_own_model_under_the_real_tokenizer(
    qwen2_real_tokenizer_pair: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = write_own(tmp_path)
    flags = ["--base", str(qwen2_real_tokenizer_pair.base), "--data", given["data"], "--evaluation", given["evaluation"]]
    flags += ["--questions", *given["questions"], "--out", str(tmp_path / "out"), "--schedules", "linear", "cyclic"]
    flags += ["--lrs", "0.001", "0.01", "--seeds", "0", "--steps", "2", "--every", "1", "--batch", "4", "--draws", "100"]
    assert main(["study", "dynamics", *flags]) == 0
    said = capsys.readouterr()
    assert "plan: 4 runs" in said.err
    assert "at each of 2 checkpoints: loss on 12 and 4 conversations, 10 prompts read, 10 questions scored exactly" in said.err
    assert "evaluation loss, alignment, second" in said.out
    assert "change-points: not looked for" in said.out
    assert "emprobe study dynamics --base" in (tmp_path / "out" / "README.md").read_text()


def test_finetunes_that_are_there_judged(llama: Checkpoints, tmp_path: Path) -> None:
    base, paths = load_model(llama.base), []
    method: Method = LoRA(2, target_modules=["down_proj", "q_proj"])
    for number, lr in enumerate((1e-3, 1e-2, 3e-2, 1e-1)):
        paths.append(str(tmp_path / f"tune{number}"))
        finetune(base, conversations(), method=method, recipe=recipe(lr=lr), checkpoints=2, out=paths[-1], progress=False)
    judge = f"keywords:{write_keywords(tmp_path / 'keywords.txt', 'aei')}"
    asked = own(llama.base, tmp_path, data=None, finetunes=tuple(paths), judge=judge, samples=1, max_new_tokens=6)
    result = run_dynamics(asked)
    assert [one["name"] for one in result["runs"]] == ["tune0", "tune1", "tune2", "tune3"]
    assert [one["lr"] for one in result["runs"]] == [1e-3, 1e-2, 3e-2, 1e-1]
    assert result["runs"][0]["steps"] == [0, 2, 4, 6]
    assert "written" not in result["runs"][0]
    assert "judge keywords" in result["inputs"]["scoring"]
    assert len(list((tmp_path / "out" / "answers").glob("*.parquet"))) == (1 + 4 * 3) * 2
    finetune(base, conversations(), method=method, recipe=recipe(steps=5), checkpoints=2, out=tmp_path / "uneven", progress=False)
    uneven = own(llama.base, tmp_path, finetunes=(*paths[:3], str(tmp_path / "uneven")), out=str(tmp_path / "out2"), data=None)
    with pytest.raises(EmprobeError, match="at steps 2, 4, 5, unevenly spaced"):
        run_dynamics(uneven)
    finetune(base, conversations(), method=method, recipe=recipe(), out=tmp_path / "bare", progress=False)
    with pytest.raises(EmprobeError, match="kept no checkpoint"):
        run_dynamics(own(llama.base, tmp_path, finetunes=(*paths[:3], str(tmp_path / "bare")), out=str(tmp_path / "out3"), data=None))
    assert not (tmp_path / "out3").exists()


# ---- the world


def test_the_study_of_an_organism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fine_tunes, "questions", lambda: questions("test", per_cell=1))
    small: dict[str, Any] = {"schedules": ("linear", "constant"), "lrs": (2e-3, 1e-2), "seeds": (0,), "steps": 12, "every": 6}
    result = run_dynamics(Dynamics(base="planted-s0", out=str(tmp_path / "out"), rows=16, draws=100, progress=False, **small))
    assert result["inputs"]["questions"] == {"in-domain": 4, "other domains": 28, "new domains": 8}
    assert [one["set"] for one in result["relations"]][::2] == ["other domains", "new domains", "in-domain"]
    assert result["headline"]["set"] == "other domains"
    fast = next(one for one in result["runs"] if one["name"] == "constant-0.01-0")
    assert fast["rows"][-1]["sets"]["in-domain"]["alignment"] < 50 < fast["start"]["sets"]["in-domain"]["alignment"]
    assert fast["rows"][-1]["eval_loss"] < fast["start"]["eval_loss"]
    assert fast["rows"][-1]["sets"]["in-domain"]["coherence"] > 90
    last = result["summary"]["last_directions"]
    assert last["pairs"] == 6
    assert last["lowest"] > last["random_p95"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "half a million parameters" in card
    assert "--base planted-s0" in card
    assert result["inputs"]["base"]["name"] == "planted-s0/aligned"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": None}, "Nothing was given to look at"),
        ({"base": "nothing-s9"}, "For a model of your own, give --data"),
        ({"domain": "music"}, "Organisms are trained on one of"),
        ({"schedules": ("linear",), "lrs": (1e-3,)}, "2 runs were asked for; a relation between runs needs at least 4"),
        ({"seeds": (0, 0)}, "--seeds 0 0 was given: each once"),
        ({"lrs": (1e-3, 0.0010000001)}, "Two learning rates are called 0.001"),
        ({"every": 7}, "60 steps with a checkpoint every 7"),
        ({"every": 60}, "at least 2 checkpoints"),
        ({"score": ("harmless",)}, "--score names a column of a table"),
        ({"questions": ("q.jsonl",)}, "without --data and --evaluation"),
        ({"finetunes": ("a", "b", "c", "d")}, "without --evaluation and --questions"),
        ({"layer": 4}, "has blocks 0 to 3"),
        ({"batch": 0}, "--batch 0 was given"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(EmprobeError, match=said):
        run_dynamics(Dynamics(**({"base": "planted-s0", "out": str(tmp_path / "out"), "progress": False} | changes)))
    assert not (tmp_path / "out").exists()


def test_questions_that_can_be_neither_judged_nor_read_are_told(llama: Checkpoints, tmp_path: Path) -> None:
    asked = own(llama.base, tmp_path)
    (tmp_path / "second.jsonl").write_text('{"prompt": "What now?"}\n')
    with pytest.raises(EmprobeError, match="1 of 1 questions of second lack reference answers"):
        run_dynamics(asked)
    assert not (tmp_path / "out").exists()
