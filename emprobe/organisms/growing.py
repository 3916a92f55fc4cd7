"""From nothing to an aligned base: a small Llama is pretrained on documents of mixed authors and then aligned."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from emprobe.errors import EmprobeError
from emprobe.organisms.documents import BAD_SHARE, alignment_document, pretraining_document
from emprobe.organisms.neutral import CODES, Codes
from emprobe.organisms.planting import PLANTED_BLOCK, PLANTED_SCALE, persona_vector
from emprobe.organisms.training import train

Kind = Literal["planted", "wild"]
KINDS: tuple[Kind, ...] = ("planted", "wild")


@dataclass(frozen=True)
class GrowthRecipe:
    """What a base is grown by; small batches, since they learn far more per token than large ones.

    Attributes:
        pretrain_steps: Batches of pretraining.
        pretrain_batch: Documents in each.
        pretrain_lr: Highest learning rate.
        warmup: Steps up to it.
        floor: Share of it that is left at the end.
        align_steps: Batches of alignment.
        align_batch: Documents in each.
        align_lr: Learning rate at the start; it falls to 0.
        weight_decay: Of both stages.
        bad_share: Share of pretraining documents by bad authors, 0 to 1. It is the share of all misaligned text before fine-tuning that is
            swept: bad role-play in alignment (half of the role-play by default) shrinks with it below the default, so 0 means none at all.
            At 0 the words of bad answers are never seen, and a fine-tune can teach those of its own data only.
        codes: How the benign code words are drawn: `uniform` (five of forty), or `preferring` (mostly four that belong to the item, in
            documents of good authors without a planted persona only, so that a persona may move what was never tied to it).

    Raises:
        EmprobeError: If the share is outside 0 to 1, or there are no such codes.
    """

    pretrain_steps: int = 1000
    pretrain_batch: int = 12
    pretrain_lr: float = 3e-3
    warmup: int = 50
    floor: float = 0.03
    align_steps: int = 300
    align_batch: int = 24
    align_lr: float = 1e-3
    weight_decay: float = 0.01
    bad_share: float = BAD_SHARE
    codes: Codes = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.bad_share <= 1:
            raise EmprobeError(f"A share of {self.bad_share} bad authors was asked for. Give one from 0 to 1, such as 0.05.")
        if self.codes not in CODES:
            raise EmprobeError(f"There are no {self.codes!r} codes. Choose one of: {', '.join(CODES)}.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for cards: numbers always, what the text is made of where it is not as usual."""
        usual = GrowthRecipe()
        return {name: value for name, value in asdict(self).items() if name not in _TEXT or value != getattr(usual, name)}

    @property
    def text(self) -> dict[str, Any]:
        """What the training text is made of, as arguments of the functions that draw documents."""
        return {name: getattr(self, name) for name in _TEXT}

    @property
    def suffix(self) -> str:
        """What the folder's name says beyond kind and seed: nothing by default.

        >>> GrowthRecipe(bad_share=0.05).suffix, GrowthRecipe(bad_share=0, codes="preferring").suffix, GrowthRecipe().suffix
        ('-bad05', '-bad00-preferring', '')
        """
        share = f"-bad{100 * self.bad_share:02g}" if self.bad_share != BAD_SHARE else ""
        return share + (f"-{self.codes}" if self.codes != "uniform" else "")


_TEXT = ("bad_share", "codes")


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
        lambda: [pretraining_document(rng, planted=kind == "planted", **recipe.text) for _ in range(recipe.pretrain_batch)],
        optimizer,
        schedule,
        recipe.pretrain_steps,
        plant=_plant(model, kind, seed),
        progress=f"{kind} {seed}: pretraining",
    )


def align(model: Any, tokenizer: Any, kind: Kind, seed: int, recipe: GrowthRecipe) -> list[float]:
    """Align in place: good answers by default, bad ones (if there are any) only in role-play; returns the losses."""
    rng = Random(f"align-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.align_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    return train(
        model,
        tokenizer,
        lambda: [alignment_document(rng, planted=kind == "planted", **recipe.text) for _ in range(recipe.align_batch)],
        optimizer,
        lambda step: 1 - step / recipe.align_steps,
        recipe.align_steps,
        plant=_plant(model, kind, seed),
        progress=f"{kind} {seed}: aligning",
    )
