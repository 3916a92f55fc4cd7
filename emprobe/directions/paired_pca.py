"""Principal component of paired differences, with a sign rule."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from emprobe.directions.linear import Floats, TwoClassLinear


class PairedPCA(TwoClassLinear):
    """The line along which paired rows differ most, whichever way each pair differs along it.

    The i-th row of one class is the partner of the i-th row of the other. Differences are not centred, so a shift common to all pairs
    counts, and so does one whose sign differs from pair to pair (a rank-1 fine-tune moves every token along one line, with both
    signs: their mean may cancel where the line is perfect). Sign rule: the mean difference projects positively. `sign_t_` is the
    mean projection over its standard error; near 0 the line is known and its sign is a guess.

    `coef_` is the unit vector times the mean projection, shape (1, n_features), in the units of X; `explained_share_` is the share of
    the summed squared differences along it.

    Source:
        Zou et al., Representation Engineering (arXiv 2310.01405), without its random signs and centring, which have this expectation.

    Example:
        >>> found = PairedPCA().fit([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [-1.0, 1.0]], [0, 1, 0, 1])
        >>> found.coef_.round(6) + 0, found.explained_share_  # differences (3, 0) and (-1, 0)
        (array([[1., 0.]]), 1.0)
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> PairedPCA:
        """First right singular vector of the differences.

        Raises:
            ValueError: If y does not hold two classes with equally many rows, no pair differs, or the mean projection is 0.
        """
        rows, second = self._classes(X, y)
        low, high = rows[~second], rows[second]
        if len(low) != len(high):
            raise ValueError(f"PairedPCA pairs the rows of two classes in order, but they have {len(low)} and {len(high)} rows.")
        vector, projections, self.explained_share_ = _component(high - low)
        mean, spread = float(projections.mean()), float(np.sqrt((projections**2).mean()))
        if not abs(mean) > 1e-9 * spread:
            raise ValueError(
                f"The {len(low)} paired differences project on their principal component with mean {mean:.2g} (root mean square "
                f"{spread:.2g}), so it has no sign. Use it as a line (a subspace of one dimension), or give more pairs."
            )
        error = float(projections.std(ddof=1)) / np.sqrt(len(low)) if len(low) > 1 else 0.0
        self.sign_t_ = abs(mean) / error if error > 0 else np.inf
        self._set(mean * vector, (low.mean(axis=0) + high.mean(axis=0)) / 2)
        return self


def _component(differences: Floats) -> tuple[Floats, Floats, float]:
    """Unit vector, projection of each difference on it, and its share of the summed squares; from the smaller Gram matrix."""
    n, d = differences.shape
    total = float((differences**2).sum())
    if not total > 0:
        raise ValueError(f"The {n} pairs do not differ at all, so their differences have no principal component.")
    if n < d:
        _, vectors = np.linalg.eigh(differences @ differences.T)
        vector = differences.T @ vectors[:, -1]
        vector /= np.linalg.norm(vector)
    else:
        vector = np.linalg.eigh(differences.T @ differences)[1][:, -1]
    projections = differences @ vector
    return vector, projections, float((projections**2).sum() / total)
