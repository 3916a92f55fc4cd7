"""What overlap would be by chance, by the name of the chance; the further down the list, the harder to beat.

`analytic` and `haar` say what unrelated directions of no structure give. Activations have few large directions, so any two things
that are made of them overlap more than that: `covariance_matched` and `activation_differences` say how much. `permutation` says what
the same rows give when their labels mean nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap.covariance import CovarianceMatched
from emprobe.overlap.frames import ActivationDifferences, FrameLaw, Haar, batches, fitting, orthonormalised, varying_rows
from emprobe.overlap.measures import SMALLER_IS_MORE, Side, measures_of_images, targets_of
from emprobe.overlap.resampling import numbered
from emprobe.stats import null_of
from emprobe.types import Null

__all__ = [
    "ActivationDifferences",
    "Analytic",
    "CovarianceMatched",
    "FrameLaw",
    "Haar",
    "Permutation",
    "activation_differences",
    "analytic",
    "covariance_matched",
    "drawn_nulls",
    "false_discovery",
    "haar",
    "permutation",
]

Floats = NDArray[np.float64]


class Analytic:
    """The isotropic null without draws: the mean k_a / d_model of the squared norm held, and for a vector its whole law.

    Against a k-dimensional subspace, the squared cosine of a uniformly random unit vector is Beta(k / 2, (d_model - k) / 2).

    Source: Muirhead (1982), theorem 1.5.7.
    """

    name = "analytic"

    def nulls(self, values: Mapping[str, float], k_a: int, k_b: int, d_model: int, *, rows: bool = False) -> dict[str, Null]:
        """The null of each measure whose mean or law is known."""
        small, large = min(k_a, k_b), max(k_a, k_b)
        found: dict[str, Null] = {}
        for name, mean in (("mean_squared_cosine", large / d_model), ("explained_l2", k_a / d_model)):
            found[name] = Null(self.name, 0, mean)
        if small == 1 and large < d_model:
            law = stats.beta(large / 2, (d_model - large) / 2)
            for name in ("mean_squared_cosine", *(() if rows or k_b > 1 else ("explained_l2",))):
                low, high = (float(q) for q in law.ppf([0.025, 0.975]))
                found[name] = Null(self.name, 0, large / d_model, low, high, float(law.cdf(values[name])), float(law.sf(values[name])))
        return found


class Permutation:
    """Labels shuffled within groups: the span of the classes' mean differences when labels mean nothing.

    Args:
        rows: Activations `[n, d_model]`.
        labels: The class of each row; m classes span m - 1 dimensions, two give the mean-difference direction.
        groups: Labels move within a group (question) only; `None` if all rows may exchange theirs.

    Raises:
        EmprobeError: One class only, a label that is None or NaN, no group in which labels differ, or unusable rows.
        MismatchError: Unequal lengths.
    """

    name = "permutation"

    def __init__(self, rows: object, labels: Sequence[Hashable] | NDArray[Any] | Tensor, groups: Sequence[Hashable] | None = None) -> None:
        self.rows = varying_rows(rows)
        n = len(self.rows)
        of = ["all"] * n if groups is None else list(groups)
        if len(labels) != n or len(of) != n:
            raise MismatchError(f"{n} rows came with {len(labels)} labels and {len(of)} groups. Give one of each a row.")
        labels = labels.tolist() if isinstance(labels, np.ndarray | Tensor) else labels
        # A label that differs from itself is NaN.
        missing = [row for row, label in enumerate(labels) if label is None or label != label]
        if missing:
            raise EmprobeError(
                f"Row {missing[0]} of {n} bears the label {labels[missing[0]]}, as do {len(missing) - 1} others: no class. Leave them out."
            )
        (self.labels,), _ = numbered([labels], [n])
        self.classes = list(dict.fromkeys(labels))
        if len(self.classes) < 2:
            raise EmprobeError(f"A permutation null was asked of {n} rows that all bear the label {self.classes[0]}. Give two classes.")
        (codes,), (count,) = numbered([of], [n])
        self.groups = [np.flatnonzero(codes == g) for g in range(count)]
        if not any(len(set(self.labels[group])) > 1 for group in self.groups):
            raise EmprobeError(
                f"Labels were to be shuffled within {len(self.groups)} groups, but in each all rows bear one label, so nothing can move. "
                "Use groups in which the labels differ, or none."
            )

    def images(self, targets: Floats, k: int, draws: int, seed: int) -> Iterator[Floats]:
        """See `FrameLaw`."""
        rows = fitting(self.rows, targets)
        if k != len(self.classes) - 1:
            raise EmprobeError(
                f"A permutation of {len(self.classes)} classes gives {len(self.classes) - 1} dimension(s), and {k} were asked. "
                "Compare a direction with labels of two classes."
            )
        rng = np.random.default_rng(seed)
        for size in batches(draws, k * len(rows)):
            z = np.stack([self.contrasts(self._shuffled(rng)) @ rows for _ in range(size)])
            yield orthonormalised(z @ z.mT, z @ targets.T)

    def contrasts(self, labels: NDArray[np.int64]) -> Floats:
        """Weights `[m - 1, n]` of the rows in each class mean less the first class's."""
        members = np.eye(len(self.classes))[labels].T
        means = members / members.sum(axis=1, keepdims=True)
        return np.asarray(means[1:] - means[0])

    def _shuffled(self, rng: np.random.Generator) -> NDArray[np.int64]:
        labels = self.labels.copy()
        for group in self.groups:
            labels[group] = rng.permutation(labels[group])
        return labels


def analytic() -> Analytic:
    """The isotropic null without draws."""
    return Analytic()


def haar() -> Haar:
    """Uniformly random subspaces."""
    return Haar()


def covariance_matched(rows: Any) -> CovarianceMatched:
    """Random subspaces of Gaussian vectors with the covariance of these rows `[n, d_model]`."""
    return CovarianceMatched(rows)


def activation_differences(rows: Any) -> ActivationDifferences:
    """Subspaces of differences between random pairs of these rows `[n, d_model]`."""
    return ActivationDifferences(rows)


def permutation(rows: Any, labels: Sequence[Hashable] | NDArray[Any] | Tensor, groups: Sequence[Hashable] | None = None) -> Permutation:
    """Mean-difference directions of these rows with labels shuffled within groups."""
    return Permutation(rows, labels, groups)


def drawn_nulls(
    law: FrameLaw, values: Mapping[str, float], k_a: int, b: Side, a_mean: Floats | None, draws: int, seed: int
) -> dict[str, Null]:
    """Every measure's place among what random subspaces of k_a dimensions under this law have with b."""
    parts = [measures_of_images(images, b, a_mean) for images in law.images(targets_of(b, a_mean), k_a, draws, seed)]
    found = {}
    for name in parts[0]:
        drawn = np.concatenate([part[name] for part in parts])
        # A cosine's sign is a convention of its two directions; as much of it, either way, is what chance must reach.
        value = abs(values[name]) if name == "cosine" else values[name]
        found[name] = _mirrored(null_of(law.name, -value, -drawn)) if name.startswith(SMALLER_IS_MORE) else null_of(law.name, value, drawn)
    return found


def _mirrored(null: Null) -> Null:
    assert null.low is not None
    assert null.high is not None
    return Null(null.name, null.draws, -null.mean, -null.high, -null.low, null.percentile, null.p)


def false_discovery(p: ArrayLike) -> Floats:
    """p-values of many layers, adjusted so that at most that share of those called found is expected to be by chance.

    Raises:
        EmprobeError: If there are none, or one is not in 0..1.

    Source: Benjamini & Hochberg (1995), Journal of the Royal Statistical Society B 57, 289-300; valid for layers, whose overlaps are
        positively dependent.

    Example:
        >>> false_discovery([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.04, 0.04]
    """
    found = np.asarray(p, dtype=np.float64)
    if found.ndim != 1 or not found.size or not ((found >= 0) & (found <= 1)).all():
        raise EmprobeError(f"False discovery was to be controlled over {found.size} p-values {found}. Give one or more in 0..1.")
    return np.asarray(stats.false_discovery_control(found))
