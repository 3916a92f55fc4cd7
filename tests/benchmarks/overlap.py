"""1,000 Haar and 1,000 covariance-matched draws of 20 dimensions, against a loop over Gaussian + QR + `subspace_angles` in d_model.

The loops run on fewer draws and are scaled by draw, as their cost is the same for each; `scipy.stats.ortho_group`, whose cost grows with
d_model cubed, runs once at d_model 1,280 and is scaled by 4 cubed to 5,120. Setting up (Gram matrix and its tridiagonal form) counts.
"""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
from scipy import stats
from scipy.linalg import subspace_angles

from emprobe.overlap.frames import FrameLaw
from emprobe.overlap.nulls import covariance_matched, haar
from tests.benchmarks.harness import main, medians

K, D, N, DRAWS, LOOP, ORTHO = 20, 5120, 2000, 1000, 40, 1280


def mean_squared_cosines(law: FrameLaw, fixed: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """Ours: all cosines of each draw, and their mean square."""
    cosines = [np.linalg.svd(images, compute_uv=False) for images in law.images(fixed, K, draws, 0)]
    return (np.concatenate(cosines) ** 2).mean(axis=1)


def loop(fixed: np.ndarray, rows: np.ndarray | None, draws: int = LOOP) -> np.ndarray:
    """Theirs: vectors drawn in d_model (combining the centred rows, where there are any), orthonormalised, and scipy's angles."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(draws):
        vectors = rng.standard_normal((K, D)) if rows is None else rng.standard_normal((K, len(rows))) @ rows
        angles = subspace_angles(np.linalg.qr(vectors.T)[0], fixed.T)
        found.append((np.cos(angles) ** 2).mean())
    return np.array(found)


def peak_over_input(rows: np.ndarray, fixed: np.ndarray) -> float:
    """Most memory held at once with the rows themselves, over the rows' bytes."""
    tracemalloc.start()
    mean_squared_cosines(covariance_matched(rows), fixed, 50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return 1 + peak / rows.nbytes


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Rows whose scale falls tenfold over the dimensions, about a mean, and a fixed subspace."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N, D)) * np.linspace(3, 0.3, D) + 1
    return rows, np.linalg.qr(rng.standard_normal((D, K)))[0].T


def speed(rounds: int) -> dict[str, Any]:
    """Ratios of CPU seconds."""
    rows, fixed = inputs()
    centred = rows - rows.mean(axis=0)
    seconds = medians(
        {
            "haar": lambda: mean_squared_cosines(haar(), fixed),
            "covariance": lambda: mean_squared_cosines(covariance_matched(rows), fixed),
            "haar loop": lambda: loop(fixed, None),
            "covariance loop": lambda: loop(fixed, centred),
        },
        rounds=rounds,
    )
    start = time.process_time()
    stats.ortho_group.rvs(ORTHO, random_state=0)
    ortho = (time.process_time() - start) * (D / ORTHO) ** 3 * DRAWS
    scale = DRAWS / LOOP
    loops = scale * (seconds["haar loop"] + seconds["covariance loop"])
    return {
        "times faster: 1,000 Haar draws": scale * seconds["haar loop"] / seconds["haar"],
        "times faster: 1,000 covariance-matched draws": scale * seconds["covariance loop"] / seconds["covariance"],
        "times faster: both": loops / (seconds["haar"] + seconds["covariance"]),
        "times faster: Haar, against ortho_group (scaled)": ortho / seconds["haar"],
        "CPU seconds: 1,000 Haar draws": seconds["haar"],
        "CPU seconds: 1,000 covariance-matched draws": seconds["covariance"],
    }


def law(_: int) -> dict[str, Any]:
    """Kolmogorov-Smirnov p of ours and theirs being one law."""
    rows, fixed = inputs()
    centred = rows - rows.mean(axis=0)
    pairs = {"Haar": (haar(), None), "covariance-matched": (covariance_matched(rows), centred)}
    return {
        f"KS p of equal laws: {name}": float(stats.ks_2samp(mean_squared_cosines(ours, fixed), loop(fixed, of, 300)).pvalue)
        for name, (ours, of) in pairs.items()
    }


def memory(_: int) -> dict[str, Any]:
    """Most memory held at once, the rows themselves included, over the rows' bytes."""
    rows, fixed = inputs()
    return {
        "peak memory over input: float64 rows": peak_over_input(rows, fixed),
        "peak memory over input: float32 rows": peak_over_input(rows.astype(np.float32), fixed),
    }


if __name__ == "__main__":
    main({"speed": speed, "law": law, "memory": memory}, rounds=3)
