"""Gradient checkpointing: a block that is run again in the backward pass is steered as it was the first time, and not counted twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from emprobe.interventions.kernels import State

Entered = dict[int, Tensor]
"""What entered a block, by layer, until its attention has run."""


class Recompute:
    """Remembers of every checkpointed block what its forward pass was, until the backward pass runs it again.

    Args:
        state: What the hooks of one `intervene` block share.
        entered: What its writes to `resid_mid` keep.
    """

    def __init__(self, state: State, entered: Entered) -> None:
        self.state, self.entered = state, entered
        self._wrapped: dict[nn.Module, tuple[Any, Any]] = {}

    def listen(self, blocks: nn.ModuleList) -> None:
        """Stand in for the function by which these blocks are checkpointed, if they are."""
        for layer, block in enumerate(blocks):
            if getattr(block, "gradient_checkpointing", False) and block not in self._wrapped:
                own: Any = block._gradient_checkpointing_func
                block._gradient_checkpointing_func = self._remembering(own, layer)  # type: ignore[assignment]
                self._wrapped[block] = (own, block._gradient_checkpointing_func)

    def leave(self) -> None:
        """Put the functions back."""
        for block, (own, ours) in self._wrapped.items():
            if block._gradient_checkpointing_func is ours:
                block._gradient_checkpointing_func = own
        self._wrapped.clear()

    def _remembering(self, checkpoint: Callable[..., Any], layer: int) -> Callable[..., Any]:
        def remembering(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state, entered = replace(self.state), dict(self.entered)
            first = True

            def again(*inner: Any, **named: Any) -> Any:
                nonlocal first
                now = replace(self.state), dict(self.entered)
                if not first:
                    assert state.tokens is not None
                    self._set(replace(state, tokens=replace(state.tokens, counts=False)), entered)
                if layer in self.entered and inner:
                    # Reentrant checkpointing hands the block a copy of its input, cut from the graph.
                    self.entered[layer] = inner[0]
                try:
                    return run(*inner, **named)
                finally:
                    if not first:
                        self._set(*now)
                    first = False

            return checkpoint(again, *args, **kwargs)

        return remembering

    def _set(self, state: State, entered: Entered) -> None:
        vars(self.state).update(vars(state))
        self.entered.clear()
        self.entered.update(entered)
