"""One layer as a two-class problem: rows, classes, and the question of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from emprobe.activations import Activations, PairActivations
from emprobe.errors import EmprobeError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Source = Activations | PairActivations
Scheme = Literal["sign flips per question", "labels within questions", "labels between questions"]


@dataclass(frozen=True, eq=False)
class Design:
    """Rows of one layer that are to be told apart.

    Attributes:
        X: float64 rows; those of a pair alternate, base then tuned, so that partners stay side by side in every subset.
        y: Class of each row; the direction points from False to True (tuned, for a pair).
        questions: The question of each row; rows of one question are never split between halves, folds or draws.
        paired: Whether rows 2i and 2i + 1 are one text through two checkpoints.
        layer: Where they were read.
    """

    X: Floats
    y: Bools
    questions: tuple[str, ...]
    paired: bool
    layer: int

    @property
    def codes(self) -> NDArray[np.int64]:
        """Number of each row's question, 0-based in sorted order."""
        return np.unique(np.asarray(self.questions), return_inverse=True)[1].astype(np.int64)

    @property
    def scheme(self) -> Scheme:
        """How labels are permuted under the null: whatever would have been exchangeable had there been no difference."""
        if self.paired:
            return "sign flips per question"
        return "labels within questions" if bool(self._mixed().any()) else "labels between questions"

    def _mixed(self) -> Bools:
        """Which questions hold both classes."""
        size, true = np.bincount(self.codes), np.bincount(self.codes, weights=self.y)
        return np.asarray((true > 0) & (true < size))

    def select(self, rows: NDArray[np.int64] | Bools) -> Design:
        """Only these rows, which must hold whole pairs if they are paired."""
        index = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return Design(self.X[index], self.y[index], tuple(self.questions[i] for i in index), self.paired, self.layer)

    def null_labels(self, draws: int, seed: int) -> Bools:
        """Labels `[draws, rows]` as they could have been had the classes not differed (see `scheme`)."""
        rng = np.random.default_rng(seed)
        codes, k = self.codes, int(self.codes.max()) + 1
        if self.paired:
            return self.y ^ (rng.random((draws, k)) < 0.5)[:, codes]
        if self.scheme == "labels within questions":
            keys = codes + rng.random((draws, len(codes)))
            places = np.argsort(np.argsort(codes, kind="stable"), kind="stable")
            # Sorted by question with a random order inside: the r-th place of a question takes one of its own labels.
            return self.y[np.argsort(keys, axis=1)][:, places]
        of_question = np.zeros(k, dtype=np.bool_)
        of_question[codes] = self.y
        return rng.permuted(np.tile(of_question, (draws, 1)), axis=1)[:, codes]


def reference_of(acts: Source) -> Activations:
    """The capture whose rows, place and token statistics stand for the whole: a pair's base."""
    return acts.base if isinstance(acts, PairActivations) else acts


def design_of(acts: Source, layer: int, labels: Sequence[bool] | None = None) -> Design:
    """The two-class problem at one layer: tuned against base for a pair, True against False rows with `labels`.

    Raises:
        EmprobeError: Labels that do not fit, one empty group, or a layer that was not captured.
    """
    if isinstance(acts, PairActivations):
        if labels is not None:
            raise EmprobeError("labels= contrasts rows within one checkpoint. Give acts.base or acts.tuned, not the pair.")
        stacked = torch.stack([acts.base.at(layer), acts.tuned.at(layer)], dim=1).double()
        questions = tuple(question for question, _ in acts.base.keys for _ in range(2))
        return Design(stacked.flatten(0, 1).numpy(), np.tile([False, True], len(acts)), questions, True, layer)
    y = check_labels(labels, len(acts))
    return Design(acts.at(layer).double().numpy(), y, tuple(question for question, _ in acts.keys), False, layer)


def layers_that_differ(acts: Source) -> tuple[int, ...]:
    """Captured layers at which a pair's activations differ anywhere; all of one checkpoint's.

    Raises:
        EmprobeError: If nothing differs at any layer.
    """
    if not isinstance(acts, PairActivations):
        return acts.layers
    found = tuple(layer for layer in acts.base.layers if not torch.equal(acts.base.at(layer), acts.tuned.at(layer)))
    if not found:
        raise EmprobeError(
            "Base and tuned have equal activations at every layer, so there is no direction between them. Are they the same weights?"
        )
    return found


def check_labels(labels: Sequence[bool] | None, rows: int) -> Bools:
    """Labels as an array, one per row and both kinds there.

    Raises:
        EmprobeError: If not.
    """
    if labels is None:
        raise EmprobeError("The contrast tuned-base needs a pair's activations. Give capture(pair, …), or labels= for one checkpoint.")
    y = np.asarray(labels)
    if len(y) != rows:
        raise EmprobeError(f"labels has {len(y)} entries for {rows} rows. Give one per row.")
    if y.ndim != 1 or y.dtype.kind not in "biuf" or not np.isin(y, (0, 1)).all():
        raise EmprobeError(f"labels holds [{', '.join(sorted(set(map(repr, y.ravel().tolist())))[:5])}]; give True or False for each row.")
    y = y.astype(np.bool_)
    positive = int(y.sum())
    if positive in (0, len(y)):
        raise EmprobeError(
            f"There is nothing to contrast: {positive} of {len(y)} rows carry the label (misaligned answers, for instance) and "
            f"{len(y) - positive} do not. Give rows of both kinds, or contrast tuned-base, which needs no labels."
        )
    return y
