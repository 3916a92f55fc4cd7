"""A store on disk: what is read back is what was captured, changed bytes are refused by name, and a kill at any instant loses nothing."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from emprobe.activations import Activations, PairActivations
from emprobe.capture import ActivationStore, capture, filling
from emprobe.capture.backends import hooks
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import locked_folder, save_tensors
from emprobe.models import load_model, load_pair
from emprobe.types import Conversation
from tests.capture.test_capture import ROWS
from tests.fixtures.models import Checkpoints

MANY = [Conversation(r.messages, r.response, f"{r.question_id}-{n}", r.sample) for n in range(3) for r in ROWS]


def in_memory(source: Any, **options: Any) -> Any:
    """The same rows in shards' batches: a store's shard is a capture of its own rows."""
    return [capture(source, MANY[i : i + 8], progress=False, **options) for i in range(0, len(MANY), 8)]


@pytest.fixture
def store(llama: Checkpoints, tmp_path: Path) -> ActivationStore:
    return capture(
        load_pair(llama.base, llama.adapter),
        MANY,
        store=tmp_path / "store",
        shard_rows=8,
        site=["resid_pre", "resid_post"],
        positions=["prompt_mean", "response_mean"],
        progress=False,
    )


def test_what_is_read_is_what_was_captured(llama: Checkpoints, store: ActivationStore) -> None:
    assert len(store) == len(MANY)
    acts = store.read(site="resid_post", positions="response_mean")
    assert isinstance(acts, PairActivations)
    parts = in_memory(load_pair(llama.base, llama.adapter), positions="response_mean")
    for role in ("base", "tuned"):
        got, made = getattr(acts, role), [getattr(part, role) for part in parts]
        assert torch.equal(got.values, torch.cat([m.values for m in made]))
        assert got.keys == tuple(c.key for c in MANY)
        assert got.tokens == tuple(t for m in made for t in m.tokens)
        weights = [m.n_tokens for m in made]
        mean = sum((w * m.token_mean for w, m in zip(weights, made, strict=True)), torch.zeros(())) / sum(weights)
        torch.testing.assert_close(got.token_mean, mean, rtol=1e-12, atol=1e-12)
        assert got.n_tokens == sum(weights)


@pytest.mark.parametrize("rows", [slice(None), slice(3, 5), slice(6, 18), slice(-2, None), slice(1, 20, 5), slice(0, 1)])
def test_some_rows_and_layers(store: ActivationStore, rows: slice) -> None:
    whole = store.read(site="resid_pre", positions="prompt_mean").tuned
    part = store.read(site="resid_pre", positions="prompt_mean", rows=rows, layers=[2, 0]).tuned
    assert part.layers == (2, 0)
    assert torch.equal(part.values, whole.values[rows][:, [2, 0]])
    assert part.keys == whole.keys[rows]
    assert part.tokens == whole.tokens[rows]
    assert torch.equal(part.token_norm, whole.token_norm[[2, 0]])


def test_only_the_shards_that_are_needed_are_opened(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.folder / "shard-00002.safetensors").unlink()
    assert len(store.read(site="resid_pre", positions="prompt_mean", rows=slice(0, 16))) == 16
    with pytest.raises(EmprobeError, match=r"Shard shard-00002\.safetensors .* is missing"):
        store.read(site="resid_pre", positions="prompt_mean")


def test_changed_bytes_are_refused_by_name(llama: Checkpoints, store: ActivationStore) -> None:
    path = store.folder / "shard-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(EmprobeError, match=r"Shard shard-00001\.safetensors .* is not what was written there: its SHA-256"):
        ActivationStore.open(store.folder).read(site="resid_pre", positions="prompt_mean")
    with pytest.raises(EmprobeError, match=r"Shard shard-00001\.safetensors .* Delete that file"):
        again(llama, store.folder)
    path.unlink()
    assert len(again(llama, store.folder)) == len(MANY)


def again(llama: Checkpoints, folder: Path, rows: Any = MANY, **options: Any) -> ActivationStore:
    """The fixture's capture once more."""
    asked = {"shard_rows": 8, "site": ["resid_pre", "resid_post"], "positions": ["prompt_mean", "response_mean"]} | options
    return capture(load_pair(llama.base, llama.adapter), rows, store=folder, progress=False, **asked)


def test_a_finished_store_runs_no_model(llama: Checkpoints, store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f.name: f.read_bytes() for f in store.folder.iterdir()}
    monkeypatch.setattr(hooks.Hooks, "run", lambda *_: pytest.fail("a model was run"))
    assert len(again(llama, store.folder)) == len(MANY)
    assert {f.name: f.read_bytes() for f in store.folder.iterdir()} == before


def test_a_missing_shard_alone_is_captured_anew(llama: Checkpoints, store: ActivationStore) -> None:
    before = {f.name: f.read_bytes() for f in store.folder.iterdir()}
    (store.folder / "shard-00000.safetensors").unlink()
    again(llama, store.folder)
    assert {f.name: f.read_bytes() for f in store.folder.iterdir()} == before


def test_an_interrupted_capture_says_so_and_goes_on(llama: Checkpoints, tmp_path: Path, store: ActivationStore) -> None:
    def broken() -> Iterator[Conversation]:
        yield from MANY[:12]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(llama, tmp_path / "other", broken())
    with pytest.raises(EmprobeError, match=r"stopped after 8 rows\. Run the same capture again"):
        ActivationStore.open(tmp_path / "other")
    again(llama, tmp_path / "other", iter(MANY))
    for file in store.folder.iterdir():
        assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (MANY[::-1], {}, r"Shard shard-00000\.safetensors of .* holds other conversations"),
        (MANY[:-1], {}, r"Shard shard-00002\.safetensors of .* holds other conversations"),
        (MANY[:8], {}, r"holds 3 shards, and the conversations given fill only 1"),
        (MANY, {"layers": [1]}, r"holds another capture: layers differs \(layers was \[0, 1, 2\], now \[1\]\)"),
        (MANY, {"site": "resid_post"}, r"another capture: sites differs"),
        (MANY, {"shard_rows": 4}, r"shard_rows was 8, now 4"),
        (MANY, {"shard_rows": 0}, r"shard_rows=0"),
    ],
)
def test_another_capture_is_refused(llama: Checkpoints, store: ActivationStore, rows: Any, options: Any, message: str) -> None:
    before = {f.name: f.read_bytes() for f in store.folder.iterdir()}
    with pytest.raises(EmprobeError, match=message):
        again(llama, store.folder, rows, **options)
    assert {f.name: f.read_bytes() for f in store.folder.iterdir()} == before


def test_other_weights_are_refused(llama: Checkpoints, store: ActivationStore) -> None:
    with pytest.raises(MismatchError, match="checkpoints differs"):
        capture(
            load_pair(llama.base, llama.base),
            MANY,
            store=store.folder,
            shard_rows=8,
            site=["resid_pre", "resid_post"],
            positions=["prompt_mean", "response_mean"],
            progress=False,
        )


def test_what_it_does_not_hold_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(EmprobeError, match="Site was not named, and the store holds resid_pre, resid_post"):
        store.read(positions="prompt_mean")
    with pytest.raises(EmprobeError, match="Positions 'last' was asked for, but the store holds prompt_mean, response_mean"):
        store.read(site="resid_pre", positions="last")
    with pytest.raises(EmprobeError, match="layer 7"):
        store.read(site="resid_pre", positions="prompt_mean", layers=7)
    with pytest.raises(EmprobeError, match="of a store of 21 rows"):
        store.read(site="resid_pre", positions="prompt_mean", rows=slice(30, 40))
    with pytest.raises(EmprobeError, match=r"Rows \[1, 2\] were asked of a store, which reads slices"):
        store.read(site="resid_pre", positions="prompt_mean", rows=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(EmprobeError, match="holds no activations"):
        ActivationStore.open(tmp_path)


def test_foreign_folders_and_second_writers_are_refused(llama: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EmprobeError, match="holds files that are no store"):
        again(llama, tmp_path)
    with locked_folder(tmp_path / "busy"), pytest.raises(EmprobeError, match="Another process is writing to"):
        again(llama, tmp_path / "busy")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"positions": {"a": "prompt_mean"}}, {"positions": {"a": "response_mean"}}),
        ({"positions": {"a": [(0, 2)] * 7}}, {"positions": {"a": [(0, 3)] * 7}}),
        ({"positions": "decision_token", "other": "grow"}, {"positions": "decision_token", "other": "plant beans or"}),
    ],
)
def test_the_same_rows_read_at_other_tokens_are_another_capture(
    llama: Checkpoints, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    checkpoint = load_model(llama.base)

    def grab(positions: Any, other: str = "") -> ActivationStore:
        rows = [Conversation.ask(f"q{i}", "what now", other_response=other).answered("plant beans and peas") for i in range(7)]
        return capture(checkpoint, rows, store=tmp_path / "s", positions=positions, progress=False)

    assert len(grab(**first)) == len(grab(**first)) == 7
    with pytest.raises(MismatchError, match="other tokens of them"):
        grab(**second)


def test_an_edited_manifest_is_refused(llama: Checkpoints, store: ActivationStore) -> None:
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["asked"]["layers"] = [1, 0, 2]
    path.write_text(json.dumps(manifest))
    with pytest.raises(EmprobeError, match=r"manifest\.json is not what was written there"):
        ActivationStore.open(store.folder)
    with pytest.raises(EmprobeError, match=r"manifest\.json is not what was written there"):
        again(llama, store.folder)


def test_lost_or_changed_statistics_are_told_and_made_anew(llama: Checkpoints, store: ActivationStore) -> None:
    path = store.folder / "statistics.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    with pytest.raises(EmprobeError, match=r"statistics\.safetensors .* Delete that file"):
        again(llama, store.folder)
    path.unlink()
    again(llama, store.folder)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written_says_so_and_a_full_disk_loses_no_shard(
    llama: Checkpoints, tmp_path: Path, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EmprobeError, match=r"The folder .*file cannot be used: File exists"):
        again(llama, tmp_path / "file")
    written = []

    def full(path: Path, *parts: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_tensors(path, *parts)

    monkeypatch.setattr(filling, "save_tensors", full)
    with pytest.raises(EmprobeError, match="No space left on device. The shards that are there stay"):
        again(llama, tmp_path / "other")
    monkeypatch.undo()
    assert len(json.loads((tmp_path / "other" / "manifest.json").read_text())["shards"]) == 2
    again(llama, tmp_path / "other")
    for file in store.folder.iterdir():
        assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes()


def test_one_checkpoint_gives_plain_activations(llama: Checkpoints, tmp_path: Path) -> None:
    store = capture(load_model(llama.base), MANY, store=tmp_path / "one", layers=[1], progress=False)
    acts = store.read()
    assert isinstance(acts, Activations)
    assert (store.roles, acts.layers, len(acts)) == (("model",), (1,), len(MANY))
    assert "ActivationStore(" in repr(store)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_is_bit_equal(llama: Checkpoints, tmp_path: Path) -> None:
    """`kill -9` at least 20 times while shards are being written; every finished store equals an undisturbed one, file by file."""
    script = Path(__file__).with_name("killing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(llama.base), str(llama.adapter), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 20
    assert found["stores"] >= 2
    assert found["equal"] is True
