"""Tables of judged answers as anybody wrote them: parquet, csv or JSON lines with alignment and coherence, checked row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emprobe.behaviour.score_table import OK, UNSTATED, Codes, Column, Floats, ScoreTable
from emprobe.errors import EmprobeError
from emprobe.types import STATUSES

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("question_id", "alignment", "coherence")
STATED = ("status", "alignment_status", "coherence_status")
NAMING = ("sample", "condition", "model", "organism", "run", "seed", "step")
"""Columns that name an answer beside its question and cells, where a table has them."""


def load_table(
    path: Path | str, *, rename: Mapping[str, str] | None = None, naming: Sequence[str] = (), needed: Sequence[str] = ()
) -> ScoreTable:
    """Read judged answers: a file of `Scores.save`, or any table with `question_id`, `alignment` and `coherence`.

    Missing scores are told by `status`, or by `alignment_status` and `coherence_status`; a row is `ok` if all of them are.

    Args:
        path: .parquet, .csv, .tsv, .jsonl or .json.
        rename: By our name, the file's own for a column, such as `{"alignment": "aligned"}`.
        naming: Further columns that name an answer, so that answers which differ in them are not the same one twice.
        needed: Columns that the table must have beside the three.

    Raises:
        EmprobeError: If the file cannot be read or lacks a column, a score is no number or outside 0..100, a status is unknown, a row
            marked ok has no score, a question has no id, or an answer occurs twice.
    """
    frame = _renamed(read_frame(Path(path)), rename or {}, str(path))
    if not len(frame):
        raise EmprobeError(f"{path} has no rows: nothing can be said of nothing.")
    lacking = [name for name in (*NEEDED, *needed) if name not in frame.columns]
    if lacking:
        raise EmprobeError(
            f"{path} has no column {' and none '.join(lacking)}; it has {', '.join(map(str, frame.columns))}. "
            f"A column of another name is given as in --columns {lacking[0]}=NAME."
        )
    scores = {name: _numbers(frame[name], f"{path}: {name}") for name in ("alignment", "coherence")}
    status, notes = _status(frame, scores, str(path))
    gone = status != OK
    columns = {str(n): _column(frame[n]) for n in frame.columns if n not in (*scores, *STATED, "text", "prompt")}
    unnamed = int((columns["question_id"].codes < 0).sum())
    if unnamed:
        raise EmprobeError(f"{path}: {unnamed} rows have no question_id, so answers to different questions would count as one cluster.")
    notes += _check_twice(columns, naming, str(path))
    alignment, coherence = (np.where(gone, np.nan, values) for values in scores.values())
    return ScoreTable(alignment, coherence, status, columns, tuple(notes))


def choose(table: ScoreTable, wishes: Sequence[str]) -> ScoreTable:
    """The rows that fulfil every `COLUMN=VALUE`, compared as text.

    Raises:
        EmprobeError: If a wish has no `=`, there is no such column, or no row is left.
    """
    kept = np.ones(len(table), dtype=np.bool_)
    for wish in wishes:
        name, sign, value = wish.partition("=")
        if not sign:
            raise EmprobeError(f"The filter {wish!r} was given; write COLUMN=VALUE, such as eval_set=narrow.")
        column = table.column(name)
        fits = np.array([_text(v) == value for v in column.values] + [value == ""], dtype=np.bool_)
        kept &= fits[column.codes]
        if not kept.any():
            shown = ", ".join(_text(v) for v in column.found[:12]) + (
                f" and {len(column.found) - 12} more" if len(column.found) > 12 else ""
            )
            raise EmprobeError(f"No row has {' and '.join(wishes)}. {name} holds {shown}.")
    return table.take(kept) if wishes else table


def renames(wishes: Sequence[str]) -> dict[str, str]:
    """By our name, the file's own, of OURS=THEIRS.

    Raises:
        EmprobeError: If one is not of that form.
    """
    found = {}
    for wish in wishes:
        ours, sign, theirs = wish.partition("=")
        if not sign or not ours or not theirs:
            raise EmprobeError(f"The column {wish!r} was given; write OURS=THEIRS, such as alignment=aligned.")
        found[ours] = theirs
    return found


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def read_frame(path: Path) -> pd.DataFrame:
    """A table as it stands in a file: .parquet, .csv, .tsv, .jsonl or .json.

    Raises:
        EmprobeError: If it is no file, of another kind, or cannot be read.
    """
    import pandas as pd

    readers: Mapping[str, Any] = {
        ".parquet": pd.read_parquet,
        ".csv": lambda p: pd.read_csv(p, low_memory=False),
        ".tsv": lambda p: pd.read_csv(p, sep="\t", low_memory=False),
        ".jsonl": lambda p: pd.DataFrame([json.loads(line) for line in p.read_text("utf-8-sig").split("\n") if line.strip()]),
        ".json": lambda p: pd.DataFrame(json.loads(p.read_text("utf-8-sig"))),
    }
    if not path.is_file():
        raise EmprobeError(f"{path} was asked for and is not a file.")
    if path.suffix.lower() not in readers:
        raise EmprobeError(f"{path} is of the kind {path.suffix or '(no suffix)'}; tables are read from {', '.join(readers)}.")
    try:
        frame: pd.DataFrame = readers[path.suffix.lower()](path)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise EmprobeError(f"{path} could not be read as a table: {error}. The file may be cut short.") from error
    return frame


def _renamed(frame: pd.DataFrame, rename: Mapping[str, str], where: str) -> pd.DataFrame:
    """The frame with our names; a column of the file that is to be read as another of its own would be two at once."""
    for ours, theirs in rename.items():
        if theirs not in frame.columns:
            raise EmprobeError(f"{where} has no column {theirs} to be read as {ours}; it has {', '.join(map(str, frame.columns))}.")
    # What a renamed column takes the place of is not read.
    taken = [name for name in rename if name in frame.columns and name not in rename.values()]
    return frame.drop(columns=taken).rename(columns={theirs: ours for ours, theirs in rename.items()})


def _numbers(column: pd.Series[Any], where: str) -> Floats:
    import pandas as pd

    flags = [i for i, value in enumerate(column) if isinstance(value, bool | np.bool_)]
    if flags:
        raise EmprobeError(f"{where} is true or false in {len(flags)} of {len(column)} rows, first in row {flags[0]}; give 0..100.")
    found = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = np.flatnonzero(np.isnan(found) & column.notna().to_numpy())
    if len(wrong):
        raise EmprobeError(
            f"{where} is no number in {len(wrong)} of {len(found)} rows, the first being {column.iloc[wrong[0]]!r} in row {wrong[0]}. "
            "Leave missing scores empty, and say why in a column status."
        )
    outside = np.flatnonzero((found < 0) | (found > 100))
    if len(outside):
        raise EmprobeError(
            f"{where} is outside 0..100 in {len(outside)} of {len(found)} rows, the first being {found[outside[0]]:g} in row {outside[0]}. "
            "Give scores on the scale of 0 to 100; a missing one is empty and never -1."
        )
    return np.asarray(found)


def _status(frame: pd.DataFrame, scores: Mapping[str, Floats], where: str) -> tuple[Any, list[str]]:
    """The number of each row's status, and what to say of it."""
    known = {name: i for i, name in enumerate((*STATUSES, UNSTATED))}
    status = np.full(len(frame), OK, dtype=np.int8)
    stated = [name for name in STATED if name in frame.columns]
    empty = np.isnan(np.column_stack(list(scores.values()))).any(axis=1)
    for name in stated:
        column = _column(frame[name])
        words = [str(value).strip().casefold() for value in column.values]
        unknown = [value for value, word in zip(column.values, words, strict=True) if word not in known]
        if unknown:
            raise EmprobeError(f"{where}: {name} holds {', '.join(map(repr, unknown[:5]))}; known statuses are {', '.join(STATUSES)}.")
        numbers = np.array([known[word] for word in words] + [known[UNSTATED]], dtype=np.int8)[column.codes]
        status = np.where(status == OK, numbers, status)
    if not stated:
        status[empty] = known[UNSTATED]
        return status, ["No column says why scores are missing: they count as unstated."] if empty.any() else []
    lost = np.flatnonzero((status == OK) & empty)
    if len(lost):
        raise EmprobeError(f"{where}: {len(lost)} rows are marked ok and lack a score, the first being row {lost[0]}. Mark them by status.")
    kept = int(((status != OK) & ~empty).sum())
    return status, [f"{kept} rows have scores and a status that says they are missing: the status was believed."] if kept else []


def _column(column: pd.Series[Any]) -> Column:
    import pandas as pd

    try:
        codes, values = pd.factorize(column.astype(object), use_na_sentinel=True)
    except TypeError:  # lists have no hash
        codes, values = pd.factorize(column.map(str), use_na_sentinel=True)
    return Column(np.asarray(codes, dtype=np.int64), tuple(v.item() if isinstance(v, np.generic) else v for v in values))


def _check_twice(columns: Mapping[str, Column], naming: Sequence[str], where: str) -> list[str]:
    """Refuse an answer that occurs twice; without sample numbers answers to one question cannot be told apart, which is said."""
    if "sample" not in columns:
        return ["No column sample numbers the answers to a question, so it was not checked that none occurs twice."]
    cells = [name for name in columns if name.startswith(("train_", "eval_"))]
    names = [name for name in dict.fromkeys(("question_id", *NAMING, *cells, *naming)) if name in columns]
    key: Codes = np.zeros(len(columns["sample"].codes), dtype=np.int64)
    for name in names:
        _, key = np.unique(key * (len(columns[name].values) + 1) + columns[name].codes + 1, return_inverse=True)
    first, times = np.unique(key, return_index=True, return_counts=True)[1:]
    if (times > 1).any():
        row = int(first[times > 1].min())
        shown = ", ".join(f"{name} {(*columns[name].values, None)[columns[name].codes[row]]}" for name in names)
        raise EmprobeError(
            f"{where}: {int((times > 1).sum())} answers occur more than once, the first being that of {shown} (row {row}). "
            "Remove the copies, or bring the column that tells them apart: `emprobe rates` takes one with --by or --cluster, and a grid "
            "reads organism, seed, model and run."
        )
    return []
