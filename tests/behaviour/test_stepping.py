"""Shortcuts that change no token (shared prompts, rows that leave, cheap drawing, packed requests), against a model's own `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import emprobe as em
from emprobe.behaviour.sampled import Answers
from emprobe.errors import EmprobeError
from emprobe.interventions import stepping
from emprobe.models import Checkpoint, load_model
from emprobe.models.caches import RoomyLayer, empty_cache, spread_cache
from emprobe.models.drawing import draw
from tests.fixtures.models import ALL_ARCHITECTURES, Architecture, Checkpoints

QUESTIONS = [em.Conversation.ask(f"q{i}", "plant beans " * (1 + 2 * i)) for i in range(4)]
WHERES = {
    "everywhere": em.Where(),
    "end of prompt": em.Where(prompt_positions=[-1, -2], generation=False),
    "prompt": em.Where(generation=False, exclude_first=True),
    "window": em.Where(prompt=False, generation_window=(1, 4)),
    "no marks": em.Where(exclude_special=True),
}


def often_stopping(path: Any) -> Checkpoint:
    """A checkpoint of which about a fifth of all tokens is taken for an end of turn, so that rows leave all the time."""
    checkpoint = load_model(path)
    checkpoint.hf.generation_config.eos_token_id = list(range(0, checkpoint.hf.config.get_text_config().vocab_size, 5))
    return checkpoint


def ask(checkpoint: Checkpoint, **more: Any) -> Answers:
    return em.generate(checkpoint, QUESTIONS, **{"samples": 5, "max_new_tokens": 12, "progress": False, **more})


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Answers without the shortcuts."""

    def run(checkpoint: Checkpoint, **more: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(stepping, "steppable", lambda checkpoint: False)
            return ask(checkpoint, **more)

    return run


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_tokens_are_those_of_the_models_own_generate(
    name: Architecture, checkpoints_of: Callable[[Architecture], Checkpoints], plainly: Callable[..., Any]
) -> None:
    checkpoint = often_stopping(checkpoints_of(name).base)
    for temperature in (0.0, 4.0):
        plain = plainly(checkpoint, temperature=temperature)
        assert ask(checkpoint, temperature=temperature) == plain
        assert ask(checkpoint, temperature=temperature, token_budget=60) == plain
    assert len({len(a.response or "") for a in plain}) > 3, "rows leave at different times"


def test_the_shortcuts_are_taken_where_they_can_be(checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    taken = {name for name in ALL_ARCHITECTURES if stepping.steppable(load_model(checkpoints_of(name).base))}
    assert {"llama", "qwen2", "gemma2", "gpt2", "qwen3", "mistral", "olmo2"} <= taken


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_steered_tokens_and_receipts_are_too(
    name: Architecture, where: str, checkpoints_of: Callable[[Architecture], Checkpoints], plainly: Callable[..., Any]
) -> None:
    checkpoint = often_stopping(checkpoints_of(name).base)
    v = em.Direction.from_vector(torch.randn(checkpoint.d_model, generator=torch.Generator().manual_seed(0)), layer=1, resid_norm=20.0)
    found = []
    for run in (plainly, ask):
        with em.intervene(checkpoint, em.Add(v, 1.0, where=WHERES[where])) as receipt:
            found.append((run(checkpoint), receipt.as_dict()[0]))
    (plain, slow), (answers, quick) = found
    assert answers == plain
    assert answers != ask(checkpoint), "steering does something"
    for name in ("rows", "positions_in_prompt"):
        assert quick[name] == slow[name], name
    for name in ("rows_steered", "positions_in_generation"):
        assert quick[name] <= slow[name], "less is steered in vain"
    assert quick["rows_steered"] == slow["rows_steered"] or not WHERES[where].prompt


def test_conditions_and_all_writes_too(checkpoints_of: Callable[[Architecture], Checkpoints], plainly: Callable[..., Any]) -> None:
    checkpoint = often_stopping(checkpoints_of("qwen2").base)
    vectors = torch.randn(2, checkpoint.d_model, generator=torch.Generator().manual_seed(1))
    v, u = (em.Direction.from_vector(vector, layer=1, resid_norm=20.0) for vector in vectors)
    operators = (em.Ablate(v, site="writes"), em.Add(u, 1.0, when=em.When(u, above=0.0), layers=[2]))
    with em.intervene(checkpoint, *operators):
        plain = plainly(checkpoint)
    with em.intervene(checkpoint, *operators):
        assert ask(checkpoint) == plain


def test_a_sweeps_receipt_counts_each_plans_rows(checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    checkpoint = often_stopping(checkpoints_of("llama").base)
    v = em.Direction.from_vector(torch.ones(checkpoint.d_model), layer=1, resid_norm=20.0)
    plans = {"none": [], "weak": em.Add(v, 0.1), "strong": em.Add(v, 2.0)}
    swept = em.sweep(checkpoint, QUESTIONS, plans, samples=5, max_new_tokens=12, progress=False)
    for line, name in zip(swept.receipt.as_dict(), ("weak", "strong"), strict=True):
        with em.intervene(checkpoint, plans[name]) as receipt:
            assert swept[name] == ask(checkpoint)
        alone = receipt.as_dict()[0]
        assert (line["rows"], line["rows_steered"], line["positions_in_prompt"]) == (20, 20, alone["positions_in_prompt"])
    assert swept["none"].plan is None
    assert swept["weak"].plan == em.Plan.of(plans["weak"]).hash


@pytest.mark.parametrize("steered", [False, True])
def test_packed_requests_draw_the_same_tokens(llama: Checkpoints, steered: bool) -> None:
    checkpoint = often_stopping(llama.base)
    v = em.Direction.from_vector(torch.ones(checkpoint.d_model), layer=1, resid_norm=20.0)
    for temperature in (1.0, 0.0):
        found = {}
        for engine in ("hf", "hf-batching"):
            if steered:
                with em.intervene(checkpoint, em.Add(v, 1.0, where=em.Where(prompt_positions=[-1]))):
                    found[engine] = ask(checkpoint, engine=engine, temperature=temperature, samples=2)
            else:
                found[engine] = ask(checkpoint, engine=engine, temperature=temperature, samples=2)
        assert found["hf"] == found["hf-batching"]
        assert found["hf-batching"].engine == "hf-batching"


def draw_exactly(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.Tensor:
    """The definition: the first token at which the cumulative probability, in double precision, passes the number."""
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    return (cumulative > uniforms[:, None] * cumulative[:, -1:]).long().argmax(dim=-1)


@given(st.integers(0, 2**32), st.sampled_from([5, 255, 256, 257, 1000]), st.sampled_from([0.25, 1.0, 3.0]))
def test_cheap_drawing_is_drawing(seed: int, vocabulary: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(6, vocabulary, generator=generator)
    logits[:, ::3] = -torch.inf
    uniforms = torch.rand(6, dtype=torch.float64, generator=generator)
    # At the very edge between two tokens, on either side, where single precision cannot tell.
    p = torch.softmax(logits[:2].double() / temperature, dim=-1).cumsum(dim=-1)
    edge = p[:, vocabulary // 2] / p[:, -1] + torch.tensor([1e-12, -1e-12])
    uniforms[:2] = edge.clamp(1e-12, 1 - 1e-12)
    assert torch.equal(draw(logits, uniforms, temperature), draw_exactly(logits, uniforms, temperature))
    ends = torch.tensor([0.0, 1 - 2**-53] * 3, dtype=torch.float64)
    assert torch.isfinite(logits.gather(1, draw(logits, ends, temperature)[:, None])).all(), "what has no probability is never drawn"
    of = torch.tensor([3, 3, 0])
    assert torch.equal(draw(logits, uniforms[:3], temperature, of), draw(logits[of], uniforms[:3], temperature))


def test_logits_that_are_no_numbers_are_refused(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    with torch.no_grad():
        checkpoint.hf.lm_head.weight.fill_(torch.nan)
    with pytest.raises(EmprobeError, match="logits that are no numbers"):
        ask(checkpoint)


def test_kept_keys_and_values_are_those_of_a_cache_that_grows(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    cache = empty_cache(checkpoint)
    assert cache is not None
    first, second = torch.randn(2, 2, 3, 8), torch.randn(3, 2, 1, 8)
    for layer in cache.layers:
        layer.update(first, first + 1)
    rows = torch.tensor([1, 0, 1])
    spread = spread_cache(cache, rows, room=4)
    assert all(isinstance(layer, RoomyLayer) for layer in spread.layers)
    keys, values = spread.layers[0].update(second, second + 1)
    assert torch.equal(keys, torch.cat([first[rows], second], dim=2))
    assert torch.equal(values, keys + 1)
    fewer = spread_cache(spread, torch.tensor([2]), room=0)
    assert torch.equal(fewer.layers[0].keys, keys[2:])
    assert (spread.get_seq_length(), fewer.get_seq_length(), cache.get_seq_length()) == (4, 4, 3), "each goes on by itself"
