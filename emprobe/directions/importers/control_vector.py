"""GGUF control vectors of repeng and llama.cpp: tensors `direction.<N>`, N >= 1.

Source: llama.cpp's control vector loader and `cvector-generator` (which names what it measured at block i `direction.<i + 1>`), and
repeng's `export_gguf` (which names it `direction.<i>`, i the block whose output it measured). Both add it at the output of block N.
"""

from __future__ import annotations

import re
from typing import Any

from emprobe.directions.importers.container import Opened
from emprobe.directions.importers.source import Asked, Source, Vector, check_one_width, vector_of
from emprobe.errors import EmprobeError, MissingExtraError

NAME = re.compile(r"direction\.(\d+)")
CONVENTIONS = {
    "repeng": (
        "GGUF, repeng's: direction.N was measured at, and is added to, the output of 0-based block N",
        "none: emprobe's resid_post[N] is the output of block N",
    ),
    "llama.cpp": (
        "GGUF, llama.cpp's own generator: direction.N was measured at the output of 0-based block N - 1, and is added to that of block N",
        "direction.N became resid_post[N - 1], where it was measured",
    ),
}
LAST = "if the highest layer is the model's last block, repeng measured it after the final norm, not in the residual stream"
ASSUMED = (
    "nothing in the file says who wrote it: repeng's convention was taken (the block it is added to); "
    "if llama.cpp's cvector-generator did, give convention='llama.cpp'"
)


def recognises(opened: Opened) -> str | None:
    """A GGUF file holds a control vector or is refused by the reader."""
    return "surely" if opened.kind == "gguf" else None


def read(opened: Opened, asked: Asked) -> Source:
    """Vectors at the block where they were measured, by the convention of who wrote the file.

    Raises:
        EmprobeError: If it is no control vector, is damaged, or the convention does not exist.
        MissingExtraError: If the package gguf is not installed.
    """
    found, facts = _tensors(opened)
    ours = f"GGUF, emprobe's: {facts['emprobe.convention']}" if "emprobe.convention" in facts else None
    name = asked.convention or "repeng"
    if name not in CONVENTIONS:
        raise EmprobeError(f"The convention {name!r} does not exist. Use one of: {', '.join(CONVENTIONS)}.")
    if ours and name != "repeng":
        raise EmprobeError(f"{opened.path} was written by emprobe and says its convention ({ours}). Leave convention out.")
    convention, conversion = CONVENTIONS[name] if ours is None else (ours, "none: it is emprobe's")
    vectors = {number - (name == "llama.cpp"): vector for number, vector in found.items()}
    check_one_width(vectors, str(opened.path))
    cautions = () if ours else ((LAST,) if name == "repeng" else ()) + (() if asked.convention else (ASSUMED,))
    return Source(
        vectors=vectors,
        site="resid_post",
        convention=convention,
        conversion=conversion,
        contrast="positive - negative prompts",
        sign="positive is the positive prompts",
        cautions=cautions,
        facts=facts,
    )


def _tensors(opened: Opened) -> tuple[dict[int, Vector], dict[str, Any]]:
    try:
        from gguf import GGUFReader  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise MissingExtraError("gguf", "gguf", f"Reading {opened.path}") from None
    try:
        reader = GGUFReader(opened.path)
        fields = {
            name: field.contents() for name, field in reader.fields.items() if name.startswith(("general.", "controlvector.", "emprobe."))
        }
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise EmprobeError(f"{opened.path} is cut short or damaged: {error}. Fetch it again.") from error
    if fields.get("general.architecture") != "controlvector":
        raise EmprobeError(
            f"{opened.path} is a GGUF file of {fields.get('general.architecture')!r}, not of a control vector. Is it a model?"
        )
    numbered = {int(found.group(1)): tensors[name] for name in tensors if (found := NAME.fullmatch(name))}
    if not numbered or min(numbered) < 1:
        raise EmprobeError(f"{opened.path} should hold tensors direction.1, direction.2, …, but holds {', '.join(tensors) or 'none'}.")
    vectors = {number: vector_of(data, f"{opened.path}, direction.{number}") for number, data in sorted(numbered.items())}
    return vectors, {name.removeprefix("controlvector."): value for name, value in fields.items() if not name.startswith("general.")}
