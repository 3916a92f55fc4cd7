"""Where a fine-tune moved the residual stream: its difference of means, beside the teacher's, with null and ceiling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.activations import Activations, PairActivations
from emprobe.capture import capture
from emprobe.directions.certainty import observed_cosine, split_half
from emprobe.directions.design import Design, design_of
from emprobe.models.load import Checkpoint
from emprobe.overlap import covariance_directions
from emprobe.overlap.cosine import cosine_null
from emprobe.stats import clustered_interval, null_of
from emprobe.types import Conversation

SPLITS = 50
"""Random halves of the questions behind a ceiling."""


@dataclass(frozen=True, eq=False)
class Shift:
    """What a fine-tune did to the activations at the last token of questions, at one layer.

    Attributes:
        pair: Activations of both models.
        layer: 0-based block.
        clusters: Family of each question.
    """

    pair: PairActivations
    layer: int
    clusters: tuple[str, ...]

    @property
    def design(self) -> Design:
        """As a two-class problem, tuned against base."""
        return design_of(self.pair, self.layer)

    @property
    def rows(self) -> NDArray[np.float64]:
        """Tuned minus base for each question, `[question, d_model]`."""
        return np.asarray(self.pair.at(self.layer).numpy(), dtype=np.float64)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean over questions, `[d_model]`."""
        return np.asarray(self.rows.mean(axis=0))

    @property
    def norm(self) -> float:
        """Norm of the mean."""
        return float(np.linalg.norm(self.mean))


def read(checkpoint: Checkpoint, questions: Sequence[Conversation], layer: int) -> Activations:
    """Residual stream behind a block, at the last token of each question."""
    found: Activations = capture(checkpoint, questions, layers=[layer], positions="last_prompt_token", progress=False)
    return found


def beside(student: Shift, teacher: Shift, *, nulls: int, seed: int = 0) -> dict[str, Any]:
    """The student's direction beside the teacher's, and its shift along it.

    Args:
        student: Its shift from where it started.
        teacher: The teacher's from its parent.
        nulls: Random directions of the covariance of the student's start.
        seed: Draws them, and the halves of the ceiling.

    Returns:
        `cosine` with an interval over questions; `random_p975`, the size that a random direction stays below; `null` of the covariance;
        `ceiling`, what two noisy estimates of one direction would show; `projection`, the shift along the teacher's direction in units of
        the teacher's own. A student that did not move has a projection of 0 and no direction.
    """
    axis = teacher.mean / teacher.norm
    along = clustered_interval(student.rows @ axis / teacher.norm, student.clusters).as_dict()
    if not student.norm > 1e-9 * teacher.norm:
        return {"projection": along, "norm": student.norm / teacher.norm}
    cosine = observed_cosine(student.design, teacher.design, draws=500, seed=seed)
    drawn = covariance_directions(student.pair.base.at(student.layer), nulls, seed).numpy() @ axis
    return {
        "projection": along,
        "norm": student.norm / teacher.norm,
        "cosine": cosine.as_dict(),
        "random_p975": cosine_null(len(axis), 0.975),
        "null": null_of("covariance_matched", abs(cosine.value), np.abs(drawn)).as_dict(),
        "ceiling": ceiling(student, teacher, seed),
    }


def ceiling(a: Shift, b: Shift, seed: int = 0) -> float | None:
    """The cosine that two estimates of one direction would show: root of the product of their reliabilities; `None` where one has none."""
    halves = [split_half(shift.design, splits=SPLITS, seed=seed).full for shift in (a, b)]
    return math.sqrt(halves[0] * halves[1]) if min(halves) > 0 else None


def cosines(shifts: Mapping[str, NDArray[np.float64]]) -> list[list[float | None]]:
    """Cosine of every mean shift with every other, in their order; `None` where one did not move.

    Example:
        >>> cosines({"a": np.array([1.0, 0.0]), "b": np.array([0.0, 2.0]), "c": np.zeros(2)})
        [[1.0, 0.0, None], [0.0, 1.0, None], [None, None, None]]
    """
    norms = {name: float(np.linalg.norm(shift)) for name, shift in shifts.items()}
    return [
        [float(one @ two) / (norms[a] * norms[b]) if norms[a] and norms[b] else None for b, two in shifts.items()]
        for a, one in shifts.items()
    ]
