"""Persona vectors `.pt`: one tensor [n_layers + 1, d_model], indexed as `hidden_states` are.

Source: Chen et al., persona vectors (arXiv 2507.21509), and its repository's `generate_vec.py`: hidden_states of every index, mean of
the trait's answers less mean of the opposite's, stacked, float32.
"""

from __future__ import annotations

import re

import torch

from emprobe.directions.importers.container import Opened, described
from emprobe.directions.importers.source import INPUTS_CONVERTED, Asked, Source, from_inputs, rows_of
from emprobe.errors import EmprobeError

RULE = re.compile(r"(prompt_avg|prompt_last|response_avg)")
FINAL_NORM = "it is the file's last row, taken after the final norm and not in the residual stream"


def recognises(opened: Opened) -> str | None:
    """Two axes fit, but say nothing of what a row is; the position rule in the name does."""
    if not (isinstance(opened.content, torch.Tensor) and opened.content.ndim == 2):
        return None
    return "surely" if RULE.search(opened.path.name) else "perhaps"


def read(opened: Opened, asked: Asked) -> Source:
    """Rows 1 to n_layers - 1 are outputs of blocks 0 to n_layers - 2; the last is refused.

    Raises:
        EmprobeError: If the file holds no such tensor.
    """
    tensor = opened.content
    if not (isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and len(tensor) > 2):
        raise EmprobeError(f"{opened.path} is no persona vector [n_layers + 1, d_model]: it is {described(opened)}.")
    rows = rows_of(tensor, str(opened.path))
    outputs, embeddings = from_inputs(rows[:-1])
    rule = RULE.search(opened.path.name)
    return Source(
        vectors=outputs,
        site="resid_post",
        convention="persona_vectors: row k is the input of block k (0 the embeddings), the last row is after the final norm",
        conversion=f"{INPUTS_CONVERTED}; the last row is left out",
        positions=rule.group() if rule else "unknown",
        contrast="trait - opposite",
        sign="positive is more of the trait",
        estimator="difference of means",
        embeddings=embeddings,
        left_out={len(rows) - 2: FINAL_NORM},
        facts={"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")},
    )
