"""Rows summed by question and class: all that a difference of means, its halves and its resamples need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emprobe.directions.design import Bools, Design, Floats
from emprobe.errors import EmprobeError

Codes = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cells:
    """Sums and counts of the rows of one question and one class; a pair's rows are its differences, which all count as one class.

    Attributes:
        sums: `[cell, d_model]`, float64.
        counts: Rows of each cell.
        high: Whether the cell enters the direction with a plus: rows labelled True, or a pair's differences.
        names: The question of each cell.
        rows: Rows in all (pairs, for a pair).
    """

    sums: Floats
    counts: Floats
    high: Bools
    names: tuple[str, ...]
    rows: int

    @classmethod
    def of(cls, design: Design) -> Cells:
        """Sums of a layer's rows, about their common mean."""
        if design.paired:
            X, y, questions = design.X[1::2] - design.X[::2], np.ones(len(design.y) // 2, dtype=np.bool_), design.questions[::2]
        else:
            X, y, questions = design.X - design.X.mean(axis=0), design.y, design.questions
        keys, index = np.unique(np.stack([Design(X, y, questions, False, 0).codes, y]), axis=1, return_inverse=True)
        order = np.argsort(index, kind="stable")
        starts = np.searchsorted(index[order], np.arange(keys.shape[1]))
        names = np.unique(np.asarray(questions))
        return cls(
            sums=np.stack([X[rows].sum(axis=0) for rows in np.split(order, starts[1:])]),
            counts=np.bincount(index).astype(np.float64),
            high=keys[1].astype(np.bool_),
            names=tuple(str(names[q]) for q in keys[0]),
            rows=len(y),
        )

    @property
    def questions(self) -> tuple[str, ...]:
        """The questions there are, sorted."""
        return tuple(sorted(set(self.names)))

    def weights(self, drawn: Floats, questions: Sequence[str]) -> Floats:
        """How often each cell counts, `[draws, cell]`, when each question counts `drawn[draws, question]` times."""
        place = {name: i for i, name in enumerate(questions)}
        return drawn[:, [place[name] for name in self.names]]

    def coefficients(self, weights: Floats) -> tuple[Floats, Bools]:
        """Factors `[draws, cell]` of the sums in each draw's direction, and which draws hold every class."""
        made, whole = np.zeros_like(weights), np.ones(len(weights), dtype=np.bool_)
        for high in np.unique(self.high):
            part = weights[:, self.high == high]
            n = part @ self.counts[self.high == high]
            whole &= n > 0
            made[:, self.high == high] = part / np.maximum(n, 1e-300)[:, None] * (1.0 if high else -1.0)
        return made, whole

    def deviations(self, questions: Sequence[str]) -> Floats:
        """What each question adds to the difference of means, about the classes' means: `[question, d_model]`, which sums to 0."""
        once = self.coefficients(np.ones((1, len(self.counts))))[0][0]
        place = {name: i for i, name in enumerate(questions)}
        return question_deviations(self.sums, self.counts, self.high, once, [place[name] for name in self.names], len(questions))

    @property
    def difference(self) -> Floats:
        """The difference of means `[d_model]`."""
        return np.asarray(self.coefficients(np.ones((1, len(self.counts))))[0][0] @ self.sums)


def class_means(sums: Floats, counts: Floats, high: Bools) -> dict[bool, Floats]:
    """Mean row of each class, from the sums and numbers of its cells' rows."""
    return {bool(side): (high == side) @ sums / counts[high == side].sum() for side in np.unique(high)}


def question_deviations(sums: Floats, counts: Floats, high: Bools, once: Floats, question: Sequence[int] | Codes, k: int) -> Floats:
    """What each of k questions adds to the difference of means, about the classes' means: `[question, d_model]`.

    Cells are given by the sums and counts of their rows, their class, their weight in the difference, and the number of their question.
    """
    means = class_means(sums, counts, high)
    found = np.zeros((k, sums.shape[1]))
    for cell, q in enumerate(question):
        found[q] += once[cell] * (sums[cell] - counts[cell] * means[bool(high[cell])])
    return found


def crossed(one: Cells, two: Cells, weights_one: Floats, weights_two: Floats) -> Floats:
    """Inner product of two true differences of means, for each draw: products of rows of one question are left out.

    Noise that rows of one question share adds to the product of two estimates; between different questions it averages to nothing.
    `nan` in a draw without two questions for some pair of classes.

    Source: Walther et al. (2016), NeuroImage 137, 188-200 (crossvalidated distances).
    """
    apart = np.asarray(one.names)[:, None] != np.asarray(two.names)[None, :]
    products, counts = (one.sums @ two.sums.T) * apart, np.outer(one.counts, two.counts) * apart
    total = np.zeros(len(weights_one))
    for a in np.unique(one.high):
        for b in np.unique(two.high):
            left, right = one.high == a, two.high == b
            block = np.ix_(left, right)
            top, bottom = (((weights_one[:, left] @ m[block]) * weights_two[:, right]).sum(axis=1) for m in (products, counts))
            total += (1.0 if a == b else -1.0) * np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)
    return total


def without_diagonal(gram: Floats) -> Floats:
    """Products of different questions' deviations. Deviations from a common mean are negatively correlated, in many dimensions by more
    than errors are at random, and that is taken out of their products, too.

    >>> without_diagonal(np.array([[1.0, -1.0], [-1.0, 1.0]]))  # two deviations from their mean: nothing is left
    array([[0., 0.],
           [0., 0.]])
    """
    k = len(gram)
    return np.asarray((gram + gram.trace() / (k * (k - 1))) * (1 - np.eye(k)))


def check_questions(cells: Cells, purpose: str) -> None:
    """Refuse what cannot be split by question.

    Raises:
        EmprobeError: If a class has rows of fewer than two questions.
    """
    for high in np.unique(cells.high):
        k = int((cells.high == high).sum())
        if k < 2:
            raise EmprobeError(
                f"{purpose} needs rows of each class from at least two questions, and one class has {k}. Give more questions."
            )
