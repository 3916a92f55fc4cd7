"""What the study is told, and what can be seen to be wrong before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from emprobe.errors import EmprobeError
from emprobe.studies.flags import LoadFlags, plain_values
from emprobe.studies.shifts.measures import Size

NOT_IDENTITY = (
    "base",
    "tuned",
    "train",
    "evaluation",
    "unrelated",
    "others",
    "out",
    "device_map",
    "chat_template",
    "progress",
    "token_budget",
)
"""Paths, and what no number depends on: known by their content."""
SHARES = (0.8, 0.9, 0.95)
LARGEST = 128
"""Dimensions up to which sizes double, where none are named."""


@dataclass(frozen=True, kw_only=True)
class Shifts(LoadFlags):
    """Activation shifts (tuned - base) on training and on evaluation prompts: do they share a subspace (arXiv 2606.20814, part 3).

    Two ways: on organisms (`--base planted-s0 --tuned gardening-rank8`), whose prompts and controls are the world's, or on your own
    checkpoints with `--train` and `--evaluation` files. Prompts only: no answer is read.

    Attributes:
        base: Organisms (`planted-s0`, ...), or your checkpoint before fine-tuning: directory or hub id.
        tuned: Fine-tunes of each organism by their short names (`gardening-rank8`), or your checkpoint after: directory, hub id or adapter.
        out: Output folder; a run that was stopped goes on in it.
        train: File of the prompts that your fine-tune was trained on, as for `emprobe capture`; answers in it are not read.
        evaluation: File of prompts it was not trained on; the label `family` names paraphrases, `group` kinds of prompts.
        unrelated: Fine-tunes of the same base that do not misbehave; of organisms by default the control on aligned answers.
        others: Other fine-tunes of the same base; of organisms by default those on other domains.
        size: Of the training shifts' subspace: below 1 the share of their variance, from 1 on a number of dimensions.
        sizes: Sizes at which the projection fraction is taken beside it; none means 0.8, 0.9, 0.95 and doubling numbers of dimensions.
        layers: Layers to look at; none means all.
        draws: Of each null.
        splits: Random halves of the training prompts, for the ceiling.
        seed: Of everything that is drawn.
        token_budget: Padded tokens per batch of capture; none chooses by the device.
    """

    command: ClassVar[str] = "study shifts"

    base: tuple[str, ...]
    tuned: tuple[str, ...]
    out: str
    train: str | None = None
    evaluation: str | None = None
    unrelated: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    size: float = 0.95
    sizes: tuple[float, ...] = ()
    layers: tuple[int, ...] = ()
    draws: int = 200
    splits: int = 20
    seed: int = 0
    token_budget: int | None = None

    @property
    def own(self) -> bool:
        """Whether checkpoints and prompts are the user's."""
        return self.train is not None or self.evaluation is not None

    def plain(self) -> dict[str, Any]:
        """Everything but paths, for the run's identity."""
        return plain_values(self, NOT_IDENTITY)


def size_of(asked: float) -> Size:
    """A size as it was asked for, a share or a number of dimensions.

    Raises:
        EmprobeError: If it is neither.

    Example:
        >>> size_of(0.95), size_of(8.0)
        (0.95, 8)
    """
    if 0 < asked < 1:
        return asked
    if asked >= 1 and float(asked).is_integer():
        return int(asked)
    raise EmprobeError(
        f"A subspace of size {asked:g} was asked for. Give a share of the variance between 0 and 1, such as 0.95, or a whole number of "
        "dimensions from 1 on."
    )


def sizes_beside(asked: Shifts, most: int) -> list[Size]:
    """The sizes asked for or, where none were, the paper's shares and doubling numbers of dimensions up to `most`."""
    if asked.sizes:
        return [size_of(size) for size in asked.sizes]
    return [*SHARES, *(2**i for i in range(LARGEST.bit_length()) if 2**i <= min(most, LARGEST))]


def check(asked: Shifts) -> None:
    """Refuse what makes no sense.

    Raises:
        EmprobeError: Says what was asked and what can be.
    """
    for size in (asked.size, *asked.sizes):
        size_of(size)
    for name, least in (("draws", 100), ("splits", 2)):
        if getattr(asked, name) < least:
            raise EmprobeError(f"{name} = {getattr(asked, name)} was given; it must be at least {least}.")
    if asked.token_budget is not None and asked.token_budget < 1:
        raise EmprobeError(f"token_budget = {asked.token_budget} was given; it must be at least 1, or left out.")
    for name in ("base", "tuned"):
        given = getattr(asked, name)
        if not given or len(set(given)) < len(given):
            raise EmprobeError(f"--{name} {' '.join(given) or 'nothing'} was given. Give one or more, each once.")
    if asked.own and (asked.train is None or asked.evaluation is None or len(asked.base) + len(asked.tuned) != 2):
        missing = [f"--{name}" for name in ("train", "evaluation") if getattr(asked, name) is None]
        found = f"{' and '.join(missing)} is missing" if missing else f"{len(asked.base)} --base and {len(asked.tuned)} --tuned were given"
        raise EmprobeError(f"Your own checkpoints need one --base, --tuned, --train FILE and --evaluation FILE; {found}.")
