"""Fill a store shard by shard: a kill at any instant loses at most the shard under way, and the same call goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from emprobe.capture.engine import Engine
from emprobe.capture.request import Chunk, Records, Request
from emprobe.capture.store import FORMAT, ActivationStore, check_shard, read_manifest, write_manifest
from emprobe.capture.tokens import token_hash
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import content_hash, file_hash, locked_folder, save_tensors
from emprobe.types import Conversation

STATISTICS = "statistics.safetensors"


def fill_store(request: Request, conversations: Iterable[Conversation], folder: Path, shard_rows: int) -> ActivationStore:
    """Capture into a folder; shards that are there already are checked and kept.

    Raises:
        EmprobeError: If a shard's bytes changed (it is named), the folder holds other files, or another process is writing there.
        MismatchError: If the folder holds another capture.
    """
    if shard_rows < 1:
        raise EmprobeError(f"A store was asked for with shard_rows={shard_rows}. Give at least 1.")
    with ExitStack() as stack:
        with _writing(folder):
            stack.enter_context(locked_folder(folder))
        engine = request.engine(conversations)
        manifest = _claimed(request, folder, shard_rows)
        with engine.speed.bar:
            given = 0
            for given, chunk in enumerate(request.chunks(conversations, shard_rows), start=1):
                _fill_shard(request, engine, chunk, folder, manifest, given - 1)
        if given < len(manifest["shards"]):
            raise MismatchError(
                f"{folder} holds {len(manifest['shards'])} shards, and the conversations given fill only {given}. "
                "Give the same conversations, or another folder."
            )
        if manifest["complete"] and (folder / STATISTICS).is_file():
            check_shard(folder, manifest["statistics"])
        else:
            _finish(folder, manifest)
    return ActivationStore.open(folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say in one sentence why a folder cannot be written; what is there already is whole, since files take their place all at once."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise EmprobeError(
            f"The store {folder} could not be written: {error}. The shards that are there stay. Make room, or give a folder that can be "
            "written, and run the same capture again."
        ) from error


def _claimed(request: Request, folder: Path, shard_rows: int) -> dict[str, Any]:
    """The folder's manifest, if it is this capture's; a new one in an empty folder."""
    asked = {
        "checkpoints": {role: c.fingerprint for role, c in request.roles.items()},
        "sites": list(request.sites),
        "rules": list(request.rules),
        "layers": list(request.layers),
        "dtype": str(next(iter(request.roles.values())).hf.dtype).removeprefix("torch."),
        "backend": request.backend,
        "shard_rows": shard_rows,
    }
    manifest = read_manifest(folder)
    if manifest is None:
        if any(folder.iterdir()):
            raise EmprobeError(f"The folder {folder} holds files that are no store of activations. Give an empty or a new folder.")
        named = {role: {"name": c.name, "fingerprint": c.fingerprint} for role, c in request.roles.items()}
        manifest = {"format": FORMAT, "asked": asked, "checkpoints": named, "complete": False, "shards": [], "notes": []}
    different = [key for key in asked if manifest["asked"].get(key) != asked[key]]
    if different:
        key = different[0]
        raise MismatchError(
            f"The store {folder} holds another capture: {', '.join(different)} differ{'s' if len(different) == 1 else ''} "
            f"({key} was {manifest['asked'].get(key)!r}, now {asked[key]!r}). Give another folder, or what it was made with."
        )
    return manifest


def _fill_shard(request: Request, engine: Engine, chunk: Chunk, folder: Path, manifest: dict[str, Any], index: int) -> None:
    content = _content(chunk)
    there = manifest["shards"][index] if index < len(manifest["shards"]) else None
    if there is not None:
        if there["content"] != content:
            raise MismatchError(
                f"Shard {there['file']} of {folder} holds other conversations than those given for its {there['rows']} rows, or other "
                "tokens of them. Give the same ones in the same order, or another folder."
            )
        if (folder / there["file"]).is_file():
            check_shard(folder, there)
            engine.speed.step(len(chunk.conversations), 0)
            return
    file = f"shard-{index:05d}.safetensors"
    records = request.run(engine, chunk)
    with _writing(folder):
        _write_shard(request, records, folder / file)
    notes = Counter(note for row in chunk.encoded for note in row.notes)
    entry = {
        "file": file,
        "sha256": file_hash(folder / file),
        "rows": len(chunk.conversations),
        "n_tokens": next(iter(records.values()))[0].n_tokens,
        "content": content,
        "notes": dict(notes),
    }
    manifest["shards"][index : index + 1] = [entry]
    with _writing(folder):
        write_manifest(folder, manifest)


def _content(chunk: Chunk) -> str:
    """Names what a shard's rows are: whose, of which tokens, and which of these are read."""
    read = [[[row.start, row.stop] if isinstance(row, range) else list(row) for row in rule] for rule in chunk.read]
    return content_hash([[c.key for c in chunk.conversations], [token_hash(e) for e in chunk.encoded], read])


def _write_shard(request: Request, records: Records, path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for (site, rule), found in records.items():
        for role, record in zip(request.roles, found, strict=True):
            tensors[f"{role}.{site}.{rule}"] = record.values
            tensors[f"{role}.{site}.token_mean"] = record.token_mean
            tensors[f"{role}.{site}.token_norm"] = record.token_norm
    first = next(iter(records.values()))[0]
    save_tensors(path, tensors, {"record": "shard of Activations", "keys": first.keys, "tokens": first.tokens})


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Merge the shards' token statistics, and mark the store complete."""
    asked = manifest["asked"]
    names = [f"{role}.{site}.{what}" for role in asked["checkpoints"] for site in asked["sites"] for what in ("token_mean", "token_norm")]
    merged: dict[str, torch.Tensor] = {}
    n_tokens, notes, n_rows = 0, Counter[str](), 0
    for shard in manifest["shards"]:
        with safe_open(str(folder / shard["file"]), framework="pt") as file:
            parts = {name: file.get_tensor(name) * shard["n_tokens"] for name in names}
        merged = {name: merged[name] + part if name in merged else part for name, part in parts.items()}
        n_tokens += shard["n_tokens"]
        n_rows += shard["rows"]
        notes.update(shard["notes"])
    means = {name: total / max(n_tokens, 1) for name, total in merged.items()}
    with _writing(folder):
        save_tensors(folder / STATISTICS, means, {"record": "token statistics of Activations"})
    manifest["statistics"] = {"file": STATISTICS, "sha256": file_hash(folder / STATISTICS), "n_tokens": n_tokens}
    manifest["notes"] = [f"{note} ({count} of {n_rows} rows)" for note, count in notes.most_common()]
    manifest["complete"] = True
    with _writing(folder):
        write_manifest(folder, manifest)
