"""What a file of someone else's vectors holds, once its indices are told in emprobe's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emprobe.errors import EmprobeError, MismatchError
from emprobe.types import Site

Vector = NDArray[np.float64]
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Asked:
    """What the caller says of a file that the file does not say itself; `None` is not said."""

    site: Site | None = None
    entry: str | None = None
    minus: Path | None = None
    convention: str | None = None


@dataclass(frozen=True)
class Source:
    """Vectors as the file holds them, each at the block it belongs to.

    Attributes:
        vectors: 0-based block to float64 vector, not normalised.
        site: Where in the block they belong.
        convention: What an index means in the file.
        conversion: What was done to make it emprobe's.
        embeddings: The input of block 0, which is no block's output.
        left_out: Blocks that the file has an entry for which is no vector of that block, and why.
        cautions: What to know before the vectors are used.
        facts: What else the file says.
    """

    vectors: Mapping[int, Vector]
    site: Site
    convention: str
    conversion: str
    positions: str = UNKNOWN
    contrast: str = UNKNOWN
    sign: str = UNKNOWN
    estimator: str = UNKNOWN
    embeddings: Vector | None = None
    left_out: Mapping[int, str] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


INPUTS_CONVERTED = (
    "the input of block k is the output of block k - 1, so index k >= 1 became resid_post[k - 1]; index 0, the embeddings, is resid_pre[0]"
)


def from_inputs(rows: Sequence[Vector]) -> tuple[dict[int, Vector], Vector]:
    """Block inputs, index k, as block outputs k - 1; and the embeddings.

    >>> outputs, embeddings = from_inputs([np.zeros(1), np.ones(1)])
    >>> outputs, embeddings
    ({0: array([1.])}, array([0.]))
    """
    return {k - 1: row for k, row in enumerate(rows) if k}, rows[0]


def vector_of(value: Any, where: str) -> Vector:
    """One vector in float64, copied out of whatever holds it.

    Raises:
        EmprobeError: If it is not one axis of floating-point numbers.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.device.type != "cpu":
            raise EmprobeError(f"{where} is a tensor without plain values ({value.layout}, {value.device}). Save it dense.")
        value = value.detach().double().numpy() if value.is_floating_point() else value.numpy()
    found = np.asarray(value)
    if found.ndim != 1 or not found.size or not np.issubdtype(found.dtype, np.floating):
        raise EmprobeError(
            f"{where} should be one vector [d_model] of floating-point numbers, but has shape {list(found.shape)} and type {found.dtype}."
        )
    return found.astype(np.float64)


def rows_of(matrix: Any, where: str) -> list[Vector]:
    """The rows of a matrix [layer, d_model]."""
    return [vector_of(row, f"{where}, row {index}") for index, row in enumerate(matrix)]


def check_one_width(vectors: Mapping[int, Vector], where: str) -> None:
    """Refuse vectors of several widths.

    Raises:
        MismatchError: Names two of them.
    """
    widths = {len(vector): layer for layer, vector in vectors.items()}
    if len(widths) > 1:
        (a, first), (b, second) = list(widths.items())[:2]
        raise MismatchError(
            f"{where} has d_model {a} at layer {first} and {b} at layer {second}. One model has one width: is the file whole?"
        )


def spans(layers: Sequence[int]) -> str:
    """Layers for a message.

    >>> spans([0, 1, 2, 5])
    '0 to 2, 5'
    """
    ordered = sorted(layers)
    starts = [layer for layer in ordered if layer - 1 not in ordered]
    ends = [layer for layer in ordered if layer + 1 not in ordered]
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True)) or "none"
