"""The subspace record: an orthonormal basis that knows where it was read and how much it explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from emprobe.activations import PairActivations
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import check_fits, load_record, save_tensors
from emprobe.overlap.lora import lora_output
from emprobe.overlap.spans import Span, independent_span, matrix_of, principal_span
from emprobe.types import Site


class DirectionLike(Protocol):
    """What a `Direction` shows here; `overlap` and `directions` are neighbours and do not import each other."""

    @property
    def vector(self) -> Float[Tensor, " d_model"]: ...
    @property
    def layer(self) -> int: ...
    @property
    def site(self) -> Site: ...
    @property
    def positions(self) -> str: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False)
class Subspace:
    """An orthonormal basis in the residual stream; the span is what counts, the basis is one of many.

    Attributes:
        basis: float64, orthonormal rows; from rows, in descending order of what they explain, each with its largest entry positive.
        share: Share of the squared norm of what it was made from that each basis vector explains, in 0..1.
        made_from: What that was, in words.
        layer: 0-based block at whose `site` it was read; `None` where it was not said.
        site: Where in the block.
        positions: The position rule of the rows.
        n: Rows (or directions, or LoRA rank) it was made from.
        total: Summed squared norm of these, about `mean` where they were centred.
        mean: The mean that was subtracted; `None` where the rows were not centred.
        provenance: Checkpoints, fingerprints, files.

    Raises:
        EmprobeError: If the basis is not orthonormal to 1e-6, or shares do not fit it.
    """

    basis: Float[Tensor, "k d_model"]
    share: tuple[float, ...]
    made_from: str
    layer: int | None = None
    site: Site | None = None
    positions: str | None = None
    n: int = 1
    total: float = 1.0
    mean: Float[Tensor, " d_model"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.basis.shape)
        if self.basis.ndim != 2 or not 1 <= shape[0] <= shape[1] or not bool(torch.isfinite(self.basis).all()):
            raise EmprobeError(f"A subspace needs a finite basis [k, d_model] with 1 <= k <= d_model, but got shape {shape}.")
        double = self.basis.double()
        off = float((double @ double.T - torch.eye(shape[0], dtype=torch.float64)).abs().max())
        if off > 1e-6:
            raise EmprobeError(
                f"A subspace needs orthonormal rows, but these are off by {off:.2g}. Use Subspace.from_directions, which orthonormalises."
            )
        if len(self.share) != shape[0]:
            raise EmprobeError(f"A subspace of {shape[0]} dimensions came with {len(self.share)} explained shares. Give one each.")
        if self.mean is not None and tuple(self.mean.shape) != shape[1:]:
            raise EmprobeError(f"A subspace in d_model {shape[1]} came with a mean of shape {tuple(self.mean.shape)}.")

    @classmethod
    def from_deltas(
        cls,
        deltas: Any,
        *,
        k: int | None = None,
        share: float | None = None,
        centred: bool = True,
        layer: int | None = None,
        site: Site | None = None,
        positions: str | None = None,
        made_from: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Subspace:
        """The leading right singular vectors of deltas `[row, d_model]` (rows of tuned - base, or any rows).

        Args:
            deltas: The rows, or a `PairActivations`, whose delta at `layer` is taken with its site, positions and fingerprints;
                dimensions no larger than float32 rounds the base's rows then count for nothing.
            k: How many components; or
            share: the fewest whose explained share reaches this.
            centred: Subtract the mean delta first. Uncentred, the mean is explained too, and often is most of what is.
            layer: 0-based block.
            site: Where in the block the rows were read.
            positions: Their position rule.
            made_from: What the rows are, in words; of a pair, by default the names of its checkpoints.
            provenance: Kept in the card.

        Raises:
            EmprobeError: No rows, NaN or infinity, fewer rows (or rank) than k, constant rows, both or neither of k and share.

        Source: What shapes emergent misalignment (arXiv 2606.20814), PCA of training deltas; singular value decomposition of the rows.

        Example:
            >>> Subspace.from_deltas([[3.0, 0.0], [0.0, 4.0]], k=1, centred=False).share
            (0.64,)
        """
        rounding = 0.0
        if isinstance(deltas, PairActivations):
            pair, made_from = deltas, made_from or f"{deltas.tuned.checkpoint} - {deltas.base.checkpoint}"
            if layer is None:
                raise EmprobeError(f"Activations of layers {', '.join(map(str, pair.base.layers))} were given. Say layer= to take one.")
            site, positions = pair.base.site, pair.base.positions
            sides = {"base": pair.base, "tuned": pair.tuned}
            provenance = {name: {"name": a.checkpoint, "fingerprint": a.fingerprint} for name, a in sides.items()} | dict(provenance or {})
            deltas = pair.tuned.at(layer).double() - pair.base.at(layer).double()
            # A rank-1 adapter's deltas have one dimension right behind it, and float32's last digits make up all others.
            rounding = torch.finfo(torch.float32).eps * float(pair.base.at(layer).double().norm())
        what = "deltas" if layer is None else f"deltas at layer {layer}"
        found = principal_span(deltas, k=k, share=share, centred=centred, what=what, rounding=rounding)
        words = f"{made_from or 'deltas'}, {'centred' if centred else 'not centred'}"
        return cls._of(found, words, len(deltas), layer, site, positions, provenance or {})

    @classmethod
    def from_directions(cls, directions: Sequence[DirectionLike | Tensor | NDArray[Any]], *, made_from: str | None = None) -> Subspace:
        """The span of several directions or vectors, each counted with norm 1; layer, site and positions where all agree.

        Raises:
            EmprobeError: If there are none, or they depend on each other (the rank is named).
            MismatchError: If their d_model differ.

        Example:
            >>> Subspace.from_directions([torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])]).k
            2
        """
        vectors = [_vector(d) for d in directions]
        if not vectors:
            raise EmprobeError("A subspace was asked of no directions. Give at least one.")
        if len({tuple(v.shape) for v in vectors}) > 1 or vectors[0].ndim != 1:
            raise MismatchError(f"Directions of shapes {[tuple(v.shape) for v in vectors]} span no common subspace. Take one model's.")
        rows = matrix_of(torch.stack([v.double() for v in vectors]), "directions")
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not norms.all():
            raise EmprobeError(f"Direction {int(norms.argmin())} of {len(rows)} is zero and points nowhere. Leave it out.")
        found = independent_span(rows / norms, "directions")
        known = [d for d in directions if not isinstance(d, Tensor | np.ndarray)]
        places = [{getattr(d, name) for d in known} if len(known) == len(vectors) else set() for name in ("layer", "site", "positions")]
        layer, site, positions = (place.pop() if len(place) == 1 else None for place in places)
        sources = {"directions": [dict(d.provenance) for d in known]} if known else {}
        common = sources["directions"][0] if known and all(s == sources["directions"][0] for s in sources["directions"]) else sources
        return cls._of(found, made_from or f"{len(vectors)} directions", len(vectors), layer, site, positions, common)

    @classmethod
    def from_lora(cls, path: str | Path, *, module: str, layer: int, site: Site | None = None) -> Subspace:
        """The span of a LoRA's B matrix, all that the adapter can write at one module of one layer; shares are of B's squared norm.

        Args:
            path: A PEFT adapter's folder, or its `adapter_model.safetensors`.
            module: The end of the module's name, such as `down_proj`.
            layer: 0-based block.
            site: Where the module writes to; known for the usual names of output projections.

        Raises:
            EmprobeError: If there is no such matrix, it is rank-deficient (an untrained B is zero), or the module does not write to the
                residual stream.

        Source: Hu et al. (arXiv 2106.09685): W + (alpha / r) B A, so that every change lies in the span of B.
        """
        rows, known, facts = lora_output(path, module=module, layer=layer)
        if (site or known) is None:
            raise EmprobeError(
                f"{module!r} does not write to the residual stream as far as its name tells, so its B spans another space. "
                "Take an output projection (o_proj, down_proj), or say site= if it is one."
            )
        found = independent_span(rows, f"columns of B of {module} at layer {layer}")
        return cls._of(found, f"LoRA B of {module}", len(rows), layer, site or known, None, facts)

    @classmethod
    def _of(
        cls, span: Span, words: str, n: int, layer: int | None, site: Site | None, positions: str | None, provenance: Mapping[str, Any]
    ) -> Subspace:
        return cls(
            basis=torch.from_numpy(span.basis.copy()),
            share=tuple(span.share.tolist()),
            made_from=words,
            layer=layer,
            site=site,
            positions=positions,
            n=n,
            total=span.total,
            mean=None if span.mean is None else torch.from_numpy(span.mean),
            provenance=dict(provenance),
        )

    def __repr__(self) -> str:
        place = f"{self.site or 'site unknown'}[{'?' if self.layer is None else self.layer}]"
        return (
            f"Subspace({self.made_from}, {place}, {self.positions or 'positions unknown'}, {self.k} of d_model {self.d_model}, explains "
            f"{100 * sum(self.share):.1f} %, n {self.n})"
        )

    @property
    def k(self) -> int:
        """Its dimension."""
        return len(self.basis)

    @property
    def d_model(self) -> int:
        """Width of the residual stream it lies in."""
        return int(self.basis.shape[1])

    def card(self) -> dict[str, Any]:
        """Everything but the tensors, as plain values."""
        names = [f.name for f in fields(self) if f.name not in ("basis", "mean", "provenance")]
        return {"record": "Subspace", **{name: getattr(self, name) for name in names}, "provenance": dict(self.provenance)}

    def save(self, path: str | Path) -> None:
        """Write basis (and mean) with the card to one safetensors file."""
        tensors = {"basis": self.basis} if self.mean is None else {"basis": self.basis, "mean": self.mean}
        save_tensors(path, tensors, self.card())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        d_model: int | None = None,
        layer: int | None = None,
        site: Site | None = None,
        fingerprint: str | None = None,
    ) -> Subspace:
        """Read what `save` wrote, refusing what does not fit where it is to be used.

        Args:
            path: The file.
            d_model: Width of the model it must fit.
            layer: Block it must have been read at.
            site: Site it must have been read at.
            fingerprint: Weight fingerprint that must be among those it was made from.

        Raises:
            EmprobeError: If it is no subspace file, or its card is not whole.
            MismatchError: If it does not fit what was asked; the message names both.
        """
        found = load_record(path, cls, ["basis", "mean"])
        asked = {"d_model": d_model, "layer": layer, "site": site, "fingerprint": fingerprint}
        check_fits(str(path), asked, {"d_model": found.d_model, "layer": found.layer, "site": found.site}, found.provenance)
        return found


def _vector(direction: DirectionLike | Tensor | NDArray[Any]) -> Tensor:
    if isinstance(direction, Tensor):
        return direction
    if isinstance(direction, np.ndarray) and np.issubdtype(direction.dtype, np.number):
        return torch.from_numpy(direction.astype(np.float64))
    vector = getattr(direction, "vector", None)
    if not isinstance(vector, Tensor):
        raise EmprobeError(
            f"A direction, a tensor or an array of numbers was asked for, but got a {type(direction).__name__}: {direction!r:.60}."
        )
    return vector
