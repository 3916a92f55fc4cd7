"""The overlap of two sides layer by layer: subspaces made where rows can carry them, compared, and held against their ceiling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emprobe.activations import Activations, PairActivations
from emprobe.errors import EmprobeError
from emprobe.overlap.between import NULLS, overlap
from emprobe.overlap.frames import FrameLaw
from emprobe.overlap.layers import LayerOverlap, OverlapLayers
from emprobe.overlap.nulls import Analytic, activation_differences, covariance_matched, false_discovery
from emprobe.overlap.resampling import ceiling
from emprobe.overlap.spans import SpanError
from emprobe.overlap.subspace import DirectionLike, Subspace

Captured = Activations | PairActivations
OverLayers = Captured | Mapping[Any, Subspace | DirectionLike | Tensor | NDArray[Any]]
OF_ROWS = {"covariance_matched": covariance_matched, "activation_differences": activation_differences}


@dataclass(frozen=True)
class _Settings:
    k: int | None
    share: float | None
    centred: bool
    draws: int
    resamples: int
    seed: int


def overlap_layers(
    a: OverLayers,
    b: OverLayers,
    *,
    k: int | None = None,
    share: float | None = None,
    centred: bool = True,
    layers: Sequence[int] = (),
    nulls: Sequence[str | Analytic | FrameLaw] | None = None,
    rows: Captured | Mapping[Any, Any] | None = None,
    draws: int = 1000,
    resamples: int = 200,
    seed: int = 0,
) -> OverlapLayers:
    """`overlap` at every layer that both sides have, with the noise ceiling, and p under false-discovery control over the layers.

    A layer at which the rows of a side cannot carry the subspace that is asked for (below an adapter base and tuned are equal; a rank-1
    adapter's deltas have one dimension) is left out and named, unless `layers` asks for it.

    Args:
        a: A pair's activations for its deltas, one checkpoint's for its rows, or a subspace or direction for each layer.
        b: The same for the other side; one of each are compared whatever their layers.
        k: Dimensions of the subspaces that are made from activations; or
        share: the share of the rows' squared norm that they explain.
        centred: Subtract the rows' mean first.
        layers: 0-based blocks; none means all that both sides have.
        nulls: As in `overlap`, where `covariance_matched` and `activation_differences` may be named if `rows` are given. `None`: all four,
            or those that need no rows.
        rows: Activations, or rows for each layer, whose covariance the nulls of rows take.
        draws: Draws of each null.
        resamples: How often subspaces are made again at most, without a block of questions; 0 for no interval.
        seed: Of nulls, blocks and halves.

    Raises:
        EmprobeError: No common layer, one that is asked for and not there or without the dimensions, unusable k, share, nulls or rows.
        SpanError: If no layer is left.
        MismatchError: If the sides are of different models.

    Example:
        >>> import torch
        >>> axes = torch.eye(3, dtype=torch.float64)
        >>> found = overlap_layers({4: axes[0], 5: axes[0]}, {4: axes[1], 5: axes[0]}, nulls=["analytic"])
        >>> [(row.layer, round(row.overlap.mean_squared_cosine.value, 9)) for row in found]
        [(4, 0.0), (5, 1.0)]
    """
    settings = _Settings(k, share, centred, draws, resamples, seed)
    for side, which in ((a, "a"), (b, "b")):
        if not isinstance(side, Mapping) and (k is None) == (share is None):
            raise EmprobeError(f"Side {which} gives activations, of which subspaces are made. Say exactly one of k= and share=.")
    names = list(nulls if nulls is not None else (*OF_ROWS, "haar", "analytic") if rows is not None else NULLS)
    found: list[LayerOverlap] = []
    left_out: dict[int | None, str] = {}
    for one, two in _places(a, b, layers):
        layer = one if one == two else None
        try:
            found.append(_compared(layer, (a, one), (b, two), _laws(names, rows, one), settings))
        except SpanError as error:
            if layer is None or layer in layers:
                raise
            left_out[layer] = error.found
    if not found:
        why = " ".join(left_out.values())
        raise SpanError(f"No layer is left to compare. {why}", "Ask for fewer dimensions, or centred=False, which keeps the rows' mean.")
    return OverlapLayers(_controlled(found), left_out)


def _places(a: OverLayers, b: OverLayers, layers: Sequence[int]) -> list[tuple[int | None, int | None]]:
    """The layers of the sides that belong together; two single ones do whatever their layers."""
    have = [tuple(side) if isinstance(side, Mapping) else side.layers for side in (a, b)]
    if len(have[0]) == len(have[1]) == 1 and not layers:
        return [(have[0][0], have[1][0])]
    wanted = tuple(layers) or tuple(sorted(layer for layer in set(have[0]) & set(have[1]) if layer is not None))
    missing = [layer for layer in wanted if layer not in have[0] or layer not in have[1]]
    if missing or not wanted:
        has = " and ".join(f"{name} has layers {', '.join(map(str, side))}" for name, side in zip("ab", have, strict=True))
        what = f"Layer {missing[0]} was" if missing else "Layers of both sides were"
        raise EmprobeError(f"{what} asked for, but {has}. Choose among those that both have.")
    return [(layer, layer) for layer in wanted]


def _compared(
    layer: int | None, one: tuple[OverLayers, Any], two: tuple[OverLayers, Any], laws: Sequence[Any], settings: _Settings
) -> LayerOverlap:
    spaces = [_space(side, place, settings) for side, place in (one, two)]
    rows = [None if isinstance(side, Mapping) else side for side, _ in (one, two)]
    options: dict[str, Any] = {"draws": settings.draws, "resamples": settings.resamples, "seed": settings.seed}
    found = overlap(spaces[0], spaces[1], nulls=laws, rows_a=rows[0], rows_b=rows[1], **options)
    halves = [_ceiling(source, space, settings) for source, space in zip(rows, spaces, strict=True) if source is not None]
    return LayerOverlap(layer, found, float(np.sqrt(halves[0] * halves[1])) if len(halves) == 2 else None)


def _space(side: OverLayers, layer: Any, settings: _Settings) -> Subspace:
    if isinstance(side, Mapping):
        given = side[layer]
        return given if isinstance(given, Subspace) else Subspace.from_directions([given], made_from=_words(given))
    tuned = side.tuned if isinstance(side, PairActivations) else side
    return Subspace.from_deltas(
        # A pair is given as it is, so that its rounding counts for no dimension.
        side if isinstance(side, PairActivations) else side.at(layer), k=settings.k, share=settings.share, centred=settings.centred,
        layer=layer, site=tuned.site, positions=tuned.positions, made_from=f"rows of {tuned.checkpoint}",
        provenance={"tuned": {"name": tuned.checkpoint, "fingerprint": tuned.fingerprint}},
    )  # fmt: skip


def _words(given: Any) -> str:
    contrast = getattr(given, "contrast", None)
    return "one direction" if contrast is None else f"direction {contrast}"


def _ceiling(source: Captured, space: Subspace, settings: _Settings) -> float:
    assert space.layer is not None
    rows = source.at(space.layer)
    return ceiling(rows, k=space.k, groups=source.questions, centred=settings.centred, seed=settings.seed).value


def _laws(names: Iterable[Any], rows: Captured | Mapping[Any, Any] | None, layer: Any) -> list[Any]:
    """Nulls of rows with the rows of this layer, all others as they are."""
    laws = []
    for name in names:
        if not isinstance(name, str) or name not in OF_ROWS:
            laws.append(name)
            continue
        if rows is None:
            raise EmprobeError(f"The null {name} needs rows whose covariance it takes. Give them with rows=.")
        there = tuple(rows) if isinstance(rows, Mapping) else rows.layers
        if layer not in there:
            raise EmprobeError(f"The rows of the nulls have no layer {layer}, at which {name} is to be drawn. Give rows of that layer.")
        laws.append(OF_ROWS[name](rows[layer] if isinstance(rows, Mapping) else rows.at(layer)))
    return laws


def _controlled(found: Sequence[LayerOverlap]) -> tuple[LayerOverlap, ...]:
    """With the p of each layer's mean squared cosine under false-discovery control over the layers, for each null."""
    placed = [row.overlap.nulls["mean_squared_cosine"] for row in found]
    q: list[dict[str, float]] = [{} for _ in found]
    for name in dict.fromkeys(name for nulls in placed for name in nulls):
        there = [(i, p) for i, nulls in enumerate(placed) if name in nulls and (p := nulls[name].p) is not None]
        for (i, _), rate in zip(there, false_discovery([p for _, p in there]) if there else [], strict=True):
            q[i][name] = float(rate)
    return tuple(replace(row, q=rates) for row, rates in zip(found, q, strict=True))
