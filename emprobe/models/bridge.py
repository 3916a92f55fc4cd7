"""The one door to TransformerLens: its `TransformerBridge` round a twin of a model, and how its names and sums relate to ours."""

from __future__ import annotations

import copy
import logging
import warnings
from functools import partial
from typing import Any

import torch

from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.models.load import Checkpoint
from emprobe.models.twin import wrapped_twin
from emprobe.types import Site

HOOK_NAMES: dict[Site, str] = {
    "resid_pre": "hook_in",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_out",
}
"""TransformerLens' names within `blocks.<layer>.`; its attn_out and mlp_out lie behind a norm of their own where the model has one."""

# How far the bridge may be off from the model, as a share of a hidden state's norm. Its attention is the eager kernel, whose sums
# run in another order; what it gets wrong (an adapter inside a fused matrix that it splits, another meaning of a site) is off by about 1.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2


def tolerance_of(dtype: torch.dtype) -> float:
    """How far the bridge of a model in this dtype may be off, as a share of the norm."""
    return TOLERANCES.get(dtype, HALF_TOLERANCE)


def bridge_refusal(checkpoint: Checkpoint, asked: str, why: str) -> EmprobeError:
    """The refusal of a bridge that computes something else than its model."""
    return EmprobeError(
        f"{asked} was asked for {checkpoint.name!r} ({type(checkpoint.hf).__name__}, adapter {checkpoint.adapter}), but "
        f"TransformerLens does not compute what the model does: {why}. Use {asked.partition('=')[0]}='hooks'."
    )


def bridge_of(checkpoint: Checkpoint, asked: str) -> tuple[Any, type[Exception]]:
    """A bridge round the checkpoint's twin, and the exception that ends its forward passes early.

    Args:
        checkpoint: Whose weights it shares.
        asked: What the user said, such as `backend='transformer_lens'`; for refusals.

    Raises:
        MissingExtraError: If transformer-lens is not installed.
        EmprobeError: If it has no bridge for the model, or as `wrapped_twin` refuses.

    Source: TransformerLens 4, `TransformerBridge.boot_transformers`.
    """
    bridge, stop = _import(asked)
    return wrapped_twin(checkpoint, "transformer_lens", asked, partial(_boot, bridge, checkpoint, asked)), stop


def _import(asked: str) -> tuple[Any, type[Exception]]:
    """`TransformerBridge` and the exception that ends its forwards, without what importing it does to transformers' log."""
    log = logging.getLogger("transformers")
    level = log.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformer_lens.model_bridge import TransformerBridge
            from transformer_lens.model_bridge.exceptions import StopAtLayerException
    except ImportError as error:
        raise MissingExtraError("transformer-lens", "transformer-lens", asked) from error
    finally:
        log.setLevel(level)
    return TransformerBridge, StopAtLayerException


def _boot(bridge: Any, checkpoint: Checkpoint, asked: str, twin: Any) -> Any:
    """A bridge round the twin, with a tokenizer of its own (it sets padding and special tokens on it)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bridge.boot_transformers(
                checkpoint.name, hf_model=twin, tokenizer=copy.deepcopy(checkpoint.tokenizer), device=checkpoint.device, dtype=twin.dtype
            )
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise EmprobeError(
            f"{asked} was asked for {checkpoint.name!r}, but TransformerLens cannot bridge a "
            f"{type(checkpoint.hf).__name__}: {str(error).strip().splitlines()[0]} Use {asked.partition('=')[0]}='hooks'."
        ) from error
