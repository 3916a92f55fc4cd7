"""The interval of a mean over folds that share most of their training rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from emprobe.errors import EmprobeError
from emprobe.studies.priors.folds import Folds
from emprobe.types import Estimate


def over_folds(values: ArrayLike, folds: Folds, level: float = 0.95) -> Estimate:
    """Mean over folds with Nadeau and Bengio's corrected interval: Student's t, variance s² (1/J + n_test/n_train).

    Folds overlap in what they were fitted on, so that the plain standard error s/√J shrinks without limit as repeats are added; this one
    does not. For differences give those of the same folds.

    Args:
        values: One a fold, J of them.
        folds: The splits.
        level: Coverage aimed at.

    Raises:
        EmprobeError: If there is not one finite value a fold, or fewer than two.

    Source: Nadeau & Bengio (2003), Machine Learning 52, 239-281.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.shape != (len(folds),) or len(x) < 2 or not np.isfinite(x).all():
        raise EmprobeError(f"An interval over {len(folds)} folds was asked for, of {x.shape} values. Give one finite value for each.")
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1) * np.sqrt(x.var(ddof=1) * (1 / len(x) + folds.test_share)))
    mean = float(x.mean())
    n, families = len(folds.families), int(folds.families.max()) + 1
    return Estimate(mean, mean - half, mean + half, n, families, f"mean over {len(x)} folds, Nadeau-Bengio corrected t", level)
