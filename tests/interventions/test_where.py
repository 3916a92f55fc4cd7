"""`Where` names the same tokens however they are laid out: padded, cached, in chunks, packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emprobe.errors import EmprobeError
from emprobe.interventions import Where
from emprobe.interventions.tokens import Prompts, Tokens

SPECIAL = (0, 1)
BOUND = st.one_of(st.none(), st.integers(-6, 6))


class Cache:
    """All that `Tokens` asks of a cache."""

    def __init__(self, seen: int) -> None:
        self.seen = seen

    def get_seq_length(self) -> int:
        return self.seen


@st.composite
def wheres(draw: Any) -> Where:
    """Any `Where` that is allowed."""
    prompt, generation = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    which = draw(st.sampled_from(["all", "positions", "window"])) if prompt else "all"
    window = (draw(BOUND), draw(BOUND)) if which == "window" else None
    answer = (draw(st.one_of(st.none(), st.integers(0, 4))), draw(st.one_of(st.none(), st.integers(0, 6))))
    try:
        return Where(
            prompt,
            generation,
            draw(st.lists(st.integers(-4, 4), min_size=1, max_size=3)) if which == "positions" else None,
            window,
            answer if generation and draw(st.booleans()) else None,
            draw(st.booleans()),
            draw(st.booleans()),
        )
    except EmprobeError:
        return Where()


def by_hand(where: Where, ids: list[int], length: int) -> list[bool]:
    """One text, token by token, with Python's own slices."""
    prompt, answer = list(range(length)), list(range(length, len(ids)))
    named: set[int] = set()
    if where.prompt_positions is not None:
        named |= {prompt[p] for p in where.prompt_positions if -length <= p < length}
    elif where.prompt_window is not None:
        named |= set(prompt[slice(*where.prompt_window)])
    elif where.prompt:
        named |= set(prompt)
    if where.generation:
        named |= set(answer[slice(*(where.generation_window or (None, None)))])
    named -= {i for i in named if (where.exclude_first and i == 0) or (where.exclude_special and ids[i] in SPECIAL)}
    return [i in named for i in range(len(ids))]


@given(where=wheres(), data=st.data())
def test_every_layout_names_what_the_text_alone_says(where: Where, data: Any) -> None:
    texts = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=9), min_size=1, max_size=4))
    lengths = [data.draw(st.integers(1, len(t))) for t in texts]
    wanted = [by_hand(where, t, n) for t, n in zip(texts, lengths, strict=True)]
    for side in ("left", "right"):
        width = max(map(len, texts))
        gaps = [width - len(t) for t in texts]
        rows = [[0] * g + t if side == "left" else t + [0] * g for t, g in zip(texts, gaps, strict=True)]
        real = [[0] * g + [1] * len(t) if side == "left" else [1] * len(t) + [0] * g for t, g in zip(texts, gaps, strict=True)]
        ids, mask = torch.tensor(rows), torch.tensor(real)
        tokens = Tokens.of({"input_ids": ids, "attention_mask": mask}, Prompts(lengths=lengths), SPECIAL)
        found = where.mask(tokens)
        assert [f[m.bool()].tolist() for f, m in zip(found, mask, strict=True)] == wanted
        assert not found[~mask.bool()].any(), "padding is never named"
        quick = tokens.named(where, torch.device("cpu"))
        assert torch.equal(found, mask.bool() & torch.ones_like(found) if quick is None else quick) or bool(found.all())


@given(where=wheres(), data=st.data())
def test_generation_in_any_chunks_names_what_the_text_alone_says(where: Where, data: Any) -> None:
    """As generate does it: left padding, prompts that end at one column, a cache, and any number of tokens to a pass."""
    prompts = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=4))
    answer = data.draw(st.integers(0, 4))
    width = max(map(len, prompts))
    texts = [p + [2] * answer for p in prompts]
    ids = torch.tensor([[0] * (width - len(p)) + t for p, t in zip(prompts, texts, strict=True)])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(t) for p, t in zip(prompts, texts, strict=True)])
    told, start, found = Prompts(width=width), 0, []
    cached = data.draw(st.booleans())
    while start < ids.shape[1]:
        stop = start + data.draw(st.integers(1, ids.shape[1] - start))
        given_ = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], "past_key_values": Cache(start)}
        if not cached:
            given_ = {"input_ids": ids[:, :stop], "attention_mask": mask[:, :stop]}
        tokens = Tokens.of(given_, told, SPECIAL)
        assert tokens.fresh == (start == 0), "a batch begins once"
        named = tokens.named(where, torch.device("cpu"))
        named = torch.ones(tokens.shape, dtype=torch.bool) if named is None else named
        found.append(named[:, start - stop :])
        start = stop
    rows = torch.cat(found, dim=1)
    wanted = [by_hand(where, t, len(p)) for p, t in zip(prompts, texts, strict=True)]
    assert [row[-len(t) :].tolist() for row, t in zip(rows, texts, strict=True)] == wanted


def test_a_prepared_mask_of_any_kind_tells_padding() -> None:
    """Static caches hand the decoder one mask per kind of attention; one of a short sliding window says nothing of early columns."""
    real = torch.tensor([[False, False, True, True], [True, True, True, True]])
    causal = torch.ones(4, 6).tril().bool()
    whole = (causal[None] & torch.cat([real, torch.zeros(2, 2, dtype=torch.bool)], dim=1)[:, None])[:, None]
    short = whole[..., :3]
    positions = torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]])
    for mask in ({"sliding_attention": short, "full_attention": whole}, {"full_attention": whole}, whole, torch.where(whole, 0.0, -1e9)):
        given_ = {"input_ids": torch.zeros(2, 4).long(), "attention_mask": mask, "position_ids": positions}
        tokens = Tokens.of(given_, Prompts(width=4))
        assert torch.equal(tokens.real, real)
        assert Where(prompt_positions=[-1]).mask(tokens).tolist() == [[False, False, False, True]] * 2
        assert Where(prompt_positions=[0]).mask(tokens).tolist() == [[False, False, True, False], [True, False, False, False]]


def test_a_where_says_what_it_names() -> None:
    assert str(Where(exclude_first=True)) == "all tokens but padding, without position 0"
    assert str(Where(prompt_window=(-4, None), generation_window=(0, 8))) == "prompt positions -4: and generated tokens 0:8"
    assert str(Where(prompt=False, exclude_special=True)) == "the generation, without special tokens"
    assert Where(prompt_positions=[-1]) == Where(prompt_positions=(-1,))
    assert len({Where(), Where(), Where(exclude_first=True)}) == 2


def test_splitting_without_prompt_ends_is_refused() -> None:
    tokens = Tokens.of({"input_ids": torch.zeros(2, 3).long()}, Prompts())
    for where in (Where(prompt=False), Where(generation=False), Where(prompt_positions=[0]), Where(generation_window=(0, 2))):
        with pytest.raises(EmprobeError, match="nobody said where each prompt ends"):
            where.mask(tokens)
    assert Where(exclude_first=True).mask(tokens).tolist() == [[False, True, True]] * 2
