"""Where writes go: hooks at a site of a block, in the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emprobe.interventions.edit import Place, rank_of
from emprobe.interventions.writing import Write, written_in_sum
from emprobe.models.sites import Tap, hidden_of, input_of, taps_of, with_hidden


class Hooked:
    """The hooks of one `intervene` block.

    They stand before every other hook of a module, so that those (a capture's) see what was written. Among themselves they act in the order
    in which a forward pass comes to their sites, and at one site in the order in which blocks were entered, earlier ones first.

    Attributes:
        entered: What entered a block whose `resid_mid` is written, by layer, until its attention has run.
    """

    def __init__(self, checkpoint: Any, stack: ExitStack, earlier: Sequence[Hooked | None]) -> None:
        self.checkpoint, self.stack = checkpoint, stack
        self.earlier = [hook for hooked in earlier if hooked for hook in hooked.hooks]
        self.hooks: list[tuple[nn.Module, tuple[int, int], int]] = []
        self.entered: dict[int, Tensor] = {}
        stack.callback(self.entered.clear)

    def write(self, place: Place, write: Write) -> None:
        """Replace every hidden state that passes a place by what `write` makes of it."""
        layer, site = place
        if site == "resid_mid":
            self._write_middle(place, write)
            return
        tap: Tap = taps_of(self.checkpoint, site, [layer])[0]
        if tap.side == "input":
            self._before(tap.module, place, write)
        else:
            self._after(tap.module, place, write)

    def _write_middle(self, place: Place, write: Write) -> None:
        """The stream after attention is held by no module: what attention adds is changed by what is to change in the sum."""
        layer = place[0]
        taps_of(self.checkpoint, "resid_mid", [layer])  # refuses models that have none
        (block,), (attention,) = taps_of(self.checkpoint, "resid_pre", [layer]), taps_of(self.checkpoint, "attn_out", [layer])

        def remember(hidden: Tensor) -> None:
            self.entered[layer] = hidden

        def written(added: Tensor) -> Tensor:
            return written_in_sum(self.entered.pop(layer), added, write)

        # Listens after all writes to the block's input, which are hooked in front.
        self.stack.callback(block.listen(remember).remove)
        self._after(attention.module, place, written)

    def _after(self, module: nn.Module, place: Place, write: Write) -> None:
        def hook(_: Any, args: tuple[Any, ...], output: Any) -> Any:
            return write(output) if isinstance(output, Tensor) else with_hidden(output, write(hidden_of(output)))

        self._keep(module, place, module.register_forward_hook(hook, prepend=True))

    def _before(self, module: nn.Module, place: Place, write: Write) -> None:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            written = write(input_of(args, kwargs))
            return ((written, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": written})

        self._keep(module, place, module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def _keep(self, module: nn.Module, place: Place, handle: RemovableHandle) -> None:
        self.stack.callback(handle.remove)
        self.hooks.append((module, rank_of(place), handle.id))
        ours = sorted(((rank, number) for other, rank, number in (*self.earlier, *self.hooks) if other is module), key=lambda hook: hook[0])
        order: tuple[Any, ...] = (module._forward_hooks, module._forward_pre_hooks)
        for hooks in order:
            for _, number in reversed(ours):
                if number in hooks:
                    hooks.move_to_end(number, last=False)
