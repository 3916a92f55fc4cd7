"""refusal_direction: `mean_diffs.pt` [n_pos, n_layers, d_model] float64, or `direction.pt` with `direction_metadata.json` beside it.

Source: Arditi et al., refusal is mediated by a single direction (arXiv 2406.11717), and its repository's `generate_directions.py`
(forward pre-hooks on the blocks, positions -n_pos to -1 of the template's end) and `run_pipeline.py` (the metadata's `pos`, `layer`).
"""

from __future__ import annotations

from typing import Any

import torch

from emprobe.directions.importers.container import Opened, described
from emprobe.directions.importers.source import INPUTS_CONVERTED, Asked, Source, from_inputs, rows_of, vector_of
from emprobe.errors import EmprobeError
from emprobe.files import read_json

METADATA = "direction_metadata.json"


def recognises(opened: Opened) -> str | None:
    """Three axes are enough; one axis with its metadata beside it, too."""
    if not isinstance(opened.content, torch.Tensor):
        return None
    chosen = opened.content.ndim == 1 and (opened.path.parent / METADATA).is_file()
    return "surely" if opened.content.ndim == 3 or chosen else None


def read(opened: Opened, asked: Asked) -> Source:
    """Block inputs as outputs of the block before, at one token position.

    Raises:
        EmprobeError: If the file holds no such tensor, or several positions and none is named.
    """
    tensor = opened.content
    if isinstance(tensor, torch.Tensor) and tensor.ndim == 3 and tensor.shape[1] > 1:
        position = _position(opened, asked)
        outputs, embeddings = from_inputs(rows_of(tensor[position], str(opened.path)))
        return _source(outputs, embeddings, position, opened)
    if isinstance(tensor, torch.Tensor) and tensor.ndim == 1:
        position, layer = _metadata(opened)
        if asked.entry not in (None, str(position)):
            raise EmprobeError(f"{opened.path} was asked for position {asked.entry}, but its metadata says {position}. Leave entry out.")
        vector = vector_of(tensor, str(opened.path))
        return _source({layer - 1: vector} if layer else {}, None if layer else vector, position, opened)
    raise EmprobeError(f"{opened.path} is no refusal direction [n_pos, n_layers, d_model] or [d_model]: it is {described(opened)}.")


def _source(outputs: dict[int, Any], embeddings: Any, position: int, opened: Opened) -> Source:
    return Source(
        vectors=outputs,
        site="resid_post",
        convention="refusal_direction: index k is the input of block k; positions count from the end of the prompt",
        conversion=INPUTS_CONVERTED,
        positions=f"prompt token {position}",
        contrast="harmful - harmless instructions",
        sign="positive is harmful (refused)",
        estimator="difference of means",
        embeddings=embeddings,
        facts={"shape": list(opened.content.shape), "dtype": str(opened.content.dtype).removeprefix("torch."), "position": position},
    )


def _position(opened: Opened, asked: Asked) -> int:
    n = len(opened.content)
    names = [str(position) for position in range(-n, 0)]
    if asked.entry is None and n == 1:
        return -1
    if asked.entry not in names:
        said = "none was named" if asked.entry is None else f"{asked.entry!r} was asked for"
        raise EmprobeError(f"{opened.path} holds {n} token positions and {said}. Give entry= one of {', '.join(names)}.")
    return int(asked.entry)


def _metadata(opened: Opened) -> tuple[int, int]:
    path = opened.path.parent / METADATA
    if not path.is_file():
        raise EmprobeError(
            f"{opened.path} is one vector, and {METADATA}, which says its position and layer, is not beside it. Put it there, or import "
            "with format='array', naming layer and site."
        )
    found = read_json(path)
    position, layer = (found.get("pos"), found.get("layer")) if isinstance(found, dict) else (None, None)
    if not (isinstance(position, int) and isinstance(layer, int) and position < 0 <= layer):
        raise EmprobeError(f"{path} should say a negative `pos` and a `layer` from 0, but says {found}.")
    return position, layer
