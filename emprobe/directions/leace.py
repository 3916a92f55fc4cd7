"""The readout that LEACE erases, through the package concept-erasure."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import ArrayLike

from emprobe.directions.linear import Floats, TwoClassLinear
from emprobe.errors import MissingExtraError


class Leace(TwoClassLinear):
    """Least-squares concept erasure of a two-class label: `coef_` is the readout whose information the eraser removes.

    LEACE subtracts left · (right · (x - mean)); for two classes `left_` is along the difference of the means and `coef_`, its `right`,
    along the inverse total covariance times that difference. It is signed towards `classes_[1]` and scaled so that the classes' means
    lie 1 apart along it. A d x d covariance is formed.

    Args:
        shrinkage: Shrink the covariance, as concept-erasure does by default.

    Source:
        Belrose et al. (arXiv 2306.03819), theorem 4.3.
    """

    def __init__(self, shrinkage: bool = True) -> None:
        self.shrinkage = shrinkage

    def fit(self, X: ArrayLike, y: ArrayLike) -> Leace:
        """Fit the eraser.

        Raises:
            MissingExtraError: If concept-erasure is not installed.
            ValueError: If y does not hold two classes, or their means are equal.
        """
        try:
            with warnings.catch_warnings():
                # Its grouping helper, unused here, is compiled in a way that torch has deprecated.
                warnings.simplefilter("ignore", DeprecationWarning)
                from concept_erasure import LeaceFitter  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise MissingExtraError("concept-erasure", "leace", "The estimator 'leace'") from None
        rows, second = self._classes(X, y)
        low = rows[~second].mean(axis=0)
        difference = rows[second].mean(axis=0) - low
        if not np.abs(difference).max() > 1e-12 * max(np.abs(rows).max(), 1e-300):
            raise ValueError("The means of the two classes are equal, so there is nothing linear to erase.")
        x, z = torch.tensor(rows), torch.tensor(second, dtype=torch.float64)
        # Its default tolerance drops weak concepts in silence, and its bound on the trace would turn the readout.
        eraser = LeaceFitter.fit(x, z, shrinkage=self.shrinkage, svd_tol=1e-12, constrain_cov_trace=False).eraser
        self.left_: Floats = eraser.proj_left[:, 0].numpy()
        readout: Floats = eraser.proj_right[0].numpy()
        self._set(readout / float(readout @ difference), low + difference / 2)
        return self
