"""What every backend calls a model with."""

from __future__ import annotations

import torch
from torch import Tensor

from emprobe.capture.plan import Batch


def inputs_of(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What the model is called with. Padding on the right needs no mask: no real token sees a later one."""
    given = {"input_ids": batch.ids.to(device)}
    if batch.padding == "left":
        given["attention_mask"] = batch.mask.to(device)
        given["position_ids"] = (batch.mask.cumsum(dim=1) - 1).clamp(min=0).to(device)
    return given
