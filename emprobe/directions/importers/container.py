"""Opening a file by what its first bytes say, never by its name, and never running what is in it."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - the name of torch's refusal; nothing is read with pickle
from typing import Any, Literal

import numpy as np
import torch

from emprobe.errors import EmprobeError
from emprobe.files import file_hash

Kind = Literal["torch", "array", "json", "gguf"]
KINDS: Mapping[Kind, str] = {"torch": "a torch file", "array": "a numpy file", "json": "a JSON file", "gguf": "a GGUF file"}


@dataclass(frozen=True)
class Opened:
    """A file, what kind it is and what it holds; GGUF is left to its own reader."""

    path: Path
    kind: Kind
    content: Any
    sha256: str


def open_container(path: Path) -> Opened:
    """Read a torch, numpy or JSON file, or recognise a GGUF one.

    Raises:
        EmprobeError: If there is no such file, it is empty, of no known kind, cut short, or would have to run code to be read.
    """
    if not path.is_file():
        raise EmprobeError(f"{path} was asked for and is not a file.")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise EmprobeError(f"{path} is empty (0 bytes). Fetch it again.")
    kind = _kind(path, head)
    read: dict[Kind, Callable[[Path], Any]] = {"torch": _torch, "array": _array, "json": _json}
    return Opened(path, kind, read[kind](path) if kind in read else None, file_hash(path))


def _kind(path: Path, head: bytes) -> Kind:
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"\x93NUMPY"):
        return "array"
    if head.startswith(b"PK"):
        return "array" if _is_npz(path) else "torch"
    if head.startswith(b"\x80"):
        return "torch"
    if head.lstrip().startswith(b"{"):
        return "json"
    if head[8:9] == b"{":
        raise EmprobeError(f"{path} is a safetensors file. If emprobe wrote it, read it with Direction.load; other layouts are not known.")
    raise EmprobeError(
        f"{path} begins with {head[:8]!r}, which is none of the kinds that can be imported: torch (.pt), numpy (.npy, .npz), GGUF, or JSON "
        "(.svec). Is it the right file, and whole?"
    )


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError):
        raise EmprobeError(f"{path} is cut short or damaged: the archive has no readable table of contents. Fetch it again.") from None


def _torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own about pickles that are none of its: these are refused below
            # Nothing but tensors and plain values is made, whatever the file asks for; a file saved on a GPU is read on the CPU.
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - peers write torch files; this runs no code
    except Exception as error:  # a damaged pickle makes torch stumble in any way
        asks_for = re.search(r"GLOBAL (\w+(?:\.\w+)+)", str(error)) if isinstance(error, UnpicklingError) else None
        if asks_for:
            raise EmprobeError(
                f"{path} holds more than tensors: reading it would run code ({asks_for.group(1)}), so it is refused. Save the tensors "
                "alone, as a dictionary of layer to vector, where the file comes from."
            ) from error
        told = [*str(error).splitlines(), type(error).__name__]
        raise EmprobeError(f"{path} is cut short, damaged or no torch file ({told[0]}). Fetch it again.") from error


def _array(path: Path) -> dict[str, Any]:
    """Arrays by name; the one of a .npy has none."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": found}
        with found:
            return {name: found[name] for name in found}
    except Exception as error:  # as above: numpy reads headers with Python's own parser
        if "allow_pickle" in str(error):
            raise EmprobeError(f"{path} holds Python objects: reading it would run code, so it is refused. Save plain numbers.") from error
        raise EmprobeError(f"{path} is cut short or damaged: {error}. Fetch it again.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EmprobeError(f"{path} begins like JSON and is not: {error}. It may be cut short; fetch it again.") from error


def described(opened: Opened) -> str:
    """What a file holds, in one line, for messages."""
    if opened.kind == "gguf":
        return KINDS["gguf"]
    single = opened.kind == "array" and list(opened.content) == [""]
    return f"{KINDS[opened.kind]} with {_value(opened.content[''] if single else opened.content)}"


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"values of shape {list(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        if not value:
            return "no entries"
        names = [str(name) for name in value]
        more = f", … ({len(names)} in all)" if len(names) > 6 else ""
        return f"entries {', '.join(names[:6])}{more}, of which the first holds {_value(next(iter(value.values())))}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}" + (f" of which the first holds {_value(value[0])}" if value else "")
    return f"a {type(value).__name__}"
