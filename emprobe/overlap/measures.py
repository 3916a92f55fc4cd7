"""The measures of overlap themselves, as functions of two orthonormal bases and, where they are at hand, of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import subspace_angles

Floats = NDArray[np.float64]

SMALLER_IS_MORE = ("angle", "grassmann")
"""Beginnings of the names of measures that fall as overlap grows."""
OF_ROWS = ("explained_l2", "projection_fraction", "reconstruction_cosine")


@dataclass(frozen=True, eq=False)
class Side:
    """One subspace in any common coordinates: `basis[k, d]`, the `mean` it is about, and rows `[n, d]` with their weights."""

    basis: Floats
    mean: Floats | None = None
    rows: Floats | None = None
    weights: Floats | None = None


def measures(a: Side, b: Side) -> dict[str, float]:
    """Every measure of how b lies in a that these two allow.

    * `angle_1` …: principal angles in radians, ascending; 0 to π/2.
    * `mean_squared_cosine`: mean over the min(k_a, k_b) angles of cos², 0 to 1; random subspaces give max(k_a, k_b) / d_model.
    * `grassmann_distance`: sqrt(Σ angle²), 0 for equal spans.
    * `explained_l2`: share of the squared norm of b's rows that a's span holds, after a's mean is subtracted if a has one; without
      rows, of b's basis vectors, all alike. `projection_fraction`: mean over rows of ‖P x‖ / ‖x‖, a norm and not a square; without
      rows, sqrt(explained_l2), since a mean over basis vectors would depend on the basis. Neither is symmetric.
    * `reconstruction_cosine`: mean over rows of the cosine of mean + P (x - mean) with x.
    * `cosine`: of two vectors, with its sign.

    Source: Björck & Golub (1973) for the angles; What shapes emergent misalignment (arXiv 2606.20814) for what is of rows.

    Example:
        >>> axes = np.eye(3)
        >>> found = measures(Side(axes[:2]), Side(axes[1:]))
        >>> [round(found[name], 3) for name in ("angle_1", "angle_2", "mean_squared_cosine", "explained_l2")]
        [0.0, 1.571, 0.5, 0.5]
    """
    angles = np.sort(subspace_angles(a.basis.T, b.basis.T))
    found = {f"angle_{i}": float(angle) for i, angle in enumerate(angles, 1)}
    found["mean_squared_cosine"] = float((np.cos(angles) ** 2).mean())
    found["grassmann_distance"] = float(np.linalg.norm(angles))
    if b.rows is None:
        found["explained_l2"] = float((np.cos(angles) ** 2).sum() / len(b.basis))
        found["projection_fraction"] = found["explained_l2"] ** 0.5
    else:
        rows = b.rows if a.mean is None else b.rows - a.mean
        mean_image = None if a.mean is None else a.basis @ a.mean
        found |= {name: float(value) for name, value in _of_rows(rows, rows @ a.basis.T, b.weights, a.mean, mean_image).items()}
    if len(a.basis) == len(b.basis) == 1:
        found["cosine"] = float(a.basis[0] @ b.basis[0])
    return found


def measures_of_images(images: Floats, b: Side, a_mean: Floats | None) -> dict[str, Floats]:
    """The same for a batch of random subspaces, given the images `[draws, k, m]` of `targets_of(b, mean)`."""
    k_b = len(b.basis)
    cosines = np.clip(np.linalg.svd(images[:, :, :k_b], compute_uv=False), 0.0, 1.0)
    angles = np.arccos(cosines)
    found = {f"angle_{i}": angles[:, i - 1] for i in range(1, angles.shape[1] + 1)}
    found["mean_squared_cosine"] = (cosines**2).mean(axis=1)
    found["grassmann_distance"] = np.linalg.norm(angles, axis=1)
    if b.rows is None:
        found["explained_l2"] = (cosines**2).sum(axis=1) / k_b
        found["projection_fraction"] = np.sqrt(found["explained_l2"])
    else:
        n = len(b.rows)
        rows = b.rows if a_mean is None else b.rows - a_mean
        image = images[:, :, k_b : k_b + n].mT
        found |= _of_rows(rows, image, b.weights, a_mean, None if a_mean is None else images[:, :, -1])
    if images.shape[1] == k_b == 1:
        found["cosine"] = cosines[:, 0]
    return found


def targets_of(b: Side, a_mean: Floats | None) -> Floats:
    """What a null needs the images of: b's basis, b's rows about a's mean, and that mean."""
    if b.rows is None:
        return b.basis
    parts = [b.basis, b.rows] if a_mean is None else [b.basis, b.rows - a_mean, a_mean[None, :]]
    return np.concatenate(parts)


def _of_rows(rows: Floats, image: Floats, weights: Floats | None, mean: Floats | None, mean_image: Floats | None) -> dict[str, Floats]:
    """Means of `row_measures` over rows whose weights count them, and the share of all rows' squared norm that is held."""
    weight = np.ones(len(rows)) if weights is None else weights
    held = (image**2).sum(axis=-1)
    found = {"explained_l2": (held * weight).sum(axis=-1) / ((rows**2).sum(axis=1) * weight).sum()}
    each = row_measures(rows, image, mean, mean_image)
    return found | {name: (values * weight).sum(axis=-1) / weight.sum() for name, values in each.items()}


def row_measures(rows: Floats, image: Floats, mean: Floats | None = None, mean_image: Floats | None = None) -> dict[str, Floats]:
    """How much of each row a subspace holds, of its own: `projection_fraction` ‖P x‖ / ‖x‖ and `reconstruction_cosine`, `[..., n]`.

    Args:
        rows: About the mean, if there is one, `[n, d_model]`. One that is nothing but the mean has no direction of its own and counts as
            not held.
        image: Their coordinates in an orthonormal basis, or in those of many subspaces, `[..., n, k]`.
        mean: What was subtracted from the rows; it counts as known in the reconstruction.
        mean_image: Its coordinates in the same bases, `[..., k]`.

    Source: arXiv 2606.20814, comparison of training and evaluation deltas.

    Example:
        >>> found = row_measures(np.array([[3.0, 4.0]]), np.array([[3.0]]))
        >>> found["projection_fraction"].tolist()
        [0.6]
    """
    squared = (rows**2).sum(axis=1)
    held = (image**2).sum(axis=-1)
    fraction = np.sqrt(np.clip(held / np.where(squared > 0, squared, 1.0), 0.0, 1.0))
    if mean is None or mean_image is None:
        return {"projection_fraction": fraction, "reconstruction_cosine": fraction}
    along = rows @ mean
    rebuilt_along = (image @ mean_image[..., None])[..., 0]
    size = float(mean @ mean)
    inner = size + along + rebuilt_along + held
    norms = np.sqrt(np.maximum((size + 2 * rebuilt_along + held) * (size + 2 * along + squared), 1e-300))
    return {"projection_fraction": fraction, "reconstruction_cosine": np.clip(inner / norms, -1.0, 1.0)}


def mahalanobis(rows: Floats, basis: Floats, variances: Floats, mean: Floats | None) -> Floats:
    """How far each row lies from the mean within the span, in standard deviations there: sqrt(Σ z_j² / variance_j).

    Source: arXiv 2606.20814, comparison of training and evaluation deltas.

    Example:
        >>> mahalanobis(np.array([[3.0, 9.0]]), np.array([[1.0, 0.0]]), np.array([4.0]), None).tolist()
        [1.5]
    """
    z = (rows if mean is None else rows - mean) @ basis.T
    return np.asarray(np.sqrt((z**2 / variances).sum(axis=1)))
