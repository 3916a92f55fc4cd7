"""One answer however it is computed: batch, order, padding, shared openings, shared blocks, running out of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emprobe.capture import capture
from emprobe.capture.backends import hooks
from emprobe.capture.plan import MIN_SHARED_TOKENS
from emprobe.errors import EmprobeError, MismatchError
from emprobe.models import CheckpointPair, load_model, load_pair
from emprobe.types import Conversation
from tests.capture.test_capture import ROWS, alone
from tests.fixtures.models import ALL_ARCHITECTURES, Architecture, Checkpoints, merge_adapter, write_adapter

RULES = ["last_prompt_token", "all_tokens", "prompt_mean", "response_mean", "response_last", "template_tokens"]
Made = Callable[[Architecture], Checkpoints]


def opened(n: int, *, system: bool = False) -> list[Conversation]:
    """Rows that open alike for some fifty tokens, more than the tiny models' sliding windows, and then differ in text and length."""
    head = "Write me a list of beans and peas and carrots, " * 4
    ends = [f"{head}{'and a ' * (i % 3)}number {i}" for i in range(n)]
    return [Conversation.ask(f"q{i}", end).answered("plant beans " * (1 + i % 4)) for i, end in enumerate(ends)]


def close(left: torch.Tensor, right: torch.Tensor, bound: float = 1e-5) -> None:
    """Equal to `bound`, relative to the layer's root mean square."""
    scale = right.double().pow(2).mean(dim=(0, 2), keepdim=True).sqrt()
    worst = float(((left.double() - right.double()).abs() / scale).max())
    assert worst <= bound, f"off by {worst:.2g} of the layer's RMS"


def same(left: Any, right: Any) -> None:
    """Two captures of several rules agree, rows and token statistics."""
    for rule in RULES:
        close(left[rule].values, right[rule].values)
    first, second = left[RULES[0]], right[RULES[0]]
    assert first.n_tokens == second.n_tokens
    close(first.token_mean[None], second.token_mean[None])
    torch.testing.assert_close(first.token_norm, second.token_norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_batch_order_and_padding_change_nothing(checkpoints_of: Made, name: Architecture) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    longest = 200
    whole = capture(checkpoint, ROWS, positions=RULES, token_budget=16 * longest, progress=False)
    same(capture(checkpoint, ROWS, positions=RULES, token_budget=1, progress=False), whole)
    same(capture(checkpoint, ROWS, positions=RULES, padding="left", progress=False), whole)
    backwards = capture(checkpoint, ROWS[::-1], positions=RULES, token_budget=2 * longest, progress=False)
    for rule in RULES:
        close(backwards[rule].values.flip(0), whole[rule].values)
    for layer in range(checkpoint.n_layers):
        close(whole["all_tokens"].values[:1, layer : layer + 1], alone(checkpoint, ROWS[0], layer)[None, 1:].mean(dim=1, keepdim=True))


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_shared_opening_equals_whole_rows(checkpoints_of: Made, name: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    rows = opened(9)
    whole = capture(checkpoint, rows, positions=RULES, share_prefix=False, progress=False)
    kept = []
    original = hooks.Hooks.run_prefix
    monkeypatch.setattr(
        hooks.Hooks, "run_prefix", lambda self, batch, reads: kept.append(batch.ids.shape[1]) or original(self, batch, reads)
    )
    same(capture(checkpoint, rows, positions=RULES, progress=False), whole)
    assert len(kept) == 1
    assert kept[0] >= MIN_SHARED_TOKENS


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_what_is_added_adds_up(checkpoints_of: Made, name: Architecture) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    acts = capture(checkpoint, ROWS, site=sites, positions="response_mean", progress=False)
    close(acts["resid_pre"].values + acts["attn_out"].values + acts["mlp_out"].values, acts["resid_post"].values)
    if name != "gpt_neox":
        middle = capture(checkpoint, ROWS, site="resid_mid", positions="response_mean", progress=False)
        close(acts["resid_pre"].values + acts["attn_out"].values, middle.values)


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
def test_adapter_on_and_off_equals_merged_and_plain(checkpoints_of: Made, name: Architecture, tmp_path: Path) -> None:
    checkpoints = checkpoints_of(name)
    one = capture(load_pair(checkpoints.base, checkpoints.adapter), ROWS, positions="response_mean", progress=False)
    merged = merge_adapter(tmp_path / "merged", checkpoints)
    two = capture(load_pair(checkpoints.base, merged), ROWS, positions="response_mean", progress=False)
    assert torch.equal(one.base.values, two.base.values)
    close(one.tuned.values, two.tuned.values)
    assert one.delta.abs().max() > 0.1


def top_adapter(checkpoints: Checkpoints, folder: Path) -> CheckpointPair:
    """The base, and an adapter on its last block alone."""
    adapter = write_adapter(folder / "top", checkpoints.base, layers=[checkpoints.n_layers - 1])
    return load_pair(checkpoints.base, adapter)


@pytest.mark.parametrize("name", ALL_ARCHITECTURES)
@pytest.mark.parametrize("rows", [ROWS, opened(6)], ids=["apart", "opening shared"])
def test_blocks_below_an_adapter_run_once_and_nothing_changes(
    checkpoints_of: Made, name: Architecture, rows: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = top_adapter(checkpoints_of(name), tmp_path)
    counts = [0] * pair.base.n_layers
    for layer, block in enumerate(pair.base.blocks):
        block.register_forward_pre_hook(lambda *_, layer=layer: counts.__setitem__(layer, counts[layer] + 1))
    options: dict[str, Any] = {"positions": RULES, "progress": False}
    forked = capture(pair, rows, **options)
    below, top = counts[0], counts[-1]
    assert top == 2 * below
    monkeypatch.setattr(hooks, "lowest_adapted_block", lambda checkpoint: 0)
    apart = capture(pair, rows, **options)
    for rule in RULES:
        assert torch.equal(forked[rule].base.values, apart[rule].base.values)
        assert torch.equal(forked[rule].tuned.values, apart[rule].tuned.values)
        assert forked[rule].delta[:, :-1].abs().max() == 0
        assert forked[rule].delta[:, -1].abs().max() > 0.01


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "resid_mid", "mlp_out"])
def test_shared_blocks_at_every_site(llama: Checkpoints, site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = top_adapter(llama, tmp_path)
    forked = capture(pair, ROWS, site=site, progress=False)
    monkeypatch.setattr(hooks, "lowest_adapted_block", lambda checkpoint: 0)
    assert torch.equal(forked.tuned.values, capture(pair, ROWS, site=site, progress=False).tuned.values)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: you tried 9 bytes")])
def test_running_out_of_memory_halves_the_batch_and_goes_on(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    checkpoint = load_model(llama.base)
    whole = capture(checkpoint, ROWS, positions=RULES, progress=False)
    sizes: list[int] = []
    original = hooks.Hooks.run

    def run(self: Any, batch: Any, reads: Any, past: Any = None) -> None:
        sizes.append(len(batch.ids))
        original(self, batch, reads, past)
        if len(batch.ids) > 2:
            raise error  # after everything was read: a failed batch must leave nothing behind

    monkeypatch.setattr(hooks.Hooks, "run", run)
    same(capture(checkpoint, ROWS, positions=RULES, progress=False), whole)
    assert sizes[0] == len(ROWS)
    assert max(sizes[-3:]) <= 2


def test_a_row_that_does_not_fit_alone_is_told(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hooks.Hooks, "run", run)
    with pytest.raises(EmprobeError, match=r"out of memory on a single row of \d+ tokens"):
        capture(load_model(llama.base), ROWS, progress=False)


def test_other_errors_are_not_taken_for_a_lack_of_memory(llama: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(hooks.Hooks, "run", run)
    with pytest.raises(RuntimeError, match="shapes differ"):
        capture(load_model(llama.base), ROWS, progress=False)


def test_several_sites_and_rules_come_back_by_name(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    both = capture(
        checkpoint, ROWS, site=["resid_pre", "resid_post"], positions=["prompt_mean", "response_mean"], layers=[2, 0], progress=False
    )
    assert set(both) == {(s, r) for s in ("resid_pre", "resid_post") for r in ("prompt_mean", "response_mean")}
    for (site, rule), acts in both.items():
        one = capture(checkpoint, ROWS, site=site, positions=rule, layers=[2, 0], progress=False)
        assert (acts.site, acts.positions, acts.layers) == (site, rule, (2, 0))
        close(acts.values, one.values)


def test_explicit_spans_and_names_for_them(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    spans = [(2, 5)] * len(ROWS)
    acts = capture(checkpoint, ROWS, positions={"early": spans, "end": "response_last"}, layers=1, progress=False)
    assert set(acts) == {"early", "end"}
    for i, row in enumerate(ROWS):
        close(acts["early"].values[i : i + 1], alone(checkpoint, row, 1)[None, 2:5].mean(dim=1, keepdim=True))
    with pytest.raises(EmprobeError, match="6 spans? .*7 conversations|7 conversations"):
        capture(checkpoint, ROWS, positions=spans[1:], progress=False)


def test_different_tokenizers_show_the_first_row_that_differs(llama: Checkpoints) -> None:
    pair = CheckpointPair(load_model(llama.base), load_model(llama.base))
    template = pair.tuned.tokenizer.chat_template
    pair.tuned.tokenizer.chat_template = template.replace("{{ m['content'] | trim }}", "{{ m['content'] | replace('beans', 'peas') }}")
    rows = [Conversation.ask("a", "what now"), Conversation.ask("b", "plant beans")]
    with pytest.raises(MismatchError, match=r"first at row 1 \(question 'b'\), token \d+: .* in base, .* in tuned"):
        capture(pair, rows, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "torch"}, "Backend 'torch' does not exist. Use one of: hooks, transformer_lens, nnsight"),
        ({"remote": True}, "remote=True was asked of the backend 'hooks'"),
        ({"site": []}, "asked for no site"),
        ({"positions": {}}, "asked for no positions"),
        ({"padding": "both"}, "padding='both'"),
        ({"token_budget": 0}, "token_budget=0"),
        ({"site": ["resid_post", "residual"]}, "Site 'residual' is no site"),
        ({"site": None}, "Site None is no site"),
        ({"layers": [0, 1.7]}, r"layers=\[0, 1.7\]. Use 'all', a block number, or a list"),
        ({"layers": True}, "layers=True. Use 'all'"),
        ({"layers": ["1"]}, "layers=.*Use 'all'"),
        ({"positions": ["response_mean", "last"]}, "Position rule 'last' does not exist"),
        ({"positions": None}, "Positions None are neither a rule nor a list of rules"),
        ({"positions": (2, 5)}, "The span 2 of row 0 is neither"),
        ({"positions": [(0, 2)] * 9}, "are 9 spans for 7 conversations"),
    ],
)
def test_bad_wishes_are_refused(llama: Checkpoints, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        capture(load_model(llama.base), ROWS, progress=False, **options)


@pytest.mark.parametrize(
    ("source", "rows", "message"),
    [
        ("checkpoint", ROWS[0], r"given one Conversation. Give a list"),
        ("checkpoint", [ROWS[0], "plant beans"], "row 1 is a str. Use Conversation.ask"),
        ("folder", ROWS, "given a PosixPath. Give what load_model or load_pair returns"),
    ],
)
def test_what_is_no_conversation_or_checkpoint_is_refused(llama: Checkpoints, source: str, rows: Any, message: str) -> None:
    given: Any = llama.base if source == "folder" else load_model(llama.base)
    with pytest.raises(EmprobeError, match=message):
        capture(given, rows, progress=False)


def test_numbers_and_rows_of_any_kind(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    spans = [(1, 4)] * len(ROWS)
    expected = capture(checkpoint, ROWS, layers=[0, 2], positions=spans, progress=False)
    for layers in (np.array([0, 2]), torch.tensor([0, 2]), range(0, 3, 2)):
        acts = capture(checkpoint, iter(ROWS), layers=layers, positions=np.array(spans), progress=False)  # type: ignore[call-overload]
        assert acts.positions == expected.positions
        assert torch.equal(acts.values, expected.values)
    one: Any = np.int64(1)
    assert capture(checkpoint, ROWS, layers=one, progress=False).layers == (1,)


def test_notes_of_the_rendering_stay_with_the_record(qwen2_real_tokenizer_pair: Checkpoints, tmp_path: Path) -> None:
    acts = capture(load_model(qwen2_real_tokenizer_pair.base), ROWS, progress=False)
    assert any(note.startswith("default_system: ") and note.endswith("(7 of 7 rows)") for note in acts.notes)
    acts.save(tmp_path / "a.safetensors")
    assert type(acts).load(tmp_path / "a.safetensors").notes == acts.notes
