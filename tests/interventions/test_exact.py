"""Steered generation is the same token for token, however it runs: an oracle by hand against caches, batches, padding and chunks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from emprobe.batching import pad
from emprobe.errors import InterventionDidNotFire
from emprobe.interventions import When, Where, intervene
from emprobe.models import Checkpoint, encode
from emprobe.types import Conversation
from tests.fixtures.models import ARCHITECTURES, Architecture, Checkpoints
from tests.interventions.by_hand import FAMILIES, WHERES, direction, greedy, load_narrow

STEPS = 5
WORDS = "plant beans peas and a row of carrots in good soil first change the washer"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(
    request: pytest.FixtureRequest, checkpoints_of: Callable[[Architecture], Checkpoints], tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return load_narrow(checkpoints_of, request.param, tmp_path_factory.mktemp("narrow") / "copy")


def prompts_of(checkpoint: Checkpoint) -> list[list[int]]:
    """Templated prompts of several lengths, a plain one, and one of a single token."""
    words = WORDS.split()
    chats = [list(encode(checkpoint.tokenizer, Conversation.ask(str(n), " ".join(words[:n]))).ids) for n in (2, 9)]
    plain = list(checkpoint.tokenizer(WORDS, add_special_tokens=False)["input_ids"])[:7]
    return [*chats, plain, [plain[3]]]


def cut(checkpoint: Checkpoint, new: list[int]) -> list[int]:
    eos = checkpoint.tokenizer.eos_token_id
    return new[: new.index(eos) + 1] if eos in new else new


def generated(checkpoint: Checkpoint, prompts: list[list[int]], **how: Any) -> list[list[int]]:
    """New tokens of each prompt, by the model's own generate on a left-padded batch."""
    ids, mask = pad(prompts, checkpoint.tokenizer.pad_token_id, "left")
    given = {"input_ids": ids}
    if how.pop("as_embeddings", False):
        given = {"inputs_embeds": checkpoint.hf.get_input_embeddings()(ids)}
    with torch.no_grad():
        out = checkpoint.hf.generate(**given, attention_mask=mask, **{"do_sample": False, "max_new_tokens": STEPS, **how})
    start = ids.shape[1] if "input_ids" in given else 0
    return [cut(checkpoint, row[start:].tolist()) for row in out]


def split_matters(where: Where) -> bool:
    """Whether a way of generating could go wrong in a way of its own."""
    return where != Where()


CASES = {
    **{f"{family}, all": (family, "all") for family in FAMILIES},
    **{f"add, {where}": ("add", where) for where in WHERES if where != "all"},
    "ablate a plane, windows": ("ablate a plane", "windows"),
    "turn, prompt": ("turn", "prompt"),
    "set, from the last prompt token on": ("set", "from the last prompt token on"),
}
WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 3},
    "embeddings": {"as_embeddings": True},
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_generating_equals_the_oracle(checkpoint: Checkpoint, case: str) -> None:
    family, (where, named) = FAMILIES[CASES[case][0]], WHERES[CASES[case][1]]
    prompts = prompts_of(checkpoint)
    operator = family.make(direction(checkpoint), direction(checkpoint, seed=1), where=where)
    by_hand = [greedy(checkpoint, prompt, family, named, STEPS) for prompt in prompts]
    wanted = [tokens for tokens, _ in by_hand]
    for way, how in WAYS.items():
        if (way == "embeddings" and where.exclude_special) or (way not in ("batched", "static") and not split_matters(where)):
            continue
        with intervene(checkpoint, operator):
            assert generated(checkpoint, prompts, **how) == wanted, way
    for prompt, (tokens, done) in list(zip(prompts, by_hand, strict=True))[1::2]:
        # One row alone; and drafted from its own text, several tokens to a forward pass.
        for how in ({}, {"prompt_lookup_num_tokens": 3}):
            with nullcontext() if done else pytest.raises(InterventionDidNotFire), intervene(checkpoint, operator):
                assert generated(checkpoint, [prompt], **how) == [tokens]


@pytest.mark.parametrize("where", ["all", "windows", "generation"])
def test_conditions_equal_the_oracle(checkpoint: Checkpoint, where: str) -> None:
    d, family = direction(checkpoint), FAMILIES["add"]
    operator = family.make(d, None, where=WHERES[where][0], when=When(d, above=0.1))
    prompts = prompts_of(checkpoint)
    wanted = [greedy(checkpoint, prompt, family, WHERES[where][1], STEPS, bound=0.1)[0] for prompt in prompts]
    for how in WAYS.values():
        with intervene(checkpoint, operator):
            assert generated(checkpoint, prompts, **how) == wanted
