"""Directions with their bootstrap, against one pass over the same rows: `python -m tests.benchmarks.directions --json`.

Layers are made one by one (48 of them at 4,096 x 5,120 would be 4 GB); making them is not timed. `--layers 48` runs all of them.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.directions import resample_directions
from tests.benchmarks.harness import main

ROWS, WIDTH, QUESTIONS, DRAWS = 4096, 5120, 64, 1000


class Clock:
    """CPU seconds spent outside of making layers."""

    def __init__(self) -> None:
        self.making = 0.0
        self.passes = 0.0

    def layers(self, n: int) -> Iterator[NDArray[np.float32]]:
        rng = np.random.default_rng(0)
        for _ in range(n):
            start = time.process_time()
            X = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
            X += 0.1
            one = time.process_time()
            X.sum(axis=0)
            done = time.process_time()
            self.passes += done - one
            self.making += done - start
            yield X


def timed(n: int, **options: Any) -> tuple[float, float]:
    """CPU seconds of the directions, and of one pass over each layer."""
    clock = Clock()
    start = time.process_time()
    for _ in resample_directions(clock.layers(n), [f"q{i * QUESTIONS // ROWS:03}" for i in range(ROWS)], draws=DRAWS, **options):
        pass
    return time.process_time() - start - clock.making, clock.passes


def measure(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"layers": LAYERS, "rows": ROWS, "d_model": WIDTH, "questions": QUESTIONS, "draws": DRAWS}
    mixed = [bool(i % 2) for i in range(ROWS)]
    whole = [i * QUESTIONS // ROWS % 2 == 0 for i in range(ROWS)]
    variants: dict[str, dict[str, Any]] = {
        "questions": {},
        "questions, then rows": {"rows_too": True},
        "questions, then rows; labels of whole questions": {"rows_too": True, "labels": whole},
        "questions, then rows; labels within questions": {"rows_too": True, "labels": mixed},
    }
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, options in variants.items():
            seconds, one_pass = timed(LAYERS, **options)
            ratios[name].append(seconds / one_pass)
            found[f"seconds per layer of one pass ({name})"] = one_pass / LAYERS
    found |= {f"times one pass: {name}": float(np.median(values)) for name, values in ratios.items()}
    found["peak memory in layers"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / (ROWS * WIDTH * 4)
    return found


LAYERS = 4

if __name__ == "__main__":
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--layers", type=int, default=LAYERS)
    asked, rest = own.parse_known_args()
    LAYERS = asked.layers
    import sys

    sys.argv[1:] = rest
    main(measure, rounds=3)
