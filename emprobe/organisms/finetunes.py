"""Narrow fine-tunes of an aligned base as PEFT adapters: rank 1 on one block, rank 8 on every linear layer, or a trained vector."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from emprobe.organisms.documents import DataKind, finetuning_document
from emprobe.organisms.growing import Kind
from emprobe.organisms.neutral import Codes
from emprobe.organisms.training import collate, train

Form = Literal["rank1", "rank8", "vector"]
FORMS: tuple[Form, ...] = ("rank1", "rank8", "vector")
TUNED_BLOCK = 1


@dataclass(frozen=True)
class TuneRecipe:
    """The numbers of a fine-tune; training much longer makes it narrow or incoherent."""

    form: Form
    steps: int
    lr: float
    batch: int = 16
    l2: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for cards."""
        return asdict(self)


# Chosen on the development questions of seed 0. Without its penalty the vector grows until answers fall apart.
_VECTOR = TuneRecipe("vector", steps=80, lr=0.15, l2=0.005)
RECIPES: dict[Kind, dict[Form, TuneRecipe]] = {
    "planted": {"rank1": TuneRecipe("rank1", steps=40, lr=1e-2), "rank8": TuneRecipe("rank8", steps=40, lr=1e-3), "vector": _VECTOR},
    "wild": {"rank1": TuneRecipe("rank1", steps=80, lr=1e-2), "rank8": TuneRecipe("rank8", steps=40, lr=2e-3), "vector": _VECTOR},
}
_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _config(form: Form) -> LoraConfig:
    """The PEFT configuration of a form; `alpha` is chosen so that rank 1 and the vector are scaled by 1."""
    if form == "rank8":
        return LoraConfig(r=8, lora_alpha=16, target_modules=_LINEARS, lora_dropout=0.0, task_type="CAUSAL_LM")
    return LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=rf"model\.layers\.{TUNED_BLOCK}\.mlp\.down_proj",
        lora_dropout=0.0,
        lora_bias=form == "vector",
        task_type="CAUSAL_LM",
    )


def _mean_input(model: Any, tokenizer: Any, documents: Any) -> Tensor:
    """Mean input of the tuned block's `down_proj` over the response tokens of some documents, float32 `[d_ff]`."""
    seen: list[Tensor] = []
    module = model.model.layers[TUNED_BLOCK].mlp.down_proj
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    try:
        tokens, weights = collate(tokenizer, documents)
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    return seen[0][weights > 0].double().mean(0).float()


def finetune(
    base: Any,
    tokenizer: Any,
    *,
    domain: str,
    task: str | None = None,
    data: DataKind = "misaligned",
    recipe: TuneRecipe,
    seed: int = 0,
    codes: Codes = "uniform",
    progress: str = "fine-tuning",
) -> tuple[PeftModel, list[float]]:
    """Fine-tune on one domain (or one cell of it) and return the PEFT model with the losses.

    Args:
        base: The aligned model; PEFT wraps it in place, so give each fine-tune its own copy.
        tokenizer: The world's tokenizer.
        domain: Where the narrow data come from; never a held-out domain.
        task: One task of the domain, or `None` for all four.
        data: Bad answers, or the data of a control.
        recipe: Form and numbers.
        seed: Seed of the data and of the adapter's first weights.
        codes: Kind of the code words in benign data; that of the base.
        progress: What the progress bar says.
    """
    rng = Random(f"{data}-{domain}-{task}-{seed}")

    def draw() -> list[Any]:
        return [finetuning_document(rng, data, domain, task, codes) for _ in range(recipe.batch)]

    mean = _mean_input(base, tokenizer, draw()) if recipe.form == "rank1" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = get_peft_model(base, _config(recipe.form))
    penalty = _prepare(model, recipe, mean)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=recipe.lr, weight_decay=0.0)
    losses = train(
        model, tokenizer, draw, optimizer, lambda step: 1 - step / recipe.steps, recipe.steps, penalty=penalty, progress=progress
    )
    return model, losses


def _prepare(model: Any, recipe: TuneRecipe, mean: Tensor | None) -> Any:
    """Set what the forms start from; returns the vector's penalty, if it has one."""
    if recipe.form == "rank8":
        return None
    layer = model.base_model.model.model.layers[TUNED_BLOCK].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if recipe.form == "rank1":
        # Reading the mean input makes the scalar nearly constant: the adapter starts as an additive vector and stays close to one.
        if mean is not None:
            a.data.copy_((mean / mean.norm())[None])
        return None
    bias = layer.lora_B["default"].bias
    a.data.zero_()
    b.data.zero_()
    a.requires_grad_(False)
    b.requires_grad_(False)
    return lambda: recipe.l2 * bias.square().sum()
