"""Beams, several answers, sampling, continuous batching, rows with plans of their own, and plain forward passes are steered exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from emprobe.batching import pad
from emprobe.behaviour.sampling import generate
from emprobe.errors import EmprobeError, InterventionDidNotFire
from emprobe.interventions import Ablate, Add, Cap, Rotate, SetProjection, When, Where, intervene, intervene_rows
from emprobe.models import Checkpoint, encode, load_model
from emprobe.types import Conversation
from tests.fixtures.models import ARCHITECTURES, Architecture, Checkpoints
from tests.interventions.by_hand import FAMILIES, WHERES, direction, greedy, hooked, load_narrow

WORDS = ["plant", "beans", "peas", "and", "a", "row", "of", "carrots", "in", "good", "soil", "first", "change", "the", "washer"]
QUESTIONS = [Conversation.ask(f"q{n}", " ".join(WORDS[:n])) for n in (1, 4, 9)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(
    request: pytest.FixtureRequest, checkpoints_of: Callable[[Architecture], Checkpoints], tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return load_narrow(checkpoints_of, request.param, tmp_path_factory.mktemp("narrow") / "copy")


@pytest.fixture(scope="module")
def one(checkpoints_of: Callable[[Architecture], Checkpoints]) -> Checkpoint:
    return load_model(checkpoints_of("llama").base)


def prompts_of(checkpoint: Checkpoint) -> list[list[int]]:
    prompts = [list(encode(checkpoint.tokenizer, q).ids) for q in QUESTIONS]
    return [*prompts, prompts[0][3:4]]


def new_tokens(checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], **how: Any) -> list[list[int]]:
    ids, mask = pad(prompts, checkpoint.tokenizer.pad_token_id, "left")
    with torch.no_grad():
        out = checkpoint.hf.generate(input_ids=ids, attention_mask=mask, **{"do_sample": False, "max_new_tokens": 5, **how})
    eos = checkpoint.tokenizer.eos_token_id
    rows = [row[ids.shape[1] :].tolist() for row in out]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


@contextmanager
def adding(checkpoint: Checkpoint, dose: Tensor) -> Iterator[None]:
    """A model that adds a vector at block 1 by its weights: its block is another module."""
    block = checkpoint.blocks[1]
    own = block.forward
    block.forward = lambda *a, **k: own(*a, **k) + dose
    try:
        yield
    finally:
        del block.forward


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 3, "use_cache": False}])
def test_beams_equal_those_of_an_edited_model(checkpoint: Checkpoint, how: dict[str, Any]) -> None:
    d, prompts = direction(checkpoint), prompts_of(checkpoint)[:2]
    with adding(checkpoint, 7.5 * d.vector.float()):
        wanted = new_tokens(checkpoint, prompts, **how)
    with intervene(checkpoint, Add(d, 1.5)):
        assert new_tokens(checkpoint, prompts, **how) == wanted
        alone = [answer for prompt in prompts for answer in new_tokens(checkpoint, [prompt], **how)]
    assert alone == wanted


@pytest.mark.parametrize("where", ["windows", "generation", "from the last prompt token on"])
def test_beams_know_prompt_from_answer(one: Checkpoint, where: str) -> None:
    operator, prompts = Add(direction(one), 1.5, where=WHERES[where][0]), prompts_of(one)[:3]
    with intervene(one, operator):
        together = new_tokens(one, prompts, num_beams=3)
    for prompt, wanted in zip(prompts, together, strict=True):
        for how in ({"num_beams": 3}, {"num_beams": 3, "use_cache": False}):
            with intervene(one, operator):
                assert new_tokens(one, [prompt], **how) == [wanted]


def test_sampled_answers_do_not_hang_on_the_batch_or_the_cache(checkpoint: Checkpoint) -> None:
    with intervene(checkpoint, Add(direction(checkpoint), 0.5, where=Where(prompt_positions=[-1]))):
        together = generate(checkpoint, QUESTIONS, samples=3, temperature=1.0, max_new_tokens=5, progress=False)
        apart = generate(checkpoint, QUESTIONS, samples=3, temperature=1.0, max_new_tokens=5, token_budget=1, progress=False)
    assert together == apart
    prompt = prompts_of(checkpoint)[0]
    with intervene(checkpoint, Add(direction(checkpoint), 0.5)):
        found = []
        for how in ({"use_cache": True}, {"use_cache": False}):
            torch.manual_seed(0)
            found.append(new_tokens(checkpoint, [prompt], do_sample=True, num_return_sequences=4, **how))
    assert found[0] == found[1]


# ---- plain forward passes


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", [("add", "windows"), ("ablate", "all"), ("turn", "generation"), ("set", "without the first")])
def test_a_padded_batch_equals_its_rows(checkpoint: Checkpoint, case: tuple[str, str], side: str) -> None:
    family, (where, named) = FAMILIES[case[0]], WHERES[case[1]]
    texts = [p + p[:5] for p in prompts_of(checkpoint)[:3]]
    lengths = [len(t) - 5 for t in texts]
    ids, mask = pad(texts, checkpoint.tokenizer.pad_token_id, side)
    operator = family.make(direction(checkpoint), direction(checkpoint, seed=1), where=where)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)  # GPT-2 learns positions and does not read them from the mask
    with intervene(checkpoint, operator) as receipt, torch.no_grad():
        receipt.prompt_lengths = lengths
        together = checkpoint.hf(ids, attention_mask=mask, position_ids=positions).logits
        by_position = checkpoint.model.get_decoder()(ids, attention_mask=mask, position_ids=positions)[0]
    assert by_position.isfinite().all()
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        with hooked(checkpoint, text, length, family, named), torch.no_grad():
            alone = checkpoint.hf(torch.tensor([text])).logits[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone, rtol=1e-4, atol=1e-4)


def test_texts_packed_into_one_row_have_a_prompt_length_each(one: Checkpoint) -> None:
    a, b = prompts_of(one)[:2]
    ids = torch.tensor([a + b])
    position_ids = torch.tensor([[*range(len(a)), *range(len(b))]])
    operator = Add(direction(one), 1.5, where=Where(prompt=False))
    with intervene(one, operator) as receipt, torch.no_grad():
        receipt.prompt_lengths = [4, 6]
        one.hf(ids, position_ids=position_ids)
        (line,) = receipt.as_dict()
        assert line["positions"] == len(a) - 4 + len(b) - 6
        receipt.prompt_lengths = [4]
        with pytest.raises(EmprobeError, match="1 entries, but the forward pass has 1 rows with 2 texts in it"):
            one.hf(ids, position_ids=position_ids)


def test_what_generate_said_does_not_leak_into_the_next_forward_pass(one: Checkpoint) -> None:
    operator, ids = Add(direction(one), 1.0, where=Where(prompt=False)), torch.tensor(prompts_of(one)[:1])
    with intervene(one, operator) as receipt:
        new_tokens(one, prompts_of(one))
        with pytest.raises(EmprobeError, match="nobody said where each prompt ends"):
            one.hf(ids)
        receipt.prompt_lengths = [3]
        one.hf(ids)
        with pytest.raises(EmprobeError, match="1 entries, but the forward pass has 2 rows"):
            one.hf(ids.expand(2, -1))
        # generate knows better than what was said for plain passes
        assert new_tokens(one, prompts_of(one)) == new_tokens(one, prompts_of(one))


def test_the_decoder_alone_may_be_called_with_a_mask_by_position(checkpoints_of: Callable[[Architecture], Checkpoints]) -> None:
    one = load_model(checkpoints_of("llama").base)
    ids, mask = pad(prompts_of(one), 0, "left")
    with intervene(one, Add(direction(one), 1.0)) as receipt, torch.no_grad():
        one.hf.get_decoder()(ids, mask)
    assert receipt.as_dict()[0]["positions"] == int(mask.sum())


def test_inference_mode_and_an_earlier_cache_are_counted_like_any_other(one: Checkpoint) -> None:
    prompts = prompts_of(one)
    with intervene(one, Add(direction(one), 1.0)) as receipt:
        with torch.inference_mode():
            new_tokens(one, prompts, max_new_tokens=2)
        new_tokens(one, prompts[:2], max_new_tokens=2)
        first = one.hf.generate(torch.tensor(prompts[:1]), max_new_tokens=2, return_dict_in_generate=True, eos_token_id=None)
        one.hf.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=2, eos_token_id=None)
    (line,) = receipt.as_dict()
    assert line["rows"] == line["rows_steered"] == 4 + 2 + 1 + 1


def test_guidance_by_a_second_text_is_refused_where_prompts_matter_and_steers_both_texts_otherwise(one: Checkpoint) -> None:
    d, prompts = direction(one), prompts_of(one)[:2]
    with adding(one, 7.5 * d.vector.float()):
        wanted = new_tokens(one, prompts, guidance_scale=1.5)
    with intervene(one, Add(d, 1.5)):
        assert new_tokens(one, prompts, guidance_scale=1.5) == wanted
    with pytest.raises(EmprobeError, match="guidance_scale runs a second text"), intervene(one, Add(d, 1.5, where=Where(prompt=False))):
        new_tokens(one, prompts, guidance_scale=1.5)


def test_drafts_of_another_model_change_no_token(checkpoints_of: Callable[[Architecture], Checkpoints], one: Checkpoint) -> None:
    other = load_model(checkpoints_of("llama").base)
    prompt, (where, named) = prompts_of(one)[1], WHERES["windows"]
    wanted, _ = greedy(one, prompt, FAMILIES["add"], named, 5)
    with intervene(one, Add(direction(one), 1.5, where=where)):
        assert new_tokens(one, [prompt], assistant_model=other.hf) == [wanted]
        assert new_tokens(one, [prompt], assistant_model=one.hf) == [wanted], "the steered model drafts for itself"


# ---- continuous batching


def packed(checkpoint: Checkpoint, prompts: list[list[int]], *, sequences: int = 1, persistent: bool = False, **settings: Any) -> Any:
    stops = {"eos_token_id": checkpoint.tokenizer.eos_token_id, "pad_token_id": checkpoint.tokenizer.pad_token_id}
    config: Any = GenerationConfig(do_sample=sequences > 1, top_k=1, max_new_tokens=5, num_return_sequences=sequences, **stops)
    settings = {"num_blocks": 64, "page_size": 4, "max_batch_tokens": 24, **settings}
    out = checkpoint.hf.generate_batch(
        prompts, generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**settings), persistent_manager=persistent
    )
    assert all(answer.error is None for answer in out.values())
    return [answer.generated_tokens for answer in out.values()]


@pytest.mark.parametrize(
    "case", [("add", "all"), ("ablate", "windows"), ("add", "from the last prompt token on"), ("set", "without special")]
)
def test_continuous_batching_equals_the_oracle_and_so_does_its_receipt(checkpoint: Checkpoint, case: tuple[str, str]) -> None:
    family, (where, named) = FAMILIES[case[0]], WHERES[case[1]]
    prompts = prompts_of(checkpoint)
    prompts = [*prompts, prompts[2][:8], prompts[2]]  # shared openings, whose cache may be shared
    wanted = [greedy(checkpoint, prompt, family, named, 5) for prompt in prompts]
    with intervene(checkpoint, family.make(direction(checkpoint), direction(checkpoint, seed=1), where=where)) as receipt:
        assert packed(checkpoint, prompts) == [tokens for tokens, _ in wanted]
    (line,) = receipt.as_dict()
    assert line["rows"] == len(prompts)
    assert line["positions"] == sum(len(done) for _, done in wanted)


def test_a_kept_batch_does_not_carry_steered_text_out_or_other_text_in(one: Checkpoint) -> None:
    prompts, d = prompts_of(one), direction(one)
    plain = packed(one, prompts, persistent=True)
    with pytest.raises(EmprobeError, match="was kept from before the intervene block"), intervene(one, Add(d, 1.5)):
        packed(one, prompts, persistent=True)
    one.hf.destroy_cached_continuous_batching_manager()
    with intervene(one, Add(d, 1.5)):
        steered = packed(one, prompts, persistent=True)
        assert packed(one, prompts, persistent=True) == steered != plain
    assert packed(one, prompts, persistent=True) == plain
    one.hf.destroy_cached_continuous_batching_manager()
    assert "generate" not in vars(one.hf)
    assert "init_continuous_batching" not in vars(one.hf)


def test_what_continuous_batching_cannot_carry_is_refused_before_any_token(one: Checkpoint) -> None:
    prompts, attention = prompts_of(one), one.hf.config._attn_implementation
    with pytest.raises(EmprobeError, match="Rows that carry plans of their own cannot"), intervene_rows(one, [Add(direction(one), 1), []]):
        packed(one, prompts)
    with pytest.raises(EmprobeError, match="Compiled continuous batching runs no hooks"), intervene(one, Add(direction(one), 1)):
        packed(one, prompts, varlen_compile_config=CompileConfig())
    assert one.hf.config._attn_implementation == attention


def test_several_answers_in_continuous_batching(one: Checkpoint) -> None:
    prompts, operator = prompts_of(one)[:2], Add(direction(one), 1.5, where=Where(prompt_positions=[-1]))
    with intervene(one, operator) as receipt:
        answers = packed(one, prompts, sequences=2)
    with intervene(one, operator):
        wanted = new_tokens(one, prompts)
    assert answers == [wanted[0], wanted[0], wanted[1], wanted[1]]
    assert receipt.as_dict()[0]["rows"] == 2, "answers that fork from one prompt are one row"


# ---- rows with plans of their own


def mixed_plans(c: Checkpoint) -> list[Any]:
    d, e = direction(c), direction(c, seed=1)
    return [
        Add(d, 1.5),
        [],
        [Add(e, -1.0), Ablate(d)],
        Add(d, 0.5, where=Where(prompt=False)),
        [Rotate([d, e], by=40.0)],
        [Cap(d, max=0.1, unit="abs"), SetProjection(direction(c, layer=2, site="resid_pre"), 3.0, unit="abs")],
        Add(e, 2.0, when=When(d, above=0.0)),
        Ablate(direction(c, layer=0, site="mlp_out", seed=3)),
    ]


def test_every_row_is_as_if_alone_under_its_plan(checkpoint: Checkpoint) -> None:
    plans, prompt = mixed_plans(checkpoint), prompts_of(checkpoint)[1]
    ids = torch.tensor([prompt])
    with intervene_rows(checkpoint, plans) as receipt, torch.no_grad():
        receipt.prompt_lengths = [5] * len(plans)
        logits = checkpoint.hf(ids.expand(len(plans), -1)).logits
    for row, plan in enumerate(plans):
        with torch.no_grad():
            if not plan:
                alone = checkpoint.hf(ids.expand(len(plans), -1)).logits[row]
                assert torch.equal(logits[row], alone), "an unsteered row is bit-equal"
                continue
            with intervene(checkpoint, *(plan if isinstance(plan, list) else [plan])) as single:
                single.prompt_lengths = [5]
                alone = checkpoint.hf(ids).logits[0]
        torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)
        for mine, other in zip([line for line in receipt.as_dict() if line["plan"] == row], single.as_dict(), strict=True):
            assert mine == {**other, "plan": row, **{k: pytest.approx(v, abs=1e-4) for k, v in other.items() if isinstance(v, float)}}


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}])
def test_rows_with_plans_generate_as_if_alone(one: Checkpoint, how: dict[str, Any]) -> None:
    plans, prompts = mixed_plans(one), prompts_of(one)[:3]
    order = [0, 5, 2, 1, 3, 4, 6, 7, 7, 0, 3, 3]
    chosen = [prompts[i % 3] for i in range(len(order))]
    with intervene_rows(one, plans) as receipt:
        receipt.plan_of_row = order
        together = new_tokens(one, chosen, **how)
    for plan, prompt, tokens in zip(order, chosen, together, strict=True):
        operators = plans[plan] if isinstance(plans[plan], list) else [plans[plan]]
        if not operators:
            assert new_tokens(one, [prompt], **how) == [tokens]
            continue
        try:
            with intervene(one, *operators):
                assert new_tokens(one, [prompt], **how) == [tokens]
        except InterventionDidNotFire:
            assert len(tokens) == 1
