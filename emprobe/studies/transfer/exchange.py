"""A covariate's values given to other prompts or other trained cells: what the null of its effect is made of."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
Level = Literal["prompt", "cell", "pair"]


class Exchange:
    """Exchanges values of units, alike in every replicate.

    Prompts: means of families are exchanged among families of one stratum, so that paraphrases stay together. Trained cells: their means
    are exchanged. Pairs: whole rows are, so that a question keeps its values and gets them from other trained cells; one that was not
    asked of the giving cell gets its question's mean.

    Args:
        frame: Units, with `prompt`, `cell`, `replicate` and `question_id`.
        level: What the values differ by.
        strata: Number of each unit's stratum; prompts are exchanged within it.
    """

    def __init__(self, frame: pd.DataFrame, level: Level, strata: Codes) -> None:
        self.level = level
        self.replicate = np.unique(frame["replicate"], return_inverse=True)[1]
        self.prompt, self.cell = (np.unique(frame[name], return_inverse=True)[1] for name in ("prompt", "cell"))
        self.question: Codes = pd.factorize(frame["question_id"])[0].astype(np.int64)
        self.strata = strata

    def draw(self, x: Floats, rng: np.random.Generator) -> Floats:
        """Values `[n]` after one exchange."""
        if self.level == "prompt":
            return self._groups(x, self.prompt, self._members, rng)
        if self.level == "cell":
            return self._groups(x, self.cell, [np.arange(int(self.cell.max()) + 1)], rng)
        to = rng.permutation(int(self.cell.max()) + 1)
        table = np.full((int(self.replicate.max()) + 1, len(to), int(self.question.max()) + 1), np.nan)
        table[self.replicate, self.cell, self.question] = x
        given, means = table[self.replicate, to[self.cell], self.question], np.nanmean(table, axis=(0, 1))
        return np.where(np.isnan(given), means[self.question], given)

    @cached_property
    def _members(self) -> list[Codes]:
        """The prompts of every stratum; one that is in several counts for its commonest."""
        found = pd.crosstab(self.prompt, self.strata).to_numpy().argmax(axis=1)
        return [np.flatnonzero(found == stratum) for stratum in np.unique(found)]

    def _groups(self, x: Floats, group: Codes, members: list[Codes], rng: np.random.Generator) -> Floats:
        """Means of groups exchanged; what differs within a group stays where it is."""
        k, replicates = int(group.max()) + 1, int(self.replicate.max()) + 1
        places = self.replicate * k + group
        counts = np.maximum(np.bincount(places, minlength=replicates * k), 1)
        means = (np.bincount(places, x, replicates * k) / counts).reshape(replicates, k)
        to = np.arange(k)
        for own in members:
            to[own] = rng.permutation(own)
        return np.asarray(x - means[self.replicate, group] + means[self.replicate, to[group]])
