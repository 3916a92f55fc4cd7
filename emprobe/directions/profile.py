"""Every layer's direction with how sure it is: the table that a choice of layer should be read beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control

from emprobe.directions.design import Design, Floats, Source, design_of, reference_of
from emprobe.directions.detection import auroc_estimate, auroc_of, crossfit_scores, folds_of
from emprobe.directions.direction import Direction
from emprobe.directions.energy import bf16_rounding, top_energy
from emprobe.directions.estimators import estimator_of, is_plain_mean
from emprobe.directions.fit import fit_directions
from emprobe.directions.resampling import ResampledDirection, resample_directions
from emprobe.stats import permutation_p
from emprobe.types import Estimate

TOP = 5
"""Dimensions whose share of the energy is told."""


@dataclass(frozen=True)
class LayerCertainty:
    """One layer's direction and its doubt.

    Attributes:
        layer: 0-based block.
        relative_norm: How far the groups' means lie apart along the direction, in mean residual norms.
        split_half: Mean cosine between the directions of two random halves of the questions, uncorrected; `None` if it has no halves.
        spearman_brown: 2 r / (1 + r) of it: the cosine to be expected with a direction from as many new questions.
        truth: Cosine with the true direction, and `stability` with those of resamples of questions, then rows (see
            `resample_directions`); for the plain mean difference only, else `None`.
        auroc: Of rows whose question had no part in fitting, cross-fitted; the interval resamples questions and keeps the fits.
        p: Share of relabellings with an AUROC as large; `q` is the same under false-discovery control over the layers.
        null_p95: 95th percentile of the relabellings' AUROC.
        top_energy: Share of the squared norm in the five largest dimensions.
        bf16_rounding: What storing both means in bf16 would change, as a share of their difference.
    """

    layer: int
    relative_norm: float
    split_half: float | None
    spearman_brown: float | None
    truth: Estimate | None
    stability: Estimate | None
    auroc: Estimate
    p: float
    q: float
    null_p95: float
    top_energy: float
    bf16_rounding: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LayerProfile:
    """What `layer_profile` found; `em.plots.draw_detection` and `draw_certainty` take it as it is, and printing it gives a table.

    Attributes:
        rows: One record for each layer at which something differs, ascending.
        site: Where in the block the rows were read.
        positions: Their position rule.
    """

    rows: tuple[LayerCertainty, ...]
    site: str
    positions: str

    def __iter__(self) -> Iterator[LayerCertainty]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> LayerCertainty:
        return self.rows[place]

    def __repr__(self) -> str:
        return "\n".join(certainty_lines(self.as_dict()))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"record": "LayerProfile", "profile": [row.as_dict() for row in self.rows], "site": self.site, "positions": self.positions}


def certainty_lines(result: Mapping[str, Any]) -> list[str]:
    """The layers as a plain-text table; the one that was taken, where the result names it, has a star."""
    taken = (result.get("direction") or {}).get("layer")
    lines = [
        f"{'layer':<7}{'|diff|/|resid|':>15}{'split-half':>12}{'cosine with the truth':>24}{'held-out AUROC':>24}{'p':>8}{'q':>8}"
        f"{'top 5':>8}{'bf16':>8}"
    ]
    for row in result["profile"]:
        half = "-" if row["split_half"] is None else f"{row['split_half']:.3f}"
        mark = " *" if row["layer"] == taken else ""
        lines.append(
            f"{str(row['layer']) + mark:<7}{row['relative_norm']:>15.3f}{half:>12}{_shown(row['truth']):>24}{_shown(row['auroc']):>24}"
            f"{row['p']:>8.3f}{row['q']:>8.3f}{100 * row['top_energy']:>6.1f} %{100 * row['bf16_rounding']:>6.1f} %"
        )
    return lines


def _shown(estimate: Mapping[str, Any] | None) -> str:
    return "-" if estimate is None else f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def layer_profile(
    acts: Source,
    *,
    labels: Sequence[bool] | None = None,
    estimator: Any = "mean_difference",
    folds: int = 5,
    permutations: int = 200,
    draws: int = 1000,
    seed: int = 0,
) -> LayerProfile:
    """How sure the direction of every layer is; layers at which nothing differs are left out.

    Args:
        acts: A pair's activations, or one checkpoint's with `labels`.
        labels: One truth value per row.
        estimator: Name or estimator, as in `fit_direction`.
        folds: Of the cross-fitting, whole questions together; fewer where there are fewer questions.
        permutations: Relabellings: tuned and base swapped by question, labels shuffled within questions or, where every question has
            rows of one class only, between them. The same ones at every layer.
        draws: Bootstrap draws.
        seed: Of all of these.

    Raises:
        EmprobeError: As `fit_direction`, or with fewer than two questions.

    Source: Benjamini & Hochberg (1995), Journal of the Royal Statistical Society B 57, 289-300, for q.
    """
    chosen = estimator_of(estimator)
    directions = fit_directions(acts, labels=labels, estimator=chosen, seed=seed)
    found = []
    for layer, direction in directions.items():
        design = design_of(acts, layer, labels)
        means = design.X[~design.y].mean(axis=0), design.X[design.y].mean(axis=0)
        resampled = _resampled(design, draws, seed) if is_plain_mean(chosen) else None
        found.append((direction, means, resampled, _detected(design, chosen, folds, permutations, seed)))
    rates = false_discovery_control([detected[1] for *_, detected in found])
    own = reference_of(acts)
    rows = tuple(_row(*row, float(rate)) for row, rate in zip(found, rates, strict=True))
    return LayerProfile(rows, own.site, own.positions)


def _resampled(design: Design, draws: int, seed: int) -> ResampledDirection:
    if design.paired:
        return next(resample_directions([design.X[1::2] - design.X[::2]], design.questions[::2], draws=draws, seed=seed))
    return next(resample_directions([design.X], design.questions, design.y.tolist(), draws=draws, seed=seed))


def _detected(design: Design, estimator: Any, folds: int, permutations: int, seed: int) -> tuple[Estimate, float, float]:
    """Cross-fitted AUROC, its permutation p, and the null's 95th percentile."""
    codes = design.codes
    folded = folds_of(codes, min(folds, int(codes.max()) + 1), seed)
    labels = np.concatenate([design.y[None], design.null_labels(permutations, seed)])
    scores = crossfit_scores(design, folded, labels, estimator)
    null = auroc_of(scores[1:], labels[1:], folded)
    estimate = auroc_estimate(scores[0], design.y, design.questions, folded, seed=seed)
    return estimate, permutation_p(estimate.value, null), float(np.quantile(null, 0.95))


def _row(
    direction: Direction,
    means: tuple[Floats, Floats],
    resampled: ResampledDirection | None,
    detected: tuple[Estimate, float, float],
    rate: float,
) -> LayerCertainty:
    half = direction.split_half
    assert direction.relative_norm is not None  # fitted ones have it
    return LayerCertainty(
        layer=direction.layer,
        relative_norm=direction.relative_norm,
        split_half=half,
        spearman_brown=None if half is None or half <= -1 else 2 * half / (1 + half),
        truth=resampled.truth if resampled else None,
        stability=resampled.stability if resampled else None,
        auroc=detected[0],
        p=detected[1],
        q=rate,
        null_p95=detected[2],
        top_energy=top_energy(direction.vector.numpy(), min(TOP, len(direction.vector))),
        bf16_rounding=bf16_rounding(*means),
    )
