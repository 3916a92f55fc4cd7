"""All predictors on the same folds: R2 with corrected intervals, permutation p, the place chosen within folds, and what is gained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.stats import null_of
from emprobe.studies.priors.features import Block
from emprobe.studies.priors.folds import Folds, family_folds
from emprobe.studies.priors.intervals import over_folds
from emprobe.studies.priors.permuting import permuted
from emprobe.studies.priors.pipelines import nested_lasso
from emprobe.studies.priors.predictors import Predictor, PromptTable, activation_predictors, baselines, directions_for
from emprobe.studies.priors.ridge import Measured, nested_ridge

Floats = NDArray[np.float64]
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Of activations beside all baselines, chosen on inner folds; 0 leaves them out."""


@dataclass(frozen=True)
class Design:
    """How predictors are measured.

    Attributes:
        k: Directions; `None` is a tenth of the prompts.
        splits: Folds of one repeat.
        repeats: Of the outer K-fold.
        inner: Folds within a training part, on which penalties are chosen.
        random_seeds: Draws of random directions.
        permutations: Of scores between families; 0 for no p.
        permutation_repeats: Repeats of the K-fold on which permutations are measured; the score found is taken on the same for its p.
        lasso_repeats: Repeats on which lasso is fitted too; 0 for none.
        seed: Of folds and permutations.
    """

    k: int | None = None
    splits: int = 5
    repeats: int = 10
    inner: int = 5
    random_seeds: int = 5
    permutations: int = 200
    permutation_repeats: int = 1
    lasso_repeats: int = 1
    seed: int = 0


@dataclass(eq=False)
class Found:
    """A predictor with what it reached: under the scores found, and under permuted ones (on the first repeats)."""

    predictor: Predictor
    draws: list[Measured]
    null: list[Measured]
    lasso: Floats | None = None

    @property
    def r2(self) -> Floats:
        """Mean over draws, fold by fold."""
        return np.asarray(np.mean([one.r2[:, 0] for one in self.draws], axis=0))


def measure(table: PromptTable, how: Design | None = None, step: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Every predictor of a table of prompts, beside its nulls and baselines.

    Args:
        table: Scores, families, activations, and what baselines are made of.
        how: Folds, permutations, directions.
        step: Called with each predictor's name before it is measured.

    Returns:
        Plain values: `predictors` (baselines, then activations at every place), `chosen` (the place chosen on inner folds, and so without
        looking at the test part: of PCA directions and of random ones, for each source), `gain` (what these add to all baselines
        together), `against_random` (PCA less random directions, paired over folds), and how it was done.

    Raises:
        EmprobeError: Too few families for the folds, scores that are constant or no numbers, k out of range.

    Source: arXiv 2606.20814, prediction of alignment from activations before fine-tuning; baselines, grouping and nesting are ours.
    """
    how = how or Design()
    folds = family_folds(table.families, splits=how.splits, repeats=how.repeats, inner=how.inner, seed=how.seed)
    k = directions_for(table, how.k, folds.fewest)
    drawn = permuted(table.scores, folds.families, how.permutations, how.seed) if how.permutations else None
    run = _Run(table, how, folds, drawn)
    cheap = [run.found(p, step) for p in baselines(table, k)]
    inside = [run.found(p, step) for p in activation_predictors(table, k, how.random_seeds)]
    chosen = [run.chosen(group, source, inside) for source in table.activations for group in ("activations", "random")]
    step("gain over all baselines")
    together = cheap[-1]
    return {
        "predictors": [run.entry(found) for found in (*cheap, *inside)],
        "chosen": [run.entry(one.found) | {"places": one.counts} for one in chosen],
        "gain": [run.gain(one, together) for one in chosen],
        "against_random": [run.against(chosen[i], chosen[i + 1]) for i in range(0, len(chosen), 2)],
        "scores": {"mean": float(table.scores.mean()), "sd": float(table.scores.std()), "between_families": between(table, folds)},
        "design": {**asdict(how), "k": k, "d_model": table.d_model, "n": len(table.scores), "families": int(folds.families.max()) + 1},
    }


def between(table: PromptTable, folds: Folds) -> float:
    """Share of the scores' variance that lies between families, 0..1.

    A predictor that knows nothing of paraphrases cannot explain more.
    """
    means = np.bincount(folds.families, table.scores) / np.bincount(folds.families)
    return float(means[folds.families].var() / table.scores.var())


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What a choice of the place within each fold reaches, the features that each fold took (of the first draw), and how often which."""

    found: Found
    taken: list[Block]
    counts: dict[str, int]


@dataclass(frozen=True, eq=False)
class _Run:
    table: PromptTable
    how: Design
    folds: Folds
    drawn: Floats | None

    @property
    def few(self) -> Folds:
        return self.folds.first_repeats(self.how.permutation_repeats)

    def found(self, predictor: Predictor, step: Callable[[str], None]) -> Found:
        step(predictor.name)
        parts: list[tuple[Block, ...]] = [(block,) for block in predictor.draws] or [predictor.blocks]
        draws = [nested_ridge(blocks, self.table.scores, self.folds) for blocks in parts]
        null = [nested_ridge(blocks, self.drawn, self.few) for blocks in parts] if self.drawn is not None else []
        lasso = None
        if self.how.lasso_repeats and predictor.group != "baseline":
            lasso = nested_lasso(parts[0][0], self.table.scores, self.folds.first_repeats(self.how.lasso_repeats))
        return Found(predictor, draws, null, lasso)

    def chosen(self, group: str, source: str, inside: Sequence[Found]) -> _Chosen:
        """In each fold and for each target the place of the least error on the inner folds: permuted scores choose for themselves."""
        open_to = [one for one in inside if one.predictor.group == group and one.predictor.place["source"] == source]
        draws, null, names = [], [], []
        taken: list[Block] = []
        for draw in range(len(open_to[0].draws)):
            of_draw = [one.draws[draw] for one in open_to]
            pick, measured = _least(of_draw)
            draws.append(measured)
            taken = taken or [_blocks(open_to[i].predictor)[0] for i in pick[:, 0]]
            names += [open_to[i].predictor.name for i in pick[:, 0]]
            if self.drawn is not None:
                null.append(_least([one.null[draw] for one in open_to])[1])
        word = "PCA" if group == "activations" else "random"
        predictor = Predictor(f"{word}: {source}, place chosen within folds", group, place={"source": source})
        counts = {name: names.count(name) for name in sorted(set(names), key=names.count, reverse=True)}
        return _Chosen(Found(predictor, draws, null), taken, counts)

    def gain(self, one: _Chosen, together: Found) -> dict[str, Any]:
        """R2 of all baselines and the chosen activations (of the first draw), less that of all baselines, paired over folds."""
        joint = [
            nested_ridge([*together.predictor.blocks, block], self.table.scores, replace(self.folds, folds=(fold,)), weights=WEIGHTS)
            for fold, block in zip(self.folds.folds, one.taken, strict=True)
        ]
        joined = np.array([found.r2[0, 0] for found in joint])
        return {
            "name": one.found.predictor.name,
            "group": one.found.predictor.group,
            "source": one.found.predictor.place["source"],
            "r2": over_folds(joined, self.folds).as_dict(),
            "gain": over_folds(joined - together.r2, self.folds).as_dict(),
            "alone": over_folds(one.found.r2 - together.r2, self.folds).as_dict(),
            "left_out": float(np.mean([found.weight[0, 0] == 0 for found in joint])),
        }

    def against(self, pca: _Chosen, random: _Chosen) -> dict[str, Any]:
        """PCA directions less random ones, paired over folds."""
        source = pca.found.predictor.place["source"]
        return {"source": source, "difference": over_folds(pca.found.r2 - random.found.r2, self.folds).as_dict()}

    def entry(self, found: Found) -> dict[str, Any]:
        """One predictor's numbers."""
        made: dict[str, Any] = {"name": found.predictor.name, "group": found.predictor.group, **found.predictor.place}
        for name in ("r2", "r", "rmse"):
            values = np.mean([getattr(one, name)[:, 0] for one in found.draws], axis=0)
            made[name] = over_folds(values, self.folds).as_dict()
        if len(found.draws) > 1:
            made["r2_of_draws"] = [float(one.r2[:, 0].mean()) for one in found.draws]
        if found.null and found.predictor.name != "mean":
            # Draws of random directions are averaged alike under the scores found and under permuted ones.
            value = float(found.r2[: len(self.few)].mean())
            null = null_of("permutation", value, np.mean([one.r2.mean(axis=0) for one in found.null], axis=0))
            made["null"] = null.as_dict() | {"value": value}
        if found.lasso is not None:
            made["lasso"] = over_folds(found.lasso, self.folds.first_repeats(self.how.lasso_repeats)).as_dict()
        return made


def _blocks(predictor: Predictor) -> tuple[Block, ...]:
    return predictor.draws or predictor.blocks


def _least(found: Sequence[Measured]) -> tuple[NDArray[np.int64], Measured]:
    """By fold and target, which has the least error on the inner folds, and what that one reached."""
    pick = np.argmin([one.chosen for one in found], axis=0)
    taken = {
        name: np.take_along_axis(np.stack([getattr(one, name) for one in found]), pick[None], axis=0)[0]
        for name in ("r2", "r", "rmse", "chosen", "alpha", "weight")
    }
    return pick, Measured(**taken)
