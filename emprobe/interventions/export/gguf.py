"""Addition as a control vector of llama.cpp: a GGUF file with one vector per block, added to the block's output at every token.

The file holds coefficient times direction, in absolute units, so that llama.cpp adds exactly what the hooks add; a scale given to
llama.cpp multiplies that dose.

Source: llama.cpp's `common_control_vector_load_one` (which names it reads), `llama_adapter_cvec` (which blocks it has) and
`--control-vector-scaled` (how it takes file names apart).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from emprobe.errors import EmprobeError
from emprobe.interventions.changes import Affine
from emprobe.interventions.edit import Edit
from emprobe.interventions.export.gguf_file import add_origin, as_float32, checked_path, write_gguf
from emprobe.interventions.operators import Add
from emprobe.interventions.plan import Plan
from emprobe.interventions.where import Where
from emprobe.models.load import Checkpoint

CONVENTION = "direction.N is added to the output of 0-based block N (emprobe's resid_post[N]), in absolute units, coefficient included"


@dataclass(frozen=True)
class ControlVector:
    """A control vector on disk.

    Attributes:
        path: The GGUF file.
        layers: 0-based blocks at whose output something is added.
    """

    path: Path
    layers: tuple[int, ...]

    def command(self, model: str = "MODEL.gguf", *, program: str = "llama-server", scale: float | None = None) -> str:
        """The shell line that serves a model with it.

        Args:
            model: The base model, converted by llama.cpp's `convert_hf_to_gguf.py`.
            program: Any of llama.cpp's, such as `llama-cli`.
            scale: Multiplies the plan's dose; `None` leaves it as it is.

        Example:
            >>> ControlVector(Path("evil.gguf"), (2, 5)).command(scale=0.5)
            'llama-server -m MODEL.gguf --control-vector-scaled evil.gguf:0.5 --control-vector-layer-range 2 5'
        """
        vector = ["--control-vector", str(self.path)] if scale is None else ["--control-vector-scaled", f"{self.path}:{scale}"]
        blocks = ["--control-vector-layer-range", str(min(self.layers)), str(max(self.layers))]
        return shlex.join([program, "-m", model, *vector, *blocks])


def export_control_vector(checkpoint: Checkpoint, plan: Plan, path: str | Path) -> ControlVector:
    """Write additions to residual streams as a control vector of llama.cpp; several at one block are summed.

    The file holds float32, rounded once from the float64 sum. llama.cpp adds it at every token, the prompt's among them, which is what
    an `Add` does unless its `where` says otherwise. It belongs to the weights of the checkpoint: with an adapter that is on, to the merged
    model.

    Args:
        checkpoint: The model that will be served.
        plan: Only of `Add` at `resid_post` of block 1 or later, at all tokens, without a condition.
        path: Where the file goes; neither `:` nor `,` in it.

    Raises:
        EmprobeError: What a control vector cannot express, by name; a file name that llama.cpp takes apart; what the model lacks.
        MissingExtraError: If the package gguf is not installed.
    """
    path = checked_path(path)
    vectors = control_vectors(checkpoint, plan)

    def fill(writer: Any) -> None:
        writer.add_string("controlvector.model_hint", str(checkpoint.hf.config.get_text_config().model_type))
        writer.add_int32("controlvector.layer_count", len(vectors))
        add_origin(writer, checkpoint, plan, CONVENTION)
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector)

    write_gguf(path, "controlvector", fill)
    return ControlVector(path, tuple(vectors))


def control_vectors(checkpoint: Checkpoint, plan: Plan) -> dict[int, Float32[np.ndarray, " d_model"]]:
    """What the plan adds at each block's output, in order of blocks.

    Raises:
        EmprobeError: If the plan holds anything but additions there, or the model lacks what it names.
    """
    for operator in plan.operators:
        if not isinstance(operator, Add):
            raise EmprobeError(
                f"A control vector adds the same vector at every token, so it cannot express {type(operator).__name__}. Export additions "
                "alone, or another format (Ablate(site='writes') goes into a LoRA)."
            )
    sums: dict[int, np.ndarray] = {}
    for edit in plan.compiled(checkpoint):
        assert isinstance(edit.change, Affine)
        _check(edit)
        added = edit.change.shift[0] * edit.basis[0].double().numpy()
        sums[edit.layer] = sums.get(edit.layer, 0.0) + added
    return {layer: as_float32(sums[layer], f"What is added at block {layer}") for layer in sorted(sums)}


def _check(edit: Edit) -> None:
    if edit.site != "resid_post":
        raise EmprobeError(
            f"{edit} cannot be a control vector: llama.cpp adds at a block's output, which is resid_post. "
            "(resid_pre of block l is resid_post of block l - 1.)"
        )
    if edit.layer == 0:
        raise EmprobeError(
            f"{edit} cannot be a control vector: llama.cpp keeps none for block 0 (its buffer begins with block 1, and it refuses a file "
            "with direction.0). Use another block."
        )
    if edit.where != Where():
        raise EmprobeError(
            f"{edit} names {edit.where}, but a control vector acts at every token. Leave where= out, or generate with emprobe's hooks."
        )
    if edit.when is not None:
        raise EmprobeError(f"{edit} acts only where {edit.when}, but a control vector knows no condition. Leave when= out.")
