"""Load one checkpoint: a directory or hub id, with or without PEFT adapters, or say in one sentence why not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import content_hash
from emprobe.models.adapters import AdapterSwitch, attach, is_adapter
from emprobe.models.blocks import blocks_of, entrance_of
from emprobe.models.weights import (
    Quantization,
    check_config,
    load_tokenizer,
    load_weights,
    local_directory,
    placed,
    quantized,
    weights_fingerprint,
)

AdapterState = Literal["none", "on", "off"]


@dataclass
class Checkpoint:
    """One model as the user means it: weights, tokenizer, and whether its adapter is on.

    Two checkpoints may share one set of weights (base = adapter off, tuned = adapter on), so every use goes through
    `active()`, which puts the adapter in this checkpoint's state and puts it back afterwards.

    Attributes:
        name: What the user called it.
        fingerprint: SHA-256 over the weight files (and the adapters', and how they are quantised), first 16 hex digits.
        adapter: `none`, or the state of the shared adapters (`on`, `off`) that makes this checkpoint.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    adapter: AdapterState = "none"
    switch: AdapterSwitch | None = None
    interventions: list[Any] = field(default_factory=list, repr=False)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Yield the Hugging Face model with the adapter in this checkpoint's state, in eval mode."""
        for session in self.interventions:
            if session.adapter != self.adapter:
                raise MismatchError(
                    f"An intervention is active on the checkpoint with adapter {session.adapter}, and {self.name!r} (adapter "
                    f"{self.adapter}) shares its weights, so it would be steered too. Leave the intervene block first."
                )
        before = self.switch.on if self.switch else True
        if self.switch:
            self.switch.turn(self.adapter == "on")
        try:
            yield self.hf
        finally:
            if self.switch:
                self.switch.turn(before)

    @property
    def hf(self) -> Any:
        """The Hugging Face model; inside a PEFT wrapper, the model whose layers the adapter was put into."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order."""
        return blocks_of(self.hf)

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.hf.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where token ids have to go."""
        return entrance_of(self.hf)

    def __repr__(self) -> str:
        kind = type(self.hf).__name__
        stacked = self.switch.names if self.switch and len(self.switch.names) > 1 else ()
        adapter = f"adapters {' + '.join(stacked)}" if stacked else "adapter"
        return f"Checkpoint({self.name!r}, {kind}, {self.n_layers} layers, d_model {self.d_model}, {adapter} {self.adapter})"


def load_model(
    path: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | None = None,
    quantization: Quantization | None = None,
    chat_template: str | None = None,
) -> Checkpoint:
    """Load one checkpoint in eval mode; code that comes with a checkpoint is never run.

    Args:
        path: Directory or hub id of a causal language model.
        adapter: PEFT adapter (directory or hub id) to put on it; the checkpoint is then the adapted model. Several are all on together.
        revision: Commit, tag or branch on the hub, for weights and tokenizer.
        adapter_revision: The same for the adapter.
        dtype: As stored (`auto`) or a torch dtype such as `float32`.
        device_map: As in transformers (`cpu`, `auto`, `cuda:0`); `None` keeps it on the CPU, quantised weights on the GPU if there is one.
        quantization: `8bit` (LLM.int8) or `4bit` (NF4), by bitsandbytes; `None` loads the weights as they are stored.
        chat_template: Jinja text that replaces the tokenizer's own template (for base models that have none).

    Raises:
        EmprobeError: If it is missing, incomplete, unreadable, or has no tokenizer; or an adapter lies outside the model's layers.
        MismatchError: If an adapter belongs to another base, or changes the base itself.
        MissingExtraError: If bitsandbytes is needed and not installed.

    Example:
        >>> load_model("./nowhere")
        Traceback (most recent call last):
        ...
        emprobe.errors.EmprobeError: Checkpoint './nowhere' was asked for, but there is no such directory. Check the path.
    """
    local = Path(path).expanduser()
    name = str(local) if local.is_dir() else str(path)
    directory = local_directory(name, revision)
    if is_adapter(directory):
        raise EmprobeError(
            f"{name!r} is a PEFT adapter, not a whole model. Give the model it was trained on as the base and this directory as tuned."
        )
    config = check_config(name, directory)
    model = load_weights(name, revision, placed(name, dtype, device_map) | quantized(name, config, quantization)).eval()
    tokenizer = load_tokenizer(name, revision, chat_template)
    blocks_of(model)
    stored = weights_fingerprint(directory)
    base = Checkpoint(model, tokenizer, name, content_hash([stored, quantization]) if quantization else stored)
    if adapter is None:
        return base
    return _adapted(base, directory, _directories(adapter, adapter_revision))


def _directories(adapter: str | Path | Sequence[str | Path], revision: str | None) -> dict[str, Path]:
    """Directory of each adapter by what the user called it."""
    given = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    directories = {str(a): local_directory(str(a), revision) for a in given}
    if not given or len(set(directories.values())) < len(given):
        raise EmprobeError(
            f"{len(given)} adapters were given ({', '.join(map(repr, map(str, given))) or 'none'}), {len(set(directories.values()))} of "
            "them different. Give each one once, and at least one."
        )
    return directories


def _adapted(base: Checkpoint, directory: Path, adapters: dict[str, Path]) -> Checkpoint:
    """The checkpoint with adapters on, all at once; it takes the base's weights over."""
    model, names = attach(base.model, adapters, base.name, directory)
    fingerprint = content_hash([base.fingerprint, *(weights_fingerprint(d) for d in adapters.values())])
    switch = AdapterSwitch(model, base.fingerprint, names)
    return Checkpoint(model.eval(), base.tokenizer, " + ".join(adapters), fingerprint, "on", switch)
