"""Edits at the places where a matrix writes, folded into one change of what the matrix writes: y' = y + U (V y) + t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.interventions.changes import Affine
from emprobe.interventions.edit import Edit, Place, rank_of
from emprobe.interventions.export.matrices import EMBEDDINGS
from emprobe.interventions.where import Where

CHUNK = 65536


@dataclass(frozen=True)
class Fold:
    """y' = y + U (V y) + t, in float64; of rank 0 where nothing is taken out."""

    u: Float[Tensor, "d_model rank"]
    v: Float[Tensor, "rank d_model"]
    t: Float[Tensor, " d_model"]

    @property
    def rank(self) -> int:
        """Dimensions of what is changed by what is there."""
        return self.u.shape[1]

    @property
    def shifts(self) -> bool:
        """Whether something is added whatever is there."""
        return bool(self.t.any())

    def then(self, edit: Edit) -> Fold:
        """This, and an affine edit after it."""
        change, basis = edit.change, edit.basis.double()
        assert isinstance(change, Affine)
        u, v, t = self.u, self.v, self.t
        if change.scale:
            u, v = torch.cat([u, change.scale * basis.T], dim=1), torch.cat([v, basis + (basis @ u) @ v])
            t = t + change.scale * basis.T @ (basis @ t)
        return Fold(u, v, t + torch.tensor(change.shift, dtype=torch.float64) @ basis)

    def of(self, written: Float[Tensor, "d_model in"]) -> Float[Tensor, "rank in"]:
        """V W in float64, a piece of W at a time: a vocabulary is wide."""
        pieces = [self.v @ piece.double().cpu() for piece in torch.split(written, CHUNK, dim=1)]
        return torch.cat(pieces, dim=1)

    def of_bias(self, bias: Tensor | None) -> Float[Tensor, " d_model"]:
        """What becomes of a bias."""
        b = torch.zeros_like(self.t) if bias is None else bias.double().cpu()
        return b + self.u @ (self.v @ b) + self.t


def nothing(d_model: int) -> Fold:
    """The fold that changes nothing.

    Example:
        >>> nothing(3).of_bias(torch.ones(3))
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    zero = torch.zeros(d_model, dtype=torch.float64)
    return Fold(zero[:, None][:, :0], zero[None][:0], zero)


def folds_of(edits: Sequence[Edit], target: str) -> dict[Place, Fold]:
    """One fold for each place at which a matrix writes.

    Additions at a block's output are additions to what its MLP writes, since nothing comes after.

    Raises:
        EmprobeError: If an edit is no change that a matrix can carry; says why.
    """
    folds: dict[Place, Fold] = {}
    for edit in sorted(edits, key=lambda e: rank_of(e.place)):
        check_everywhere(edit, target)
        place = _written_at(edit, target)
        folds[place] = folds.get(place, nothing(edit.basis.shape[1])).then(edit)
    return folds


def check_everywhere(edit: Edit, target: str) -> None:
    """Refuse what depends on the token: weights act at every one.

    Raises:
        EmprobeError: If the edit has a `where`, a `when`, or a change that is not affine.
    """
    if edit.where != Where():
        raise EmprobeError(
            f"{edit} names {edit.where}, but the target {target!r} acts at every token. Leave where out, or use hooks (emprobe.intervene)."
        )
    if edit.when is not None:
        raise EmprobeError(f"{edit} acts only where {edit.when}, but the target {target!r} knows no condition. Leave when out.")
    if not isinstance(edit.change, Affine):
        raise EmprobeError(
            f"{edit} bends what it acts on: it is no sum of a part that stays and one that is scaled, so the target {target!r} cannot "
            "express it. Use Ablate, Add, or hooks (emprobe.intervene)."
        )


def _written_at(edit: Edit, target: str) -> Place:
    assert isinstance(edit.change, Affine)
    layer, site = edit.place
    if site in ("attn_out", "mlp_out") or edit.place == EMBEDDINGS:
        if edit.place == EMBEDDINGS and any(edit.change.shift):
            raise EmprobeError(f"{edit} adds to the embeddings, which have no bias. Add at resid_post of a block.")
        return edit.place
    if edit.change.scale == 0:
        if site == "resid_mid":
            return layer, "attn_out"
        return (layer, "mlp_out") if site == "resid_post" else (layer - 1, "mlp_out")
    raise EmprobeError(
        f"{edit} changes what earlier blocks have written, which no matrix of the block can do, so the target {target!r} cannot express it."
        " Use Ablate(…, site='writes'), which takes it out of everything that is written."
    )
