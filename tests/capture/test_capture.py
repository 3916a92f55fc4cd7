"""What capture returns equals what a plain hook sees on each row alone, whatever the batch, the order or the architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emprobe.activations import Activations
from emprobe.capture import capture
from emprobe.errors import EmprobeError, MismatchError
from emprobe.models import Checkpoint, encode, load_model
from emprobe.models.positions import RULES, positions_of
from emprobe.types import Conversation
from tests.fixtures.models import Checkpoints

WORDS = ["plant", "beans", "peas", "and", "a", "row", "of", "carrots", "in", "good", "soil", "first", "change", "the", "washer"]
ROWS = [
    Conversation.ask(f"q{i}", " ".join(WORDS[: i + 2])).answered(" ".join(WORDS[i : i + 1 + (i * 5) % 7]), sample=i % 2) for i in range(7)
]


def alone(checkpoint: Checkpoint, row: Conversation, layer: int) -> torch.Tensor:
    """The block's output for one unpadded row, by a plain hook: (pos, d_model) float64."""
    seen: list[torch.Tensor] = []

    def hook(_: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].double())

    with checkpoint.active() as model, torch.no_grad():
        handle = checkpoint.blocks[layer].register_forward_hook(hook)
        model(torch.tensor([encode(checkpoint.tokenizer, row).ids]))
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("rule", ["last_prompt_token", "all_tokens", "prompt_mean", "response_mean", "response_first", "response_last"])
def test_every_row_and_layer_equals_the_row_alone(architecture: Checkpoints, rule: str) -> None:
    checkpoint = load_model(architecture.base)
    acts = capture(checkpoint, ROWS, positions=rule, token_budget=200, progress=False)
    for i, row in enumerate(ROWS):
        chosen = list(positions_of(rule, encode(checkpoint.tokenizer, row)))
        for layer in acts.layers:
            expected = alone(checkpoint, row, layer)[chosen].mean(dim=0)
            torch.testing.assert_close(acts.at(layer)[i].double(), expected, rtol=1e-4, atol=1e-4)


def test_last_layer_is_before_the_final_norm(architecture: Checkpoints) -> None:
    checkpoint = load_model(architecture.base)
    last = capture(checkpoint, ROWS[:1], layers=architecture.n_layers - 1, progress=False).values[0, 0]
    with torch.no_grad():
        out = checkpoint.hf(torch.tensor([encode(checkpoint.tokenizer, ROWS[0]).ids]), output_hidden_states=True)
    after_norm = out.hidden_states[-1][0, encode(checkpoint.tokenizer, ROWS[0]).n_prompt - 1]
    assert not torch.allclose(last, after_norm, rtol=1e-2, atol=1e-2)


def test_resid_pre_is_the_block_below(architecture: Checkpoints) -> None:
    checkpoint = load_model(architecture.base)
    pre = capture(checkpoint, ROWS, site="resid_pre", layers=[1, 2], progress=False)
    post = capture(checkpoint, ROWS, site="resid_post", layers=[0, 1], progress=False)
    assert torch.equal(pre.values, post.values)


def test_batch_size_and_order_change_nothing(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    whole = capture(checkpoint, ROWS, positions="all_tokens", token_budget=4096, progress=False)
    single = capture(checkpoint, ROWS, positions="all_tokens", token_budget=1, progress=False)
    backwards = capture(checkpoint, ROWS[::-1], positions="all_tokens", progress=False)
    torch.testing.assert_close(whole.values, single.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.values.flip(0), backwards.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.token_mean, single.token_mean, rtol=1e-5, atol=1e-6)
    assert whole.keys == tuple(c.key for c in ROWS)


def test_token_statistics_leave_out_padding_and_position_0(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    acts = capture(checkpoint, ROWS, progress=False)
    tokens = torch.cat([alone(checkpoint, row, 1)[1:] for row in ROWS])
    assert acts.n_tokens == len(tokens)
    torch.testing.assert_close(acts.token_mean[1], tokens.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(acts.token_norm[1], tokens.norm(dim=-1).mean(), rtol=1e-5, atol=1e-5)


def test_decision_token_is_the_first_difference(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    row = Conversation.ask("q", "what now", other_response="plant beans and peas").answered("plant beans or peas")
    one, other = encode(checkpoint.tokenizer, row), encode(checkpoint.tokenizer, row.answered("plant beans and peas"))
    (at,) = positions_of("decision_token", one, other)
    assert one.ids[:at] == other.ids[:at]
    assert one.ids[at] != other.ids[at]
    acts = capture(checkpoint, [row], positions="decision_token", layers=0, progress=False)
    torch.testing.assert_close(acts.values[0, 0].double(), alone(checkpoint, row, 0)[at], rtol=1e-4, atol=1e-4)


def test_several_rules_in_one_pass_equal_each_alone(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    rules = [rule for rule in RULES if rule != "decision_token"]
    together = capture(checkpoint, ROWS, positions=rules, progress=False)
    for rule in rules:
        alone_rule = capture(checkpoint, ROWS, positions=rule, progress=False).values
        torch.testing.assert_close(together[rule].values, alone_rule, rtol=1e-6, atol=1e-6)


def test_no_hook_stays(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    before = [len(b._forward_hooks) + len(b._forward_pre_hooks) for b in checkpoint.blocks]
    capture(checkpoint, ROWS, progress=False)
    with pytest.raises(EmprobeError):
        capture(checkpoint, ROWS, layers=17, progress=False)
    assert [len(b._forward_hooks) + len(b._forward_pre_hooks) for b in checkpoint.blocks] == before


def test_save_and_load(llama: Checkpoints, tmp_path: Path) -> None:
    acts = capture(load_model(llama.base), ROWS, progress=False)
    acts.save(tmp_path / "acts.safetensors")
    back = Activations.load(tmp_path / "acts.safetensors")
    assert torch.equal(back.values, acts.values)
    assert (back.keys, back.tokens, back.layers, back.positions) == (acts.keys, acts.tokens, acts.layers, acts.positions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, "asked for layer 3, but the model has layers 0 to 2"),
        ({"layers": [0, -1]}, "asked for layer -1"),
        ({"layers": "middle"}, "layers='middle'"),
        ({"site": "resid"}, "Site 'resid' is no site"),
        ({"positions": "last"}, "Position rule 'last' does not exist"),
    ],
)
def test_what_does_not_exist_is_refused(llama: Checkpoints, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        capture(load_model(llama.base), ROWS, progress=False, **options)


def test_rules_that_need_a_response_are_refused_before_any_work(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    with pytest.raises(EmprobeError, match="'response_mean' needs a response"):
        capture(checkpoint, [Conversation.ask("q", "what now")], positions="response_mean", progress=False)
    with pytest.raises(EmprobeError, match="no conversations"):
        capture(checkpoint, [], progress=False)


def test_overflow_names_row_and_layer(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    with torch.no_grad():
        checkpoint.blocks[1].mlp.down_proj.weight.fill_(torch.inf)  # type: ignore[union-attr]
    with pytest.raises(EmprobeError, match="not finite, first at row 0 .*layer 1"):
        capture(checkpoint, ROWS, progress=False)


def test_unequal_rows_are_not_subtracted(llama: Checkpoints) -> None:
    acts = capture(load_model(llama.base), ROWS, progress=False)
    with pytest.raises(MismatchError, match="7 and 6 rows"):
        acts - acts.select([0, 1, 2, 3, 4, 5])
    with pytest.raises(MismatchError, match="differ in their tokens from row 0"):
        acts - acts.select([1, 0, 2, 3, 4, 5, 6])
    with pytest.raises(MismatchError, match="differ in positions"):
        acts - replace(acts, positions="all_tokens")
