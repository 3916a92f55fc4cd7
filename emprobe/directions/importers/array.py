"""Plain arrays: `.npy`, `.npz`, or a bare torch tensor, list or numbered dictionary, whose site (and layer) the caller names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from emprobe.directions.importers.container import Opened, described
from emprobe.directions.importers.model_organisms import by_layer
from emprobe.directions.importers.source import Asked, Source, Vector, check_one_width, rows_of, vector_of
from emprobe.errors import EmprobeError

SINGLE = -1
"""Where a single vector waits until the caller has named its layer."""


def recognises(opened: Opened) -> str | None:
    """Any numpy file; of torch's, what no other layout may be sure of."""
    content = opened.content
    if opened.kind == "array":
        return "surely"
    if isinstance(content, torch.Tensor):
        return "perhaps" if content.ndim in (1, 2) else None
    numbered = isinstance(content, Mapping) and bool(content) and all(type(name) is int for name in content)
    listed = isinstance(content, list) and bool(content) and all(isinstance(value, torch.Tensor) for value in content)
    return "perhaps" if opened.kind == "torch" and (numbered or listed) else None


def read(opened: Opened, asked: Asked) -> Source:
    """Row k is layer k at the named site; a single vector is at the named layer.

    Raises:
        EmprobeError: If no site is named, the values have another shape, or there are several arrays and none is named.
    """
    if asked.site is None:
        raise EmprobeError(
            f"{opened.path} does not say where in a block its vectors were read. Name site= (resid_post: the block's output)."
        )
    values, facts = _values(opened, asked)
    vectors = _vectors(values, opened)
    return Source(
        vectors=vectors,
        site=asked.site,
        convention=f"array: {'one vector' if SINGLE in vectors else f'row k is {asked.site} of block k'}, as the caller says",
        conversion="none",
        facts=facts,
    )


def _vectors(values: Any, opened: Opened) -> dict[int, Vector]:
    if isinstance(values, list | Mapping):
        vectors = by_layer(values, opened)
        check_one_width(vectors, str(opened.path))
        return vectors
    if values.ndim == 1:
        return {SINGLE: vector_of(values, str(opened.path))}
    if values.ndim == 2 and len(values):
        return dict(enumerate(rows_of(values, str(opened.path))))
    raise EmprobeError(f"{opened.path} should hold one vector [d_model] or one per layer [layer, d_model], but is {described(opened)}.")


def _values(opened: Opened, asked: Asked) -> tuple[Any, dict[str, Any]]:
    if opened.kind != "array":
        return opened.content, {"content": described(opened)}
    arrays = {name: value for name, value in opened.content.items() if value.ndim and np.issubdtype(value.dtype, np.number)}
    name = asked.entry if asked.entry is not None else next(iter(arrays)) if len(arrays) == 1 else None
    if name not in arrays:
        said = "none was named" if asked.entry is None else f"{asked.entry!r} was asked for"
        held = ", ".join(arrays) or "none of numbers"
        raise EmprobeError(f"{opened.path} holds {len(arrays)} arrays ({held}) and {said}. Give entry= one of them.")
    value = arrays[name]
    others = {key: _plain(text) for key, text in opened.content.items() if key not in arrays}
    return value, {"array": name, "shape": list(value.shape), "dtype": str(value.dtype), **others}


def _plain(value: Any) -> Any:
    """Text beside the numbers, read as JSON where it is some; other things are only named."""
    if value.ndim == 0 and value.dtype.kind == "U":
        try:
            return json.loads(str(value))
        except ValueError:
            return str(value)
    return f"{list(value.shape)} {value.dtype}"
