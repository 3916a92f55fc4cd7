"""Models in which a token depends on more than the tokens before it: padding, sharing and batching must not change what is read."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, FalconH1Config, RwkvConfig, RwkvForCausalLM

from emprobe.capture import capture
from emprobe.capture.backends import hooks
from emprobe.capture.plan import Row, group_rows, prefix_batch
from emprobe.capture.reading import Gathered, Reading
from emprobe.errors import EmprobeError
from emprobe.models import Checkpoint, load_model
from emprobe.models.caches import empty_cache, lent_cache
from emprobe.models.chat import encode_all
from emprobe.models.reach import Lengths, changed_by_padding, lengths_of
from emprobe.types import Conversation
from tests.capture.test_capture import ROWS, alone
from tests.capture.test_parity import close, opened
from tests.fixtures.models import ALL_ARCHITECTURES, Checkpoints, copy_of


def changed(checkpoints: Checkpoints, folder: Path, **settings: Any) -> Checkpoint:
    """The same weights under other settings."""
    path = copy_of(checkpoints, folder).base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return load_model(path.parent)


def whole(checkpoint: Checkpoint, rows: list[Conversation], layer: int) -> torch.Tensor:
    """The mean over all tokens but the first of each row, every row run by itself."""
    return torch.stack([alone(checkpoint, row, layer)[1:].mean(dim=0) for row in rows])[:, None]


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_no_padding_changes_an_architecture_as_it_is_released(checkpoints_of: Any, name: Any) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    assert not changed_by_padding(checkpoint.hf, "right")
    assert not changed_by_padding(checkpoint.hf, "left")
    assert isinstance(empty_cache(checkpoint), DynamicCache)


def test_recurrent_layers_share_no_opening_and_are_refused_with_padding_on_the_left(llama: Checkpoints) -> None:
    config = RwkvConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    checkpoint = replace(load_model(llama.base), model=RwkvForCausalLM(config).eval())
    with torch.no_grad():
        for weight in checkpoint.hf.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    assert empty_cache(checkpoint) is None
    with pytest.raises(EmprobeError, match=r"recurrent layers\). Give padding='right'"):
        capture(checkpoint, ROWS, padding="left", progress=False)
    rows = opened(6)
    close(capture(checkpoint, rows, positions="all_tokens", layers=1, progress=False).values, whole(checkpoint, rows, 1), 1e-4)


def test_bidirectional_attention_is_refused_with_padding_on_the_right(llama: Checkpoints, tmp_path: Path) -> None:
    checkpoint = changed(llama, tmp_path, is_causal=False)
    with pytest.raises(EmprobeError, match=r"tokens see later ones .* Give padding='left'"):
        capture(checkpoint, ROWS, progress=False)
    acts = capture(checkpoint, ROWS, positions="all_tokens", padding="left", progress=False)
    close(acts.values[:, 1:2], whole(checkpoint, ROWS, 1), 1e-4)


def longrope(limit: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    return {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": limit, **factors}}


def test_long_rows_of_longrope_change_no_short_ones(llama: Checkpoints, tmp_path: Path) -> None:
    rows = opened(9)
    lengths = sorted(len(encoded.ids) for encoded in encode_all(load_model(llama.base).tokenizer, rows))
    checkpoint = changed(llama, tmp_path, **longrope(lengths[4]))
    assert lengths_of(checkpoint.hf).switch == lengths[4]
    for options in ({}, {"share_prefix": False}, {"padding": "left"}):
        acts = capture(checkpoint, rows, positions="all_tokens", token_budget=4096, progress=False, **options)  # type: ignore[arg-type]
        for layer in range(checkpoint.n_layers):
            close(acts.values[:, layer : layer + 1], whole(checkpoint, rows, layer), 1e-4)


def test_rows_beyond_the_positions_are_refused(checkpoints_of: Any, llama: Checkpoints, tmp_path: Path) -> None:
    long = [ROWS[0], Conversation.ask("long", "zebra quagga " * 60)]
    with pytest.raises(EmprobeError, match=r"Question 'long' has \d+ tokens, and .* can read 512: it has learned vectors for no more"):
        capture(load_model(checkpoints_of("gpt2").base), [long[0], Conversation.ask("long", "zebra quagga " * 100)], progress=False)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    checkpoint = changed(llama, tmp_path, max_position_embeddings=48, rope_parameters=dynamic)
    with pytest.raises(EmprobeError, match=r"can read 48: beyond them its dynamic RoPE depends on the longest row"):
        capture(checkpoint, long, progress=False)
    assert lengths_of(load_model(llama.base).hf) == Lengths()
    assert len(capture(load_model(llama.base), [Conversation.ask("long", "zebra quagga " * 100)], progress=False)) == 1


def test_tokens_without_an_embedding_are_refused_and_padding_needs_none(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    whole = capture(checkpoint, ROWS, progress=False)
    checkpoint.tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    assert torch.equal(capture(checkpoint, ROWS, progress=False).values, whole.values)
    with pytest.raises(EmprobeError, match=r"Question 'new' has token 400, and .* has embeddings for 400"):
        capture(checkpoint, [Conversation.ask("new", "say <|new|>")], progress=False)


def test_a_cache_with_recurrent_state_is_not_shared(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    assert isinstance(empty_cache(checkpoint), DynamicCache)
    checkpoint.hf.config = FalconH1Config(num_hidden_layers=2)
    assert empty_cache(checkpoint) is None


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_lent_cache_keeps_nothing_of_the_batch(checkpoints_of: Any, name: Any) -> None:
    cache = empty_cache(load_model(checkpoints_of(name).base))
    assert cache is not None
    first, more = torch.randn(1, 2, 40, 8), torch.randn(3, 2, 5, 8)
    cache.update(first, first, 0)
    kept = cache.layers[0].keys.clone()
    lent = lent_cache(cache, 3)
    for _ in range(2):
        keys, _ = lent.update(more, more, 0)
        assert keys.shape[0] == 3
        assert torch.equal(keys[:, :, -5:], more)
        assert torch.equal(keys[:, :, :-5], kept.expand(3, -1, -1, -1))
        assert lent.layers[0].keys.shape[2] == kept.shape[2]
    assert torch.equal(cache.layers[0].keys, kept)


def test_an_opening_that_does_not_fit_in_memory_is_not_shared(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, rows = load_model(llama.base), opened(6)
    whole = capture(checkpoint, rows, share_prefix=False, positions="all_tokens", progress=False)

    def run_prefix(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hooks.Hooks, "run_prefix", run_prefix)
    acts = capture(checkpoint, rows, positions="all_tokens", progress=False)
    assert torch.equal(acts.values, whole.values)
    assert acts.n_tokens == whole.n_tokens


def test_a_shared_opening_is_read_once_for_many_rows() -> None:
    """What is kept of it must not grow with the rows: a device holds it for all layers at once."""
    rows = [Row((*range(40), *range(n)), (range(1, 40 + n), (39 + n,), (0, 3, 39 + n), range(40, 40 + n))) for n in range(1, 101)]
    (group,) = group_rows(rows, sys.maxsize)
    batch = prefix_batch(group, rows)
    assert batch.weights.shape == (1, 4, 40)  # tokens 1 to 39, none, 0 and 3, and none of a range
    reading, gathered = Reading(batch), Gathered.empty(len(rows), 4, 1, 5)
    hidden = torch.randn(1, 40, 5, dtype=torch.float64)
    reading("resid_post", 0, hidden)
    gathered.add(reading, "resid_post", [0])
    for i, row in enumerate(rows):
        for k, read in enumerate(row.read):
            expected = hidden[0, [p for p in read if p < 40]].sum(dim=0) / len(read)
            torch.testing.assert_close(gathered.pooled[i, k, 0].double(), expected, rtol=1e-6, atol=1e-6)
