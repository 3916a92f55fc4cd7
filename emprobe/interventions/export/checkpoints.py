"""Interventions as ordinary checkpoints: what matrices write is changed in the weights themselves, so that anything can serve them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.interventions.export.folding import Fold, folds_of
from emprobe.interventions.export.made import Made
from emprobe.interventions.export.matrices import EMBEDDINGS, Matrix, matrices_of
from emprobe.interventions.export.plain import plain_model
from emprobe.interventions.plan import Plan
from emprobe.models.load import Checkpoint
from emprobe.models.saving import reshaped, save_checkpoint

SERVE = (
    'em.load_model("{out}")',
    "transformers serve {out}",
    "vllm serve {out}",
    "python -m sglang.launch_server --model-path {out}",
)
UNTIED = (
    "The base ties its output head to the embedding. The head must not change, so here it is a matrix of its own "
    "(`tie_word_embeddings: false`)."
)


def write_weights(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Made:
    """Orthogonalised weights: W' = (1 - s Bᵀ B) W for every matrix that writes, and the same of biases.

    An adapter that is on is merged first.

    Raises:
        EmprobeError: If the plan changes anything but what matrices write, or the model's matrices do not write directly.

    Source: Refusal directions (arXiv 2406.11717), equation 5.
    """
    folds = folds_of(plan.compiled(checkpoint), "weights")
    facts, limits = _write(checkpoint, folds, folder, "weights")
    what = "An ordinary checkpoint: every matrix that writes what is ablated has it taken out of its weights and its bias."
    return Made(what, SERVE, limits, facts, ("orthogonalized",))


def write_bias(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Made:
    """Addition as the bias of the matrix that writes last: `down_proj.bias` for resid_post and mlp_out, `o_proj.bias` for attn_out.

    An adapter that is on is merged first.

    Raises:
        EmprobeError: If the plan does more than add, or the architecture has no such bias.
    """
    folds = folds_of(plan.compiled(checkpoint), "bias")
    if any(fold.rank for fold in folds.values()):
        raise EmprobeError(
            "The plan takes something out, which depends on what is there, and a bias does not. Use the target lora or weights."
        )
    facts, limits = _write(checkpoint, folds, folder, "bias")
    what = "An ordinary checkpoint: the bias of the matrix that writes at each place holds what is added there."
    return Made(what, SERVE, limits, facts, ("bias",))


def _write(checkpoint: Checkpoint, folds: Mapping[tuple[int, Any], Fold], folder: Path, target: str) -> tuple[dict[str, Any], list[str]]:
    model = plain_model(checkpoint, merged=True)
    matrices = matrices_of(model, list(folds))
    written = [(m, fold) for place, fold in folds.items() for m in matrices[place]]
    settings = _flags(model, [m for m, fold in written if fold.shifts and m.bias is None], target)
    tied = _tied(model) if EMBEDDINGS in folds else None
    shape = reshaped(model, settings | ({"tie_word_embeddings": False} if tied else {}))
    weights = dict(model.state_dict())
    # Biases that the settings bring along are nothing but where something is added.
    weights |= {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in shape.state_dict().items() if name not in weights}
    if tied:
        weights[tied] = weights[tied].detach().clone()
    remaining = 0.0
    for matrix, fold in written:
        weights |= _changed(matrix, fold)
        remaining = max(remaining, _remaining(matrix, fold, weights))
    save_checkpoint(shape, weights, checkpoint.tokenizer, folder)
    facts: dict[str, Any] = {"matrices": len(written), "dtype": str(model.dtype).removeprefix("torch."), "settings": _shown(settings)}
    if any(fold.rank for _, fold in written):
        facts["off what was asked by (share of a matrix's norm, from rounding)"] = remaining
    merged = ["The adapter that was on is merged in, in the weights' own dtype."] if checkpoint.adapter == "on" else []
    return facts, [*([UNTIED] if tied else []), *merged]


def _changed(matrix: Matrix, fold: Fold) -> dict[str, Tensor]:
    """The weights of one matrix afterwards, by name, rounded once."""
    changed = {}
    if fold.rank:
        weight = matrix.weight
        after = (weight.double().cpu() + fold.u @ fold.of(weight)).to(weight.dtype)
        changed[f"{matrix.name}.weight"] = (after.T if matrix.transposed else after).contiguous()
    if (fold.rank and matrix.bias is not None) or fold.shifts:
        changed[f"{matrix.name}.bias"] = fold.of_bias(matrix.bias).to(matrix.weight.dtype)
    return changed


def _remaining(matrix: Matrix, fold: Fold, weights: Mapping[str, Tensor]) -> float:
    """How far the stored weights are from what was asked, within the span: rounding to the weights' dtype."""
    if not fold.rank:
        return 0.0
    stored = weights[f"{matrix.name}.weight"]
    after = fold.of(stored.T if matrix.transposed else stored)
    before = fold.of(matrix.weight)
    wanted = before + fold.v @ (fold.u @ before)
    return float((after - wanted).norm() / matrix.weight.double().norm().cpu())


def _tied(model: Any) -> str | None:
    """Name of the head's weight, if it is the embedding itself."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _flags(model: Any, bare: Sequence[Matrix], target: str) -> dict[str, Any]:
    """The settings that give matrices without a bias one; tried on the architecture itself."""
    flags: dict[str, Any] = {}
    missing = [matrix.name for matrix in bare]
    for name, value in model.config.to_dict().items():
        if not missing or "bias" not in name or value is not False:
            continue
        if _adds_only_biases(model, {**flags, name: True}, missing):
            flags[name] = True
            names = reshaped(model, flags).state_dict()
            missing = [m for m in missing if f"{m}.bias" not in names]
    if missing:
        tried = ", ".join(n for n, v in model.config.to_dict().items() if "bias" in n and isinstance(v, bool)) or "none"
        raise EmprobeError(
            f"{type(model).__name__} has no bias at {missing[0]} and no setting that gives it one (settings with bias in their names: "
            f"{tried}), so the target {target!r} cannot add there. Use hooks (emprobe.intervene), a control vector, or lm_eval."
        )
    return flags


def _adds_only_biases(model: Any, settings: Mapping[str, Any], wanted: Sequence[str]) -> bool:
    """Whether settings give one of the modules its bias, and bring nothing else than biases."""
    before, after = model.state_dict(), reshaped(model, settings).state_dict()
    new = after.keys() - before.keys()
    return (
        before.keys() <= after.keys()
        and all(name.endswith(".bias") for name in new)
        and all(after[name].shape == weight.shape for name, weight in before.items())
        and any(f"{name}.bias" in new for name in wanted)
    )


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "as in the base"
