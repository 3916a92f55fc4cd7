"""A second body for the same weights: a copy of a model's modules that shares every tensor, for runtimes that rewrite what they wrap.

TransformerLens replaces a model's modules by its own and nnsight replaces their `forward`, both for good; the user's model must still
generate, save, take adapters and hooks afterwards. The modules are a few kilobytes, the weights are not copied.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from emprobe.errors import EmprobeError
from emprobe.models.load import Checkpoint


@dataclass(frozen=True)
class _Wrapped:
    """What a runtime made of a twin, and the tensors that the model had then."""

    tensors: tuple[Tensor, ...]
    made: Any


_wrapped: WeakKeyDictionary[nn.Module, dict[Hashable, _Wrapped]] = WeakKeyDictionary()


def wrapped_twin(checkpoint: Checkpoint, kind: str, asked: str, wrap: Callable[[Any], Any]) -> Any:
    """What `wrap` makes of the checkpoint's twin, with its adapters in the checkpoint's state.

    Made once per model, kind and state of its adapters, and anew if the model was given other tensors since. It goes when the model
    goes.

    Args:
        checkpoint: Whose weights are shared.
        kind: What `wrap` makes, in a word.
        asked: What the user said, such as `backend='nnsight'`; for refusals.
        wrap: Takes the twin.

    Raises:
        EmprobeError: If an intervention is active on the checkpoint, or its weights are offloaded, spread over devices or quantised.
    """
    _check(checkpoint, asked)
    with checkpoint.active() as model:
        tensors = tuple(_tensors(model))
        kept, state = _wrapped.setdefault(model, {}), (kind, _adapters(model))
        found = kept.get(state)
        if found is None or len(found.tensors) != len(tensors) or any(a is not b for a, b in zip(found.tensors, tensors, strict=True)):
            found = kept[state] = _Wrapped(tensors, wrap(twin_of(model)))
        return found.made


def _adapters(model: Any) -> Hashable:
    """What a twin does not share with its model: which adapters each PEFT layer adds, how strongly, and which are merged."""
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    return tuple((m.disable_adapters, *m.active_adapters, *m.merged_adapters, *getattr(m, "scaling", {}).items()) for m in layers)


def twin_of(model: Any) -> Any:
    """The model's modules copied, its parameters and buffers shared; hooks that stand on it are not taken along.

    >>> model = nn.Linear(2, 1)
    >>> twin = twin_of(model)
    >>> twin is model, twin.weight is model.weight
    (False, True)
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)}
    for module in model.modules():
        shared |= {id(hooks): OrderedDict() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
    return copy.deepcopy(model, shared)


def _tensors(model: Any) -> chain[Tensor]:
    return chain(model.parameters(), model.buffers())


def _check(checkpoint: Checkpoint, asked: str) -> None:
    instead = f"Use {asked.partition('=')[0]}='hooks'"
    if checkpoint.interventions:
        raise EmprobeError(
            f"An intervention is active on {checkpoint.name!r}, and {asked} would run it without: on modules of its own that share the "
            f"model's weights, not its hooks. {instead}, or leave the intervene block first."
        )
    model = checkpoint.hf
    found = ""
    if getattr(model, "is_quantized", False):
        found = "its weights are quantised"
    elif len(devices := set(getattr(model, "hf_device_map", {}).values())) > 1:
        found = f"its weights are spread over {', '.join(sorted(map(str, devices)))}"
    elif any(parameter.is_meta for parameter in model.parameters()):
        found = "some of its weights are not in memory (device 'meta')"
    if found:
        raise EmprobeError(
            f"{asked} was asked for {checkpoint.name!r}, but {found}, and it is proved only for plain weights on one device. {instead}."
        )
