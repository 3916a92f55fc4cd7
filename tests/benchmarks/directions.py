"""Directions with their bootstrap, against one pass over the same rows: `python -m tests.benchmarks.directions --json`.

Layers of 4,096 x 5,120 float32 are made one by one (48 of them at once would be 4 GB); making them is not timed.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.directions import resample_directions
from tests.benchmarks.harness import main

ROWS, WIDTH, QUESTIONS, DRAWS = 4096, 5120, 64, 1000
VARIANTS: dict[str, dict[str, Any]] = {
    "questions": {"rows_too": False},
    "questions, then rows": {},
    "questions, then rows, labels of whole questions": {"labels": [i * QUESTIONS // ROWS % 2 == 0 for i in range(ROWS)]},
    "questions, then rows, labels within questions": {"labels": [bool(i % 2) for i in range(ROWS)]},
}


class Layers:
    """Random layers, made one by one, with the CPU seconds of making them and of one pass over each."""

    def __init__(self) -> None:
        self.making = 0.0
        self.passes = 0.0

    def make(self, n: int) -> Iterator[NDArray[np.float32]]:
        rng = np.random.default_rng(0)
        for _ in range(n):
            start = time.process_time()
            X = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
            X += 0.1
            made = time.process_time()
            X.sum(axis=0)
            self.passes += time.process_time() - made
            self.making += time.process_time() - start
            yield X


def passes(layers: int, options: dict[str, Any]) -> float:
    """CPU time of the directions with their intervals, in passes over the same layers."""
    data = Layers()
    start = time.process_time()
    for _ in resample_directions(data.make(layers), [f"q{i * QUESTIONS // ROWS:03}" for i in range(ROWS)], draws=DRAWS, **options):
        pass
    return (time.process_time() - start - data.making) / data.passes


def eight_layers(rounds: int) -> dict[str, Any]:
    """Every variant on eight layers, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, options in VARIANTS.items():
            found[name].append(passes(8, options))
    return {f"8 layers, {name}: passes": median(values) for name, values in found.items()}


def all_layers(rounds: int) -> dict[str, Any]:
    """The default on 48 layers, once whatever the rounds, and the process's peak memory in layers."""
    ratio = passes(48, {})
    return {
        "48 layers, questions, then rows: passes": ratio,
        "peak memory in layers of 84 MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / (ROWS * WIDTH * 4),
    }


if __name__ == "__main__":
    main({"eight_layers": eight_layers, "all_layers": all_layers}, rounds=3)
