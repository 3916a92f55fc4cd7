"""The direction record: a unit vector that knows where it was read, how large it was, and how sure we may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from emprobe.directions.choose import Choice
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import check_fits, load_record, save_tensors
from emprobe.types import Site

Unit = Literal["resid", "raw", "abs"]
UNITS: tuple[Unit, ...] = ("resid", "raw", "abs")


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector in the residual stream; positive means more like `tuned` (or more misaligned, for `labels`).

    Attributes:
        vector: float64, norm 1.
        layer: 0-based block at whose `site` it was read.
        positions: The position rule it was fitted at.
        raw_norm: Norm of the mean difference before it was made a unit vector; of an imported one, its norm in the file.
        resid_norm: Mean norm of the base's residual stream there; the unit `resid` of a coefficient. `None` if imported: no file has it.
        base_projection: Mean projection of the base's residual stream on it over all tokens; where ablation to the mean leaves it.
            `None` if imported.
        contrast: What was subtracted from what; `sign` says what positive means.
        split_half: Cosine between directions of two random halves of the questions, mean over splits; `None` where it cannot be split.
        n: Rows it was fitted on, `questions` how many questions they belong to; `None` if imported.
        provenance: Checkpoints, fingerprints, estimator, seed.
    """

    vector: Float[Tensor, " d_model"]
    layer: int
    site: Site
    positions: str
    raw_norm: float
    resid_norm: float | None
    base_projection: float | None
    contrast: str
    sign: str
    estimator: str
    split_half: float | None
    n: int | None
    questions: int | None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        norm = float(self.vector.double().norm())
        if self.vector.ndim != 1 or not abs(norm - 1) < 1e-6:
            raise EmprobeError(
                f"A direction needs one finite unit vector, but got shape {tuple(self.vector.shape)} with norm {norm:.6g}. "
                "Divide by the norm and give that as raw_norm."
            )

    @classmethod
    def from_vector(
        cls,
        vector: Float[Tensor, " d_model"] | Sequence[float],
        *,
        layer: int,
        site: Site = "resid_post",
        positions: str = "unknown",
        resid_norm: float | None = None,
        made_from: str = "a vector",
    ) -> Direction:
        """Any vector as a direction; its norm becomes `raw_norm`, and what a vector cannot say stays unknown.

        Args:
            vector: Of any norm but 0.
            layer: 0-based block at whose `site` it belongs.
            site: Where in the block.
            positions: The position rule it was read with.
            resid_norm: Mean norm of the residual stream there, if known; without it no coefficient in unit `resid`.
            made_from: What it is, in words.

        Raises:
            EmprobeError: If it is no finite vector that points anywhere.

        Example:
            >>> Direction.from_vector([3.0, 4.0], layer=2).raw_norm
            5.0
        """
        given = torch.as_tensor(vector, dtype=torch.float64).detach().cpu()
        norm = float(given.norm())
        if given.ndim != 1 or not 0 < norm < float("inf"):
            raise EmprobeError(
                f"A direction needs one finite vector that points somewhere, but got shape {tuple(given.shape)} with norm {norm:g}."
            )
        return cls(given / norm, layer, site, positions, norm, resid_norm, None, made_from, "as given", "none", None, None, None)

    def __repr__(self) -> str:
        sure = "unknown" if self.split_half is None else f"{self.split_half:.3f}"
        relative = "residual norm unknown" if self.relative_norm is None else f"{self.relative_norm:.2f} of the residual norm"
        return (
            f"Direction({self.contrast}, {self.site}[{self.layer}], {self.positions}, d_model {len(self.vector)}, raw norm "
            f"{self.raw_norm:.3g} ({relative}), split-half cosine {sure}, n {'unknown' if self.n is None else self.n})"
        )

    @property
    def relative_norm(self) -> float | None:
        """The mean difference in mean residual norms; `None` where the residual norm is unknown."""
        return None if self.resid_norm is None else self.raw_norm / self.resid_norm

    def dose(self, coefficient: float, unit: Unit = "resid") -> float:
        """A coefficient in absolute units: how far along the unit vector it moves the residual stream.

        Args:
            coefficient: How much.
            unit: `resid` (mean residual norms), `raw` (norms of the mean difference), or `abs`.

        Raises:
            EmprobeError: If the unit does not exist, or is the residual norm and that is unknown.
        """
        if unit not in UNITS:
            raise EmprobeError(f"Unit {unit!r} does not exist. Use one of: {', '.join(UNITS)}.")
        norm = {"resid": self.resid_norm, "raw": self.raw_norm, "abs": 1.0}[unit]
        if norm is None:
            raise EmprobeError(
                f"A dose of {coefficient:g} in unit 'resid' is a unit without a norm: the mean residual norm at {self.site}[{self.layer}] "
                "is unknown (an imported direction does not bring it). Use unit='raw' (norms of the vector in its file) or 'abs', or "
                "measure it: dataclasses.replace(direction, resid_norm=float(acts.token_norm[acts.column(layer)]))."
            )
        return coefficient * norm

    def cosine(self, other: Direction) -> float:
        """Signed cosine with another direction of the same width."""
        if len(self.vector) != len(other.vector):
            raise MismatchError(
                f"Directions of d_model {len(self.vector)} and {len(other.vector)} have no cosine. Take both from one model."
            )
        return float(self.vector.double() @ other.vector.double())

    @property
    def choice(self) -> Choice | None:
        """How `layer="auto"` chose the layer, and what it is worth on other questions: a record that prints as a sentence.

        `None` where the layer was asked for.
        """
        found = self.provenance.get("choice")
        return None if found is None else Choice.from_dict(found)

    def card(self) -> dict[str, Any]:
        """Everything but the vector, as plain values."""
        fields = asdict(self)
        fields.pop("vector")
        fields["provenance"] = dict(self.provenance)
        return {"record": "Direction", **fields}

    def save(self, path: str | Path) -> None:
        """Write vector and card to one safetensors file."""
        save_tensors(path, {"vector": self.vector}, self.card())

    def check_fits(
        self,
        *,
        d_model: int | None = None,
        layer: int | None = None,
        site: Site | None = None,
        fingerprint: str | None = None,
        what: str = "This direction",
    ) -> None:
        """Refuse to go on where the direction belongs to another width, layer, site or to other weights.

        Raises:
            MismatchError: If it does not fit what was asked; the message names both.
        """
        asked = {"d_model": d_model, "layer": layer, "site": site, "fingerprint": fingerprint}
        check_fits(what, asked, {"d_model": len(self.vector), "layer": self.layer, "site": self.site}, self.provenance)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        d_model: int | None = None,
        layer: int | None = None,
        site: Site | None = None,
        fingerprint: str | None = None,
    ) -> Direction:
        """Read what `save` wrote, refusing what does not fit where it is to be used.

        Args:
            path: The file.
            d_model: Width of the model it must fit.
            layer: Block it must have been read at.
            site: Site it must have been read at.
            fingerprint: Weight fingerprint that must be among those it was made with.

        Raises:
            EmprobeError: If it is no direction file, or its card is not whole.
            MismatchError: If it does not fit what was asked; the message names both.
        """
        direction = load_record(path, cls, ["vector"])
        direction.check_fits(d_model=d_model, layer=layer, site=site, fingerprint=fingerprint, what=str(path))
        return direction
