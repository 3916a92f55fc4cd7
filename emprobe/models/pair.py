"""Two checkpoints that belong together: base and tuned, one set of weights where tuned is an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emprobe.errors import MismatchError
from emprobe.models.adapters import is_adapter
from emprobe.models.load import Checkpoint, load_model
from emprobe.models.weights import local_directory


@dataclass(frozen=True)
class CheckpointPair:
    """The model before fine-tuning (`base`) and after (`tuned`)."""

    base: Checkpoint
    tuned: Checkpoint

    @property
    def shares_weights(self) -> bool:
        """Whether both live in one set of weights (tuned is an adapter)."""
        return self.base.model is self.tuned.model


def load_pair(
    base: str | Path,
    tuned: str | Path | Sequence[str | Path],
    *,
    revision: str | None = None,
    tuned_revision: str | None = None,
    **options: Any,
) -> CheckpointPair:
    """Load base and tuned, and refuse two checkpoints that do not belong together.

    Args:
        base: Directory or hub id of the model before fine-tuning.
        tuned: Directory or hub id of the model after; a PEFT adapter shares the base's weights (adapter off = base), and so do several,
            which are then all on together or all off.
        revision: Commit, tag or branch of base on the hub.
        tuned_revision: The same for tuned, model or adapter.
        options: As in `load_model` (`dtype`, `device_map`, `quantization`, `chat_template`).

    Raises:
        EmprobeError: If one cannot be loaded, or one of several is no adapter.
        MismatchError: If architecture, size, vocabulary or chat template differ, or an adapter is another base's.
        MissingExtraError: If bitsandbytes is needed and not installed.
    """
    several = not isinstance(tuned, str | Path)
    if several or is_adapter(local_directory(str(tuned), tuned_revision)):
        on = load_model(base, adapter=tuned, revision=revision, adapter_revision=tuned_revision, **options)
        return CheckpointPair(adapter_off(on, base), on)
    assert isinstance(tuned, str | Path)
    pair = CheckpointPair(load_model(base, revision=revision, **options), load_model(tuned, revision=tuned_revision, **options))
    check_pair(pair)
    return pair


def adapter_off(tuned: Checkpoint, base: str | Path) -> Checkpoint:
    """The base checkpoint that lives in an adapted one's weights: the same model with the adapter off."""
    assert tuned.switch is not None
    return replace(tuned, name=str(base), fingerprint=tuned.switch.base_fingerprint, adapter="off")


def check_pair(pair: CheckpointPair) -> None:
    """Refuse checkpoints of different architecture, shape, vocabulary or template.

    Raises:
        MismatchError: Names the first thing that differs, with both values.
    """
    base, tuned = pair.base, pair.tuned
    facts: dict[str, list[Any]] = {
        "architecture": [type(c.hf).__name__ for c in (base, tuned)],
        "number of layers": [c.n_layers for c in (base, tuned)],
        "d_model": [c.d_model for c in (base, tuned)],
    }
    for what, (left, right) in facts.items():
        if left != right:
            raise MismatchError(
                f"Base {base.name!r} and tuned {tuned.name!r} do not belong together: {what} is {left} and {right}. "
                "Give two checkpoints of one model, before and after fine-tuning."
            )
    check_tokenizers(pair)
    _check_parameters(pair)


def check_tokenizers(pair: CheckpointPair, names: tuple[str, str] = ("base", "tuned")) -> None:
    """Refuse tokenizers that would give one text two readings; messages call the two by these names.

    Raises:
        MismatchError: If a token has another id, or the chat templates differ.
    """
    left, right = pair.base.tokenizer.get_vocab(), pair.tuned.tokenizer.get_vocab()
    if left != right:
        token = min(t for t in left.keys() | right.keys() if left.get(t) != right.get(t))
        raise MismatchError(
            f"The vocabularies of {' and '.join(names)} differ ({len(left)} and {len(right)} tokens; first difference: {token!r} is id "
            f"{left.get(token)} in {names[0]} and {right.get(token)} in {names[1]}). The same text would be other tokens; give matching "
            "tokenizers."
        )
    templates = [c.tokenizer.chat_template for c in (pair.base, pair.tuned)]
    if templates[0] != templates[1]:
        raise MismatchError(
            f"The chat templates of {' and '.join(names)} differ, so one prompt would be rendered in two ways. "
            "Copy one tokenizer over the other, or pass chat_template= (--chat-template FILE) for both."
        )


def _check_parameters(pair: CheckpointPair) -> None:
    base = {n: p.shape for n, p in pair.base.hf.named_parameters()}
    tuned = {n: p.shape for n, p in pair.tuned.hf.named_parameters()}
    # A fine-tune may add rows to the embedding only together with tokens, which the tokenizers' check has ruled out.
    different: list[tuple[str, Any, Any]] = [
        (n, base.get(n), tuned.get(n)) for n in sorted(base.keys() | tuned.keys()) if base.get(n) != tuned.get(n)
    ]
    if different:
        name, left, right = different[0]
        raise MismatchError(
            f"Base and tuned differ in {len(different)} weights' shapes (first: {name} is {left and tuple(left)} in base and "
            f"{right and tuple(right)} in tuned). Give two checkpoints of one model."
        )
