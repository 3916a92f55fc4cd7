"""The capture engine: rows in, what every site, layer and rule held out; sharing, batches, retries and progress in between."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from emprobe.batching import plan_batches
from emprobe.capture.backends import Backend
from emprobe.capture.plan import Batch, Group, Padding, Row, group_rows, prefix_batch, row_batch
from emprobe.capture.reading import Gathered, Reading
from emprobe.errors import EmprobeError
from emprobe.models.load import Checkpoint
from emprobe.types import Site

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class Speed:
    """The progress bar: rows done, tokens per second, time left."""

    bar: tqdm[Any]
    n_tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def step(self, rows: int, tokens: int) -> None:
        """Rows that are finished, and the tokens that went through every checkpoint for them."""
        self.n_tokens += tokens
        self.bar.set_postfix_str(f"{self.n_tokens / max(time.monotonic() - self.started, 1e-9):,.0f} tokens/s", refresh=False)
        self.bar.update(rows)


@dataclass
class Engine:
    """Runs rows through the checkpoints of one capture.

    Attributes:
        token_budget: Padded tokens per batch; halved when a device runs out of memory, and then it stays halved.
        share_prefix: Whether rows that open alike compute their opening once.
        switch: Rows of more tokens than this are computed apart from the others, and share no opening; see `Lengths`.
    """

    checkpoints: Sequence[Checkpoint]
    backend: Backend
    sites: Sequence[Site]
    layers: Sequence[int]
    token_budget: int
    share_prefix: bool
    padding: Padding
    speed: Speed
    switch: int = sys.maxsize

    def run(self, rows: Sequence[Row]) -> list[dict[Site, Gathered]]:
        """What each checkpoint held at each site, in the order of the rows."""
        n_rules = len(rows[0].read)
        gathered = [
            {site: Gathered.empty(len(rows), n_rules, len(self.layers), c.d_model) for site in self.sites} for c in self.checkpoints
        ]
        share = self.share_prefix and self.backend.shares_prefix and self.padding == "right"
        for group in group_rows(rows, self.switch if share else 0):
            self._run_group(group, rows, gathered)
        return gathered

    def _run_group(self, group: Group, rows: Sequence[Row], gathered: list[dict[Site, Gathered]]) -> None:
        past, done = None, 0
        if group.prefix:
            past = self._prefix(prefix_batch(group, rows), gathered)
            done = len(group.prefix) if past is not None else 0
            self.speed.step(0, done)
        waiting = self._planned(group.rows, rows, done)
        while waiting:
            chosen = waiting[0]
            batch = row_batch(chosen, rows, done, self.padding)
            try:
                self._forward(batch, gathered, lambda b, reads: self.backend.run(b, reads, past))
            except (RuntimeError, MemoryError) as error:
                self._make_room(error, batch)
                waiting = self._planned([r for rest in waiting for r in rest], rows, done)
                continue
            waiting.pop(0)
            self.speed.step(len(chosen), int(batch.mask.sum()))

    def _prefix(self, batch: Batch, gathered: list[dict[Site, Gathered]]) -> Any:
        """A shared opening, kept for the rows; None where it cannot be kept, or does not fit in memory: then each row has its own."""
        try:
            return self._forward(batch, gathered, self.backend.run_prefix)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        return None

    def _planned(self, chosen: Sequence[int], rows: Sequence[Row], done: int) -> list[list[int]]:
        """Batches of these rows, longest first; the order and the budget decide, so that the same rows make the same batches."""
        plans = []
        for long in (True, False):
            ordered = [r for r in sorted(chosen) if (len(rows[r].ids) > self.switch) == long]
            batches = plan_batches([len(rows[r].ids) - done for r in ordered], self.token_budget)
            plans += [[ordered[i] for i in batch] for batch in batches]
        return plans

    def _forward(self, batch: Batch, gathered: list[dict[Site, Gathered]], run: Callable[[Batch, Sequence[Reading]], Any]) -> Any:
        """One batch through every checkpoint; what was read counts only once all of it has gone well."""
        readings = [Reading(batch) for _ in self.checkpoints]
        result = run(batch, readings)
        for found, reading in zip(gathered, readings, strict=True):
            if reading.found:
                for site, at_site in found.items():
                    at_site.add(reading, site, self.layers)
        return result

    def _make_room(self, error: Exception, batch: Batch) -> None:
        """After running out of memory: half the budget, or the end if a single row does not fit; other errors go on their way."""
        if not _out_of_memory(error):
            raise error
        if len(batch.ids) == 1:
            raise EmprobeError(
                f"The device ran out of memory on a single row of {batch.past + batch.ids.shape[1]} tokens. Ask for fewer layers, "
                "shorten the row, load the model in a smaller dtype, or spread it over devices with device_map='auto'."
            ) from error
        self.token_budget = max(1, min(self.token_budget, batch.ids.numel()) // 2)
        torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)
