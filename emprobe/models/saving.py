"""Write a checkpoint whose weights or settings differ from those of a model in memory, which stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def reshaped(model: Any, settings: Mapping[str, Any]) -> Any:
    """The architecture of a model with other settings in its config, without weights (on torch's meta device).

    Args:
        model: A Hugging Face model.
        settings: Of its config, by name.
    """
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.device("meta"):
        made = type(model)(config).to(model.dtype)
    made.generation_config = copy.deepcopy(model.generation_config)
    # How weights are named in files, where that differs from the model; known since the model was loaded.
    made._weight_conversions = getattr(model, "_weight_conversions", None)
    return made.eval()


def save_checkpoint(shape: Any, weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights as an ordinary checkpoint.

    Args:
        shape: What `reshaped` gave.
        weights: By name; all that the shape has.
        tokenizer: Saved beside them.
        folder: Where.
    """
    logs: Any = transformers.logging
    shown = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        shape.save_pretrained(folder, state_dict=dict(weights))
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logs.enable_progress_bar()
