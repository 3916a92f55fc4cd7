"""The runtimes that can read activations: one protocol, and what each cannot do refused by name before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from emprobe.capture.plan import Batch
from emprobe.errors import EmprobeError
from emprobe.models.load import Checkpoint
from emprobe.types import Site

BackendName = Literal["hooks", "transformer_lens", "nnsight"]
BACKENDS: tuple[BackendName, ...] = ("hooks", "transformer_lens", "nnsight")

Read = Callable[[Site, int, Tensor], None]


class Backend(Protocol):
    """Runs batches through one or two checkpoints and hands every wanted hidden state to a reader.

    Made once per capture with what is wanted; its constructor refuses what it cannot do.
    """

    shares_prefix: bool

    def run(self, batch: Batch, reads: Sequence[Read], past: Any = None) -> None:
        """One batch through every checkpoint; `reads[i]` gets `(site, layer, hidden[batch, pos, d_model])` of checkpoint i."""
        ...

    def run_prefix(self, batch: Batch, reads: Sequence[Read]) -> Any:
        """A shared opening through every checkpoint; returns what `run` takes as `past`, or None if it cannot be kept."""
        ...


def backend_of(
    name: str, checkpoints: Sequence[Checkpoint], sites: Sequence[Site], layers: Sequence[int], *, remote: bool = False
) -> Backend:
    """The backend of that name, made for these checkpoints, sites and layers.

    Raises:
        EmprobeError: If there is none of that name, or it cannot do what was asked.
        MissingExtraError: If its package is not installed.
    """
    if remote and name != "nnsight":
        raise EmprobeError(
            f"remote=True was asked of the backend {name!r}, and only 'nnsight' runs on NDIF's servers. Use backend='nnsight'."
        )
    match name:
        case "hooks":
            from emprobe.capture.backends.hooks import Hooks

            return Hooks(checkpoints, sites, layers)
        case "transformer_lens":
            from emprobe.capture.backends.transformer_lens import TransformerLens

            return TransformerLens(checkpoints, sites, layers)
        case "nnsight":
            from emprobe.capture.backends.nnsight import NNsight

            return NNsight(checkpoints, sites, layers, remote=remote)
        case _:
            raise EmprobeError(f"Backend {name!r} does not exist. Use one of: {', '.join(BACKENDS)}.")
