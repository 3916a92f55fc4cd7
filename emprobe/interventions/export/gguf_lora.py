"""Ablation as a LoRA of llama.cpp: each matrix that writes to the residual stream gets the low-rank change that the hooks amount to.

Source: llama.cpp's `llama_adapter_lora_init_impl` (keys, names and shapes that it takes), `build_lora_mm` (W x + alpha / rank B A x) and
`build_inp_embd` (rows of A are looked up for embeddings, so that A is stored as [d_vocab, rank] there).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.interventions.export.folding import Fold, folds_of
from emprobe.interventions.export.gguf_file import CONVERT, add_origin, as_float32, check_name, write_gguf
from emprobe.interventions.export.made import Made
from emprobe.interventions.export.matrices import Matrix, matrices_of
from emprobe.interventions.export.plain import plain_model
from emprobe.interventions.plan import Plan
from emprobe.models.load import Checkpoint

NAME = "ablation.gguf"
CONVENTION = "W + lora_b lora_a on each matrix that writes what is ablated; alpha is the rank, so llama.cpp's scale is 1"
ARCHITECTURES: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model types whose logits were compared with llama.cpp's, and what llama.cpp calls them."""

LIMITS = (
    "It holds the change of this checkpoint's own weights. If its adapter was on, serve the merged model, or the base with that adapter as "
    "a GGUF LoRA of its own beside this one: llama.cpp sums them.",
    "On a quantised model what is left along the direction is what quantisation made of it: the change was computed from these weights.",
    "--lora-scaled FILE:0.5 ablates half; older builds of llama.cpp take the scale as an argument of its own.",
)

Pair = tuple[Float32[np.ndarray, "rank in"], Float32[np.ndarray, "d_model rank"]]


def write_gguf_lora(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Made:
    """Write ablations of what matrices write as a LoRA of llama.cpp, `ablation.gguf`, in float32.

    Args:
        plan: Such as `Ablate(direction, site="writes")`.
        checkpoint: A Llama, Mistral, Qwen2 or Qwen3 whose output matrix is not tied to its embedding.
        folder: Where the file goes; neither `:` nor `,` in its path.

    Raises:
        EmprobeError: What a LoRA cannot express or llama.cpp cannot apply, by name; a path that llama.cpp takes apart.
        MissingExtraError: If the package gguf is not installed.
    """
    check_name(folder)
    tensors = lora_tensors(checkpoint, plan)
    rank = next(len(t) for name, t in tensors.items() if name.endswith(".lora_a") and not name.startswith("token_embd"))

    def fill(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))
        add_origin(writer, checkpoint, plan, CONVENTION)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)

    write_gguf(folder / NAME, _architecture(checkpoint), fill)
    return Made(
        what=f"A GGUF LoRA for llama.cpp: {CONVENTION}.",
        serve=[
            CONVERT,
            f"llama-server -m model.gguf --lora '{{out}}/{NAME}'",
            f"llama-cli -m model.gguf --lora-scaled '{{out}}/{NAME}:0.5'",
        ],
        limits=LIMITS,
        facts={"rank": rank, "matrices": len(tensors) // 2},
        tags=["gguf", "llama.cpp", "lora"],
    )


def lora_tensors(checkpoint: Checkpoint, plan: Plan) -> dict[str, Float32[np.ndarray, "rows columns"]]:
    """The file's tensors by llama.cpp's names, in the order that numpy has them.

    Raises:
        EmprobeError: What a LoRA cannot express or llama.cpp cannot apply, by name.
        MissingExtraError: If the package gguf is not installed.
    """
    folds = {place: fold for place, fold in folds_of(plan.compiled(checkpoint), "gguf_lora").items() if fold.rank or fold.shifts}
    if not any(fold.rank for fold in folds.values()):
        raise EmprobeError("The plan takes nothing away, and a LoRA multiplies what a matrix does. Use the target gguf for additions.")
    model = plain_model(checkpoint, merged=True)
    rank = max(fold.rank for fold in folds.values())
    written = matrices_of(model, list(folds))
    pairs = {matrix.name: _pair(matrix, folds[place], rank) for place, found in written.items() for matrix in found}
    embeddings = {matrix.name for found in written.values() for matrix in found if matrix.is_embedding}
    architecture = _architecture(checkpoint)
    if embeddings:
        _check_untied(model, checkpoint)

    names = _names(architecture, checkpoint.n_layers)
    tensors = {}
    for name, (a, b) in pairs.items():
        called = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        tensors[f"{called}.lora_a"] = np.ascontiguousarray(a.T) if name in embeddings else a
        tensors[f"{called}.lora_b"] = b
    return tensors


def _architecture(checkpoint: Checkpoint) -> str:
    kind = str(checkpoint.hf.config.get_text_config().model_type)
    if kind not in ARCHITECTURES:
        raise EmprobeError(
            f"{checkpoint.name!r} is a {kind}, and LoRAs for llama.cpp were compared with hooks only on {', '.join(ARCHITECTURES)}. Export "
            "the target weights and convert that checkpoint with llama.cpp's convert_hf_to_gguf.py."
        )
    return ARCHITECTURES[kind]


def _check_untied(model: Any, checkpoint: Checkpoint) -> None:
    """llama.cpp knows a tied matrix by one name, finds the embedding's LoRA for the output too, and aborts on its shape."""
    if model.config.get_text_config().tie_word_embeddings:
        raise EmprobeError(
            f"{checkpoint.name!r} ties its output matrix to its embedding, and llama.cpp would apply the embedding's LoRA to both, and "
            "stops. Export the target weights, which unties them, and convert that checkpoint with llama.cpp's convert_hf_to_gguf.py."
        )


def _pair(matrix: Matrix, fold: Fold, rank: int) -> Pair:
    """A and B of one matrix, filled up with zeros to the common rank.

    Raises:
        EmprobeError: If what the matrix adds whatever its input changes as well, which a LoRA cannot.
    """
    before = torch.zeros_like(fold.t) if matrix.bias is None else matrix.bias.double().cpu()
    changed = float((fold.of_bias(matrix.bias) - before).norm())
    if changed > 1e-7 * float(before.norm()):
        raise EmprobeError(
            f"What {matrix.name} adds whatever its input (its bias) would have to change by {changed:.3g}, and a LoRA of llama.cpp has "
            "none. Export the target weights and convert that checkpoint, or additions alone with the target gguf."
        )
    a, b = torch.zeros(rank, matrix.weight.shape[1]), torch.zeros(len(fold.u), rank)
    a[: fold.rank], b[:, : fold.rank] = fold.of(matrix.weight), fold.u
    return as_float32(a.numpy(), f"The LoRA of {matrix.name}"), as_float32(b.numpy(), f"The LoRA of {matrix.name}")


def _names(architecture: str, n_layers: int) -> Any:
    """The map of the package gguf, from names of Hugging Face's modules to llama.cpp's."""
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "Naming tensors for llama.cpp") from None

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(number, n_layers)
