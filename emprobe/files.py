"""Files: atomic writes, canonical JSON, content hashes, and safetensors with one JSON card in the metadata."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emprobe.errors import EmprobeError, MismatchError

T = TypeVar("T")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place only if the block ends well.

    The file is flushed to disk before the rename, so a kill at any instant leaves the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked_folder(folder: Path | str) -> Iterator[Path]:
    """Hold a folder for one writer; the lock goes with the process, however it ends. What a killed writer left half-written is removed.

    Raises:
        EmprobeError: If it cannot be made, or another process is writing there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise EmprobeError(f"The folder {folder} cannot be used: {error.strerror}. Give another.") from error
    if sys.platform == "win32":  # No locks on folders there: two writers would have to be kept apart by the user.
        yield folder
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EmprobeError(f"Another process is writing to {folder}. Wait for it, or give another folder.") from None
        for left in [*folder.glob(".*.part"), *folder.glob(".tmp*")]:  # the second are safetensors' own
            if left.is_file():
                left.unlink()
        yield folder
    finally:
        os.close(handle)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces; what hashes are taken of.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    '{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path | str, value: Any) -> None:
    """Write readable JSON atomically; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read JSON, or say which file could not be read and why.

    Raises:
        EmprobeError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EmprobeError(f"{path} was asked for and does not exist.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EmprobeError(f"{path} could not be read as JSON: {error}.") from error


def content_hash(value: Any) -> str:
    """SHA-256 of a JSON-able value, first 16 hex digits.

    >>> content_hash({"a": 1}) == content_hash({"a": 1})
    True
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file's bytes, whole hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], card: Mapping[str, Any]) -> None:
    """Write tensors and one JSON card (metadata key `card`) to a safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata={"card": canonical_json(dict(card))})


def load_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file of `save_tensors`: its tensors and its card.

    Raises:
        EmprobeError: If the file is missing, is not safetensors, or has no card of emprobe.
    """
    if not Path(path).is_file():
        raise EmprobeError(f"{path} was asked for and is not a file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise EmprobeError(f"{path} could not be read as safetensors: {error}. The file may be cut short.") from error
    if "card" not in metadata:
        raise EmprobeError(f"{path} holds tensors but no emprobe card, so what they mean is unknown. Was it saved by emprobe?")
    try:
        card = json.loads(metadata["card"])
    except ValueError as error:
        raise EmprobeError(f"{path} has a card that is no JSON: {error}. Was it edited? Save it again.") from error
    if not isinstance(card, dict):
        raise EmprobeError(f"{path} has a card that is a {type(card).__name__} and no table of names. Was it saved by emprobe?")
    return tensors, card


def load_record(path: Path | str, kind: type[T], tensors: Collection[str]) -> T:
    """A dataclass whose `card` and tensors `save_tensors` wrote under its class's name.

    Args:
        path: The file.
        kind: The dataclass.
        tensors: Names of the tensors that it takes, which the file may leave out only where the dataclass has a default.

    Raises:
        EmprobeError: If the file holds another record, or its card is not one of this record.
    """
    found, card = load_tensors(path)
    if card.pop("record", None) != kind.__name__:
        raise EmprobeError(f"{path} holds no {kind.__name__.lower()}. Was it written by {kind.__name__}.save?")
    values = {**card, **found}
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}  # type: ignore[arg-type]
    wrong = [*sorted(needed - values.keys()), *sorted(values.keys() - names), *sorted(set(found) - set(tensors))]
    kinds = {"layer": int | None, "raw_norm": int | float, "provenance": dict, "share": list}
    wrong += [name for name, wanted in kinds.items() if name in values and not isinstance(values[name], wanted)]
    if wrong:
        raise EmprobeError(
            f"{path} is no {kind.__name__} that can be read: {', '.join(dict.fromkeys(wrong))} missing, unknown or of another type."
        )
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def check_fits(what: str, asked: Mapping[str, Any], found: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Refuse a direction or subspace that belongs to another model or place than the one it is asked to fit.

    Args:
        what: Names it in the message: its file, for instance.
        asked: `d_model`, `layer`, `site` and `fingerprint` (of weights) that it must have; `None` is not asked.
        found: What it has, but for fingerprints.
        provenance: Its own; any of its entries may hold the `fingerprint` of weights that it was made with.

    Raises:
        MismatchError: Names what was asked and what it has; a thing that is asked for and unknown does not fit either.

    Example:
        >>> check_fits("a.safetensors", {"layer": 2, "site": None}, {"layer": 3, "site": "resid_post"}, {})
        Traceback (most recent call last):
        emprobe.errors.MismatchError: a.safetensors was asked to fit layer 2, but is of layer 3. Give the file of that model and place.
    """
    known = [str(side["fingerprint"]) for side in provenance.values() if isinstance(side, Mapping) and "fingerprint" in side]
    for name, wanted in asked.items():
        has = known if name == "fingerprint" else [found[name]]
        if wanted is not None and wanted not in has:
            shown = " and ".join(str(value) for value in has if value is not None) or "unknown"
            raise MismatchError(
                f"{what} was asked to fit {name} {wanted}, but is of {name} {shown}. Give the file of that model and place."
            )
