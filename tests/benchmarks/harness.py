"""Interleaved timing: every variant once per round, in turn, so that a busy machine slows all of them alike; medians of CPU seconds."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def medians(variants: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median CPU seconds of each variant over `rounds` interleaved rounds, after `warmup` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + rounds):
        for name, run in variants.items():
            start = time.process_time()
            run()
            if turn >= warmup:
                seconds[name].append(time.process_time() - start)
    return {name: median(found) for name, found in seconds.items()}


def ratios(variants: Mapping[str, Callable[[], Any]], to: str, *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """CPU seconds of each variant over those of `to`, as the median of the rounds' own ratios.

    For differences of a few per cent: within a round the machine is the same for all, and the order turns from round to round.
    """
    names = list(variants)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        start = turn % len(names)
        seconds = medians({name: variants[name] for name in (*names[start:], *names[:start])}, rounds=1, warmup=0)
        if turn >= warmup:
            for name in names:
                found[name].append(seconds[name] / seconds[to])
    return {name: median(values) for name, values in found.items()}


def main(parts: Mapping[str, Callable[[int], Mapping[str, Any]]], *, rounds: int) -> None:
    """Run a benchmark's parts (each takes the number of rounds) on one thread and print their named ratios.

    A table, or with `--json` one JSON object; `--only` runs some of the parts.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds that the medians are over")
    parser.add_argument("--only", nargs="+", choices=list(parts), default=list(parts), help="parts to run")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in asked.only:
        found |= parts[name](asked.rounds)
    found |= {"machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread"}
    if asked.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.writelines(
            f"{name:<60} {value:.3f}\n" if isinstance(value, float) else f"{name:<60} {value}\n" for name, value in found.items()
        )
