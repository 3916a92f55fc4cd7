"""A table of runs, or of runs and their checkpoints: what is in it, what is missing, and what makes it unusable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emprobe.behaviour.table_files import read_frame
from emprobe.errors import EmprobeError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Columns:
    """Which column is what.

    Attributes:
        loss: In-domain losses.
        score: Scores of behaviour, higher is better.
        run: Names the run; rows of one run are one cluster.
        step: Orders the checkpoints of a run; `None` if there is none.
        set: Names the question set that a row's scores are of; each set is looked at by itself.
        given: Runs that differ in it are compared only with those that do not (learning rate, schedule).
    """

    loss: tuple[str, ...]
    score: tuple[str, ...]
    run: str
    step: str | None = None
    set: str | None = None
    given: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """All of them."""
        return (self.run, *(name for name in (self.step, self.set, self.given) if name), *self.loss, *self.score)


def read_runs(path: Path | str, columns: Columns) -> pd.DataFrame:
    """The named columns of a file, with numbers as numbers; missing ones are NaN.

    Raises:
        EmprobeError: If the file cannot be read, lacks a column, holds words or infinities for numbers, a row names no run (or step, set,
            given), a run has several values of `given`, or one run (and step, and set) stands in several rows.
    """
    frame = read_frame(Path(path).expanduser())
    if not len(frame):
        raise EmprobeError(f"{path} has no rows: nothing can be said of nothing.")
    lacking = [name for name in columns.named if name not in frame.columns]
    if lacking:
        raise EmprobeError(
            f"{path} has no column {' and none '.join(lacking)}; it has {', '.join(map(str, frame.columns))}. Say which column is which "
            "with --loss, --score, --run, --step and --set."
        )
    twice = [name for name in columns.named if columns.named.count(name) > 1]
    if twice:
        raise EmprobeError(f"The column {twice[0]} was given for two things. Give each of --loss, --score, --run, --step, --set its own.")
    found = frame[list(columns.named)].copy()
    for name in (*columns.loss, *columns.score, *([columns.step] if columns.step else [])):
        found[name] = _numbers(found[name], f"{path}: {name}")
    _check_runs(found, columns, str(path))
    return found


def _numbers(column: pd.Series[Any], where: str) -> Any:
    import pandas as pd

    found = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = np.flatnonzero((np.isnan(found) & column.notna().to_numpy()) | np.isinf(found))
    if len(wrong):
        raise EmprobeError(
            f"{where} is no finite number in {len(wrong)} of {len(found)} rows, the first being {column.iloc[wrong[0]]!r} in row "
            f"{wrong[0]}. Leave missing numbers empty."
        )
    return found


def _check_runs(frame: pd.DataFrame, columns: Columns, where: str) -> None:
    for name in (columns.run, *(n for n in (columns.step, columns.set, columns.given) if n)):
        unnamed = int(frame[name].isna().sum())
        if unnamed:
            raise EmprobeError(f"{where}: {unnamed} of {len(frame)} rows have no {name}, so it is not known what they are of. Name them.")
    if columns.given:
        several = frame.groupby(columns.run)[columns.given].nunique() > 1
        if several.any():
            raise EmprobeError(f"{where}: Run {several.idxmax()} has several values of {columns.given}, so it is equal to no other in it.")
    key = [columns.run, *(name for name in (columns.step, columns.set) if name)]
    # Without a step, rows of one run may differ; the same row twice is a copy all the same.
    copies = frame.duplicated(subset=key if columns.step else list(frame.columns), keep=False)
    if copies.any():
        row = int(np.flatnonzero(copies.to_numpy())[0])
        shown = ", ".join(f"{name} {frame[name].iloc[row]}" for name in key)
        raise EmprobeError(
            f"{where}: {int(copies.sum())} rows are given twice, the first being {shown} (row {row}). Remove the copies, or name the "
            "column that tells them apart with --step or --set."
        )


def sets_of(frame: pd.DataFrame, columns: Columns) -> dict[str, pd.DataFrame]:
    """The rows of each question set, by its name; one set, `all`, where no column tells them apart."""
    if columns.set is None:
        return {"all": frame}
    return {str(name): part for name, part in frame.groupby(columns.set, sort=True)}


def one_per_run(frame: pd.DataFrame, columns: Columns, numbers: Sequence[str]) -> pd.DataFrame:
    """The last row of each run by its step; without steps, means over its rows."""
    if columns.step is not None:
        return frame.sort_values(columns.step, kind="stable").groupby(columns.run, sort=True).tail(1).sort_values(columns.run)
    return frame.groupby(columns.run, sort=True)[list(numbers)].mean().reset_index()
