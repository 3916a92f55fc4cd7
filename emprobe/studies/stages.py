"""Finished stages of a study, kept by what they depend on: a run that was killed goes on behind the last of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emprobe.files import content_hash, read_json, write_json


@dataclass(frozen=True)
class Stages:
    """A folder of finished stages."""

    folder: Path

    def path(self, name: str, identity: Any) -> Path:
        """Where the stage lies, or will."""
        return self.folder / f"{name}-{content_hash(identity)}.json"

    def stage(self, name: str, identity: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was made of this before, or is made now.

        Args:
            name: Of the stage.
            identity: Everything its numbers depend on: fingerprints, hashes of data, settings, seeds.
            make: Gives plain values, as JSON holds them.
        """
        path = self.path(name, identity)
        if not path.is_file():
            write_json(path, make())
        found: dict[str, Any] = read_json(path)
        return found
