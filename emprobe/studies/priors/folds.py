"""Repeated K-fold by question family: paraphrases of one question never stand on both sides of a split, outside or inside."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from emprobe.errors import EmprobeError

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Fold:
    """One split: row numbers for fitting and for testing, and the splits of the former on which penalties are chosen."""

    train: Rows
    test: Rows
    inner: tuple[tuple[Rows, Rows], ...]


@dataclass(frozen=True, eq=False)
class Folds:
    """All splits of a study; every predictor is measured on the same.

    Attributes:
        folds: Repeat by repeat.
        families: The number of each row's family, from 0.
        n_splits: Folds of one repeat.
    """

    folds: tuple[Fold, ...]
    families: Rows
    n_splits: int

    def __len__(self) -> int:
        return len(self.folds)

    @property
    def test_share(self) -> float:
        """Mean of n_test / n_train over all folds: what the corrected variance of a mean over folds needs."""
        return float(np.mean([len(fold.test) / len(fold.train) for fold in self.folds]))

    @property
    def fewest(self) -> int:
        """Rows of the smallest training part."""
        return min(len(fold.train) for fold in self.folds)

    def first_repeats(self, n: int) -> Folds:
        """The folds of the first repeats alone."""
        return Folds(self.folds[: n * self.n_splits], self.families, self.n_splits)


def family_folds(families: Sequence[Hashable], *, splits: int = 5, repeats: int = 10, inner: int = 5, seed: int = 0) -> Folds:
    """Repeated K-fold whose parts are whole families.

    Args:
        families: One name a row; rows that share one go together. Give every row its own for an ungrouped split, which leaks wherever
            rows are copies of each other.
        splits: Folds of one repeat.
        repeats: Each with another partition of the families.
        inner: Folds within each training part, on which penalties are chosen.
        seed: Same seed, same folds.

    Raises:
        EmprobeError: If there are too few families for the folds: each inner training part needs two.

    Example:
        >>> folds = family_folds([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], splits=3, repeats=2, inner=2)
        >>> len(folds), [len(fold.test) for fold in folds.folds[:3]], folds.test_share
        (6, [4, 4, 4], 0.5)
    """
    check_families(len(set(families)), splits=splits, repeats=repeats, inner=inner)
    number = {name: i for i, name in enumerate(dict.fromkeys(families))}
    codes = np.array([number[name] for name in families], dtype=np.int64)
    made = []
    for repeat in range(repeats):
        outer = GroupKFold(splits, shuffle=True, random_state=seed * 1009 + repeat)
        for train, test in outer.split(codes, groups=codes):
            within = GroupKFold(inner, shuffle=True, random_state=seed)
            parts = tuple((train[a], train[b]) for a, b in within.split(train, groups=codes[train]))
            made.append(Fold(train, test, parts))
    return Folds(tuple(made), codes, splits)


def check_families(families: int, *, splits: int, repeats: int, inner: int) -> None:
    """Refuse folds that cannot be made.

    Raises:
        EmprobeError: Says how many families there are and how many the folds need.
    """
    if splits < 2 or inner < 2 or repeats < 1:
        raise EmprobeError(f"{splits} folds, {inner} inner folds and {repeats} repeats were asked for. Give at least 2, 2 and 1.")
    left = families - -(-families // splits)
    if families < 2 * splits or left < 2 * inner:
        raise EmprobeError(
            f"{splits} folds with {inner} inner folds were asked for of {families} families of questions, of which {max(left, 0)} are left "
            f"to fit on. Give at least {2 * splits} families and {2 * inner} to fit on: more questions, or fewer folds."
        )
