"""Each trained cell's direction, and how the cosines of two cells' directions go with how much behaviour they hand to each other.

A direction is the mean of tuned minus base over prompts that all cells share, at the last prompt token. No answer is read and every prompt
counts once, so answers' lengths cannot make a direction here, as they can where all tokens of answers of different length are pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student

from emprobe.behaviour.criterion import Criterion
from emprobe.clusters import Resampling
from emprobe.errors import EmprobeError
from emprobe.overlap import covariance_directions
from emprobe.stats import permutation_p
from emprobe.studies.transfer.cell_rates import Cell, relation
from emprobe.studies.transfer.training import CellJob
from emprobe.types import Estimate, Null

Floats = NDArray[np.float64]
RELATIONS = ("same_task", "same_domain", "neither")


@dataclass(frozen=True, eq=False)
class Replicate:
    """The cells' directions on one base with one seed.

    Attributes:
        name: Base and seed.
        cells: The trained cells.
        vectors: Unit directions, `[cells, d_model]`.
        transfer: Misaligned share of answers, `[trained, asked]`.
        random: Cosines of pairs of random directions with the covariance of the base's activations.
    """

    name: str
    cells: tuple[Cell, ...]
    vectors: Floats
    transfer: Floats
    random: Floats

    def pairs(self) -> pd.DataFrame:
        """A row for each pair of cells: `a`, `b`, `relation`, signed `cosine`, and `transfer`, the mean of both ways."""
        cosines, mean = self.vectors @ self.vectors.T, (self.transfer + self.transfer.T) / 2
        lines = [
            {
                "replicate": self.name,
                "i": i,
                "j": j,
                "relation": relation(self.cells[i], self.cells[j]),
                "cosine": cosines[i, j],
                "transfer": mean[i, j],
            }
            for i, j in combinations(range(len(self.cells)), 2)
        ]
        return pd.DataFrame(lines).astype({"cosine": "float64", "transfer": "float64"})


def choose_layer(shifts: Mapping[str, Floats]) -> tuple[int, list[float]]:
    """The column whose directions are surest: the largest mean cosine between those of two halves of the prompts.

    Behaviour has no part in the choice.

    Args:
        shifts: By cell, tuned minus base `[prompts, layers, d_model]`.

    Returns:
        The column, and every column's mean cosine.
    """
    found = []
    for values in shifts.values():
        halves = [values[start::2].mean(axis=0) for start in (0, 1)]
        sizes = np.linalg.norm(halves[0], axis=1) * np.linalg.norm(halves[1], axis=1)
        found.append(np.divide((halves[0] * halves[1]).sum(axis=1), sizes, out=np.zeros_like(sizes), where=sizes > 0))
    means = np.mean(found, axis=0)
    return int(means.argmax()), means.tolist()


def replicates_of(jobs: Sequence[CellJob], rates: pd.DataFrame, layer: int | None, randoms: int) -> tuple[list[Replicate], dict[str, Any]]:
    """Read what the jobs kept.

    Args:
        jobs: Finished ones, the bases among them.
        rates: Columns organism, seed, train_domain, train_task, eval_domain, eval_task, rate.
        layer: 0-based block; `None` chooses it.
        randoms: Pairs of random directions.

    Raises:
        EmprobeError: If a layer was asked for that the model lacks, or as `transfer_of`.
    """
    bases = {job.base.name: job.activations() for job in jobs if job.cell is None}
    trained = [job for job in jobs if job.cell is not None]
    shifts = {str(job.folder): (job.activations() - bases[job.base.name]).numpy() for job in trained}
    layers = next(iter(bases.values())).layers
    if layer is not None and layer not in layers:
        raise EmprobeError(f"--layer {layer} was asked for; the model has blocks {layers[0]} to {layers[-1]}.")
    column, sure = choose_layer(shifts)
    column = layers.index(layer) if layer is not None else column
    found = []
    for name, seed in dict.fromkeys((job.base.name, job.seed) for job in trained):
        own = [job for job in trained if (job.base.name, job.seed) == (name, seed)]
        means = np.stack([shifts[str(job.folder)][:, column].mean(axis=0) for job in own])
        cells = tuple(job.cell for job in own if job.cell is not None)
        part = rates[(rates["organism"] == name) & (rates["seed"] == seed)]
        rows = bases[name].values[:, column].double().numpy()
        drawn = covariance_directions(rows, 2 * randoms, seed).numpy()
        vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
        cosines = (drawn[::2] * drawn[1::2]).sum(axis=1)
        found.append(Replicate(f"{name}, seed {seed}", cells, vectors, transfer_of(part, cells), cosines))
    how = {"layer": layers[column], "chosen": layer is None, "split_half": dict(zip(map(str, layers), sure, strict=True))}
    return found, how


def transfer_of(rates: pd.DataFrame, cells: Sequence[Cell]) -> Floats:
    """One fine-tune a row, `[trained, asked]`.

    Raises:
        EmprobeError: If no answer of one cell's fine-tune to another's questions has scores.
    """
    names = ["train_domain", "train_task", "eval_domain", "eval_task"]
    known = {tuple(map(str, row)): rate for *row, rate in rates[[*names, "rate"]].itertuples(index=False)}
    bare = [f"{' '.join(a)} asked of {' '.join(b)}" for a in cells for b in cells if (*a, *b) not in known]
    if bare:
        raise EmprobeError(f"{len(bare)} cells of one base and seed have no scores, such as {bare[0]}: transfer of their pairs is unknown.")
    return np.array([[known[(*a, *b)] for b in cells] for a in cells], dtype=np.float64)


def rates_of_jobs(scores: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """The misaligned share of each fine-tune's judged answers to each cell."""
    judged = scores[scores["status"] == "ok"]
    flags = criterion.misaligned(judged["alignment"].to_numpy(np.float64), judged["coherence"].to_numpy(np.float64))
    names = ["organism", "seed", "train_domain", "train_task", "eval_domain", "eval_task"]
    return judged[names].assign(rate=flags.astype(np.float64)).groupby(names, observed=True)["rate"].mean().reset_index()


# ---- what is said of them


def compare(replicates: Sequence[Replicate], *, permutations: int, how: Resampling) -> dict[str, Any]:
    """Cosines by relation, and how they follow transfer over pairs of cells, overall and within each relation.

    Raises:
        EmprobeError: If there are fewer than four cells, whose pairs show no correlation.
    """
    if len(replicates[0].cells) < 4:
        raise EmprobeError(
            f"Directions of {len(replicates[0].cells)} cells were to be compared. A correlation over pairs needs four cells."
        )
    pairs = pd.concat([one.pairs() for one in replicates], ignore_index=True)
    random = np.concatenate([one.random for one in replicates])
    low, high = np.quantile(random, [0.025, 0.975])
    return {
        "cosines": {name: _mean_cosine(part, how) for name, part in pairs.groupby("relation") if len(part)},
        "random": {"mean": float(random.mean()), "low": float(low), "high": float(high), "n": len(random)},
        "pairs": _listed(pairs),
        "cells": len(replicates[0].cells),
        "correlation": {
            "all": _followed(replicates, pairs, permutations, how),
            **{name: _within(pairs[pairs["relation"] == name], how) for name in RELATIONS},
        },
        "by_replicate": {one.name: _spearman(one.pairs()) for one in replicates},
    }


def _listed(pairs: pd.DataFrame) -> dict[str, list[Any]]:
    """The pairs as columns, for figures."""
    return {
        "replicate": pairs["replicate"].tolist(),
        "relation": pairs["relation"].tolist(),
        "cosine": pairs["cosine"].round(4).tolist(),
        "transfer": pairs["transfer"].round(4).tolist(),
    }


def _mean_cosine(part: pd.DataFrame, how: Resampling) -> dict[str, Any]:
    """Mean signed cosine of pairs, with an interval over cells."""
    return _over_cells(part, lambda rows: float(rows["cosine"].mean()), how).as_dict()


def _followed(replicates: Sequence[Replicate], pairs: pd.DataFrame, permutations: int, how: Resampling) -> dict[str, Any] | None:
    """Spearman's correlation of cosine and transfer, within replicates, beside Mantel's null."""
    found = _correlated(pairs, how)
    if found is None:
        return None
    null = mantel(replicates, permutations, how.seed)
    made = Null("cells relabelled (Mantel)", len(null), float(null.mean()), *map(float, np.quantile(null, [0.025, 0.975])))
    p = permutation_p(found.value, null)
    return replace(found, null=replace(made, p=p, percentile=1 - p)).as_dict()


def _within(part: pd.DataFrame, how: Resampling) -> dict[str, Any] | None:
    found = _correlated(part, how) if len(part) > 3 else None
    return None if found is None else found.as_dict()


def _correlated(part: pd.DataFrame, how: Resampling) -> Estimate | None:
    return None if _spearman(part) is None else _over_cells(part, _spearman, how)


def _over_cells(part: pd.DataFrame, statistic: Callable[[pd.DataFrame], float | None], how: Resampling) -> Estimate:
    """A number over pairs, with a jackknife interval over cells: each cell is left out with all its pairs, in every replicate.

    Source: Snijders & Borgatti (1999), Connections 22, 161-170 (standard errors of statistics of pairs).
    """
    value = statistic(part)
    assert value is not None
    names = np.unique(part[["i", "j"]].to_numpy())
    left = [statistic(part[(part["i"] != name) & (part["j"] != name)]) for name in names]
    usable = np.array([one for one in left if one is not None and np.isfinite(one)])
    n = len(usable)
    method = f"jackknife over {n} cells, each left out with its pairs"
    if n < 4:
        return Estimate.point(value, n=len(part), method=f"{n} cells show no doubt")
    error = float(np.sqrt((n - 2) / (2 * n) * ((usable - usable.mean()) ** 2).sum()))
    half = error * float(student.ppf(0.5 + how.level / 2, n - 1))
    return Estimate(value, max(value - half, -1.0), min(value + half, 1.0), len(part), n, method, how.level)


def _spearman(part: pd.DataFrame) -> float | None:
    """Spearman's correlation within replicates: ranks of both, each replicate about its mean; `None` if one side does not vary."""
    a, b = ranks_within(part).T
    return float(a @ b / np.sqrt((a @ a) * (b @ b))) if a.any() and b.any() else None


def ranks_within(part: pd.DataFrame) -> Floats:
    """Ranks of cosine and transfer within each replicate, about their mean, `[pairs, 2]`."""
    codes = np.unique(part["replicate"], return_inverse=True)[1]
    found = np.empty((len(part), 2))
    for code in range(codes.max() + 1):
        rows = np.flatnonzero(codes == code)
        for column, name in enumerate(("cosine", "transfer")):
            found[rows, column] = rankdata(part[name].to_numpy()[rows]) - (len(rows) + 1) / 2
    return found


def mantel(replicates: Sequence[Replicate], permutations: int, seed: int) -> Floats:
    """The correlation with the cells of one side relabelled, the same relabelling in every replicate.

    Source: Mantel (1967), Cancer Research 27, 209-220.
    """
    rng = np.random.default_rng(seed)
    n = len(replicates[0].cells)
    i, j = np.triu_indices(n, 1)
    sides = []
    for one in replicates:
        ranked = ranks_within(one.pairs())
        square = np.zeros((n, n))
        square[i, j] = square[j, i] = ranked[:, 1]
        sides.append((ranked[:, 0], square))
    size = np.sqrt(sum(a @ a for a, _ in sides) * sum(float((square[i, j] ** 2).sum()) for _, square in sides))
    orders = [rng.permutation(n) for _ in range(permutations)]
    return np.array([sum(float(a @ square[order[i], order[j]]) for a, square in sides) / size for order in orders])
