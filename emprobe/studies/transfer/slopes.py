"""One slope of a linear regression with other columns held, and its doubt over prompts and trained cells."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from emprobe.clusters import BOTH
from emprobe.errors import EmprobeError
from emprobe.types import Estimate

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
LEVEL, LEAST = 0.95, 1e-9
OWN = 1e-4
"""Share of a covariate's variance that the held columns must leave: below it stand roundings, or what is the same by another name."""
FEW = 200
"""Up to so many clusters are left out one at a time; of more, each one's influence is taken, which is the same to first order."""


def residual(x: Floats, held: Floats) -> Floats:
    """What the held columns leave of x."""
    return np.asarray(x - held @ np.linalg.lstsq(held, x, rcond=None)[0])


def slope(x: Floats, y: Floats, held: Floats, clusters: Mapping[str, Codes], weights: Floats) -> Estimate:
    """The coefficient of x in a least-squares fit of y on x and the held columns.

    Intervals, by clustering: one cluster left out at a time with everything fitted anew (few clusters), or by each cluster's influence
    (many); over two clusterings at once the variances are added and that of their pairs is taken off. Student's t with one degree of
    freedom less than clusters, by Satterthwaite for both.

    Args:
        x: `[n]`.
        y: `[n]`.
        held: Other columns, `[n, p]`, a constant in their span.
        clusters: By name, the number of each row's cluster; those with fewer than three clusters give no interval.
        weights: Of the rows.

    Raises:
        EmprobeError: If the held columns leave nothing of x, or no clustering has three clusters.

    Source: Cameron, Gelbach & Miller (2011), Journal of Business & Economic Statistics 29, 238-249 (two ways); MacKinnon & White
        (1985), Journal of Econometrics 29, 305-325 (jackknife).

    Example:
        >>> x, ones, alone = np.array([0.0, 1, 2, 3]), np.ones((4, 1)), {"prompts": np.arange(4)}
        >>> round(slope(x, 2 * x + 1, ones, alone, np.ones(4)).value, 6)
        2.0
    """
    root = np.sqrt(weights)
    a, b, h = x * root, y * root, held * root[:, None]
    left = residual(a, h)
    power = float(left @ left)
    spread = residual(a, root[:, None])
    if power <= max(OWN * float(spread @ spread), LEAST * float(a @ a), LEAST**2):
        raise EmprobeError("What is held leaves nothing of it, so its own effect cannot be told from theirs.")
    value = float(left @ b) / power
    error = residual(b - value * a, h)
    influence = left * error / power
    variances = {}
    for name, codes in clusters.items():
        dense = np.unique(codes, return_inverse=True)[1]
        k = int(dense.max()) + 1
        if k > 2:
            variances[name] = (_left_out(a, b, h, dense, k, value) if k <= FEW else _influence(influence, dense, k), k)
    if not variances:
        raise EmprobeError(f"There are {', '.join(f'{len(np.unique(c))} {n}' for n, c in clusters.items())}: too few for an interval.")
    found = {name: _estimate(value, v, k - 1.0, len(x), k, f"{k} {name}") for name, (v, k) in variances.items()}
    if len(variances) == 2:
        (va, ka), (vb, kb) = variances.values()
        one, two = (np.unique(codes, return_inverse=True)[1] for codes in clusters.values())
        pairs = np.unique(one * kb + two, return_inverse=True)[1]
        both = max(va + vb - _influence(influence, pairs, int(pairs.max()) + 1), va, vb)
        df = both**2 / (va**2 / (ka - 1) + vb**2 / (kb - 1)) if both else 1.0
        words = " and ".join(f"{k} {name}" for name, (_, k) in variances.items())
        found[BOTH] = _estimate(value, both, max(df, 1.0), len(x), min(ka, kb), f"{words}, crossed")
    own = found[BOTH if BOTH in found else next(iter(found))]
    return Estimate(own.value, own.low, own.high, own.n, own.clusters, own.method, LEVEL, intervals=found)


def _left_out(a: Floats, b: Floats, held: Floats, codes: Codes, k: int, value: float) -> float:
    """Variance from leaving out one cluster at a time, everything fitted anew."""
    columns = np.column_stack([a, held])
    whole, right = columns.T @ columns, columns.T @ b
    found = []
    for i in range(k):
        own = columns[codes == i]
        gram = whole - own.T @ own
        inverse = np.linalg.pinv(gram, rcond=LEAST, hermitian=True)
        if abs(float((inverse @ gram)[0, 0]) - 1) > 1e-4:
            continue  # without this cluster the slope is not settled; the others tell of the doubt
        found.append(float(inverse[0] @ (right - own.T @ b[codes == i])))
    return float((k - 1) / k * ((np.array(found) - value) ** 2).sum()) * (k / len(found) if found else np.inf)


def _influence(influence: Floats, codes: Codes, k: int) -> float:
    return float((np.bincount(codes, influence, k) ** 2).sum()) * k / (k - 1)


def _estimate(value: float, variance: float, df: float, n: int, k: int, words: str) -> Estimate:
    half = float(stats.t.ppf(0.5 + LEVEL / 2, df) * np.sqrt(variance))
    return Estimate(value, value - half, value + half, n, k, f"least squares; doubt over {words}, Student's t", LEVEL)
