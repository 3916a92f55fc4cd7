"""The low-rank parts of an adapter that is on, module by module, so that an ablation of base and adapter is one adapter again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from emprobe.errors import EmprobeError
from emprobe.models.load import Checkpoint


@dataclass(frozen=True)
class Factors:
    """W + B A and b + bias, in float64.

    Attributes:
        bias: What is added to the output whatever the input; `None` is nothing.
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    bias: Float[Tensor, " out"] | None = None


def adapter_factors(checkpoint: Checkpoint) -> dict[str, list[Factors]]:
    """By the name of the module, what each adapter of a checkpoint adds to it; empty where none is on.

    Raises:
        EmprobeError: If an adapter does anything but add low-rank matrices (and constants).
    """
    if checkpoint.adapter != "on" or checkpoint.switch is None:
        return {}
    found: dict[str, list[Factors]] = {}
    for name, module in checkpoint.hf.named_modules():
        if not (hasattr(module, "base_layer") or hasattr(module, "modules_to_save")):
            continue
        for adapter in checkpoint.switch.names:
            factors = _factors(module, adapter)
            if factors is None:
                raise EmprobeError(
                    f"The adapter of {checkpoint.name!r} changes {name} by more than adding low-rank matrices ({type(module).__name__}), "
                    "so its ablation is no LoRA. Use the target weights, which merges it first."
                )
            found.setdefault(name, []).extend(factors)
    return found


def _factors(module: nn.Module, adapter: str) -> list[Factors] | None:
    layer: Any = module
    if getattr(layer, "lora_variant", None) or not hasattr(layer, "scaling"):
        return None
    if adapter in layer.lora_A:
        if any(weight.ndim != 2 for weight in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)):
            return None
        a, b, bias = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.lora_B[adapter].bias
    elif adapter in layer.lora_embedding_A:
        a, b, bias = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], None
    else:
        return []
    scale = layer.scaling[adapter]
    added = None if bias is None else scale * bias.detach().double().cpu()
    return [Factors(a.detach().double().cpu(), scale * b.detach().double().cpu(), added)]
