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

CONVERT = "python convert_hf_to_gguf.py '{base}' --outtype f32 --outfile model.gguf  # a script of llama.cpp"
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


def check_name(folder: Path) -> None:
    """Refuse a folder whose files llama.cpp could not be given.

    Raises:
        EmprobeError: If its path has a character at which llama.cpp takes its arguments apart.
    """
    found = [character for character in UNPARSABLE if character in str(folder).removeprefix(folder.drive)]
    if found:
        raise EmprobeError(
            f"The output folder has {' and '.join(map(repr, found))} in its path ({folder}), at which llama.cpp splits its arguments "
            "(FILE:SCALE, several files by comma). Choose another name."
        )


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


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """What a GGUF file holds, by name, as the package gguf reads it.

    Raises:
        MissingExtraError: If the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise MissingExtraError("gguf", "gguf", f"Reading {path}") from None
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
