"""Which matrices of a model write to its residual stream: found by their numbers in one small forward pass, never by their names.

A matrix writes at a place if what it puts out is what the model adds there. Where a norm of its own stands between (Gemma 2 and 3, OLMo 2),
or several experts are mixed, no single matrix does, and that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emprobe.errors import EmprobeError
from emprobe.interventions.edit import Place
from emprobe.models.blocks import blocks_of, decoder_of, hidden_of, input_of, probe_ids
from emprobe.models.proof import HALF_TOLERANCE, TOLERANCES, unhooked
from emprobe.models.sites import taps_of

EMBEDDINGS: Place = (0, "resid_pre")


@dataclass(frozen=True)
class Matrix:
    """A module that writes W x + b to the residual stream.

    Attributes:
        name: Of the module, in the Hugging Face model.
        transposed: Whether it stores W as [in, d_model]: GPT-2's Conv1D, and every embedding (in = vocabulary).
    """

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> Float[Tensor, "d_model in"]:
        """W; a view of what is stored."""
        stored = self.module.get_parameter("weight").detach()
        return stored.T if self.transposed else stored

    @property
    def bias(self) -> Float[Tensor, " d_model"] | None:
        """What is written whatever the input."""
        found = getattr(self.module, "bias", None)
        return found.detach() if isinstance(found, Tensor) else None

    @property
    def is_embedding(self) -> bool:
        """Whether its input are token or position numbers."""
        return isinstance(self.module, nn.Embedding)


@dataclass
class _Seen:
    """What went through the model: per block what its modules put out and what was added, and what entered the first."""

    linear: dict[str, tuple[Matrix, Tensor]] = field(default_factory=dict)
    embedded: list[tuple[Matrix, Tensor]] = field(default_factory=list)
    added: dict[Place, Tensor] = field(default_factory=dict)
    entered: Tensor | None = None


def matrices_of(model: Any, places: Sequence[Place]) -> dict[Place, list[Matrix]]:
    """The matrices that write at each place; at `EMBEDDINGS` every embedding that is summed there, elsewhere one.

    Args:
        model: A Hugging Face model without PEFT layers.
        places: `EMBEDDINGS`, or attn_out and mlp_out of blocks.

    Raises:
        EmprobeError: If no matrix writes there directly (a norm, experts, quantised weights), or its weights are not in memory.
    """
    seen = _watched(model, [place for place in places if place != EMBEDDINGS])
    found = {place: [_matrix_at(model, place, seen)] for place in places if place != EMBEDDINGS}
    if EMBEDDINGS in places:
        found[EMBEDDINGS] = _embeddings(model, seen)
    for place, matrices in found.items():
        for matrix in matrices:
            if matrix.weight.is_meta:
                raise EmprobeError(
                    f"The weights of {matrix.name}, which writes at {_at(place)}, are offloaded. Load the model into memory."
                )
    return found


def _watched(model: Any, places: Sequence[Place]) -> _Seen:
    seen, decoder = _Seen(), decoder_of(model)
    blocks = {id(module) for block in blocks_of(model) for module in block.modules()}
    # What is proved of the sites is proved first, by a pass of its own.
    taps = {place: taps_of(model, place[1], [place[0]])[0] for place in places}
    with unhooked(decoder), ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2 and not list(module.children()):
                stack.callback(module.register_forward_hook(_watcher(name, module, seen, inside=id(module) in blocks)).remove)
        for place, tap in taps.items():
            stack.callback(tap.module.register_forward_hook(_keeper(place, seen)).remove)
        stack.callback(blocks_of(model)[0].register_forward_pre_hook(_entrance(seen), with_kwargs=True).remove)
        decoder(input_ids=probe_ids(model), use_cache=False)
    return seen


def _watcher(name: str, module: nn.Module, seen: _Seen, *, inside: bool) -> Any:
    def hook(_: Any, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if isinstance(module, nn.Embedding):
            if not inside:
                seen.embedded.append((Matrix(name, module, transposed=True), output.detach().clone()))
        elif inside and args:
            transposed = _orientation(module, args[0], output)
            if transposed is not None:
                seen.linear[name] = Matrix(name, module, transposed), output.detach().clone()

    return hook


def _orientation(module: nn.Module, given: Tensor, output: Tensor) -> bool | None:
    """Whether a module's output is x W + b (True) or x Wᵀ + b (False) of its input, by its numbers; `None` if neither."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return None
    for transposed in (False, True):
        stored = weight if transposed else weight.T
        if stored.shape == (given.shape[-1], output.shape[-1]):
            product = given @ stored
            if _same(output, product if bias is None else product + bias):
                return transposed
    return None


def _keeper(place: Place, seen: _Seen) -> Any:
    def hook(_: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.added[place] = hidden_of(output).detach().clone()

    return hook


def _entrance(seen: _Seen) -> Any:
    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.entered = input_of(args, kwargs).detach().clone()

    return hook


def _same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    tolerance = TOLERANCES.get(left.dtype, HALF_TOLERANCE)
    return bool((left.double().cpu() - right.double().cpu()).norm() <= tolerance * left.double().cpu().norm())


def _matrix_at(model: Any, place: Place, seen: _Seen) -> Matrix:
    """The matrix whose output is what is added at a place."""
    added, block = seen.added[place], blocks_of(model)[place[0]]
    own = {id(module) for module in block.modules()}
    found = [m for m, output in seen.linear.values() if id(m.module) in own and _same(added, output)]
    if found:
        return found[-1]
    raise EmprobeError(f"No single matrix of {type(model).__name__} writes at {_at(place)}: {_why(model, place, block)}")


def _why(model: Any, place: Place, block: nn.Module) -> str:
    tap = taps_of(model, place[1], [place[0]])[0].module
    name = next(name for name, module in block.named_modules() if module is tap)
    weights = [weight for weight in tap.parameters() if weight.ndim >= 2]
    if not weights and any(True for _ in tap.parameters()):
        return (
            f"what the block adds there is the output of {name} ({type(tap).__name__}), a norm that stands after the matrix, so a change "
            "of the matrix is not the change of what is written. Use hooks (emprobe.intervene), or the target lm_eval."
        )
    if any("expert" in child.lower() for child, _ in tap.named_modules()):
        return f"{name} ({type(tap).__name__}) mixes the outputs of several experts, which are not exported. Use hooks (emprobe.intervene)."
    if weights and not any(weight.is_floating_point() for weight in weights):
        return f"the weights of {name} ({type(tap).__name__}) are quantised. Load the model without quantization."
    return f"looked in {name} ({type(tap).__name__}) for one whose output is what the block adds. Use hooks (emprobe.intervene)."


def _embeddings(model: Any, seen: _Seen) -> list[Matrix]:
    """The embeddings whose sum, perhaps times a number, enters block 0."""
    assert seen.entered is not None
    entered = seen.entered.double()
    fitting = [(m, output.double()) for m, output in seen.embedded if output.shape[-1] == entered.shape[-1]]
    if fitting:
        total = sum((output.expand_as(entered) for _, output in fitting), torch.zeros_like(entered))
        factor = (entered * total).sum() / (total * total).sum()
        if _same(entered.to(seen.entered.dtype), (factor * total).to(seen.entered.dtype)):
            return [m for m, _ in fitting]
    names = ", ".join(m.name for m, _ in seen.embedded) or "none"
    raise EmprobeError(
        f"What enters block 0 of {type(model).__name__} is not the sum of its embeddings ({names}): a norm or a projection stands between, "
        "so a change of the embeddings is not the change of what is written. Use hooks (emprobe.intervene)."
    )


def _at(place: Place) -> str:
    return f"{place[1]}[{place[0]}]"
