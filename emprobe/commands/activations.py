"""Activations that a command is given: a file, or the folder that `emprobe capture` wrote."""

from __future__ import annotations

from pathlib import Path

from emprobe.activations import Activations, PairActivations
from emprobe.capture import ActivationStore
from emprobe.capture.store import MANIFEST
from emprobe.types import Site


def read_activations(path: str, *, site: Site | None = None, positions: str | None = None) -> Activations | PairActivations:
    """What is there: a pair's activations where base and tuned were captured together.

    Args:
        path: A file of `Activations.save`, a store, or the output folder of `emprobe capture`.
        site: Which of a store's sites, where it has several.
        positions: Which of its position rules, where it has several.

    Raises:
        EmprobeError: If nothing readable is there, or the store holds several sites or rules and none is named.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return Activations.load(path)
    inner = folder / "activations"
    read: Activations | PairActivations = ActivationStore.open(inner if (inner / MANIFEST).is_file() else folder).read(
        site=site, positions=positions
    )
    return read
