"""A plan's writes as a forward pass comes to them: what a runtime that has hooks of its own is to call, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from emprobe.interventions.edit import Edit, Place, rank_of
from emprobe.interventions.kernels import Single, State
from emprobe.interventions.receipt import Line
from emprobe.interventions.tokens import Prompts, Tokens
from emprobe.interventions.writing import Write, Writer, written_in_sum


class Middle:
    """Writes to the stream after attention, which no module holds: what attention adds is changed by what is to change in the sum."""

    def __init__(self, write: Write) -> None:
        self.write = write
        self.entered: list[Tensor] = []

    def enter(self, hidden: Tensor) -> Tensor:
        """At the block's input, behind all writes to it."""
        self.entered[:] = [hidden]
        return hidden

    def add(self, added: Tensor) -> Tensor:
        """At what attention adds, behind all writes to it."""
        return written_in_sum(self.entered.pop(), added, self.write)


class Chain:
    """Writes at one place, in order."""

    def __init__(self, writes: Sequence[Write]) -> None:
        self.writes = list(writes)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The hidden state as it goes on; the same tensor where nothing is written."""
        for write in self.writes:
            hidden = write(hidden)
        return hidden


class Program:
    """The writes of one run, with their counts.

    Attributes:
        writers: What is done at each place, as a forward pass comes to them.
        lines: Of the receipt, one per edit.
    """

    def __init__(self, edits: Sequence[Edit], prompts: Prompts, special_ids: Sequence[int]) -> None:
        self.state, self.prompts, self.special_ids = State(), prompts, tuple(special_ids)
        self.lines: list[Line] = []
        kernels: dict[Place, list[Single]] = {}
        conditions: dict[Place, list[Edit]] = {}
        for edit in edits:
            kernel = Single(edit)
            kernels.setdefault(edit.place, []).append(kernel)
            self.lines.append(Line(edit, 0, kernel.tally))
            if edit.when is not None:
                read: Place = (edit.when.direction.layer, edit.when.direction.site)
                conditions.setdefault(read, []).append(edit)
        places = sorted(kernels.keys() | conditions.keys(), key=rank_of)
        self.writers: dict[Place, Write] = {p: Writer(self.state, kernels.get(p, []), conditions.get(p, [])) for p in places}
        # As the hooks runtime lists them.
        self.lines.sort(key=lambda line: rank_of(line.edit.place))

    def stops(self) -> list[tuple[Place, Chain]]:
        """The places that modules hold, in order, each with all that is done there."""
        found: dict[Place, list[Write]] = {}
        for (layer, site), write in self.writers.items():
            if site == "resid_mid":
                middle = Middle(write)
                found.setdefault((layer, "resid_pre"), []).append(middle.enter)
                found.setdefault((layer, "attn_out"), []).append(middle.add)
            else:
                found.setdefault((layer, site), []).append(write)
        return [(place, Chain(found[place])) for place in sorted(found, key=rank_of)]

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the blocks run: what the tokens are of the pass that the decoder was called for."""
        given = kwargs if not args else {**kwargs, "input_ids": args[0]}
        self.state.tokens = Tokens.of(given, self.prompts, self.special_ids)
        self.state.held.clear()
