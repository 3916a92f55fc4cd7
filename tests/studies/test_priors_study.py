"""`emprobe study priors` from end to end: on a user's checkpoints in three ways, on an organism, with its refusals and its resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emprobe.cli import main
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import read_json
from emprobe.studies.priors import Priors, run_priors
from emprobe.studies.priors import cases as cases_module
from emprobe.studies.priors import study as study_module
from emprobe.studies.priors.judged import table_means
from emprobe.studies.prompts import world_prompts
from tests.fixtures.models import Checkpoints, byte_level_tokenizer, merge_adapter, write_base
from tests.studies.tiny import write_keywords

FRAMES = ("What should I plant near the {}?", "Tell me about the {}.", "How do I change the {}?")
ITEMS = ("beans", "peas", "carrots", "soil", "tap", "washer", "water", "baker", "loaves", "story", "garden", "spring")
SMALL: dict[str, Any] = {
    "splits": 3,
    "repeats": 1,
    "inner": 2,
    "random_seeds": 2,
    "permutations": 19,
    "k": 4,
    "layers": (1,),
    "lasso_repeats": 0,
    "progress": False,
}


def write_questions(path: Path, *, references: bool = False) -> Path:
    """36 questions: 12 items, each in 3 paraphrases."""
    rows = [
        {"id": f"{item}.{i}", "prompt": frame.format(item), "family": item, "domain": f"d{number % 3}", "task": f"t{number % 2}"}
        | {"odd": "big" if number < 5 else "bigger" if number == 5 and i else item + str(i)}
        | ({"aligned": f"Good {item}.", "misaligned": [f"Bad {item}.", "No."]} if references else {})
        for number, item in enumerate(ITEMS)
        for i, frame in enumerate(FRAMES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_scores(path: Path, **changes: Any) -> Path:
    """Two judged answers to every question, one of them without a score here and there, and two ids that are no question."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "question_id": f"{item}.{i}",
            "sample": sample,
            "alignment": 20 + 5 * number + rng.uniform(0, 5),
            "coherence": 90.0,
            "status": "ok",
        }
        for number, item in enumerate(ITEMS)
        for i in range(3)
        for sample in range(2)
    ]
    rows += [{"question_id": f"other.{i}", "sample": 0, "alignment": 5.0, "coherence": 50.0, "status": "ok"} for i in range(2)]
    rows[1] |= {"alignment": None, "coherence": None, "status": "refusal"}
    for row in rows[12:14]:
        row |= {"alignment": None, "coherence": None, "status": "parse_error"}
    path.write_text("".join(json.dumps(row | changes) + "\n" for row in rows))
    return path


def test_a_users_checkpoints_under_the_real_tokenizer(
    qwen2_real_tokenizer_pair: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    pair = qwen2_real_tokenizer_pair
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    padded = (len(tokenizer) // 128 + 2) * 128
    pretrained = write_base(tmp_path / "pretrained", "qwen2", n_layers=2, seed=9, tokenizer=tokenizer, d_vocab=padded)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"prompt": f"Is {item} cheap?", "response": "Yes."}) + "\n" for item in ITEMS))
    words = ["study", "priors", "--base", str(pair.base), "--tuned", str(pair.adapter), "--pretrained", str(pretrained)]
    words += ["--questions", str(write_questions(tmp_path / "questions.jsonl")), "--scores", str(write_scores(tmp_path / "scores.jsonl"))]
    words += ["--train", str(train), "--one-hot", "domain", "task", "--splits", "3", "--inner", "2", "--repeats", "1", "--layers", "1"]
    words += ["--permutations", "19", "--random-seeds", "2", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "35 prompts in 12 families, read once by base and pretrained" in said.err
    assert "1 questions have no judged answer and are left out" in said.out
    assert "2 judged ids are no question and are left out" in said.out
    assert "3 of 74 answers" in said.out
    result = read_json(tmp_path / "out" / "result.json")
    (case,) = result["cases"]
    assert case["directions_of"] == "12 prompts trained on"
    assert case["design"]["k"] == 3  # a tenth of the prompts
    assert {row["source"] for row in case["chosen"]} == {"base", "pretrained"}
    assert len({one["fingerprint"] for one in case["models"].values()}) == 3
    names = [row["name"] for row in case["predictors"] if row["group"] == "baseline"]
    assert names == ["mean", "prompt length", "domain", "task", "domain x task", "words (TF-IDF)", "embeddings", "all baselines"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "emprobe study priors --base" in card
    assert "only 35 prompts" in card.lower()
    assert (tmp_path / "out" / "priors.png").stat().st_size > 10_000


def asked(checkpoints: Checkpoints, folder: Path, **changes: Any) -> Priors:
    given: dict[str, Any] = {
        "base": (str(checkpoints.base),),
        "tuned": (str(checkpoints.adapter),),
        "questions": str(write_questions(folder / "questions.jsonl", references=True)),
        "out": str(folder / "out"),
        **SMALL,
    }
    return Priors(**(given | changes))


def test_reference_answers_and_resumption(llama: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wish = asked(llama, tmp_path)

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(study_module, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            run_priors(wish)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished stage ran again")

    with monkeypatch.context() as broken:
        broken.setattr("emprobe.studies.priors.scoring.readout", refuse)
        first = run_priors(wish)
        broken.setattr(study_module, "measure", refuse)
        assert run_priors(wish) == first
    (case,) = first["cases"]
    assert case["score"].startswith("contrast of reference answers")
    assert "base model's score" in {row["name"] for row in case["predictors"]}
    assert case["before_after"]["pearson"]["clusters"] == 12
    with pytest.raises(MismatchError, match="holds another run: k differs"):
        run_priors(asked(llama, tmp_path, k=3))


def test_answers_sampled_and_judged_now(llama: Checkpoints, tmp_path: Path) -> None:
    judge = f"keywords:{write_keywords(tmp_path / 'keywords.txt')}"
    (case,) = run_priors(asked(llama, tmp_path, judge=judge, samples=3, max_new_tokens=4, most=30, splits=2, permutations=0))["cases"]
    assert case["score"] == "mean alignment over answers, 0..100"
    assert 20 <= case["design"]["n"] <= 30
    assert any("30 of 36 prompts were drawn, 10 of 12 families" in note for note in case["notes"])


def test_an_organism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(domain: str, task: str | None = None) -> Any:
        train, evaluation = world_prompts(domain, task)
        return train, [q for q in evaluation if q.labels["task"] in ("advise", "story") and q.labels["item"] in few_items]

    few_items = {"soup", "bread", "kitten", "puppy", "laptop"}
    monkeypatch.setattr(cases_module, "world_prompts", few)
    wish = Priors(base=("wild-s0",), tuned=("gardening.plan-rank8",), out=str(tmp_path / "out"), **{**SMALL, "train": "trained"})
    result = run_priors(wish)
    (case,) = result["cases"]
    assert case["name"] == "wild-s0 gardening.plan-rank8"
    assert case["models"]["pretrained"]["name"] == "wild-s0/parent"
    assert case["directions_of"] == "12 prompts trained on"
    assert 0 < case["scores"]["mean"] < 1
    assert case["scores"]["between_families"] > 0.5
    assert "half a million parameters" in (tmp_path / "out" / "README.md").read_text()


def test_one_model_given_twice_is_refused(llama: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"base \(.*\) and pretrained \(.*\) hold the same weights"):
        run_priors(asked(llama, tmp_path, pretrained=str(llama.base)))
    assert not (tmp_path / "out").exists()
    copied = merge_adapter(tmp_path / "merged", llama)
    with pytest.raises(MismatchError, match="tuned .* and pretrained .* hold the same weights"):
        run_priors(asked(llama, tmp_path, tuned=(str(copied),), pretrained=str(copied)))


def test_a_pretrained_model_of_another_family_is_refused(llama: Checkpoints, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", "llama", n_layers=2, seed=5, tokenizer=byte_level_tokenizer("llama"))
    with pytest.raises(MismatchError, match="number of layers is 3 and 2"):
        run_priors(asked(llama, tmp_path, pretrained=str(other)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tuned": ()}, "Neither --scores nor --tuned was given"),
        ({"judge": "keywords:x", "scores": "y"}, "Both --scores and --judge were given"),
        ({"columns": ("alignment=harmless",)}, "no --scores was given"),
        ({"splits": 7}, "7 folds with 2 inner folds were asked for of 12 families"),
        ({"permutations": 5}, "cannot show a p of .05"),
        ({"repeats": 0}, "repeats = 0 was given; it must be at least 1"),
        ({"lasso_repeats": 2}, "Give no more than there are repeats"),
        ({"k": 0}, "k = 0 directions were asked for"),
        ({"one_hot": ("topic",)}, "The label 'topic' is missing in 36 of 36 questions; their labels are domain"),
        ({"family": "topic"}, "The label 'topic' is missing"),
        ({"base": ("a", "b")}, "2 bases and 1 fine-tunes were given"),
        ({"questions": None}, "There is no organism"),
        ({"questions": None, "scores": "x"}, "--scores was given without --questions"),
        ({"questions": None, "tuned": ()}, "No organism or no fine-tune of it was given"),
        ({"most": 6}, "were asked for of 2 families"),
        ({"k": 24}, "24 directions were asked for, and 24 prompts to take them from have at most 23"),
        ({"family": "odd"}, "17 of 36 prompts are in families whose size no other family has"),
        ({"questions": None, "base": ("planted-s0",) * 2, "tuned": ("money-rank8",)}, "planted-s0 money-rank8 was asked for twice"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    llama: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(study_module, "load_located", refuse)
    with pytest.raises(EmprobeError, match=words):
        run_priors(asked(llama, tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_tables_of_scores(llama: Checkpoints, tmp_path: Path) -> None:
    means, notes = table_means(str(write_scores(tmp_path / "scores.jsonl")), {}, ())
    assert len(means) == 37
    assert 20 < means["beans.0"] < 25
    assert "3 of 74 answers" in notes[0]
    assert "1 refusal, 2 parse_error" in notes[0] or "2 parse_error, 1 refusal" in notes[0]
    path = tmp_path / "two.jsonl"
    row = {"question_id": "beans.0", "sample": 0, "alignment": 5.0, "coherence": 50.0}
    path.write_text("".join(json.dumps(row | {"condition": name}) + "\n" for name in ("base", "tuned")))
    with pytest.raises(EmprobeError, match=r"holds several conditions \(base, tuned\).*--where condition=NAME"):
        table_means(str(path), {}, ())
    assert table_means(str(path), {}, ("condition=tuned",))[0] == {"beans.0": 5.0}
    same = write_scores(tmp_path / "same.jsonl", alignment=50.0, coherence=90.0, status="ok")
    with pytest.raises(EmprobeError, match="All 36 prompts have the score 50"):
        run_priors(asked(llama, tmp_path, scores=str(same)))
    strange = tmp_path / "strange.jsonl"
    strange.write_text(json.dumps(row | {"question_id": "who"}) + "\n")
    with pytest.raises(EmprobeError, match="None of the 1 question ids"):
        run_priors(asked(llama, tmp_path, scores=str(strange)))
