"""The targets of `emprobe export` by name, and the folder that each one fills."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from emprobe.errors import EmprobeError
from emprobe.files import file_hash, write_json, write_text
from emprobe.interventions.export.card import card_of, text_of
from emprobe.interventions.export.made import Made
from emprobe.interventions.plan import Plan
from emprobe.models.load import Checkpoint, load_model

Maker = Callable[[Plan, Checkpoint, Path], Made]

TARGETS: Mapping[str, str] = {
    "lora": "lora:write_lora",
    "bias": "checkpoints:write_bias",
    "weights": "checkpoints:write_weights",
    "gguf": "gguf:write_control_vector",
    "gguf_lora": "gguf_lora:write_gguf_lora",
    "lm_eval": "lm_eval:write_lm_eval",
    "easysteer": "easysteer:write_easysteer",
    "vllm_lens": "vllm_lens:write_vllm_lens",
}
"""Module and function of each target; they load when they are asked for."""
CHECKPOINTS = ("weights", "bias")
"""Targets that are ordinary checkpoints."""
BIASES = "biases"
"""Folder of the second adapter of a `lora` whose matrices have biases that change."""


@dataclass(frozen=True)
class Exported:
    """A folder that serves a plan without emprobe.

    Attributes:
        folder: Holds the files, `card.json`, `README.md` and the plan itself.
        card: What stands in `card.json`.
    """

    target: str
    folder: Path
    card: Mapping[str, Any]

    @property
    def serve(self) -> tuple[str, ...]:
        """Command lines (or lines of Python) that use what was written."""
        return tuple(self.card["serve"])

    def load(self, **options: Any) -> Checkpoint:
        """The export as a checkpoint: an ordinary model, or the base with the adapter (and that of the biases, where there is one).

        Args:
            options: As in `load_model`.

        Raises:
            EmprobeError: If it is for another program, or the base is not where it was.
        """
        if self.target in CHECKPOINTS:
            return load_model(self.folder, **options)
        if self.target != "lora":
            raise EmprobeError(f"An export to {self.target!r} is no checkpoint that can be loaded here. Use it so: {'; '.join(self.serve)}")
        biases = self.folder / BIASES
        return load_model(self.card["base_model"], adapter=[self.folder, *([biases] if biases.is_dir() else [])], **options)

    def __repr__(self) -> str:
        return f"Exported({self.target!r}, {str(self.folder)!r}: {', '.join(self.card['files'])})"


def export(plan: Plan, checkpoint: Checkpoint, target: str, out: str | Path) -> Exported:
    """Write a plan in a form that other runtimes can serve.

    Args:
        plan: What is done; see each target for what it can express.
        checkpoint: The model it is done to.
        target: A name in `TARGETS`.
        out: Folder, new or empty.

    Raises:
        EmprobeError: If there is no such target, it cannot express the plan (says what and why), the model lacks what the plan names, or
            the folder holds files. Nothing is left behind then.
    """
    if target not in TARGETS:
        raise EmprobeError(f"Export target {target!r} was asked for. Use one of: {', '.join(TARGETS)}.")
    out = _free(Path(out).expanduser())
    module, function = TARGETS[target].split(":")
    make: Maker = getattr(import_module(f"{__package__}.{module}"), function)
    part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".part"))
    try:
        made = make(plan, checkpoint, part)
        # In a folder of its own: servers read every *.safetensors that lies beside a checkpoint's weights.
        plan.save(part / "emprobe" / "plan.safetensors")
        files = {str(path.relative_to(part)): file_hash(path) for path in sorted(part.rglob("*")) if path.is_file()}
        card = card_of(plan, checkpoint, target, made, files, str(out))
        write_json(part / "card.json", card)
        write_text(part / "README.md", text_of(card))
        part.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(target, out, card)


def _free(out: Path) -> Path:
    """The folder, if it may be filled."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise EmprobeError(f"The output folder {out} holds files already. Give a new or an empty one.")
    except OSError as error:
        raise EmprobeError(f"The output folder {out} cannot be used: {error.strerror or error}. Give another.") from error
    return out
