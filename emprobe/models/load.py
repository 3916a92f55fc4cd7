"""Load one checkpoint: a directory or hub id, with or without a PEFT adapter, or say in one sentence why not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import content_hash, file_hash
from emprobe.models.adapters import AdapterSwitch, attach, is_adapter
from emprobe.models.sites import blocks_of

AdapterState = Literal["none", "on", "off"]
WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


@dataclass
class Checkpoint:
    """One model as the user means it: weights, tokenizer, and whether its adapter is on.

    Two checkpoints may share one set of weights (base = adapter off, tuned = adapter on), so every use goes through
    `active()`, which puts the adapter in this checkpoint's state and puts it back afterwards.

    Attributes:
        name: What the user called it.
        fingerprint: SHA-256 over the weight files (and the adapter's), first 16 hex digits.
        adapter: `none`, or the state of the shared adapter (`on`, `off`) that makes this checkpoint.
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
        return torch.device(self.hf.get_input_embeddings().weight.device)

    def __repr__(self) -> str:
        kind = type(self.hf).__name__
        return f"Checkpoint({self.name!r}, {kind}, {self.n_layers} layers, d_model {self.d_model}, adapter {self.adapter})"


def weights_fingerprint(directory: Path) -> str:
    """SHA-256 over the names and bytes of the weight files in a directory (16 hex digits)."""
    files = sorted(f for pattern in WEIGHT_PATTERNS for f in directory.glob(pattern))
    return content_hash([[file.name, file_hash(file)] for file in files])


def local_directory(path: str, revision: str | None) -> Path:
    """Where the files of a directory or hub id lie on this disk; raises `EmprobeError` if nowhere."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise EmprobeError(f"Checkpoint {path!r} is a file. Give the directory that holds config.json and the weights.")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise EmprobeError(f"Checkpoint {path!r} was asked for, but there is no such directory. Check the path.")
    why = ""
    for name in ("config.json", "adapter_config.json"):
        try:
            found = cached_file(path, name, revision=revision)
        except (OSError, ValueError) as error:
            why = why or str(error).strip().splitlines()[0]
        else:
            if name == "adapter_config.json":
                # A whole model's weights come with from_pretrained; an adapter is loaded from this directory.
                with suppress(OSError):
                    cached_file(path, "adapter_model.safetensors", revision=revision)
            return Path(str(found)).parent
    raise EmprobeError(
        f"Checkpoint {path!r} is no directory here, and as a hub id it could not be read: {why} "
        "Check the spelling, the network, or your access token."
    )


def _show_bars(shown: bool) -> None:
    """Turn transformers' own progress bars on or off; ours speak of the run, theirs of shards."""
    logs: Any = transformers.logging
    logs.enable_progress_bar() if shown else logs.disable_progress_bar()


def _load_weights(path: str, directory: Path, revision: str | None, options: dict[str, Any]) -> Any:
    if not (directory / "config.json").is_file():
        raise EmprobeError(
            f"Checkpoint {path!r} has no config.json, so its architecture is unknown; found: "
            f"{', '.join(sorted(f.name for f in directory.iterdir())[:8]) or 'nothing'}. Was it saved by save_pretrained?"
        )
    # The reader of a missing weight would otherwise get freshly drawn ones and a warning in the log.
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    _show_bars(False)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, revision=revision, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise EmprobeError(
            f"Checkpoint {path!r} could not be loaded as a causal language model: {str(error).strip().splitlines()[0]} "
            "The weights may be missing, cut short, or of an architecture this transformers does not know."
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        _show_bars(bars)
    model, info = loaded
    bad = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if bad:
        raise EmprobeError(
            f"Checkpoint {path!r} lacks {len(bad)} of the weights its config.json asks for (first: {bad[0]}). They would be "
            "random numbers. Check that the files are complete and that config.json belongs to them."
        )
    return model


def _load_tokenizer(path: str, revision: str | None, chat_template: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EmprobeError(f"Checkpoint {path!r} has no usable tokenizer: {str(error).strip().splitlines()[0]}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_model(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | None = None,
    chat_template: str | None = None,
) -> Checkpoint:
    """Load one checkpoint in eval mode.

    Args:
        path: Directory or hub id of a causal language model.
        adapter: PEFT adapter (directory or hub id) to put on it; the checkpoint is then the adapted model.
        revision: Commit, tag or branch on the hub.
        dtype: As stored (`auto`) or a torch dtype such as `float32`.
        device_map: As in transformers; `None` keeps it on the CPU.
        chat_template: Jinja text that replaces the tokenizer's own template (for base models that have none).

    Raises:
        EmprobeError: If it is missing, incomplete, unreadable, or has no tokenizer.
        MismatchError: If the adapter belongs to another base.

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
    options: dict[str, Any] = {"dtype": dtype}
    if device_map is not None:
        options["device_map"] = device_map
    model = _load_weights(name, directory, revision, options).eval()
    tokenizer = _load_tokenizer(name, revision, chat_template)
    blocks_of(model)
    fingerprint = weights_fingerprint(directory)
    if adapter is None:
        return Checkpoint(model, tokenizer, name, fingerprint)
    adapter_directory = local_directory(str(adapter), None)
    peft_model = attach(model, str(adapter), name, adapter_directory, directory).eval()
    adapted = content_hash([fingerprint, weights_fingerprint(adapter_directory)])
    return Checkpoint(peft_model, tokenizer, str(adapter), adapted, "on", AdapterSwitch(peft_model, fingerprint))
