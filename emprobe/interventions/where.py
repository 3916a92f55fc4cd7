"""Which tokens an intervention touches, named by what they are and never by prefill or decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.interventions.tokens import Tokens

Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class Where:
    """All tokens but padding, unless narrowed.

    `prompt=False` (generation only) leaves the last prompt token as it was, and with it the first new token: its logits
    are computed there. `prompt=False, prompt_positions=[-1]` is refused as a contradiction; to steer from the first new token
    on, say `prompt_positions=[-1]` and leave the rest.

    Args:
        prompt: Tokens of the prompt, the template's among them.
        generation: Tokens of the answer.
        prompt_positions: Only these tokens of the prompt, counted from its first (0) or last (-1) real token.
        prompt_window: Only the prompt's tokens from .. up to (a slice, negative from the prompt's end; `None` is open).
        generation_window: Only the answer's tokens from .. up to, counted from its first (0); `None` is open.
        exclude_first: Leave out position 0, an attention sink in many models.
        exclude_special: Leave out all tokens that decoding skips as special, the marks of a chat template among them, wherever they stand.

    Raises:
        EmprobeError: If it names no tokens at all, or contradicts itself.

    Example:
        >>> print(Where(prompt_positions=[-1]))
        prompt positions -1 and the generation
        >>> print(Where())
        all tokens but padding
    """

    prompt: bool = True
    generation: bool = True
    prompt_positions: Sequence[int] | None = None
    prompt_window: Window | None = None
    generation_window: Window | None = None
    exclude_first: bool = False
    exclude_special: bool = False

    def __post_init__(self) -> None:
        if self.prompt_positions is not None:
            object.__setattr__(self, "prompt_positions", tuple(map(int, self.prompt_positions)))
        for name in ("prompt_window", "generation_window"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _window(name, getattr(self, name)))
        if not (self.prompt or self.generation):
            raise EmprobeError("Where(prompt=False, generation=False) names no tokens. Leave one of them on.")
        narrowed = [n for n in ("prompt_positions", "prompt_window") if getattr(self, n) is not None]
        if narrowed and not self.prompt:
            raise EmprobeError(f"Where(prompt=False, {narrowed[0]}=…) contradicts itself: it names tokens of the prompt. Leave prompt on.")
        if len(narrowed) == 2:
            raise EmprobeError("Where was given prompt_positions and prompt_window; both say which tokens of the prompt. Give one.")
        if self.generation_window is not None and not self.generation:
            raise EmprobeError("Where(generation=False, generation_window=…) contradicts itself. Leave generation on.")
        if self.prompt_positions == ():
            raise EmprobeError("Where(prompt_positions=[]) names no token of the prompt. Say prompt=False to leave it out.")

    @property
    def is_everything(self) -> bool:
        """Whether it names all tokens but padding."""
        return not (self.splits or self.exclude_first or self.exclude_special)

    @property
    def splits(self) -> bool:
        """Whether it has to be known where each prompt ends."""
        narrowed = (self.prompt_positions, self.prompt_window, self.generation_window)
        return not (self.prompt and self.generation) or any(n is not None for n in narrowed)

    def mask(self, tokens: Tokens) -> Bool[Tensor, "batch pos"]:
        """Which positions of one forward pass it names.

        Raises:
            EmprobeError: If that depends on where prompts end, or on token ids, and these are not known.
        """
        chosen = tokens.real
        if self.exclude_first:
            chosen = chosen & (tokens.index > 0)
        if self.exclude_special:
            chosen = chosen & ~tokens.special
        return chosen & self._parts(tokens) if self.splits else chosen

    def _parts(self, tokens: Tokens) -> Tensor:
        if tokens.prompt_lengths is None:
            raise EmprobeError(
                f"This intervention names {self}, but nobody said where each prompt ends. Generate (emprobe.generate, or the model's own "
                "generate), or set receipt.prompt_lengths to one length per row before a plain forward pass."
            )
        index, length = tokens.index, tokens.prompt_lengths
        generated = index >= length
        prompt = ~generated if self.prompt else torch.zeros_like(generated)
        if self.prompt_positions is not None:
            named = [index == (p if p >= 0 else length + p) for p in self.prompt_positions]
            prompt = prompt & torch.stack(named).any(dim=0)
        if self.prompt_window is not None:
            start, stop = (None if w is None else (w if w >= 0 else length + w) for w in self.prompt_window)
            prompt = _between(prompt, index, start, stop)
        if not self.generation:
            return prompt
        if self.generation_window is not None:
            generated = _between(generated, index - length, *self.generation_window)
        return prompt | generated

    def __str__(self) -> str:
        if self.prompt_positions is not None:
            prompt = f"prompt positions {', '.join(map(str, self.prompt_positions))}"
        elif self.prompt_window is not None:
            prompt = f"prompt positions {_slice(self.prompt_window)}"
        else:
            prompt = "the prompt"
        generation = "the generation" if self.generation_window is None else f"generated tokens {_slice(self.generation_window)}"
        named = " and ".join([prompt] * self.prompt + [generation] * self.generation) if self.splits else "all tokens but padding"
        left_out = [name for name, on in (("position 0", self.exclude_first), ("special tokens", self.exclude_special)) if on]
        return named + (f", without {' and '.join(left_out)}" if left_out else "")


def _window(name: str, given: Sequence[int | None]) -> Window:
    if len(given) != 2:
        raise EmprobeError(f"Where({name}={tuple(given)!r}) is no window. Give (from, up to), such as (0, 8) or (-4, None).")
    start, stop = given
    if name == "generation_window" and any(w is not None and w < 0 for w in given):
        raise EmprobeError(
            f"Where(generation_window={tuple(given)!r}) counts from the answer's end, which is not known while it is being "
            "generated. Count from its first token (0)."
        )
    if start is not None and stop is not None and (start < 0) == (stop < 0) and start >= stop:
        raise EmprobeError(f"Where({name}={tuple(given)!r}) names no token: it ends before it begins.")
    return start, stop


def _between(named: Tensor, index: Tensor, start: Tensor | int | None, stop: Tensor | int | None) -> Tensor:
    if start is not None:
        named = named & (index >= start)
    return named if stop is None else named & (index < stop)


def _slice(window: Window) -> str:
    start, stop = ("" if w is None else str(w) for w in window)
    return f"{start}:{stop}"
