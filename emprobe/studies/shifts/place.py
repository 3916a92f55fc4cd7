"""Everything that is measured at one position rule and layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.clusters import Resampling, means
from emprobe.overlap.covariance import CovarianceMatched
from emprobe.overlap.frames import FrameLaw, Haar
from emprobe.overlap.spans import SpanError
from emprobe.studies.shifts.measures import Components, Size

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OnPrompts:
    """Rows of one kind (shifts, activations) on training and on evaluation prompts, `[prompt, d_model]`."""

    train: Floats
    evaluation: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """What was read at one rule and layer.

    Attributes:
        positions: The rule.
        layer: 0-based block, whose output it is.
        own: OnPrompts of the fine-tune under study.
        others: Of other fine-tunes on the same prompts, by name.
        base: Activations before, on training and evaluation prompts.
        families: Of the training prompts, and of the evaluation prompts.
        groups: Of the evaluation prompts; none where they have none.
        rounding: Norm of float32's rounding of one row.
        size: Of the subspace that everything is measured with.
        draws: Of each null.
        splits: Of the training prompts, for the ceiling.
        seed: Of all that is drawn.
    """

    positions: str
    layer: int
    own: OnPrompts
    others: Mapping[str, OnPrompts]
    base: OnPrompts
    families: tuple[Sequence[str], Sequence[str]]
    groups: Sequence[str]
    rounding: float
    size: Size
    draws: int
    splits: int
    seed: int

    @cached_property
    def laws(self) -> dict[str, FrameLaw]:
        """Random subspaces: of no structure, of the covariance of the activations before, and of the training shifts' own.

        The last is not there where all training shifts are equal.
        """
        found: dict[str, FrameLaw] = {"haar": Haar(), "base_covariance": self.of_base}
        if (self.own.train != self.own.train[0]).any():
            found["shift_covariance"] = CovarianceMatched(self.own.train)
        return found

    @cached_property
    def of_base(self) -> FrameLaw:
        """Subspaces of the covariance of activations before, on all prompts."""
        return CovarianceMatched(np.concatenate([self.base.train, self.base.evaluation]))

    @property
    def frobenius(self) -> float:
        """Rounding of the training rows together, which their singular values are compared with."""
        return float(self.rounding * np.sqrt(len(self.own.train)))

    def components(self, shifts: Floats, *, centred: bool) -> Components:
        """Of training shifts, without those that are rounding."""
        return Components.of(shifts, centred=centred, what=f"training shifts at layer {self.layer}", rounding=self.frobenius)


def mean_over(columns: Mapping[str, Floats], families: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean of each column over prompts, with an interval over families."""
    codes = np.unique(families, return_inverse=True)[1]
    found = means(np.stack(list(columns.values()), axis=1), {"families": codes}, Resampling())
    return {name: estimate.as_dict() for name, estimate in zip(columns, found, strict=True)}


def or_undefined(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it makes or, where there is no such number, why."""
    try:
        return make()
    except SpanError as error:
        return {"undefined": str(error)}
