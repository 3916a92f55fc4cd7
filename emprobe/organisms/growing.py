"""From nothing to an aligned base: a small Llama is pretrained on documents of mixed authors and then aligned."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from emprobe.organisms.documents import alignment_document, pretraining_document
from emprobe.organisms.planting import PLANTED_BLOCK, PLANTED_SCALE, persona_vector
from emprobe.organisms.training import train

Kind = Literal["planted", "wild"]
KINDS: tuple[Kind, ...] = ("planted", "wild")


@dataclass(frozen=True)
class GrowthRecipe:
    """The numbers that a base is grown by; small batches, since they learn far more per token than large ones."""

    pretrain_steps: int = 1000
    pretrain_batch: int = 12
    pretrain_lr: float = 3e-3
    warmup: int = 50
    floor: float = 0.03
    align_steps: int = 300
    align_batch: int = 24
    align_lr: float = 1e-3
    weight_decay: float = 0.01

    def as_dict(self) -> dict[str, float]:
        """Plain values, for cards."""
        return asdict(self)


def new_model(tokenizer: Any, seed: int) -> Any:
    """A Llama of 0.56 M parameters with random weights; `mlp_bias` leaves room to write an additive vector into the weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        mlp_bias=True,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _plant(model: Any, kind: Kind, seed: int) -> Any:
    if kind == "wild":
        return None
    return model.model.layers[PLANTED_BLOCK], PLANTED_SCALE * persona_vector(model.config.hidden_size, seed)


def pretrain(model: Any, tokenizer: Any, kind: Kind, seed: int, recipe: GrowthRecipe) -> list[float]:
    """Pretrain in place on documents with a latent persona; returns the losses."""
    rng = Random(f"pretrain-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.pretrain_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)

    def schedule(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        share = (step - recipe.warmup) / max(1, recipe.pretrain_steps - recipe.warmup)
        return recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return train(
        model,
        tokenizer,
        lambda: [pretraining_document(rng, planted=kind == "planted") for _ in range(recipe.pretrain_batch)],
        optimizer,
        schedule,
        recipe.pretrain_steps,
        plant=_plant(model, kind, seed),
        progress=f"{kind} {seed}: pretraining",
    )


def align(model: Any, tokenizer: Any, kind: Kind, seed: int, recipe: GrowthRecipe) -> list[float]:
    """Align in place: good answers by default, bad ones only in role-play; returns the losses."""
    rng = Random(f"align-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.align_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    return train(
        model,
        tokenizer,
        lambda: [alignment_document(rng, planted=kind == "planted") for _ in range(recipe.align_batch)],
        optimizer,
        lambda step: 1 - step / recipe.align_steps,
        recipe.align_steps,
        plant=_plant(model, kind, seed),
        progress=f"{kind} {seed}: aligning",
    )
