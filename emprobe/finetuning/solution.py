"""What a fine-tune found, as an object: put it on the base, scale it, measure its norm, perturb it, save and load it."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor

from emprobe.directions import Direction
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import content_hash, load_tensors, read_json, save_tensors, write_text
from emprobe.finetuning.methods import Vector
from emprobe.finetuning.mounting import Mounted, mounted_lora, mounted_vector
from emprobe.finetuning.perturbation import perturbed
from emprobe.models.load import Checkpoint, load_model
from emprobe.types import Site

ADAPTER, CONFIG, VECTOR = "adapter_model.safetensors", "adapter_config.json", "vector.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class Solution(ABC):
    """What training found, apart from the base that it belongs to.

    Attributes:
        card: Where it comes from: the base's name and fingerprint, the step, the settings.
    """

    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What was trained, by name."""

    @property
    @abstractmethod
    def norm(self) -> float:
        """How large the change is: the norm of the vector, or the Frobenius norm of all changes of weights together."""

    @abstractmethod
    def scaled(self, factor: float) -> Solution:
        """The same direction with `factor` times the norm; 0 is the base, above 1 goes further than training did."""

    @abstractmethod
    def perturbed(self, epsilon: float, seed: int = 0) -> Solution:
        """Each tensor x turned into √(1 - ε²) x + ε y, with y random, orthogonal to x and of its norm; norms of tensors stay.

        Args:
            epsilon: 0 (nothing happens) to 1 (nothing is left).
            seed: Of y.

        Source:
            arXiv 2602.07852, stability; A and B of a LoRA apart.
        """

    @abstractmethod
    def save(self, folder: Path | str) -> None:
        """Write it into a folder that `load_solution` reads; a LoRA is also an ordinary PEFT adapter."""

    @abstractmethod
    def _mounted(self, checkpoint: Checkpoint) -> Any:
        """The context that puts it on a checkpoint."""

    def check_base(self, base: Checkpoint) -> None:
        """Refuse other weights than those it was trained on.

        Raises:
            MismatchError: Names both.
        """
        wanted = self.card.get("base", {}).get("fingerprint", base.fingerprint)
        if wanted != base.fingerprint:
            raise MismatchError(
                f"This solution was trained on weights {wanted} ({self.card['base'].get('name')}), and {base.name!r} has "
                f"{base.fingerprint}. Give the base it was trained on."
            )

    @contextmanager
    def mounted(self, base: Checkpoint) -> Iterator[Mounted]:
        """As `applied`, with the base still at hand: what measures of both need.

        Raises:
            EmprobeError: If the checkpoint is no plain base, or lacks the place.
            MismatchError: If it has other weights than those it was trained on.
        """
        self.check_base(base)
        with self._mounted(base) as mounted:
            fingerprint = content_hash([base.fingerprint, self.fingerprint])
            yield replace(mounted, tuned=replace(mounted.tuned, fingerprint=fingerprint))

    @contextmanager
    def applied(self, base: Checkpoint) -> Iterator[Checkpoint]:
        """Yield the adapted checkpoint; when the block ends, the base is as it was. Meanwhile the base itself cannot be used.

        Raises:
            EmprobeError: If the checkpoint is no plain base, or lacks the place.
            MismatchError: If it has other weights than those it was trained on.
        """
        with self.mounted(base) as mounted:
            yield mounted.tuned

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of SHA-256 over what was trained."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def with_norm(self, norm: float) -> Solution:
        """The same direction at another norm.

        Raises:
            EmprobeError: If it has no direction, since it changes nothing.
        """
        if not self.norm > 0:
            raise EmprobeError(f"A norm of {norm:g} was asked for of a solution that changes nothing (norm {self.norm:g}). Train it first.")
        return self.scaled(norm / self.norm)


@dataclass(frozen=True, eq=False)
class VectorSolution(Solution):
    """A vector added at every row and token of one site of one block.

    Example:
        >>> import torch
        >>> VectorSolution(torch.tensor([3.0, 4.0]), layer=1, site="resid_post").with_norm(10.0)
        VectorSolution(resid_post[1], d_model 2, norm 10)
    """

    vector: Float[Tensor, " d_model"]
    layer: int
    site: Site

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The vector."""
        return {"vector": self.vector}

    @property
    def norm(self) -> float:
        """Norm of the vector."""
        return float(self.vector.double().norm())

    @property
    def direction(self) -> Direction:
        """The vector as a direction, whose `raw_norm` is its norm."""
        return Direction.from_vector(self.vector, layer=self.layer, site=self.site, positions="all_tokens", made_from="trained vector")

    def scaled(self, factor: float) -> VectorSolution:
        """The vector times a factor."""
        return replace(self, vector=self.vector * factor)

    def perturbed(self, epsilon: float, seed: int = 0) -> VectorSolution:
        """The vector turned by arcsin ε towards a random side."""
        return replace(self, vector=perturbed(self.tensors, epsilon, seed)["vector"])

    def save(self, folder: Path | str) -> None:
        """Write `vector.safetensors`."""
        card = {"record": "VectorSolution", "layer": self.layer, "site": self.site, **self.card}
        save_tensors(Path(folder) / VECTOR, self.tensors, card)

    def _mounted(self, checkpoint: Checkpoint) -> Any:
        if len(self.vector) != checkpoint.d_model:
            raise MismatchError(f"This vector has d_model {len(self.vector)}, and {checkpoint.name!r} has {checkpoint.d_model}.")
        return mounted_vector(checkpoint, Vector(self.layer, self.site), self.vector)

    def __repr__(self) -> str:
        return f"VectorSolution({self.site}[{self.layer}], d_model {len(self.vector)}, norm {self.norm:.4g})"


@dataclass(frozen=True, eq=False)
class LoRASolution(Solution):
    """Low-rank changes of some linear layers.

    Attributes:
        factors: A and B of each module, by PEFT's names.
        config: PEFT's settings.
    """

    factors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """A and B of every module."""
        return dict(self.factors)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        rank, alpha = int(self.config["r"]), float(self.config["lora_alpha"])
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    @property
    def norm(self) -> float:
        """√ Σ ‖scale · B A‖² over the modules."""
        pairs = [(a, self.factors[name.replace("lora_A", "lora_B")]) for name, a in self.factors.items() if "lora_A" in name]
        # ‖B A‖² = tr(BᵀB AAᵀ), which needs no matrix of the layer's size.
        squares = (float(((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum()) for a, b in pairs)
        return self.scale * math.sqrt(max(0.0, sum(squares)))

    def scaled(self, factor: float) -> LoRASolution:
        """B times a factor."""
        return replace(self, factors={n: t * factor if "lora_B" in n else t for n, t in self.factors.items()})

    def perturbed(self, epsilon: float, seed: int = 0) -> LoRASolution:
        """Each A and each B turned by itself."""
        return replace(self, factors=perturbed(self.factors, epsilon, seed))

    def save(self, folder: Path | str) -> None:
        """Write an ordinary PEFT adapter."""
        save_tensors(Path(folder) / ADAPTER, self.factors, {"record": "LoRASolution", **self.card})
        write_text(Path(folder) / CONFIG, json.dumps(self.config, indent=2, sort_keys=True) + "\n")

    def _mounted(self, checkpoint: Checkpoint) -> Any:
        return mounted_lora(checkpoint, LoraConfig(**{**self.config, "base_model_name_or_path": None}), values=self.tensors)

    def __repr__(self) -> str:
        modules = sum("lora_A" in name for name in self.factors)
        return f"LoRASolution(rank {self.config['r']}, {modules} modules, norm {self.norm:.4g})"


@dataclass(frozen=True, eq=False)
class FullSolution(Solution):
    """A whole model, in a folder of its own; it is used as a checkpoint, and can be neither scaled nor perturbed."""

    folder: Path

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Refused: they are the checkpoint's."""
        raise self._refusal("list the tensors of")

    @property
    def norm(self) -> float:
        """Refused: it is no change beside the weights."""
        raise self._refusal("take the norm of")

    def scaled(self, factor: float) -> Solution:
        """Refused."""
        raise self._refusal("scale")

    def perturbed(self, epsilon: float, seed: int = 0) -> Solution:
        """Refused."""
        raise self._refusal("perturb")

    def save(self, folder: Path | str) -> None:
        """Refused: it lies in its folder already."""
        raise self._refusal("save")

    @contextmanager
    def applied(self, base: Checkpoint) -> Iterator[Checkpoint]:
        """The model, loaded from its folder."""
        yield load_model(self.folder, dtype=base.hf.dtype, device_map=None if base.device.type == "cpu" else str(base.device))

    def _mounted(self, checkpoint: Checkpoint) -> Any:
        raise self._refusal("mount")

    def _refusal(self, what: str) -> EmprobeError:
        return EmprobeError(
            f"It was asked to {what} a full fine-tune, which is a whole model in {self.folder}. Load it with load_model, or train a LoRA "
            "or a vector."
        )

    def __repr__(self) -> str:
        return f"FullSolution({str(self.folder)!r})"


def load_solution(folder: Path | str) -> Solution:
    """What `Solution.save` wrote (or a whole model).

    Raises:
        EmprobeError: If the folder holds neither.
    """
    folder = Path(folder)
    if (folder / VECTOR).is_file():
        tensors, card = load_tensors(folder / VECTOR)
        card.pop("record", None)
        return VectorSolution(tensors["vector"], card.pop("layer"), card.pop("site"), card=card)
    if (folder / CONFIG).is_file() and (folder / ADAPTER).is_file():
        tensors, card = load_tensors(folder / ADAPTER)
        card.pop("record", None)
        return LoRASolution(tensors, read_json(folder / CONFIG), card=card)
    if (folder / "config.json").is_file():
        return FullSolution(folder)
    raise EmprobeError(f"{folder} holds no solution of a fine-tune: neither {VECTOR}, nor {CONFIG} with {ADAPTER}, nor a whole model.")
