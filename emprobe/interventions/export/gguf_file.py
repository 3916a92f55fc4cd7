"""A GGUF file as llama.cpp reads it: its name, where it comes from, float32, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.files import atomic_path
from emprobe.interventions.plan import Plan
from emprobe.models.load import Checkpoint

UNPARSABLE = ":,"


def as_float32(values: np.ndarray, what: str) -> np.ndarray:
    """Rounded to float32.

    Raises:
        EmprobeError: If something is too large for it.
    """
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(rounded).all():
        raise EmprobeError(f"{what} reaches {np.abs(values).max():.3g}, which float32 cannot hold. Give smaller coefficients.")
    return rounded


def checked_path(path: str | Path) -> Path:
    """The path, if llama.cpp can take its name.

    Raises:
        EmprobeError: If it has a character at which llama.cpp takes its arguments apart, or does not end in .gguf.
    """
    path = Path(path)
    name = str(path).removeprefix(path.drive)
    found = [character for character in UNPARSABLE if character in name]
    if found:
        raise EmprobeError(
            f"The file {str(path)!r} has {' and '.join(map(repr, found))} in its name, at which llama.cpp splits arguments (FILE:SCALE, "
            "several files by comma). Choose another name."
        )
    if path.suffix != ".gguf":
        raise EmprobeError(f"The file {str(path)!r} was asked for, but llama.cpp's files end in .gguf. Choose such a name.")
    return path


def add_origin(writer: Any, checkpoint: Checkpoint, plan: Plan, convention: str) -> None:
    """Say in the file's metadata who wrote it, from what, and what its tensors mean; llama.cpp passes over these keys."""
    writer.add_string("emprobe.version", version("emprobe"))
    writer.add_string("emprobe.convention", convention)
    writer.add_string("emprobe.plan", repr(plan))
    writer.add_string("emprobe.plan_hash", plan.hash)
    writer.add_string("emprobe.checkpoint", checkpoint.name)
    writer.add_string("emprobe.fingerprint", checkpoint.fingerprint)


def write_gguf(path: Path, architecture: str, fill: Callable[[Any], None]) -> None:
    """Write a GGUF file atomically.

    Args:
        path: Where it goes.
        architecture: Its `general.architecture`.
        fill: Adds keys and tensors to a `gguf.GGUFWriter`.

    Raises:
        MissingExtraError: If the package gguf is not installed.
    """
    try:
        from gguf import GGUFWriter  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise MissingExtraError("gguf", "gguf", f"Writing {path}") from None
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, architecture)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
