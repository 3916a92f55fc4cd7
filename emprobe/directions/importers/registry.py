"""Which formats there are, and which of them a file is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emprobe.directions.importers import array, control_vector, model_organisms, persona_vectors, refusal_direction, svec
from emprobe.directions.importers.container import KINDS, Kind, Opened, described
from emprobe.directions.importers.source import Asked, Source
from emprobe.errors import EmprobeError


@dataclass(frozen=True)
class Format:
    """A layout: how surely a file is of it (`surely`, `perhaps`, or `None`), how it is read, and which options it takes."""

    meaning: str
    kinds: frozenset[Kind]
    recognises: Callable[[Opened], str | None]
    read: Callable[[Opened, Asked], Source]
    options: frozenset[str] = frozenset()


_TORCH: frozenset[Kind] = frozenset({"torch"})
FORMATS: dict[str, Format] = {
    "persona_vectors": Format("row k is the input of block k", _TORCH, persona_vectors.recognises, persona_vectors.read),
    "model_organisms": Format(
        "k is the output of block k", _TORCH, model_organisms.recognises, model_organisms.read, frozenset({"entry", "minus"})
    ),
    "refusal_direction": Format(
        "k is the input of block k", _TORCH, refusal_direction.recognises, refusal_direction.read, frozenset({"entry"})
    ),
    "gguf": Format(
        "direction.N is added at the output of block N",
        frozenset({"gguf"}),
        control_vector.recognises,
        control_vector.read,
        frozenset({"convention"}),
    ),
    "svec": Format("k is the output of block k", frozenset({"json"}), svec.recognises, svec.read),
    "array": Format("you name the site", frozenset({"array", "torch"}), array.recognises, array.read, frozenset({"site", "entry"})),
}


def choose(opened: Opened, name: str) -> str:
    """The named format, or under `auto` the one that the file's content names.

    Raises:
        EmprobeError: If there is no such format, the file cannot be of it, is of none, or may be of several; these are listed.
    """
    if name != "auto":
        if name not in FORMATS:
            raise EmprobeError(f"The format {name!r} does not exist. Use auto or one of: {', '.join(FORMATS)}.")
        if opened.kind not in FORMATS[name].kinds:
            wanted = " or ".join(sorted(KINDS[kind] for kind in FORMATS[name].kinds))
            raise EmprobeError(f"{opened.path} was asked for as {name}, which is {wanted}, but it is {described(opened)}.")
        return name
    found = {key: format.recognises(opened) for key, format in FORMATS.items()}
    candidates = [key for key in found if found[key] == "surely"] or [key for key in found if found[key]]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise EmprobeError(f"{opened.path} is {described(opened)}, which is the layout of no known format ({', '.join(FORMATS)}).")
    listed = "; ".join(f"{key} ({FORMATS[key].meaning})" for key in candidates)
    raise EmprobeError(
        f"{opened.path} is {described(opened)}, which may be any of: {listed}. They may mean different layers, and the file "
        "cannot tell: give format= one of them."
    )


def check_options(name: str, asked: Asked, path: Path) -> None:
    """Refuse an option that the format has no use for, rather than leave it unheard.

    Raises:
        EmprobeError: Names the option and those that the format takes.
    """
    given = [option for option in ("entry", "minus", "convention") if getattr(asked, option) is not None]
    unused = [option for option in given if option not in FORMATS[name].options]
    if unused:
        raise EmprobeError(f"{path} was read as {name}, which has no {' or '.join(unused)} to choose. Leave {' and '.join(unused)} out.")
