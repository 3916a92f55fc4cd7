"""The record of a fine-tune: what it found, how the loss went, and what it was along the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from emprobe.errors import EmprobeError
from emprobe.files import atomic_path, read_json
from emprobe.finetuning.solution import Solution, load_solution

BOOKS = ("tokens", "sequences", "change_norm", "eval_forward_kl", "eval_reverse_kl", "stop_rate", "empty_rate", "length")
COLUMNS = ("step", "loss", "kl", "lr", "gradient_norm", "eval_loss", "eval_kl", *BOOKS)
CARD, CURVE, FOUND, ALONG = "finetune.json", "history.parquet", "solution", "checkpoints"


@dataclass(frozen=True, eq=False)
class FineTune:
    """A finished fine-tune.

    Attributes:
        solution: What was found; `solution.applied(base)` puts it on.
        history: One row per update: `step`, `loss` (nats per response token, before the update), `kl` (nats per token, where there is an
            anchor), `lr`, `gradient_norm`, and where it was evaluated `eval_loss`, `eval_kl`; what distillation adds, see `distill`.
        settings: Base, method, recipe, what counted, what was done during training, hashes of the data.
        steps: Updates after which it was kept along the way.
        folder: Where it lies; `None` if in memory only.
    """

    solution: Solution
    history: pd.DataFrame
    settings: Mapping[str, Any]
    steps: tuple[int, ...] = ()
    folder: Path | None = None
    kept: Mapping[int, Solution] = field(default_factory=dict, repr=False)

    def at(self, step: int) -> Solution:
        """What had been found after that many updates.

        Raises:
            EmprobeError: If it was not kept then.
        """
        if step not in self.steps:
            raise EmprobeError(
                f"Step {step} was asked for; kept were: {', '.join(map(str, self.steps)) or 'none'}. Ask for it in checkpoints=."
            )
        return self.kept[step] if self.folder is None else load_solution(checkpoint_folder(self.folder, step))

    @classmethod
    def load(cls, folder: Path | str) -> FineTune:
        """Read the folder of a finished fine-tune.

        Raises:
            EmprobeError: If it holds none, or one that is not finished.
        """
        folder = Path(folder)
        settings = read_json(folder / CARD)
        if not (folder / CURVE).is_file():
            raise EmprobeError(f"The fine-tune in {folder} is not finished. Run it again with the same settings; it goes on where it was.")
        steps = tuple(sorted(int(path.name.removeprefix("step-")) for path in (folder / ALONG).glob("step-*")))
        return cls(load_solution(folder / FOUND), pd.read_parquet(folder / CURVE), settings, steps, folder)

    def __repr__(self) -> str:
        last = self.history.iloc[-1]
        kl = f", KL {last['kl']:.3f}" if "kl" in last else ""
        return f"FineTune({self.solution}, {len(self.history)} steps, loss {self.history['loss'].iloc[0]:.3f} → {last['loss']:.3f}{kl})"


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where a run keeps what it was after that many updates.

    >>> checkpoint_folder(Path("out"), 20).as_posix()
    'out/checkpoints/step-000020'
    """
    return folder / ALONG / f"step-{step:06d}"


def save_curve(folder: Path, history: pd.DataFrame) -> None:
    """Write the loss curve; the last file of a run, so that it is finished where it is there."""
    with atomic_path(folder / CURVE) as temporary:
        history.to_parquet(temporary, index=False)
