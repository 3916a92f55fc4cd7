"""A sweep gives under every plan what `generate` gives within `intervene`, and its receipt says which plan is which."""

from __future__ import annotations

import pytest
import torch

import emprobe as em
from emprobe.errors import EmprobeError
from emprobe.models import Checkpoint, load_model
from emprobe.types import Conversation
from tests.fixtures.models import Checkpoints

QUESTIONS = [Conversation.ask(str(n), "beans " * n + "soil") for n in (1, 4, 9)]


@pytest.fixture(scope="module")
def checkpoint(llama: Checkpoints) -> Checkpoint:
    return load_model(llama.base)


@pytest.fixture(scope="module")
def plans(checkpoint: Checkpoint) -> dict[str, em.Add | em.Ablate | list[em.Add]]:
    vectors = torch.randn(2, checkpoint.d_model, generator=torch.Generator().manual_seed(0))
    one, other = (em.Direction.from_vector(v, layer=1, resid_norm=20.0) for v in vectors)
    return {"none": [], "weak": em.Add(one, 0.1), "strong": em.Add(one, 2.0), "two": [em.Add(one, 1.0), em.Add(other, -1.0)]}


@pytest.mark.parametrize("token_budget", [8192, 64])
def test_every_plan_gives_what_it_gives_alone(checkpoint: Checkpoint, plans: dict[str, em.Add | list[em.Add]], token_budget: int) -> None:
    swept = em.sweep(checkpoint, QUESTIONS, plans, samples=2, max_new_tokens=6, token_budget=token_budget, progress=False)
    assert list(swept) == list(plans)
    for name, plan in plans.items():
        operators = plan if isinstance(plan, list) else [plan]
        if operators:
            with em.intervene(checkpoint, *operators):
                alone = em.generate(checkpoint, QUESTIONS, samples=2, max_new_tokens=6, progress=False)
        else:
            alone = em.generate(checkpoint, QUESTIONS, samples=2, max_new_tokens=6, progress=False)
        assert swept[name] == alone, name
    assert len({tuple(a.response for a in answers) for answers in swept.values()}) > 1, "steering does something"


def test_the_receipt_names_the_plans(checkpoint: Checkpoint, plans: dict[str, em.Add | list[em.Add]]) -> None:
    receipt = em.sweep(checkpoint, QUESTIONS, plans, max_new_tokens=3, progress=False).receipt
    lines = str(receipt).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["weak", "strong", "two", "two"], "a plan without operators has no line"
    assert {entry["rows"] for entry in receipt.as_dict()} == {len(QUESTIONS)}


def test_no_plan_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(EmprobeError, match="sweep was given no plan"):
        em.sweep(checkpoint, QUESTIONS, {}, progress=False)
