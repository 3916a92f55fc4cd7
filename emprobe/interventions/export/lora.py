"""Ablation as a PEFT LoRA: each matrix that writes W x + b gets W x + b - s Bᵀ B (W x + b), so that no hook is needed to serve it.

Of a checkpoint whose adapter is on, the export is one adapter for the same base: the old one and the ablation of both. What a matrix adds
whatever its input (its bias) is no product of low-rank matrices; PEFT has a bias for LoRA, but not for embeddings, so the biases' part is a
second adapter in a folder of its own, to be switched on together with the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor, nn

from emprobe.errors import EmprobeError
from emprobe.files import save_tensors
from emprobe.interventions.export.adapter_factors import Factors, adapter_factors
from emprobe.interventions.export.card import base_name
from emprobe.interventions.export.folding import Fold, folds_of, nothing
from emprobe.interventions.export.made import Made
from emprobe.interventions.export.matrices import Matrix, matrices_of
from emprobe.interventions.export.plain import plain_model
from emprobe.interventions.export.registry import BIASES
from emprobe.interventions.plan import Plan
from emprobe.models.load import Checkpoint

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
EMBEDDING_LIMIT = (
    "It acts on the embeddings. Not every server applies a LoRA there: vLLM does only for architectures that register embedding modules "
    "(and refuses the adapter for others), SGLang only if its target modules hold them. Where yours does not, use the target `weights`."
)
BIAS_LIMIT = (
    "The biases of {n} of the matrices write along what is ablated (by up to {most:.3g} of the norm of a bias). Their part is a second "
    "adapter, `biases/` (LoRA with `lora_bias`), which has to be on together with the first: the first alone leaves these constants in "
    "the stream. Servers of LoRA such as vLLM take no biases: use the target `weights` there."
)


@dataclass(frozen=True)
class _Part:
    """What one module gets: W + b a, and a constant."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    bias: Float[Tensor, " out"] | None
    embedding: bool
    transposed: bool


def write_lora(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Made:
    """Write the adapter (and that of the biases, where they matter).

    Raises:
        EmprobeError: If the plan holds more than ablations (or shifts) of what matrices write, or the model's matrices do not write
            directly; says which and why.
    """
    folds = folds_of(plan.compiled(checkpoint), "lora")
    if not any(fold.rank for fold in folds.values()):
        raise EmprobeError("The plan only adds, and a LoRA multiplies what a matrix does. Use the target bias.")
    model = plain_model(checkpoint, merged=False)
    matrices = matrices_of(model, list(folds))
    parts = _parts(model, adapter_factors(checkpoint), {m.name: (m, folds[place]) for place, found in matrices.items() for m in found})
    rank = max(len(part.a) for part in parts.values())
    base = base_name(checkpoint)
    _write(folder, model, {n: p for n, p in parts.items() if len(p.a)}, rank, base)
    biased = {n: p for n, p in parts.items() if p.bias is not None}
    if biased:
        _write(folder / BIASES, model, {n: _only_bias(p) for n, p in biased.items()}, 1, base, biased=True)
    return _made(parts, rank, _largest_share(matrices.values(), biased))


def _parts(model: Any, adapters: Mapping[str, Sequence[Factors]], written: Mapping[str, tuple[Matrix, Fold]]) -> dict[str, _Part]:
    """What each module gets that is ablated or was adapted."""
    parts = {}
    for name in [*written, *(n for n in adapters if n not in written)]:
        matrix, fold = written.get(name, (None, None))
        module = model.get_submodule(name)
        if matrix is None or fold is None:
            matrix = Matrix(name, module, isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D")
            fold = nothing(len(matrix.weight))
        parts[name] = _part(matrix, fold, adapters.get(name, ()))
    return parts


def _part(matrix: Matrix, fold: Fold, adapters: Sequence[Factors]) -> _Part:
    """(1 + U V)(W + Σ B A) - W = U (V W + Σ (V B) A) + Σ B A, and the same of the bias."""
    if matrix.is_embedding and type(matrix.module) is not nn.Embedding and not hasattr(matrix.module, "embed_scale"):
        raise EmprobeError(
            f"{matrix.name} ({type(matrix.module).__name__}) looks its rows up in a way of its own, which PEFT's LoRA of embeddings does "
            "not follow. Use the target weights."
        )
    ablated = fold.of(matrix.weight)
    for factors in adapters:
        ablated = ablated + (fold.v @ factors.b) @ factors.a
    a, b = torch.cat([ablated, *(f.a for f in adapters)]), torch.cat([fold.u, *(f.b for f in adapters)], dim=1)
    return _Part(a, b, _bias(matrix, fold, adapters), matrix.is_embedding, matrix.transposed)


def _bias(matrix: Matrix, fold: Fold, adapters: Sequence[Factors]) -> Tensor | None:
    """What is added to the module's bias; `None` where it is nothing."""
    before = torch.zeros_like(fold.t) if matrix.bias is None else matrix.bias.double().cpu()
    after = fold.of_bias(before + sum((f.bias for f in adapters if f.bias is not None), torch.zeros_like(before)))
    # Less than this is rounding of the bias itself in float32.
    if float((after - before).norm()) <= 1e-7 * float(before.norm()):
        return None
    if matrix.bias is None:
        raise EmprobeError(f"{matrix.name} has no bias that could carry what the plan adds there. Use the target bias or weights.")
    return after - before


def _only_bias(part: _Part) -> _Part:
    return _Part(torch.zeros(1, part.a.shape[1]), torch.zeros(part.b.shape[0], 1), part.bias, part.embedding, part.transposed)


def _write(folder: Path, model: Any, parts: Mapping[str, _Part], rank: int, base: str, *, biased: bool = False) -> None:
    """One adapter as PEFT saves it, every module of one rank (the smaller ones filled with zeros), scale 1."""
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        a, b = torch.zeros(rank, part.a.shape[1]), torch.zeros(part.b.shape[0], rank)
        a[: len(part.a)], b[:, : len(part.a)] = part.a, part.b
        key = f"base_model.model.{name}"
        embedding = {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
        tensors |= embedding if part.embedding else {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if biased and part.bias is not None:
            tensors[f"{key}.lora_B.bias"] = part.bias.float()
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(model, list(parts)),
        lora_bias=biased,
        fan_in_fan_out=any(part.transposed and not part.embedding for part in parts.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors, {"record": "LoRA"})
    config.save_pretrained(str(folder))


def _targets(model: Any, names: Sequence[str]) -> list[str]:
    """The modules by their last names where these name no other, which more servers understand; otherwise in full."""
    last = {name.rsplit(".", 1)[-1] for name in names}
    meant = {name for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in last and hasattr(module, "weight")}
    return sorted(last) if meant == set(names) else sorted(names)


def _largest_share(found: Any, biased: Mapping[str, _Part]) -> float:
    """The largest change of a bias, as a share of its norm."""
    shares = [
        float(part.bias.norm() / m.bias.double().norm().cpu())
        for matrices in found
        for m in matrices
        if (part := biased.get(m.name)) is not None and part.bias is not None and m.bias is not None and m.bias.any()
    ]
    return max(shares, default=1.0)


def _made(parts: Mapping[str, _Part], rank: int, share: float) -> Made:
    biased = [name for name, part in parts.items() if part.bias is not None]
    limits = [EMBEDDING_LIMIT] if any(part.embedding for part in parts.values()) else []
    limits += [BIAS_LIMIT.format(n=len(biased), most=share)] if biased else []
    adapters = '["{out}", "{out}/biases"]' if biased else '"{out}"'
    serve = [f'em.load_model("{{base}}", adapter={adapters})']
    if biased:
        serve += [
            'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{out}", adapter_name="ablation")',
            'model.load_adapter("{out}/biases", adapter_name="biases"); model.base_model.set_adapter(["ablation", "biases"])',
        ]
    else:
        vllm = next((r for r in VLLM_RANKS if r >= rank), rank)
        serve += [
            'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{out}")',
            f"vllm serve {{base}} --enable-lora --max-lora-rank {vllm} --lora-modules ablated={{out}}",
            f"python -m sglang.launch_server --model-path {{base}} --enable-lora --max-lora-rank {rank} --lora-paths ablated={{out}}",
        ]
    what = "A PEFT LoRA of scale 1 on every matrix that writes what is ablated, which changes what it writes as the hooks would."
    facts = {"rank": rank, "modules": len(parts), "modules with a bias that changes": len(biased)}
    return Made(what, serve, limits, facts, ("lora", "peft"))
