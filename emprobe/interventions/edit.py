"""One write at one place: what an operator comes down to, and all that runtimes and exports need to know of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from emprobe.interventions.changes import Affine, Change
from emprobe.interventions.when import When
from emprobe.interventions.where import Where
from emprobe.types import Site

Place = tuple[int, Site]
"""Layer (0-based block) and site."""

ORDER: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""The order in which a forward pass comes to the sites of a block."""


def rank_of(place: Place) -> tuple[int, int]:
    """Sorts places as a forward pass comes to them."""
    return place[0], ORDER.index(place[1])


@dataclass(frozen=True, eq=False)
class Edit:
    """h' = h + step(h Bᵀ) B at the tokens named, at one layer and site.

    Attributes:
        basis: float64, orthonormal rows B.
        change: The function `step`.
        where: Which tokens.
        when: Only at those of them where this holds; `None` is at all.
        label: What the user asked for, in words.
    """

    layer: int
    site: Site
    basis: Float[Tensor, "k d_model"]
    change: Change
    where: Where
    when: When | None
    label: str

    @property
    def place(self) -> Place:
        """Layer and site."""
        return self.layer, self.site

    @property
    def k(self) -> int:
        """Dimensions of the span that it moves."""
        return len(self.basis)

    @property
    def is_plain(self) -> bool:
        """Whether it is an affine change along one direction, without condition: rows that carry such edits can share one pass."""
        return self.k == 1 and isinstance(self.change, Affine) and self.when is None

    def __str__(self) -> str:
        return f"{self.label} at {self.site}[{self.layer}]"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with vectors as hashes: two edits that do the same have the same."""
        when = self.when and [str(self.when), _hash(self.when.direction.vector)]
        return {
            "label": self.label,
            "layer": self.layer,
            "site": self.site,
            **self.change.as_dict(),
            "where": str(self.where),
            "when": when,
            "basis": _hash(self.basis),
        }


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.double().contiguous().numpy().tobytes()).hexdigest()[:16]
