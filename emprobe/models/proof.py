"""Which modules of a block add to the residual stream: guessed by name, proved by one small forward pass of the model itself.

Names do not tell. `post_attention_layernorm` comes before the MLP in Llama and after the attention in Gemma 2; `self_attn` adds its own
output in Llama and not in OLMo 2; Granite scales what it adds. So a guess stands only if its numbers add up at every block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from emprobe.errors import EmprobeError
from emprobe.models.blocks import PROBE_TOKENS, blocks_of, decoder_of, hidden_of, input_of, probe_ids

ATTENTION_NAMES = ("attn", "attention")
MLP_NAMES = ("mlp", "feedforward", "feed_forward", "ffn", "moe")
# How far a sum may be off, as a share of the smaller of its two addends. A wrong guess is off by about 1, and sums are formed in the
# model's own dtype and order, so a right one is exact but for fused kernels.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
HALF_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Parts:
    """What the probe found in one block: names of child modules, `None` where nothing was proved.

    Attributes:
        block: The block's class.
        dtype: Of the residual stream.
        closest: The pair of children, attention's and MLP's, whose outputs come closest to adding up with the block's input to its
            output, and by how much they miss it (`deviation`, 0 = exact).
        middle: The child whose input comes closest to resid_pre + attn_out, and by how much it misses it (`middle_deviation`).
        parallel: Whether something that runs after the attention reads what the attention reads.
    """

    block: str
    dtype: torch.dtype
    closest: tuple[str, str] | None = None
    deviation: float = math.inf
    middle: str | None = None
    middle_deviation: float = math.inf
    parallel: bool = False

    @property
    def tolerance(self) -> float:
        """How large a deviation may be."""
        return TOLERANCES.get(self.dtype, HALF_TOLERANCE)


@dataclass
class _Seen:
    """What went through one block and its children, in the order in which they were called."""

    pre: Tensor | None = None
    order: list[str] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


_proofs: WeakKeyDictionary[nn.Module, tuple[Parts, ...]] = WeakKeyDictionary()


def parts_of(model: Any) -> tuple[Parts, ...]:
    """What is proved of each block of a model, whose adapter stays in the state it is in; paid for once per model.

    Raises:
        EmprobeError: If the model cannot run on plain token ids.
    """
    if model not in _proofs:
        _proofs[model] = _probe(model)
    return _proofs[model]


def _probe(model: Any) -> tuple[Parts, ...]:
    decoder = decoder_of(model)
    found: list[Parts] = []
    with unhooked(decoder), ExitStack() as stack, torch.no_grad():
        for block in blocks_of(model):
            _watch(block, stack, found)
        try:
            decoder(input_ids=probe_ids(model), use_cache=False)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise EmprobeError(
                f"{type(model).__name__} did not run on {PROBE_TOKENS} token ids, so where its blocks can be read is unknown: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
    return tuple(found)


@contextmanager
def unhooked(decoder: nn.Module) -> Iterator[None]:
    """Put everybody's hooks aside for a moment: an intervention under way must neither spoil the proof nor count its tokens."""
    kept = [(module, module._forward_hooks, module._forward_pre_hooks) for module in decoder.modules()]
    try:
        for module, after, before in kept:
            module._forward_hooks, module._forward_pre_hooks = type(after)(), type(before)()
        yield
    finally:
        for module, after, before in kept:
            module._forward_hooks, module._forward_pre_hooks = after, before


def _watch(block: nn.Module, stack: ExitStack, found: list[Parts]) -> None:
    """Hook a block so that running it appends what is proved of it; what was seen is let go at once."""
    seen = _Seen()

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.pre = _copy(input_of(args, kwargs))

    def leave(_: Any, args: tuple[Any, ...], output: Any) -> None:
        found.append(_prove(type(block).__name__, seen, _copy(hidden_of(output))))
        seen.pre = None
        for kept in (seen.order, seen.inputs, seen.outputs):
            kept.clear()

    stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(block.register_forward_hook(leave).remove)
    for name, child in block.named_children():
        before, after = _child_watchers(name, seen)
        stack.callback(child.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(child.register_forward_hook(after).remove)


def _child_watchers(name: str, seen: _Seen) -> tuple[Callable[..., None], Callable[..., None]]:
    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        seen.order.append(name)
        if isinstance(given, Tensor):
            seen.inputs[name] = _copy(given)

    def after(_: Any, args: tuple[Any, ...], output: Any) -> None:
        given = output[0] if isinstance(output, tuple) else output
        if isinstance(given, Tensor):
            seen.outputs[name] = _copy(given)

    return before, after


def _copy(hidden: Tensor) -> Tensor:
    # Some blocks add in place to what a child returned.
    return hidden.detach().cpu().clone()


def _prove(block: str, seen: _Seen, post: Tensor) -> Parts:
    pre = seen.pre
    assert pre is not None, "a block ended that did not begin"
    found = Parts(block, pre.dtype)
    missed = {
        (a, m): _missed(pre, seen.outputs[a], seen.outputs[m], post)
        for a, m in product(_named(seen, ATTENTION_NAMES), _named(seen, MLP_NAMES))
        if a != m
    }
    if not missed:
        return found
    closest = next((pair for pair in missed if missed[pair] <= found.tolerance), min(missed, key=lambda pair: missed[pair]))
    found = replace(found, closest=closest, deviation=missed[closest])
    return _with_middle(found, seen) if found.deviation <= found.tolerance else found


def _named(seen: _Seen, words: tuple[str, ...]) -> list[str]:
    """Children with one of the words in their names and an output like the residual stream, the last to run first.

    Where a norm or a dropout follows the attention, it is that which is added.
    """
    assert seen.pre is not None
    like = [n for n in dict.fromkeys(reversed(seen.order)) if n in seen.outputs and seen.outputs[n].shape == seen.pre.shape]
    return [name for name in like if any(word in name.lower() for word in words)]


def _missed(pre: Tensor, attention: Tensor, mlp: Tensor, post: Tensor) -> float:
    """How far resid_pre + attn_out + mlp_out is from resid_post, in the best of the orders in which blocks add them."""
    sums = ((pre + attention) + mlp, (mlp + attention) + pre, (pre + mlp) + attention)
    return min(_share(post, total, attention, mlp) for total in sums)


def _share(left: Tensor, right: Tensor, *addends: Tensor) -> float:
    """Norm of the difference as a share of the smallest addend's norm."""
    difference = float((left.double() - right.double()).norm())
    smallest = min(float(addend.double().norm()) for addend in addends)
    return difference / smallest if smallest else (0.0 if difference == 0 else math.inf)


def _with_middle(found: Parts, seen: _Seen) -> Parts:
    """Look for the child that receives resid_pre + attn_out, among those that are called after the attention."""
    assert seen.pre is not None
    assert found.closest is not None
    attention = found.closest[0]
    added = seen.outputs[attention]
    later = [n for n in seen.order[seen.order.index(attention) + 1 :] if n in seen.inputs and seen.inputs[n].shape == added.shape]
    missed = {name: _share(seen.inputs[name], seen.pre + added, added) for name in later}
    middle = min(missed, key=lambda name: missed[name], default=None)
    read = [seen.inputs[name] for name in seen.order[: seen.order.index(attention) + 1] if name in seen.inputs]
    parallel = any(torch.equal(seen.inputs[name], other) for name in later for other in (seen.pre, *read) if other.shape == added.shape)
    return replace(found, middle=middle, middle_deviation=missed[middle] if middle else math.inf, parallel=parallel)
