"""PEFT adapters: on which base one belongs, whether it fits, and which state it is in."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from emprobe.errors import MismatchError
from emprobe.files import file_hash, read_json


@dataclass
class AdapterSwitch:
    """Which state the adapter of one set of weights is in; shared by the two checkpoints of a pair.

    `base_fingerprint` is of the weights beneath the adapter.
    """

    model: Any
    base_fingerprint: str
    on: bool = True

    def turn(self, on: bool) -> None:
        """Put the adapter in this state."""
        if on != self.on:
            tuner = self.model.base_model
            tuner.enable_adapter_layers() if on else tuner.disable_adapter_layers()
            self.on = on


def is_adapter(path: Path | str) -> bool:
    """Whether a directory holds a PEFT adapter and not a whole model."""
    return (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file()


def _check_adapter_base(adapter: str, base: str, directory: Path, base_directory: Path) -> None:
    """Refuse an adapter that says it was trained on other weights than these."""
    card = directory / "card.json"
    wanted = read_json(card).get("base_fingerprint") if card.is_file() else None
    found = [file_hash(f) for f in base_directory.glob("*.safetensors")] if wanted else []
    if wanted and wanted not in found:
        raise MismatchError(
            f"Adapter {adapter!r} was trained on other weights than {base!r}: its card names a base with SHA-256 "
            f"{wanted[:12]}…, found {', '.join(h[:12] + '…' for h in found) or 'no safetensors file'}. Give the base it was trained on."
        )
    named = read_json(directory / "adapter_config.json").get("base_model_name_or_path") or ""
    hub_names = not Path(base).is_dir()
    if not wanted and hub_names and named.count("/") == 1 and not Path(named).exists() and named.lower() != base.lower():
        raise MismatchError(
            f"Adapter {adapter!r} says it was trained on {named!r}, but the base given is {base!r}. Give that base "
            "(or a local copy of it, as a directory)."
        )


def attach(model: Any, adapter: str, base: str, directory: Path, base_directory: Path) -> Any:
    """The model with the adapter put into it.

    Raises:
        MismatchError: If the adapter was trained on another base, does not fit this one, or is damaged.
    """
    _check_adapter_base(adapter, base, directory, base_directory)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that transformers means to drop: nothing a user can act on.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            peft_model: Any = PeftModel.from_pretrained(model, str(directory), is_trainable=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise MismatchError(
            f"Adapter {adapter!r} does not fit the base {base!r}: {str(error).strip().splitlines()[0]} "
            "Its layers or shapes are those of another model, or its files are damaged. Give the base it was trained on."
        ) from error
    _check_adapter_keys(peft_model, adapter, base, directory)
    return peft_model


def _check_adapter_keys(model: Any, adapter: str, base: str, directory: Path) -> None:
    """Refuse an adapter that leaves layers of the base untouched that it names, or has weights for layers the base lacks.

    PEFT only warns of the one, and drops the other in silence.
    """
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        return
    with safe_open(str(file), framework="pt") as opened:
        there = {key for key in opened.keys() if ".lora_" in key}  # noqa: SIM118 - not a mapping
    wanted = {key for key in get_peft_model_state_dict(model, save_embedding_layers=False) if ".lora_" in key}
    if there != wanted:
        first = min(there ^ wanted)
        whose = "the base has no such layer" if first in there else "the adapter has no weights for it"
        raise MismatchError(
            f"Adapter {adapter!r} does not fit the base {base!r}: {len(there ^ wanted)} weights have no counterpart, first {first} "
            f"({whose}). Give the base it was trained on."
        )
