"""Every loss against every score of every question set: at the end of runs, over their checkpoints, between runs and within them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from emprobe.errors import EmprobeError
from emprobe.studies.dynamics.max_diff import by_tolerance, max_diff
from emprobe.studies.dynamics.relation import LEAST_RUNS, STATISTICS, means_of, pearson_of, run_correlation, varies, within
from emprobe.studies.dynamics.table import Columns, one_per_run, sets_of

if TYPE_CHECKING:
    import pandas as pd


def relations_of(
    frame: pd.DataFrame, columns: Columns, *, tolerance: float = 0.0, draws: int = 2000, seed: int = 0, unusable: list[str] | None = None
) -> list[dict[str, Any]]:
    """One entry for each question set, loss and score.

    Each holds `pearson`, `spearman` and `max_diff` over one row per run (its last, or its mean where no step orders them); `without_one`,
    the range of r as each run is left out; how many rows were left out because a number is missing; and where runs have several rows
    `checkpoints`: the correlation over all rows, clustered by run, between the runs' means, and within runs (each run's means taken away).
    With `given`, `within_given` is the first one with the means of each value of that column taken away.

    Args:
        frame: The table.
        columns: What is what in it.
        tolerance: Of `max_diff`.
        draws: Of runs, for intervals, and as many shuffles.
        seed: Of both.
        unusable: Takes the reasons why a relation cannot be made, which is then left out instead of refused, unless none can.

    Raises:
        EmprobeError: Fewer than four runs, or a column that does not vary; says of which set, loss and score.
    """
    found: list[dict[str, Any]] = []
    refused: list[EmprobeError] = []
    for name, part in sets_of(frame, columns).items():
        for loss in columns.loss:
            for score in columns.score:
                try:
                    found.append(
                        {"set": name, "loss": loss, "score": score} | _relation(part, columns, loss, score, tolerance, draws, seed)
                    )
                except EmprobeError as error:
                    refused.append(EmprobeError(f"{loss} against {score}{'' if name == 'all' else f', set {name}'}: {error}"))
    if refused and (unusable is None or not found):
        raise refused[0]
    if unusable is not None:
        unusable += map(str, refused)
    return found


def _relation(frame: pd.DataFrame, columns: Columns, loss: str, score: str, tolerance: float, draws: int, seed: int) -> dict[str, Any]:
    known = frame[frame[loss].notna() & frame[score].notna()]
    ends = one_per_run(known, columns, (loss, score))
    runs = ends[columns.run].astype(str)
    how = {"draws": draws, "seed": seed}
    x, y = ends[loss].to_numpy(), ends[score].to_numpy()
    both = {kind: run_correlation(x, y, runs, kind, **how).as_dict() for kind in STATISTICS}
    names, largest = list(runs), max_diff(x, y, tolerance=tolerance, **how)
    pair = {"better_run": names[largest.better], "worse_run": names[largest.worse]} if largest.value > 0 else {}
    return {
        "rows": len(known),
        "left_out": len(frame) - len(known),
        "runs": len(ends),
        "row_of_run": "the last step" if columns.step else "the only row" if len(ends) == len(known) else "the mean of its rows",
        **both,
        "r_squared": both["pearson"]["value"] ** 2,
        "without_one": _without_one(x, y, names),
        "max_diff": largest.as_dict() | pair | {"by_tolerance": by_tolerance(x, y)},
        "points": {"run": names, "loss": x.tolist(), "score": y.tolist()},
        **(_within_given(known, columns, ends, x, y, how) if columns.given else {}),
        **({"checkpoints": _checkpoints(known, columns, loss, score, how)} if len(ends) < len(known) else {}),
    }


def _without_one(x: Any, y: Any, names: list[str]) -> dict[str, Any]:
    """Pearson's r with each run left out: its range, and whose absence changes it most; a correlation may hang on one run."""
    each = pearson_of(x, y, 1 - np.eye(len(x)))
    whole = float(pearson_of(x, y, np.ones((1, len(x))))[0])
    away = np.where(np.isfinite(each), np.abs(each - whole), -1.0)
    known = each[np.isfinite(each)]
    if not len(known):
        return {}
    most = int(away.argmax())
    return {"lowest": float(known.min()), "highest": float(known.max()), "run": names[most], "value": float(each[most])}


def _checkpoints(known: pd.DataFrame, columns: Columns, loss: str, score: str, how: dict[str, int]) -> dict[str, Any]:
    x, y, runs = known[loss].to_numpy(), known[score].to_numpy(), known[columns.run].astype(str).to_numpy()
    codes = np.unique(runs, return_inverse=True)[1]
    parts = {
        "all": (x, y, runs),
        "between": (means_of(x, codes), means_of(y, codes), np.unique(runs)),
        "within": (within(x, runs), within(y, runs), runs),
    }
    found: dict[str, Any] = {"rows": len(known)}
    for name, part in parts.items():
        if varies(part[0]) and varies(part[1]):
            found[name] = {kind: run_correlation(*part, kind, **how).as_dict() for kind in STATISTICS}
    return found


def _within_given(known: pd.DataFrame, columns: Columns, ends: pd.DataFrame, x: Any, y: Any, how: dict[str, int]) -> dict[str, Any]:
    value_of = dict(zip(known[columns.run].astype(str), known[columns.given].astype(str), strict=True))
    groups = [value_of[run] for run in ends[columns.run].astype(str)]
    a, b = within(x, groups), within(y, groups)
    if len(set(groups)) > len(groups) - LEAST_RUNS or not (varies(a) and varies(b)):
        return {}
    values = {kind: run_correlation(a, b, ends[columns.run].astype(str), kind, **how).as_dict() for kind in STATISTICS}
    return {"within_given": {"column": columns.given, "values": len(set(groups)), **values}}
