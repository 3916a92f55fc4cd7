"""The model of a checkpoint without PEFT layers: as it is, with its adapter merged in, or with it taken off."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from emprobe.errors import EmprobeError
from emprobe.models.load import Checkpoint


def plain_model(checkpoint: Checkpoint, *, merged: bool) -> Any:
    """A Hugging Face model of ordinary layers.

    A checkpoint that has no adapter gives its own model, which must not be changed; others a copy, so that the checkpoint stays as it is.

    Args:
        checkpoint: The model.
        merged: Whether an adapter that is on is added to the weights; otherwise they are those beneath it.

    Raises:
        EmprobeError: If the adapter cannot be merged.
    """
    if checkpoint.adapter == "none":
        return checkpoint.model
    with checkpoint.active():
        own = copy.deepcopy(checkpoint.model)
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that transformers means to drop, and warns of tied embeddings, which are untied afterwards.
        warnings.simplefilter("ignore")
        if not merged or checkpoint.adapter == "off":
            return own.unload()
        try:
            return own.merge_and_unload().eval()
        except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
            raise EmprobeError(
                f"The adapter of {checkpoint.name!r} cannot be merged into its base: {str(error).strip().splitlines()[0]} "
                "Export an intervention on the base, or merge it with the tool that made it."
            ) from error
