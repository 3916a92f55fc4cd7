"""The folder of one run: claimed by what the run is, so that two runs never mix and a killed one goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import read_json, write_json

MARK = "run.json"


def claim_folder(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Make the folder this run's, or find that it is already.

    Args:
        folder: Need not exist.
        identity: What the run is: everything its numbers depend on.

    Raises:
        MismatchError: If it holds another run; names what differs.
        EmprobeError: If it holds other files, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / MARK
        if mark.is_file():
            _check_same(folder, read_json(mark), identity)
        elif any(folder.iterdir()):
            raise EmprobeError(f"The output folder {folder} holds files that are no run of emprobe. Give an empty or a new folder.")
        else:
            write_json(mark, dict(identity))
    except OSError as error:
        raise EmprobeError(f"The output folder {folder} cannot be used: {error.strerror or error}. Give another with --out.") from error
    return folder


def release_folder(folder: Path) -> None:
    """Give a claimed folder back, if nothing was written there: a refused wish must not stand in the way of the next."""
    if any(path.is_file() and path.name != MARK for path in folder.rglob("*")):
        return
    (folder / MARK).unlink(missing_ok=True)
    for empty in sorted(folder.rglob("*"), reverse=True):
        empty.rmdir()


def _check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    if different:
        key = different[0]
        raise MismatchError(
            f"The output folder {folder} holds another run: {', '.join(different)} differ{'s' if len(different) == 1 else ''} "
            f"({key} was {found.get(key)!r}, now {wanted.get(key)!r}). Give another folder, or the same arguments to go on with that run."
        )
