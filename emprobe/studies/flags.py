"""What many studies are told alike: how models are loaded, and how answers are sampled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from emprobe.models.templates import named_template


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """How models are loaded.

    Attributes:
        dtype: As stored, or a torch dtype.
        device_map: As in transformers; none is the CPU.
        chat_template: File with a Jinja template, or `plain`; replaces the tokenizer's own.
        progress: Show progress bars and the plan of costs.
    """

    dtype: str = "auto"
    device_map: str | None = None
    chat_template: str | None = None
    progress: bool = True

    def loading(self) -> dict[str, Any]:
        """What `load_model` and `load_pair` are given."""
        return {"dtype": self.dtype, "device_map": self.device_map, "chat_template": named_template(self.chat_template)}


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """How answers are sampled and counted.

    Attributes:
        samples: Answers to each question.
        criterion: `emergent-misalignment`, `model-organisms` or `inoculation`.
        seed: Of sampling and of everything else that is drawn.
        temperature: Of sampling.
        max_new_tokens: Length limit of an answer.
        token_budget: Padded tokens per batch of sampling.
    """

    samples: int = 2
    criterion: str = "emergent-misalignment"
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 256
    token_budget: int = 8192


def as_given(asked: Any) -> dict[str, Any]:
    """All flags with their values: a command's own first, and those that many share behind them."""
    own = list(vars(type(asked))["__annotations__"])
    found = {f.name: getattr(asked, f.name) for f in fields(asked)}
    return {name: found[name] for name in (*(n for n in own if n in found), *(n for n in found if n not in own))}


def plain_values(asked: Any, leave_out: Iterable[str]) -> dict[str, Any]:
    """The flags as JSON holds them, for a run's identity.

    Args:
        asked: The command.
        leave_out: Paths, which are known by their content, and flags that no number depends on.
    """
    found = {name: value for name, value in as_given(asked).items() if name not in set(leave_out)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
