"""Addition as a control vector of llama.cpp: a GGUF file with one vector per block, added to the block's output at every token.

The file holds coefficient times direction, in absolute units, so that llama.cpp adds exactly what the hooks add; a scale given to
llama.cpp multiplies that dose.

Source: llama.cpp's `common_control_vector_load_one` (which names it reads), `llama_adapter_cvec` (which blocks it has) and
`--control-vector-scaled` (how it takes file names apart).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from emprobe.errors import EmprobeError
from emprobe.interventions.changes import Affine
from emprobe.interventions.edit import Edit
from emprobe.interventions.export.folding import check_everywhere
from emprobe.interventions.export.gguf_file import CONVERT, add_origin, as_float32, check_name, write_gguf
from emprobe.interventions.export.made import Made
from emprobe.interventions.operators import Add
from emprobe.interventions.plan import Plan
from emprobe.models.load import Checkpoint

NAME = "control_vector.gguf"
CONVENTION = "direction.N is added to the output of 0-based block N (emprobe's resid_post[N]), in absolute units, coefficient included"
LIMITS = (
    "llama.cpp adds it at every token of every request: the prompt's, the template's and the answer's.",
    "The file holds the whole dose in absolute units of this model's residual stream; --control-vector-scaled FILE:0.5 adds half of it.",
    "It belongs to this checkpoint: if its adapter was on, serve the merged model, or the base with that adapter as a GGUF LoRA.",
    "A quantised model is steered by the same vector, but what it is added to differs from this checkpoint's by the rounding.",
)


def write_control_vector(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Made:
    """Write additions to the residual stream as a control vector of llama.cpp, `control_vector.gguf`; several at one block are summed.

    float32, rounded once from the float64 sum. llama.cpp adds it at every token, which is what an `Add` does unless its `where` says
    otherwise, at a block's output before anything else reads it: in models with norms after attention and MLP (Gemma 2, OLMo 2) too.

    Args:
        plan: Only of `Add` at `resid_post` of block 1 or later, at all tokens, without a condition.
        checkpoint: The model that will be served.
        folder: Where the file goes; neither `:` nor `,` in its path.

    Raises:
        EmprobeError: What a control vector cannot express, by name; a path that llama.cpp takes apart; what the model lacks.
        MissingExtraError: If the package gguf is not installed.
    """
    check_name(folder)
    vectors = control_vectors(checkpoint, plan)

    def fill(writer: Any) -> None:
        writer.add_string("controlvector.model_hint", str(checkpoint.hf.config.get_text_config().model_type))
        writer.add_int32("controlvector.layer_count", len(vectors))
        add_origin(writer, checkpoint, plan, CONVENTION)
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector)

    write_gguf(folder / NAME, "controlvector", fill)
    blocks = f"--control-vector-layer-range {min(vectors)} {max(vectors)}"
    return Made(
        what=f"A GGUF control vector for llama.cpp: {CONVENTION}.",
        serve=[
            CONVERT,
            f"llama-server -m model.gguf --control-vector '{{out}}/{NAME}' {blocks}",
            f"llama-cli -m model.gguf --control-vector-scaled '{{out}}/{NAME}:0.5' {blocks}",
        ],
        limits=LIMITS,
        facts={f"norm added at block {layer}": float(np.linalg.norm(vector)) for layer, vector in vectors.items()},
        tags=["gguf", "llama.cpp"],
    )


def control_vectors(checkpoint: Checkpoint, plan: Plan) -> dict[int, Float32[np.ndarray, " d_model"]]:
    """What the plan adds at each block's output, in order of blocks.

    Raises:
        EmprobeError: If the plan holds anything but additions there, or the model lacks what it names.
    """
    for operator in plan.operators:
        if not isinstance(operator, Add):
            raise EmprobeError(
                f"A control vector adds the same vector at every token, so it cannot express {type(operator).__name__}. Export additions "
                "alone, or Ablate(site='writes') to the target gguf_lora."
            )
    sums: dict[int, np.ndarray] = {}
    for edit in plan.compiled(checkpoint):
        assert isinstance(edit.change, Affine)
        check_everywhere(edit, "gguf")
        _check_place(edit)
        added = edit.change.shift[0] * edit.basis[0].double().numpy()
        sums[edit.layer] = sums.get(edit.layer, 0.0) + added
    return {layer: as_float32(sums[layer], f"What is added at block {layer}") for layer in sorted(sums)}


def _check_place(edit: Edit) -> None:
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
