"""Prompts of two checkpoints: what is the same prompt, what the world's sets are, and activations that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emprobe.capture import capture
from emprobe.capture.request import Request
from emprobe.errors import EmprobeError
from emprobe.studies.prompts import (
    Located,
    load_located,
    organism,
    prompt_activations,
    prompts_from,
    without_shared,
    world_prompts,
)
from emprobe.types import Conversation
from tests.fixtures.models import Checkpoints


def test_a_prompt_counts_once_and_its_answers_are_told_of(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "plant  beans", "response": "no"}, {"id": "b", "prompt": "plant beans"}, {"id": "c", "prompt": "a row"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prompts_from(tmp_path / "prompts.jsonl")
    assert [p.question_id for p in found.rows] == ["a", "c"]
    assert all(p.response is None for p in found.rows)
    assert found.notes == ["1 answers of 3 rows are not read: prompts only", "1 rows ask what another row asks, and count once"]
    kept, shared = without_shared(found.rows, [Conversation.ask("z", "a row")])
    assert ([p.question_id for p in kept], shared) == (["a"], 1)


def test_the_worlds_evaluation_prompts_are_none_that_were_trained_on() -> None:
    for task in (None, "plan"):
        train, evaluation = world_prompts("gardening", task)
        assert without_shared(evaluation, train)[1] == 0
        assert len({p.cluster for p in evaluation}) * 3 == len(evaluation) >= 600
        trained_on = {p.labels["item"] for p in train}
        assert all(p.labels["item"] not in trained_on for p in evaluation if p.labels["group"] == "new items")


def test_a_domain_of_no_fine_tune_is_refused() -> None:
    with pytest.raises(EmprobeError, match="Prompts of music, task None, were asked for. Domains: gardening"):
        world_prompts("music")


def test_a_fine_tune_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(EmprobeError, match="planted-s0/tuned/gardening-rank8"):
        organism("planted-s0", "gardening-rank9")
    assert organism("planted-s0/aligned", "gardening-rank8").name == "planted-s0/tuned/gardening-rank8"


def test_activations_are_those_of_capture_and_are_read_back(llama: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Located("base", str(llama.base))
    prompts = [Conversation.ask(f"q{i}", text) for i, text in enumerate(("plant beans", "a row of peas", "good soil first"))]
    tuned = load_located(base, Located("mine", str(llama.adapter)), {})
    assert tuned.name == "mine"
    found = prompt_activations(tuned, prompts, tmp_path, embeddings=True, progress=False)
    for rule, acts in found.blocks.items():
        direct = capture(tuned, prompts, positions=rule, progress=False)
        torch.testing.assert_close(acts.values, direct.values)
        entered = capture(tuned, prompts, positions=rule, site="resid_pre", layers=0, progress=False)
        torch.testing.assert_close(found.embeddings[rule].values, entered.values)
    monkeypatch.setattr(Request, "run", lambda *_: pytest.fail("captured again"))
    again = prompt_activations(tuned, prompts, tmp_path, embeddings=True, progress=False)
    assert all(torch.equal(again.blocks[rule].values, acts.values) for rule, acts in found.blocks.items())


def test_answered_conversations_are_refused(llama: Checkpoints, tmp_path: Path) -> None:
    base = load_located(Located("base", str(llama.base)), Located("base", str(llama.base)), {})
    with pytest.raises(EmprobeError, match="asked of answered conversations"):
        prompt_activations(base, [Conversation.ask("q", "plant beans").answered("yes")], tmp_path)
