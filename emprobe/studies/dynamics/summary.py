"""All runs together: how their ways look, whether they end in one direction, where change-points lie, and what comes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from emprobe._resampling import Floats
from emprobe.clusters import Resampling, means
from emprobe.overlap import cosine_null
from emprobe.overlap.cosine import covariance_directions
from emprobe.studies.dynamics.trajectory import cosines, walk_cosines

LEAST_FALL = 10.0
"""Points of alignment that a run must lose for its half-way to be spoken of."""


def summary_of(
    measured: Sequence[Mapping[str, Any]], ways: Mapping[str, Floats], before: Floats, *, draws: int, seed: int
) -> dict[str, Any]:
    """Everything over runs.

    Args:
        measured: The runs.
        ways: Mean shift of each run at each checkpoint.
        before: The base's activations at the same questions, whose covariance is the harder chance for cosines between runs.
        draws: Of intervals and nulls.
        seed: Of both.
    """
    return {
        "local_cosine": _local(measured, ways, draws, seed),
        "components": _components(measured),
        "appears": _when(measured, "appears"),
        "saturates": _when(measured, "saturates"),
        "last_directions": _last(ways, before, seed),
        "change_points": _changes(measured),
        "half_way": _half_way(measured),
        "coherence": _coherence(measured),
    }


def _local(measured: Sequence[Mapping[str, Any]], ways: Mapping[str, Floats], draws: int, seed: int) -> dict[str, Any]:
    """Mean over runs at each step, where all runs have the same checkpoints; what random walks give; and each run's lowest turn."""
    moves = np.concatenate([np.diff(way, axis=0) for way in ways.values()])
    low, high = np.quantile(walk_cosines(moves, draws, seed), [0.025, 0.975])
    width = cosine_null(moves.shape[1])
    found: dict[str, Any] = {
        "straight": -1.0,
        "random_walk": [-width, width],
        "random_walk_of_these_moves": [float(low), float(high)],
        "of": "95 % of local cosines where each move is drawn by itself: in any direction, and with the second moments of all runs' moves",
    }
    if len({tuple(one["steps"]) for one in measured}) == 1:
        table = np.array([one["trajectory"]["local_cosine"] for one in measured], dtype=np.float64)
        whole = np.flatnonzero(np.isfinite(table).all(axis=0))
        estimates = means(table[:, whole], {"runs": np.arange(len(table))}, Resampling(draws=draws, seed=seed))
        found["steps"] = [measured[0]["steps"][i] for i in whole]
        found["mean"] = [{name: e.as_dict()[name] for name in ("value", "low", "high", "n")} for e in estimates]
    return found


def _components(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = np.array([one["trajectory"]["components"] for one in measured])
    walks = {end: np.mean([one["trajectory"]["components_of_walks"][end] for one in measured], axis=0).tolist() for end in ("mean", "high")}
    return {"mean": rows.mean(axis=0).tolist(), "lowest": rows.min(axis=0).tolist(), "highest": rows.max(axis=0).tolist(), "walks": walks}


def _when(measured: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    steps = [one["trajectory"][what] for one in measured]
    known = [step for step in steps if step is not None]
    ends = {"median": float(np.median(known)), "first": min(known), "last": max(known)} if known else {}
    return {**ends, "runs": len(known), "never": len(steps) - len(known)}


def _last(ways: Mapping[str, Floats], before: Floats, seed: int) -> dict[str, Any]:
    """Cosines between the last directions of all pairs of runs, beside random directions and such of the base's covariance."""
    last = np.stack([way[-1] for way in ways.values()])
    pairs = list(combinations(range(len(last)), 2))
    found = np.array([float(cosines(last[a], last[b])) for a, b in pairs])
    drawn = covariance_directions(before, 2 * 500, seed).numpy()
    chance = np.abs(cosines(drawn[::2], drawn[1::2]))
    return {
        "pairs": len(pairs),
        "mean": float(found.mean()),
        "lowest": float(found.min()),
        "highest": float(found.max()),
        "random_p95": cosine_null(last.shape[1]),
        "covariance_p95": float(np.quantile(chance, 0.95)),
    }


def _changes(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By curve: how many runs show each kind, and where those that jump do."""
    found: dict[str, Any] = {}
    for curve in dict.fromkeys(name for one in measured for name in one["change_points"]):
        of = {one["name"]: one["change_points"][curve] for one in measured if curve in one["change_points"]}
        kinds = Counter(change["kind"] for change in of.values())
        jumps = {name: change for name, change in of.items() if change["kind"] == "abrupt"}
        found[curve] = {kind: kinds.get(kind, 0) for kind in ("abrupt", "curved", "none")} | {
            "jumps": [
                {"run": name, "between": change["between"], "low": change["low"], "high": change["high"], "share": change["share"]}
                for name, change in jumps.items()
            ],
            "share": float(np.mean([change["share"] for change in of.values()])),
            "even_share": float(np.mean([change["even_share"] for change in of.values()])),
        }
    return found


def _half_way(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of runs whose alignment falls by ten points or more: the steps at which half of each fall was done, and which came first."""
    found: dict[str, Any] = {}
    for name in measured[0]["start"]["sets"]:
        pairs = []
        for one in measured:
            curve = [one["start"]["sets"][name]["alignment"], *(row["sets"][name]["alignment"] for row in one["rows"])]
            if any(value is None for value in curve) or curve[0] - curve[-1] < LEAST_FALL:
                continue
            loss = [one["start"]["eval_loss"], *(row["eval_loss"] for row in one["rows"])]
            if loss[-1] < loss[0]:
                pairs.append((_half(one["steps"], loss), _half(one["steps"], curve)))
        if pairs:
            both = np.array(pairs)
            found[name] = {
                "runs": len(pairs),
                "loss": float(np.median(both[:, 0])),
                "alignment": float(np.median(both[:, 1])),
                "later": int((both[:, 1] > both[:, 0]).sum()),
            }
    return found


def _half(steps: Sequence[int], curve: Sequence[float]) -> float:
    """Where a curve first crosses the middle between its ends, between checkpoints by a straight line.

    Example:
        >>> _half([0, 10, 20], [4.0, 3.0, 1.0])
        12.5
    """
    middle = (curve[0] + curve[-1]) / 2
    after = next(i for i, value in enumerate(curve) if value <= middle)
    share = (curve[after - 1] - middle) / (curve[after - 1] - curve[after])
    return float(steps[after - 1] + share * (steps[after] - steps[after - 1]))


def _coherence(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, start in measured[0]["start"]["sets"].items():
        values = [row["sets"][name]["coherence"] for one in measured for row in one["rows"]]
        if start["coherence"] is not None and all(value is not None for value in values):
            ends = [one["rows"][-1]["sets"][name]["coherence"] for one in measured]
            found[name] = {"base": start["coherence"], "at_end": float(np.mean(ends)), "lowest": float(min(values))}
    return found
