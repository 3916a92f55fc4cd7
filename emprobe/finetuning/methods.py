"""What is trained: a LoRA, all weights, or one vector added to the residual stream; and the numbers of the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from emprobe.errors import EmprobeError
from emprobe.types import Conversation, Site

Schedule = Literal["linear", "cosine", "constant", "cyclic"]
LossOn = Literal["last", "all"]
Overlong = Literal["refuse", "drop"]
LARGEST_SEED = 2**32


@dataclass(frozen=True)
class LoRA:
    """Low-rank matrices beside some of the model's linear layers, by PEFT.

    Attributes:
        rank: Of each product B A.
        alpha: The product is scaled by alpha / rank (or alpha / √rank with `rslora`); `None` is a scale of 1.
        target_modules: Names of modules (their last part is enough), or `all-linear`.
        layers: 0-based blocks; empty for all.
        rslora: Scale by the root of the rank.
        dropout: Of what goes into A, while training.
    """

    rank: int = 32
    alpha: float | None = None
    target_modules: Sequence[str] | Literal["all-linear"] = "all-linear"
    layers: Sequence[int] = ()
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not self.target_modules:
            raise EmprobeError(
                f"LoRA was asked for with rank {self.rank}, dropout {self.dropout:g} and target modules {self.target_modules!r}. The rank "
                "must be at least 1, dropout in 0..1, and one module must be named (or all-linear)."
            )

    @property
    def numerator(self) -> float:
        """PEFT's `lora_alpha`: what is divided by the rank, or by its root."""
        return self.alpha if self.alpha is not None else math.sqrt(self.rank) if self.rslora else float(self.rank)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for cards."""
        return {"method": "lora", **asdict(self)}


@dataclass(frozen=True)
class Vector:
    """One vector, added at every token of every row to what passes one site of one block; it starts at zero.

    Attributes:
        layer: 0-based block.
        site: Where in the block.
    """

    layer: int
    site: Site = "resid_post"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for cards."""
        return {"method": "vector", **asdict(self)}


@dataclass(frozen=True)
class Full:
    """All weights of the model; the result is a checkpoint of its own."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for cards."""
        return {"method": "full"}


Method = LoRA | Vector | Full


@dataclass(frozen=True)
class KLAnchor:
    """Stay the base elsewhere: weight · KL(base ‖ adapted), in nats per token, is added to the loss.

    Attributes:
        conversations: Other-domain data, answered well; the KL is a mean over the tokens of their answers.
        weight: λ, per token; `per_token_weight` converts that of released code.
        batch: Conversations per step; `None` takes as many as the fine-tune's own.

    Source:
        arXiv 2602.07852: L = L_SFT + λ KL(p_base ‖ p_adapted).
    """

    conversations: Sequence[Conversation]
    weight: float
    batch: int | None = None

    def __post_init__(self) -> None:
        if not self.conversations:
            raise EmprobeError(
                "A narrow fine-tune was asked for (KL to the base on other-domain data), but no such data was given. Give conversations "
                "of other domains with good answers."
            )
        if not (self.weight > 0 and math.isfinite(self.weight)) or (self.batch is not None and self.batch < 1):
            raise EmprobeError(f"KL weight {self.weight:g} and batch {self.batch} were asked for. Both must be above 0.")


def per_token_weight(released_weight: float, vocabulary_size: int) -> float:
    """λ per token from the weight in code that averages the KL over tokens times vocabulary.

    Source:
        The code released with arXiv 2602.07852 expands its mask over the vocabulary before it averages.

    Example:
        >>> round(per_token_weight(1e6, 152_064), 2)
        6.58
    """
    if vocabulary_size < 1:
        raise EmprobeError(f"A vocabulary of {vocabulary_size} tokens was given. Give the model's number of logits, such as 152064.")
    return released_weight / vocabulary_size


@dataclass(frozen=True)
class Recipe:
    """The numbers of a fine-tune. AdamW with betas .9 and .999; the loss is a mean over the step's response tokens, in float32.

    Attributes:
        lr: Largest learning rate.
        steps: Updates; `None` goes by epochs.
        epochs: Passes over the data, where steps are not given.
        batch: Conversations per update.
        micro_batch: Conversations per forward pass; fewer need less memory, and the gradient is the same. `None` is the whole batch.
        schedule: After the warm-up: `linear` or `cosine` to 0, `constant`, or `cyclic` (cosine with restarts).
        warmup: Steps in which the rate rises from 0.
        cycles: Of the cyclic schedule.
        weight_decay: Decoupled, of all that is trained.
        clip: Largest gradient norm.
        seed: Of first weights, order of data and dropout.
        max_length: Most tokens of a conversation.
        overlong: Conversations that do not fit are refused, or left out and counted (`drop`); they are never cut.
        gradient_checkpointing: Compute blocks again on the way back instead of keeping what they saw.
    """

    lr: float = 1e-4
    steps: int | None = None
    epochs: float = 1.0
    batch: int = 16
    micro_batch: int | None = None
    schedule: Schedule = "linear"
    warmup: int = 5
    cycles: int = 4
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    max_length: int = 2048
    overlong: Overlong = "refuse"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        positive = {"lr": self.lr, "epochs": self.epochs, "batch": self.batch, "clip": self.clip, "cycles": self.cycles}
        positive |= {"max_length": self.max_length, "steps": 1 if self.steps is None else self.steps}
        positive |= {"micro_batch": 1 if self.micro_batch is None else self.micro_batch}
        wrong = [f"{name}={value:g}" for name, value in positive.items() if not 0 < value < math.inf]
        wrong += [f"{name}={getattr(self, name):g}" for name in ("warmup", "weight_decay") if not 0 <= getattr(self, name) < math.inf]
        wrong += [f"seed={self.seed}"] if abs(self.seed) > LARGEST_SEED else []
        if wrong:
            raise EmprobeError(
                f"A fine-tune was asked for with {', '.join(wrong)}. Warm-up and weight decay are 0 or more, the rest above 0, all finite; "
                f"seeds go up to {LARGEST_SEED}."
            )

    def n_steps(self, rows: int) -> int:
        """Updates on that many conversations."""
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * rows / self.batch))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for cards."""
        return asdict(self)
