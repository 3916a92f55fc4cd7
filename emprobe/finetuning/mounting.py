"""A method put on a checkpoint for as long as a block lasts: what is trained, and the base with it switched off."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from emprobe.errors import EmprobeError
from emprobe.finetuning.losses import Head, head_of
from emprobe.finetuning.methods import LoRA, Vector
from emprobe.interventions.places import Hooked
from emprobe.models.adapters import AdapterSwitch, lowest_adapted_block, quiet_peft
from emprobe.models.load import Checkpoint
from emprobe.models.sites import check_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mounted:
    """A checkpoint with something trainable on it.

    Attributes:
        tuned: The adapted checkpoint.
        parameters: What moves, by name.
        base: While its block lasts, the base: yields the model to run.
        base_head: Makes the base's logits.
        head: Makes the adapted model's.
        lowest: The lowest block that differs from the base's.
        train: Puts dropout of the method on or off.
    """

    tuned: Checkpoint
    parameters: dict[str, nn.Parameter]
    base: Callable[[], AbstractContextManager[Any]]
    base_head: Head
    head: Head
    lowest: int = 0
    train: Callable[[bool], None] = lambda on: None


@dataclass
class _Session:
    """Stands in a checkpoint's list of interventions, so that the base, which shares the weights, is not used as if nothing were on."""

    hooked: Hooked | None = None
    adapter: str = "on"
    plans: tuple[Any, ...] = ()
    lines: tuple[Any, ...] = ()

    def as_dict(self) -> list[dict[str, Any]]:
        """Nothing is edited here that a receipt could tell of."""
        return []


@contextmanager
def _on(checkpoint: Checkpoint, session: _Session) -> Iterator[None]:
    if checkpoint.adapter != "none" or checkpoint.interventions:
        found = "an adapter on it" if checkpoint.adapter != "none" else "an intervention active on it"
        raise EmprobeError(
            f"{checkpoint.name!r} was given as the base of a fine-tune, and has {found}. Give a whole model as it is: merge the adapter "
            "first, and pass interventions that are to act during training as `during`."
        )
    gradients = [(p, p.requires_grad) for p in checkpoint.hf.parameters()]
    for parameter, _ in gradients:
        parameter.requires_grad_(False)
    checkpoint.interventions.append(session)
    try:
        yield
    finally:
        checkpoint.interventions.remove(session)
        for parameter, required in gradients:
            parameter.requires_grad_(required)


@contextmanager
def mounted_vector(checkpoint: Checkpoint, method: Vector, values: Tensor | None = None) -> Iterator[Mounted]:
    """A vector (of zeros, unless values are given) added at every row and token of one site.

    Raises:
        EmprobeError: If the model lacks the layer or site, or is no plain base.
    """
    check_layers(method.layer, checkpoint.n_layers, "A trained vector")
    head, switched = head_of(checkpoint.hf), [True]
    vector = nn.Parameter(torch.zeros(checkpoint.d_model) if values is None else values.detach().float().clone())

    def write(hidden: Tensor) -> Tensor:
        return hidden + vector.to(hidden.device, hidden.dtype) if switched[0] else hidden

    @contextmanager
    def base() -> Iterator[Any]:
        switched[0] = False
        try:
            yield checkpoint.hf
        finally:
            switched[0] = True

    session = _Session()
    with _on(checkpoint, session), ExitStack() as stack:
        session.hooked = Hooked(checkpoint, stack, [])
        session.hooked.write((method.layer, method.site), write)
        yield Mounted(_tuned(checkpoint, "vector"), {"vector": vector}, base, head, head, method.layer)


@contextmanager
def mounted_lora(
    checkpoint: Checkpoint, config: LoraConfig, *, seed: int = 0, values: dict[str, Tensor] | None = None
) -> Iterator[Mounted]:
    """PEFT's LoRA in the model's layers; new (it starts as nothing) or with given values.

    Raises:
        EmprobeError: If PEFT cannot put it there, or the model is no plain base.
    """
    head = head_of(checkpoint.hf)
    with _on(checkpoint, _Session()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                with quiet_peft():
                    wrapped: Any = get_peft_model(checkpoint.hf, copy.deepcopy(config))
            except (ValueError, TypeError) as error:
                raise EmprobeError(f"PEFT cannot put this LoRA on {checkpoint.name!r}: {str(error).splitlines()[0]}") from error
        try:
            wrapped.eval()
            named = {_short(n): p for n, p in wrapped.named_parameters() if p.requires_grad}
            for name, value in (values or {}).items():
                named[name].data.copy_(value)
            switch = AdapterSwitch(wrapped, checkpoint.fingerprint)
            tuned = replace(_tuned(checkpoint, "lora"), model=wrapped, switch=switch)

            @contextmanager
            def base() -> Iterator[Any]:
                switch.turn(False)
                try:
                    yield checkpoint.hf
                finally:
                    switch.turn(True)

            dropouts = [m for n, m in wrapped.named_modules() if ".lora_dropout." in n]
            yield Mounted(tuned, named, base, head, head_of(checkpoint.hf), lowest_adapted_block(tuned), partial(_set_training, dropouts))
        finally:
            wrapped.unload()


@contextmanager
def mounted_full(checkpoint: Checkpoint, *, with_base: bool) -> Iterator[Mounted]:
    """All weights; the base, if it is needed, is a second copy of them."""
    frozen: Any = None
    if with_base:
        frozen = copy.deepcopy(checkpoint.hf).requires_grad_(False)
        size = sum(p.numel() * p.element_size() for p in frozen.parameters())
        logger.warning("A full fine-tune with a KL keeps a second copy of all weights: %.2f GB more memory.", size / 1e9)
    with _on(checkpoint, _Session()):
        for parameter in checkpoint.hf.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        tuned = _tuned(checkpoint, "full")
        head = head_of(checkpoint.hf)
        base_head = head_of(frozen) if with_base else head
        yield Mounted(tuned, dict(checkpoint.hf.named_parameters()), lambda: nullcontext(frozen), base_head, head)


def lora_config(checkpoint: Checkpoint, method: LoRA) -> LoraConfig:
    """PEFT's configuration of a LoRA, checked against a model.

    Raises:
        EmprobeError: A module or layer that the model lacks; names those there are.
    """
    layers = list(check_layers(list(method.layers), checkpoint.n_layers, "LoRA")) if method.layers else None
    if method.target_modules == "all-linear":
        targets = sorted({n.rsplit(".", 1)[-1] for n, m in checkpoint.blocks.named_modules() if _is_linear(m)})
    else:
        targets = [method.target_modules] if isinstance(method.target_modules, str) else list(method.target_modules)
    names = [n for n, m in checkpoint.hf.named_modules() if getattr(m, "weight", None) is not None]
    missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing:
        there = sorted({n.rsplit(".", 1)[-1] for n, m in checkpoint.hf.named_modules() if _is_linear(m)})
        raise EmprobeError(
            f"LoRA was asked for on {', '.join(map(repr, missing))}, and {checkpoint.name!r} has no such module. It has: "
            f"{', '.join(there)}; or say all-linear."
        )
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.numerator,  # type: ignore[arg-type] # PEFT takes floats
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in checkpoint.blocks.modules()),
        task_type="CAUSAL_LM",
    )


def plain_config(config: LoraConfig, base: str) -> dict[str, Any]:
    """PEFT's settings as plain values, with the base as the user calls it."""
    keep = ("r", "lora_alpha", "lora_dropout", "use_rslora", "layers_to_transform")
    found: dict[str, Any] = {name: getattr(config, name) for name in keep}
    targets = config.target_modules
    found["target_modules"] = targets if isinstance(targets, str) else sorted(targets or ())
    found |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": config.fan_in_fan_out, "inference_mode": False}
    return found | {"base_model_name_or_path": base}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _set_training(modules: Sequence[nn.Module], on: bool) -> None:
    for module in modules:
        module.train(on)


def _tuned(checkpoint: Checkpoint, what: str) -> Checkpoint:
    return replace(checkpoint, name=f"{checkpoint.name} + {what}", adapter="on")


def _short(name: str) -> str:
    """A parameter's name as PEFT saves it."""
    return name.replace(".default.", ".").replace(".default", "")
