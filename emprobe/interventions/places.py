"""Where writes go: hooks at a site of a block, in the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emprobe.interventions.edit import Place
from emprobe.models.sites import Tap, hidden_of, input_of, taps_of, with_hidden

Write = Callable[[Tensor], Tensor]


class Hooked:
    """The hooks of one `intervene` block.

    They stand before every other hook of a module, so that those (a capture's) see what was written, but after those of blocks that were
    entered earlier and are still open, which have written by then.
    """

    def __init__(self, checkpoint: Any, stack: ExitStack, earlier: Sequence[Hooked | None]) -> None:
        self.checkpoint, self.stack = checkpoint, stack
        self.earlier = [handle for hooked in earlier if hooked for handle in hooked.handles]
        self.handles: list[tuple[nn.Module, RemovableHandle]] = []

    def write(self, place: Place, write: Write) -> None:
        """Replace every hidden state that passes a place by what `write` makes of it."""
        layer, site = place
        if site == "resid_mid":
            self._write_middle(layer, write)
            return
        tap: Tap = taps_of(self.checkpoint, site, [layer])[0]
        if tap.side == "input":
            self._before(tap.module, write)
        else:
            self._after(tap.module, write)

    def _write_middle(self, layer: int, write: Write) -> None:
        """The stream after attention is held by no module: what attention adds is changed by what is to change in the sum."""
        taps_of(self.checkpoint, "resid_mid", [layer])  # refuses models that have none
        (block,), (attention,) = taps_of(self.checkpoint, "resid_pre", [layer]), taps_of(self.checkpoint, "attn_out", [layer])
        entered: list[Tensor] = []

        def remember(hidden: Tensor) -> None:
            entered[:] = [hidden]

        def written(added: Tensor) -> Tensor:
            middle = entered.pop() + added
            return added + (write(middle) - middle)

        # Listens after all writes to the block's input, which are hooked in front.
        self._keep(block.module, block.listen(remember), first=False)
        self._after(attention.module, written)

    def _after(self, module: nn.Module, write: Write) -> None:
        def hook(_: Any, args: tuple[Any, ...], output: Any) -> Any:
            return with_hidden(output, write(hidden_of(output)))

        self._keep(module, module.register_forward_hook(hook, prepend=True))

    def _before(self, module: nn.Module, write: Write) -> None:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            written = write(input_of(args, kwargs))
            return ((written, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": written})

        self._keep(module, module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))

    def _keep(self, module: nn.Module, handle: RemovableHandle, *, first: bool = True) -> None:
        self.stack.callback(handle.remove)
        if not first:
            return
        for other, known in reversed(self.earlier):
            if other is module:
                order: tuple[Any, ...] = (module._forward_hooks, module._forward_pre_hooks)
                for hooks in order:
                    if known.id in hooks:
                        hooks.move_to_end(known.id, last=False)
        self.handles.append((module, handle))
