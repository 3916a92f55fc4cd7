"""Kills a capture again and again: forks itself, so that every try starts with the model loaded and dies somewhere in the work.

`python killing.py BASE ADAPTER FOLDER` prints how many kills there were, in how many stores, and whether all equal an undisturbed one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import emprobe as em

KILLS = 20


def rows() -> list[em.Conversation]:
    """Answered conversations of several lengths."""
    return [em.Conversation.ask(f"q{i}", "plant beans " * (1 + i % 9)).answered("and peas " * (1 + i % 5)) for i in range(240)]


def attempt(pair: object, folder: Path, after: float | None) -> bool:
    """Capture in a child, killed after so many seconds; whether it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            em.capture(pair, rows(), store=folder, shard_rows=6, positions=["prompt_mean", "response_mean"], progress=False)  # type: ignore[call-overload]
            code = 0
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit("a capture failed by itself")
    return os.WIFEXITED(status)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def main() -> None:
    """Kill and resume until there were enough kills, and compare every finished store."""
    torch.set_num_threads(1)  # a forked child must not wait for its parent's threads
    base, adapter, folder = sys.argv[1:]
    pair = em.load_pair(base, adapter)
    started = time.monotonic()
    attempt(pair, Path(folder) / "undisturbed", None)
    length = time.monotonic() - started
    expected = contents(Path(folder) / "undisturbed")
    draw = random.Random(0)
    kills = stores = 0
    equal = True
    while kills < KILLS or stores < 2:
        store = Path(folder) / f"killed-{stores}"
        while not attempt(pair, store, draw.uniform(0, length / 4)):
            kills += 1
        stores += 1
        equal = equal and contents(store) == expected
    sys.stdout.write(json.dumps({"kills": kills, "stores": stores, "equal": equal, "seconds undisturbed": length}))


if __name__ == "__main__":
    main()
