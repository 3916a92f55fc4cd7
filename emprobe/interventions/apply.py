"""Carry out operators with forward hooks, for as long as a `with` block lasts and not a moment longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.interventions.operators import Operator
from emprobe.interventions.receipt import Line, Receipt
from emprobe.interventions.where import Tokens
from emprobe.models.load import Checkpoint
from emprobe.models.sites import check_layers, check_site, decoder_of, hidden_of, with_hidden


@dataclass
class _Pass:
    """What the tokens of the forward pass under way are; set before the first block, read by every hook."""

    tokens: Tokens | None = None


@contextmanager
def intervene(checkpoint: Checkpoint, *operators: Operator) -> Iterator[Receipt]:
    """Steer or ablate while the block lasts; afterwards the model is as it was, also after an exception.

    Several operators at one layer act in the order given, each on what the one before it left.

    Args:
        checkpoint: The model; inside the block its adapter is in this checkpoint's state.
        operators: `Add`, `Ablate`, `SetProjection`.

    Yields:
        The receipt, which fills while the model runs.

    Raises:
        EmprobeError: No operator, a layer or site that does not exist, or a direction of another width.
        InterventionDidNotFire: On leaving the block, if something asked for did not happen.
    """
    if not operators:
        raise EmprobeError("intervene was given no operator. Give at least one, such as Add(direction, coefficient=1).")
    lines = [Line(edit) for operator in operators for edit in operator.edits()]
    for line in lines:
        _check(checkpoint, line)
    receipt = Receipt(lines, checkpoint.adapter)
    with checkpoint.active() as model, ExitStack() as stack:
        state = _Pass()
        handle = decoder_of(model).register_forward_pre_hook(_announce(state, receipt), with_kwargs=True)
        stack.callback(handle.remove)
        for layer, site in dict.fromkeys((line.edit.layer, line.edit.site) for line in lines):
            here = [line for line in lines if (line.edit.layer, line.edit.site) == (layer, site)]
            stack.callback(_register(checkpoint.blocks[layer], site, _writer(here, state)).remove)
        checkpoint.interventions.append(receipt)
        stack.callback(_forget, checkpoint.interventions, receipt)
        yield receipt
    receipt.check()


def _forget(active: list[Any], receipt: Receipt) -> None:
    active[:] = [other for other in active if other is not receipt]


def _check(checkpoint: Checkpoint, line: Line) -> None:
    edit = line.edit
    check_site(edit.site)
    check_layers([edit.layer], checkpoint.n_layers, edit.label)
    if len(edit.vector) != checkpoint.d_model:
        raise EmprobeError(
            f"{edit.label} has a direction of d_model {len(edit.vector)}, but {checkpoint.name!r} has d_model {checkpoint.d_model}. "
            "Use a direction that was read from this model."
        )


def _announce(state: _Pass, receipt: Receipt) -> Callable[..., None]:
    """A pre-hook of the decoder: before the blocks run, work out what each position is."""

    def announce(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = ids if ids is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) else None
        state.tokens = Tokens.of((given.shape[0], given.shape[1]), mask, seen, receipt.prompt_lengths, given.device)

    return announce


def _writer(lines: list[Line], state: _Pass) -> Callable[[Tensor], Tensor]:
    """What is done to the hidden state at one block: every line in turn, counted as it is done."""

    def write(hidden: Tensor) -> Tensor:
        assert state.tokens is not None, "a block ran before its decoder"
        for line in lines:
            tokens = state.tokens.to(hidden.device)
            mask = line.edit.where.mask(tokens)
            edited, before, after = line.edit.apply(hidden, mask)
            with torch.no_grad():
                line.count(mask, tokens, before, after, hidden, edited)
            hidden = edited
        return hidden

    return write


def _register(block: torch.nn.Module, site: str, write: Callable[[Tensor], Tensor]) -> Any:
    """Hook a block's input or output, before any hook that is already there, so that those see what was written."""
    if site == "resid_post":
        return block.register_forward_hook(lambda _, args, output: with_hidden(output, write(hidden_of(output))), prepend=True)

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (write(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": write(kwargs["hidden_states"])}

    return block.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
