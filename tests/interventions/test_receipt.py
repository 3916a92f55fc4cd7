"""The receipt's numbers are those of an oracle that counts token by token, whatever kind of run it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emprobe.batching import pad
from emprobe.errors import InterventionDidNotFire
from emprobe.interventions import Add, When, Where, intervene, intervene_rows
from emprobe.interventions.receipt_table import table_of
from emprobe.models import Checkpoint, encode, load_model
from emprobe.types import Conversation
from tests.fixtures.models import Architecture, Checkpoints
from tests.interventions.by_hand import FAMILIES, WHERES, direction, greedy

WORDS = ["beans", "peas", "soil", "row", "carrots", "water", "change"]
STEPS = 5


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def checkpoint(request: pytest.FixtureRequest, checkpoints_of: Callable[[Architecture], Checkpoints]) -> Checkpoint:
    return load_model(checkpoints_of(request.param).base)


def prompts_of(checkpoint: Checkpoint) -> list[list[int]]:
    questions = [Conversation.ask(str(n), " ".join(WORDS[:n])) for n in (1, 3, 7)]
    return [list(encode(checkpoint.tokenizer, q).ids) for q in questions]


def generate(checkpoint: Checkpoint, prompts: list[list[int]], **how: Any) -> torch.Tensor:
    ids, mask = pad(prompts, checkpoint.tokenizer.pad_token_id, "left")
    # No end of turn: rows that end early would be steered on, as filling; the oracle's do not.
    settings = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None, **how}
    with torch.no_grad():
        out: torch.Tensor = checkpoint.hf.generate(input_ids=ids, attention_mask=mask, **settings)
    return out


def oracle(checkpoint: Checkpoint, family: str, where: str, bound: float | None = None) -> list[list[tuple[int, float, float, float]]]:
    eos, checkpoint.tokenizer.eos_token = checkpoint.tokenizer.eos_token, None
    try:
        named = WHERES[where][1]
        return [greedy(checkpoint, p, FAMILIES[family], named, STEPS, bound=bound)[1] for p in prompts_of(checkpoint)]
    finally:
        checkpoint.tokenizer.eos_token = eos


def expected(done: list[list[tuple[int, float, float, float]]], lengths: list[int]) -> dict[str, Any]:
    flat = [one for row in done for one in row]
    mean = lambda k: pytest.approx(sum(one[k] for one in flat) / len(flat), rel=1e-3, abs=1e-4) if flat else None  # noqa: E731
    return {
        "rows": len(done),
        "rows_steered": sum(map(bool, done)),
        "positions": len(flat),
        "positions_in_prompt": sum(one[0] < n for row, n in zip(done, lengths, strict=True) for one in row),
        "positions_in_generation": sum(one[0] >= n for row, n in zip(done, lengths, strict=True) for one in row),
        "projection_before": mean(1),
        "projection_after": mean(2),
        "mean_relative_change": mean(3),
    }


CASES = [("add", w) for w in WHERES] + [(f, "all") for f in FAMILIES if f not in ("add", "ablate a plane", "turn")]


@pytest.mark.parametrize("case", CASES)
def test_totals_are_those_counted_by_hand(checkpoint: Checkpoint, case: tuple[str, str]) -> None:
    family, where = case
    wanted = expected(oracle(checkpoint, family, where), [len(p) for p in prompts_of(checkpoint)])
    operator = FAMILIES[family].make(direction(checkpoint), direction(checkpoint, seed=1), where=WHERES[where][0])
    for how in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        with intervene(checkpoint, operator) as receipt:
            generate(checkpoint, prompts_of(checkpoint), **how)
        (line,) = receipt.as_dict()
        assert {k: line[k] for k in wanted} == wanted, how
    with intervene(checkpoint, operator) as receipt:
        for prompt in prompts_of(checkpoint):
            generate(checkpoint, [prompt])
        assert {k: receipt.as_dict()[0][k] for k in wanted} == wanted, "one row at a time"


def test_conditions_are_counted_where_they_held(checkpoint: Checkpoint) -> None:
    wanted = expected(oracle(checkpoint, "add", "windows", bound=0.3), [len(p) for p in prompts_of(checkpoint)])
    d = direction(checkpoint)
    with intervene(checkpoint, Add(d, 1.5, where=WHERES["windows"][0], when=When(d, above=0.3))) as receipt:
        generate(checkpoint, prompts_of(checkpoint))
    assert {k: receipt.as_dict()[0][k] for k in wanted} == wanted
    with intervene(checkpoint, Add(d, 1.5, when=When(d, above=1e6))) as receipt:
        generate(checkpoint, prompts_of(checkpoint))
    assert receipt.as_dict()[0]["positions"] == 0, "a condition that never holds is no silence"
    assert receipt.as_dict()[0]["rows"] == 3


def test_without_a_cache_every_text_is_counted_as_often_as_it_is_read(checkpoint: Checkpoint) -> None:
    lengths = [len(p) for p in prompts_of(checkpoint)]
    with intervene(checkpoint, Add(direction(checkpoint), 1.5)) as receipt:
        generate(checkpoint, prompts_of(checkpoint), use_cache=False)
    (line,) = receipt.as_dict()
    assert line["rows"] == line["rows_steered"] == 3, "but it is the same rows"
    assert line["forwards"] == STEPS
    assert line["positions"] == sum(n + step for n in lengths for step in range(STEPS))
    assert line["positions_in_prompt"] == sum(lengths) * STEPS


def test_rows_that_ended_early_are_filled_steered_and_counted_until_the_last_row_ends(checkpoint: Checkpoint) -> None:
    prompts, operator = prompts_of(checkpoint), Add(direction(checkpoint), 1.5)
    with intervene(checkpoint, operator):
        out = generate(checkpoint, prompts)
    first = int(out[0, -STEPS])
    with intervene(checkpoint, operator) as receipt:
        stopped = generate(checkpoint, prompts, eos_token_id=first, pad_token_id=0)
    steps = stopped.shape[1] - max(map(len, prompts))
    assert stopped[0, -steps:].tolist() == [first, *[0] * (steps - 1)]
    assert receipt.as_dict()[0]["positions_in_generation"] == 3 * (steps - 1)


def test_beams_and_several_answers_are_rows(checkpoint: Checkpoint) -> None:
    prompts = prompts_of(checkpoint)
    for how in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        with intervene(checkpoint, Add(direction(checkpoint), 1.5)) as receipt:
            generate(checkpoint, prompts, **how)
        (line,) = receipt.as_dict()
        assert line["rows"] == 9
        assert line["positions"] == 3 * sum(map(len, prompts)) + 9 * (STEPS - 1)


def test_every_plan_is_counted_on_its_rows(checkpoint: Checkpoint) -> None:
    d = direction(checkpoint)
    plans = [Add(d, 1.5), [], Add(d, -1.0, where=Where(prompt=False))]
    prompts = prompts_of(checkpoint)
    with intervene_rows(checkpoint, plans) as receipt:
        receipt.plan_of_row = [2, 0, 1, 0, 2, 1]
        generate(checkpoint, [*prompts, *prompts])
    first, last = receipt.as_dict()
    assert [first["plan"], first["rows"], last["plan"], last["rows"]] == [0, 2, 2, 2]
    assert first["positions"] == len(prompts[1]) + len(prompts[0]) + 2 * (STEPS - 1)
    assert last["positions"] == last["positions_in_generation"] == 2 * (STEPS - 1)


def test_a_receipt_without_prompts_does_not_guess(checkpoint: Checkpoint) -> None:
    ids = torch.tensor(prompts_of(checkpoint)[:1])
    with intervene(checkpoint, Add(direction(checkpoint), 1.5)) as receipt, torch.no_grad():
        checkpoint.hf(ids)
        (line,) = receipt.as_dict()
        assert line["positions_in_prompt"] is None
        assert line["positions"] == ids.shape[1]


def test_a_row_without_the_token_named_is_no_silence(checkpoint: Checkpoint) -> None:
    prompts = [*prompts_of(checkpoint), prompts_of(checkpoint)[0][:2]]
    operator = Add(direction(checkpoint), 1.5, where=Where(prompt_positions=[-3], generation=False))
    with (
        pytest.raises(InterventionDidNotFire, match="steered 3 of 4 rows with prompt positions -3: the others"),
        intervene(checkpoint, operator),
    ):
        generate(checkpoint, prompts)


def entry(**other: Any) -> dict[str, Any]:
    counts = dict.fromkeys(("forwards", "rows", "positions", "positions_in_prompt", "positions_in_generation"), 7)
    means = dict.fromkeys(("mean_relative_change", "projection_before", "projection_after"), 0.25)
    return {"operator": "Ablate", "plan": 0, "layer": 3, "site": "mlp_out", **counts, **means, **other}


def test_a_table_is_as_wide_as_what_stands_in_it_and_says_what_is_not_known() -> None:
    long = entry(
        operator="SetProjection([-0.12345, 2.5] abs)", layer=47, site="resid_post", positions=123_456_789_012, positions_in_prompt=None
    )
    text = table_of([entry(), long])
    head, first, second = text.splitlines()
    assert len(head) == len(first) == len(second), "columns are aligned"
    assert "plan" not in head
    assert "-0.000" not in table_of([entry(projection_after=-1e-9)])
    assert second.startswith("SetProjection([-0.12345, 2.5] abs)  resid_post[47]  ")
    assert second.split()[-7:] == ["7", "123456789012", "-", "7", "0.250", "0.250", "0.250"]
    for name in ("rows", "positions", "after"):
        assert first[: head.index(name) + len(name)].endswith(("7", "0.250")), "numbers end below their heads"


def test_a_table_of_several_plans_says_which_by_name_or_number() -> None:
    entries = [entry(plan=0), entry(plan=2)]
    assert [line.split()[:2] for line in table_of(entries).splitlines()] == [["plan", "operator"], ["0", "Ablate"], ["2", "Ablate"]]
    named = table_of(entries, ["weak", "none", "a random one"]).splitlines()
    assert named[1].startswith("weak          Ablate")
    assert named[2].startswith("a random one  Ablate")
    assert table_of(entries[:1], ["weak"]).splitlines()[1].startswith("weak")
    assert table_of([]).split()[0] == "operator"
