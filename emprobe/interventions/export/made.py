"""What a target reports of the files it wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Made:
    """What the card says of an export beyond the plan.

    Attributes:
        what: One sentence: what kind of file it is and how it does what the plan says.
        serve: Command lines or lines of Python that use it; `{out}` stands for the folder, `{base}` for the model's name.
        limits: What the reader must know before trusting it.
        facts: Numbers about it.
        tags: Further tags of the model card.
    """

    what: str
    serve: Sequence[str]
    limits: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
