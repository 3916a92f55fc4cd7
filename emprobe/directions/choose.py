"""Choosing layer, site and position rule on some questions, and reporting on others that had no part in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from emprobe.directions.design import Bools, Design, Floats, Scheme, Source, design_of, layers_that_differ, reference_of
from emprobe.directions.detection import auroc_estimate, auroc_of, crossfit_scores, folds_of
from emprobe.directions.estimators import estimator_of, fitted, name_of
from emprobe.errors import EmprobeError, MismatchError
from emprobe.stats import permutation_p
from emprobe.types import Estimate


@dataclass(frozen=True)
class Candidate:
    """One place that could have been chosen, with its cross-fitted AUROC on the development questions (0 to 1)."""

    name: str
    layer: int
    site: str
    positions: str
    dev_auroc: float


@dataclass(frozen=True)
class Choice:
    """The place chosen on development questions, and what it is worth on test questions.

    Attributes:
        name: The chosen candidate's, with its `layer`.
        test: AUROC on the test questions of the direction fitted to all development questions, with its clustered interval.
        p_test: Of that AUROC, test rows relabelled under the null; nothing was chosen on them, so there is no maximum to correct for.
        p_max: Of the best development AUROC; each relabelling takes its own maximum over the same candidates.
        null_max_p95: 95th percentile of those maxima.
        candidates: All that could have been chosen.
        dev_questions: Questions of the choice, and `test_questions` of the report.
        scheme: How rows were relabelled.
    """

    name: str
    layer: int
    test: Estimate
    p_test: float
    p_max: float
    null_max_p95: float
    candidates: tuple[Candidate, ...]
    dev_questions: tuple[str, ...]
    test_questions: tuple[str, ...]
    scheme: Scheme
    estimator: str
    folds: int
    permutations: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        lists = {name: list(getattr(self, name)) for name in ("dev_questions", "test_questions")}
        return {**asdict(self), "candidates": [asdict(c) for c in self.candidates], **lists}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Choice:
        """What `as_dict` gave, made a record again."""
        lists = {name: tuple(plain[name]) for name in ("dev_questions", "test_questions")}
        made = {"test": Estimate(**plain["test"]), "candidates": tuple(Candidate(**c) for c in plain["candidates"])}
        return cls(**{**plain, **lists, **made})

    def __str__(self) -> str:
        several = len({candidate.name for candidate in self.candidates}) > 1
        return (
            f"Layer {self.layer}{f' of {self.name}' if several else ''} was chosen among {len(self.candidates)} by cross-fitted AUROC on "
            f"{len(self.dev_questions)} questions (p of the maximum {self.p_max:.3g}, {self.scheme}); on {len(self.test_questions)} others "
            f"its AUROC is {self.test} (p {self.p_test:.3g})."
        )


def choose(
    candidates: Mapping[str, Source],
    *,
    labels: Sequence[bool] | None = None,
    estimator: Any = "mean_difference",
    test_share: float = 1 / 3,
    folds: int = 5,
    permutations: int = 200,
    seed: int = 0,
) -> Choice:
    """The candidate and layer whose direction tells held-out development rows best apart, judged on test questions.

    Questions are split into development and test. On the former each candidate's AUROC is cross-fitted, whole questions together, and
    the best one is chosen (the first, where equal); its direction is fitted to all of them and scores the test rows.

    Args:
        candidates: Name to activations of the same rows, such as one per site and position rule; every layer of each is a
            candidate, but those at which base and tuned are equal.
        labels: For contrasts within one checkpoint, one truth value per row.
        estimator: Name or estimator, as in `fit_direction`.
        test_share: Share of the questions kept for the report.
        folds: Of the cross-fitting.
        permutations: Relabellings under the null; p cannot fall below 1 / (permutations + 1).
        seed: Of split, folds and relabellings.

    Raises:
        EmprobeError: No candidates, or too few questions to have both classes in both parts.
        MismatchError: If candidates hold different rows.

    Source: Westfall & Young (1993), Resampling-Based Multiple Testing (the maximum over candidates under permutation).
    """
    chosen = estimator_of(estimator)
    places = _places(candidates)
    name, layer = places[0]
    first = design_of(candidates[name], layer, labels)
    test = _test_rows(first, test_share, seed)
    for part, rows in (("development", ~test), ("test", test)):
        if first.y[rows].all() or not first.y[rows].any():
            raise EmprobeError(f"The {part} questions hold rows of one class only ({int(rows.sum())} rows). Give more questions of both.")
    dev = first.select(~test)
    folds_ = folds_of(dev.codes, min(folds, int(dev.codes.max()) + 1), seed)
    relabelled = np.concatenate([dev.y[None], dev.null_labels(permutations, seed)])
    found = []
    for name, layer in places:
        here = design_of(candidates[name], layer, labels).select(~test)
        found.append(auroc_of(crossfit_scores(here, folds_, relabelled, chosen), relabelled, folds_))
    table = np.stack(found)
    best, maxima = int(table[:, 0].argmax()), table[:, 1:].max(axis=0)
    name, layer = places[best]
    estimate, p_test = _report(design_of(candidates[name], layer, labels), test, chosen, permutations, seed)
    return Choice(
        name=name,
        layer=layer,
        test=estimate,
        p_test=p_test,
        p_max=permutation_p(table[best, 0], maxima),
        null_max_p95=float(np.quantile(maxima, 0.95)),
        candidates=tuple(_candidate(candidates, place, score) for place, score in zip(places, table[:, 0], strict=True)),
        dev_questions=tuple(sorted(set(dev.questions))),
        test_questions=tuple(sorted(set(first.questions) - set(dev.questions))),
        scheme=first.scheme,
        estimator=name_of(chosen),
        folds=int(folds_.max()) + 1,
        permutations=permutations,
        seed=seed,
    )


def _places(candidates: Mapping[str, Source]) -> list[tuple[str, int]]:
    """(name, layer) of every candidate, once all are seen to hold the same rows."""
    if not candidates:
        raise EmprobeError("choose was given no candidates. Give a mapping from a name to activations.")
    (first, acts), *rest = candidates.items()
    for name, other in rest:
        if type(other) is not type(acts) or reference_of(other).keys != reference_of(acts).keys:
            raise MismatchError(f"Candidates {first!r} and {name!r} hold different rows. Capture the same conversations for all of them.")
    return [(name, layer) for name, found in candidates.items() for layer in layers_that_differ(found)]


def _candidate(candidates: Mapping[str, Source], place: tuple[str, int], score: float) -> Candidate:
    own = reference_of(candidates[place[0]])
    return Candidate(place[0], place[1], own.site, own.positions, float(score))


def _test_rows(design: Design, share: float, seed: int) -> Bools:
    """Which rows belong to test questions: the same share of the questions with True rows, with False rows, and with both."""
    if not 0 < share < 1:
        raise EmprobeError(f"test_share = {share:g} was given; it is a share of the questions, between 0 and 1.")
    rng = np.random.default_rng(seed)
    codes = design.codes
    k = int(codes.max()) + 1
    if k < 4:
        raise EmprobeError(f"Choosing on some questions and reporting on others needs at least 4 of them, and there are {k}.")
    true, false = (np.bincount(codes[design.y == side], minlength=k) > 0 for side in (True, False))
    kind = 2 * true + false
    test = np.zeros(k, dtype=np.bool_)
    for which in np.unique(kind):
        members = rng.permutation(np.flatnonzero(kind == which))
        test[members[: max(round(share * len(members)), 1)]] = True
    return np.asarray(test[codes])


def _report(design: Design, test: Bools, estimator: Any, permutations: int, seed: int) -> tuple[Estimate, float]:
    """AUROC on the test rows of the direction fitted to all others, and its permutation p."""
    dev, held_out = design.select(~test), design.select(test)
    # Development rows set the origin, so that nothing of the test rows enters their scores.
    scores: Floats = (held_out.X - dev.X.mean(axis=0)) @ fitted(estimator, dev.X, dev.y)[0]
    estimate = auroc_estimate(scores, held_out.y, held_out.questions, seed=seed)
    labels = held_out.null_labels(permutations, seed + 1)
    null = auroc_of(np.tile(scores, (permutations, 1)), labels, np.zeros(len(scores), dtype=np.int64))
    return estimate, permutation_p(estimate.value, null)
