"""What was measured before fine-tuning, joined to the answers: one row for each trained cell's answers to a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.score_table import CELLS, PROMPTS, ScoreTable
from emprobe.behaviour.table_files import read_frame
from emprobe.errors import EmprobeError
from emprobe.studies.transfer.cell_rates import ASKED, TRAINED
from emprobe.studies.transfer.judged import REPLICATES

Floats = NDArray[np.float64]
KEYS = (*TRAINED, *ASKED, "question_id", *REPLICATES)
"""Columns of a covariate table that say what a row is of; all others are covariates."""
UNIT = ("prompt", "cell", *TRAINED, *ASKED, "question_id")


@dataclass(frozen=True, eq=False)
class Units:
    """Answers pooled by fine-tune and question, with what was measured before.

    Attributes:
        frame: One row a unit: `rate` (misaligned, 0..1), `n` answers, `prompt` and `cell` (numbers of their clusters), `replicate`
            (number of the organism or seed), the names of both cells, `question_id`, and the covariates (NaN where unknown).
        covariates: Their names.
        warnings: What a reader should know.
    """

    frame: pd.DataFrame
    covariates: tuple[str, ...]
    warnings: tuple[str, ...]


def read_covariates(path: Path | str) -> pd.DataFrame:
    """A table of covariates: parquet, csv, tsv or JSON lines.

    Raises:
        EmprobeError: If it cannot be read, has no rows, no key column, no covariate, or a covariate that is no number.
    """
    return checked(read_frame(Path(path)), str(path))


def checked(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """The table, if it is one of covariates; true and false count as 1 and 0.

    Raises:
        EmprobeError: As `read_covariates`.
    """
    keys = [name for name in frame.columns if name in KEYS]
    others = [name for name in frame.columns if name not in KEYS]
    if not len(frame) or not keys or not others:
        raise EmprobeError(
            f"{where} has {len(frame)} rows, the keys {keys} and the covariates {others}; it needs at least one of each. Keys are "
            f"{', '.join(KEYS)}."
        )
    frame = frame.astype({name: np.float64 for name in others if pd.api.types.is_bool_dtype(frame[name])})
    for name in others:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise EmprobeError(f"{where}: the covariate {name} is no number ({frame[name].dtype}); leave unknown values empty.")
        if np.isinf(frame[name].to_numpy(np.float64, na_value=np.nan)).any():
            raise EmprobeError(f"{where}: the covariate {name} is infinite somewhere; give a number, or leave it empty.")
    twice = int(frame.duplicated(keys).sum())
    if twice:
        raise EmprobeError(f"{where}: {twice} rows repeat the keys {', '.join(keys)}, so it is not clear which counts. Give one row each.")
    return frame


def units_of(table: ScoreTable, covariates: Sequence[pd.DataFrame], criterion: Criterion) -> Units:
    """Pool answers and join every table by the keys that it has.

    Raises:
        EmprobeError: A table with a key that the answers lack, a covariate that is in two tables, or a table that fits no answer.
    """
    frame = _pooled(table, criterion)
    names: list[str] = []
    warnings = []
    for number, given in enumerate(covariates, 1):
        where = f"covariate table {number}"
        found = checked(given, where)
        keys = [name for name in found.columns if name in KEYS]
        new = [str(name) for name in found.columns if name not in KEYS]
        lacking, again = [name for name in keys if name not in frame.columns], [name for name in new if name in frame.columns]
        if lacking or again:
            why = f"the answers have no {', '.join(lacking)}" if lacking else f"{', '.join(again)} is there already"
            raise EmprobeError(f"{where} with the keys {', '.join(keys)} cannot be joined: {why}. Rename the column or leave it out.")
        text = found.assign(**{name: found[name].astype(str) for name in keys})
        frame = frame.merge(text, how="left", on=keys, validate="many_to_one")
        for name in new:
            unknown = int(frame[name].isna().sum())
            if unknown == len(frame):
                raise EmprobeError(f"{where}: no answer has a value of {name}; its keys {', '.join(keys)} name nothing that was asked.")
            if unknown:
                warnings.append(f"{name} is unknown for {unknown} of {len(frame)} fine-tunes' questions, which its effects leave out.")
        names += new
    return Units(frame, tuple(names), tuple(warnings))


def _pooled(table: ScoreTable, criterion: Criterion) -> pd.DataFrame:
    """One row for each fine-tune and question."""
    rows = table.counted(criterion)
    clusters = table.clusterings(table.clustered((PROMPTS, CELLS)))
    columns: dict[str, Any] = {"prompt": clusters[PROMPTS][rows], "cell": clusters[CELLS][rows]}
    kept = [name for name in (*TRAINED, *ASKED, "question_id", *REPLICATES) if name in table.columns]
    for name in kept:
        column = table.columns[name]
        columns[name] = np.array([str(value) for value in column.values] + [""], dtype=object)[column.codes[rows]]
    columns["rate"] = criterion.misaligned(table.alignment, table.coherence)[rows].astype(np.float64)
    by = [name for name in columns if name != "rate"]
    frame = pd.DataFrame(columns).groupby(by, sort=True, observed=True)["rate"].agg(["mean", "size"]).reset_index()
    frame = frame.rename(columns={"mean": "rate", "size": "n"})
    replicates = [name for name in REPLICATES if name in frame.columns]
    frame["replicate"] = frame.groupby(replicates, sort=True).ngroup() if replicates else 0
    for name in ("prompt", "cell"):
        frame[name] = np.unique(frame[name], return_inverse=True)[1]
    return frame
