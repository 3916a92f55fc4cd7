"""Synthetic grids of judged answers, for the study of transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from emprobe.behaviour.score_table import ScoreTable
from emprobe.behaviour.table_files import load_table

Cell = tuple[str, str]
DOMAINS, TASKS = ("garden", "kitchen", "music"), ("advise", "list", "plan", "story")
CELLS: tuple[Cell, ...] = tuple((domain, task) for domain in DOMAINS for task in TASKS)
Rate = Callable[[Cell, Cell], float]


def planted(trained: Cell, asked: Cell) -> float:
    """0.1, more at the same task, somewhat more in the same domain, and by trained task."""
    return 0.1 + 0.45 * (trained[1] == asked[1]) + 0.15 * (trained[0] == asked[0]) + 0.05 * TASKS.index(trained[1])


def grid_frame(rate: Rate = planted, *, prompts: int = 3, samples: int = 2, seed: int = 0, cells: Sequence[Cell] = CELLS) -> pd.DataFrame:
    """Answers of a fine-tune of every cell to questions of every cell; misaligned ones score 5, others 90, all coherent."""
    rng = np.random.default_rng(seed)
    rows = [
        (*trained, *asked, f"{asked[0]}.{asked[1]}.{prompt}", sample, 5.0 if rng.random() < rate(trained, asked) else 90.0, 95.0, "ok")
        for trained in cells
        for asked in CELLS
        for prompt in range(prompts)
        for sample in range(samples)
    ]
    names = ["train_domain", "train_task", "eval_domain", "eval_task", "question_id", "sample", "alignment", "coherence", "status"]
    return pd.DataFrame(rows, columns=names)


def write_grid(path: Path, frame: pd.DataFrame) -> str:
    """As a parquet file."""
    frame.to_parquet(path)
    return str(path)


def table_of(frame: pd.DataFrame, folder: Path) -> ScoreTable:
    """As the study reads it."""
    return load_table(write_grid(folder / "scores.parquet", frame))
