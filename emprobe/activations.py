"""Captured activations as records: one checkpoint's rows, and a pair's rows on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import load_tensors, save_tensors
from emprobe.types import Site


@dataclass(frozen=True)
class Activations:
    """What one checkpoint's residual stream held: one row per conversation, one column per layer.

    Attributes:
        values: float32; each row is the mean over the tokens that the position rule names, accumulated in float64.
        layers: The 0-based block of each column.
        site: Where in the block it was read.
        positions: The position rule that chose the tokens.
        keys: (question_id, sample) of each row.
        tokens: Hash of the token ids of each row; two captures are comparable only where these agree.
        checkpoint: Name of the checkpoint, and `fingerprint` of its weights.
        token_mean: float64 mean over all tokens but position 0 and padding, whatever the rule; what ablation "to the mean" keeps.
        token_norm: Mean norm of the residual stream over the same tokens, per layer; the unit of a coefficient.
        n_tokens: How many tokens these two are means of.
        notes: What was seen while rendering (`default_system`, `double_bos`, `thinking`, …), each with the number of rows.
    """

    values: Float[Tensor, "row layer d_model"]
    layers: tuple[int, ...]
    site: Site
    positions: str
    keys: tuple[tuple[str, int], ...]
    tokens: tuple[str, ...]
    checkpoint: str
    fingerprint: str
    token_mean: Float[Tensor, "layer d_model"]
    token_norm: Float[Tensor, " layer"]
    n_tokens: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.keys:
            raise EmprobeError("Activations need at least one row, and there was none.")
        if tuple(self.values.shape[:2]) != (len(self.keys), len(self.layers)):
            raise EmprobeError(
                f"Activations of {len(self.keys)} rows and {len(self.layers)} layers came with values of shape {tuple(self.values.shape)}."
            )
        finite = torch.isfinite(self.values).all(dim=-1)
        if not bool(finite.all()):
            row, column = (~finite).nonzero()[0].tolist()
            raise EmprobeError(
                f"Activations of {self.checkpoint!r} are not finite, first at row {row} (question {self.keys[row][0]!r}), layer "
                f"{self.layers[column]}. The model overflows there; load it with dtype='float32' or 'bfloat16'."
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        rows, layers, d_model = self.values.shape
        return (
            f"Activations({self.checkpoint!r}, {rows} rows x {layers} layers x d_model {d_model}, "
            f"site {self.site}, positions {self.positions})"
        )

    def __sub__(self, other: Activations) -> Float[Tensor, "row layer d_model"]:
        """Row-wise difference in float64; refused unless both read the same tokens at the same place."""
        check_comparable(self, other)
        return self.values.double() - other.values.double()

    def at(self, layer: int) -> Float[Tensor, "row d_model"]:
        """The rows at one layer.

        Raises:
            EmprobeError: If that layer was not captured.
        """
        return self.values[:, self.column(layer)]

    @property
    def questions(self) -> tuple[str, ...]:
        """The question of each row: what statistics take as groups."""
        return tuple(question for question, _ in self.keys)

    def column(self, layer: int) -> int:
        """Which column holds a layer."""
        if layer not in self.layers:
            raise EmprobeError(f"Layer {layer} was asked for, but layers {', '.join(map(str, self.layers))} were captured.")
        return self.layers.index(layer)

    def select(self, rows: list[int]) -> Activations:
        """Only these rows, in this order; token means stay those of the whole capture."""
        return replace(self, values=self.values[rows], keys=tuple(self.keys[r] for r in rows), tokens=tuple(self.tokens[r] for r in rows))

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        card: dict[str, Any] = {
            "record": "Activations",
            "layers": self.layers,
            "site": self.site,
            "positions": self.positions,
            "keys": self.keys,
            "tokens": self.tokens,
            "checkpoint": self.checkpoint,
            "fingerprint": self.fingerprint,
            "n_tokens": self.n_tokens,
            "notes": self.notes,
        }
        save_tensors(path, {"values": self.values, "token_mean": self.token_mean, "token_norm": self.token_norm}, card)

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """Read what `save` wrote.

        Raises:
            EmprobeError: If it is no file of activations.
        """
        tensors, card = load_tensors(path)
        if card.pop("record", None) != "Activations":
            raise EmprobeError(f"{path} holds no activations. Was it written by Activations.save?")
        card["keys"] = tuple((q, int(s)) for q, s in card["keys"])
        card |= {name: tuple(card.get(name, ())) for name in ("layers", "tokens", "notes")}
        fields: dict[str, Any] = {**tensors, **card}
        return cls(**fields)


def check_comparable(left: Activations, right: Activations) -> None:
    """Refuse to compare rows that are not the same tokens read at the same place.

    Raises:
        MismatchError: Names the first difference.
    """
    for what in ("site", "positions", "layers"):
        if getattr(left, what) != getattr(right, what):
            raise MismatchError(f"Activations differ in {what}: {getattr(left, what)} and {getattr(right, what)}. Capture both alike.")
    if len(left) != len(right):
        raise MismatchError(f"Activations have {len(left)} and {len(right)} rows. Capture the same conversations from both.")
    for row, (a, b) in enumerate(zip(left.tokens, right.tokens, strict=True)):
        if a != b or left.keys[row] != right.keys[row]:
            raise MismatchError(
                f"Activations differ in their tokens from row {row} on (questions {left.keys[row]} and {right.keys[row]}). "
                "Give the same conversations, in the same order, through the same tokenizer."
            )


@dataclass(frozen=True)
class PairActivations:
    """Base and tuned activations on the same tokens, row by row.

    Raises:
        MismatchError: If rows, tokens, site, positions or layers differ.
    """

    base: Activations
    tuned: Activations

    def __post_init__(self) -> None:
        check_comparable(self.base, self.tuned)

    @property
    def delta(self) -> Float[Tensor, "row layer d_model"]:
        """Rows of tuned minus rows of base, float64."""
        return self.tuned - self.base

    def at(self, layer: int) -> Float[Tensor, "row d_model"]:
        """Rows of tuned minus rows of base at one layer, float64.

        Raises:
            EmprobeError: If that layer was not captured.
        """
        return self.tuned.at(layer).double() - self.base.at(layer).double()

    @property
    def layers(self) -> tuple[int, ...]:
        """The 0-based blocks that were captured."""
        return self.base.layers

    @property
    def questions(self) -> tuple[str, ...]:
        """The question of each row: what statistics take as groups."""
        return self.base.questions

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        return f"PairActivations(tuned {self.tuned!r}, base {self.base.checkpoint!r})"
