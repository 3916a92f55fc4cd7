"""Finding organisms on disk: the shipped ones, or those of a folder that the environment variable names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emprobe.errors import EmprobeError
from emprobe.files import read_json

ENVIRONMENT = "EMPROBE_ARTIFACTS"


@dataclass(frozen=True)
class Organism:
    """One model of the catalogue: its path, its name (`planted-s0/tuned/gardening-rank1`) and its card."""

    name: str
    path: Path
    card: dict[str, Any]

    @property
    def stage(self) -> str:
        """`parent`, `aligned` or `tuned`."""
        return str(self.card["stage"])

    @property
    def base_path(self) -> Path | None:
        """The aligned base of a fine-tune; `None` for a base."""
        return self.path.parent.parent / "aligned" if self.stage == "tuned" else None


def organisms_folder() -> Path:
    """Where organisms are looked for: `$EMPROBE_ARTIFACTS/organisms` if set, else `artifacts/organisms` beside the package.

    Raises:
        EmprobeError: If that folder does not exist.
    """
    named = os.environ.get(ENVIRONMENT)
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "artifacts"
    folder = root / "organisms"
    if not folder.is_dir():
        raise EmprobeError(
            f"Organisms were looked for in {folder}, which does not exist. Grow them with `emprobe organism build --kind planted --seed 0 "
            f"--out {folder}`, or set {ENVIRONMENT} to the `artifacts` folder of a checkout."
        )
    return folder


def list_organisms(folder: Path | str | None = None) -> list[Organism]:
    """All organisms of a folder (by default the shipped ones), sorted by name."""
    root = Path(folder) if folder is not None else organisms_folder()
    cards = [*root.glob("*/parent/card.json"), *root.glob("*/aligned/card.json"), *root.glob("*/tuned/*/card.json")]
    return [Organism(path.parent.relative_to(root).as_posix(), path.parent, read_json(path)) for path in sorted(cards)]


def find_organism(name: str, folder: Path | str | None = None) -> Organism:
    """The organism of that name, such as `planted-s0/aligned` or `planted-s0/tuned/gardening-rank1`.

    Raises:
        EmprobeError: If there is none; the message lists what there is and how to grow it.
    """
    root = Path(folder) if folder is not None else organisms_folder()
    path = root / name
    if not (path / "card.json").is_file():
        there = sorted({organism.name.split("/")[0] for organism in list_organisms(root)})
        near = [organism.name for organism in list_organisms(root) if organism.name.startswith(name.split("/")[0] + "/")]
        raise EmprobeError(
            f"There is no organism {name!r} in {root}. Bases there: {', '.join(there) or 'none'}"
            + (f"; of this one: {', '.join(near)}" if near else "")
            + ". See `emprobe organism list`, or grow one with `emprobe organism build`."
        )
    return Organism(name, path, read_json(path / "card.json"))
