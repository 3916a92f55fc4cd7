"""A plan's writes as a forward pass comes to them: what a runtime that has hooks of its own is to call, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from emprobe.interventions.edit import Edit, Place, rank_of
from emprobe.interventions.kernels import Single, State
from emprobe.interventions.places import Write
from emprobe.interventions.receipt import Line
from emprobe.interventions.tokens import Prompts, Tokens


@dataclass
class Writer:
    """What is done to the hidden state at one place: conditions are read, then every kernel writes in turn."""

    state: State
    kernels: list[Single] = field(default_factory=list)
    conditions: list[Edit] = field(default_factory=list)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The hidden state as it goes on; the same tensor where nothing is written."""
        for edit in self.conditions:
            assert edit.when is not None
            self.state.held[id(edit)] = edit.when.holds(hidden)
        for kernel in self.kernels:
            hidden = kernel.write(hidden, self.state)
        return hidden


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
        middle = self.entered.pop() + added
        return added + (self.write(middle) - middle)


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
        writers: dict[Place, Writer] = {}
        for edit in edits:
            kernel = Single(edit)
            writers.setdefault(edit.place, Writer(self.state)).kernels.append(kernel)
            self.lines.append(Line(edit, 0, kernel.tally))
            if edit.when is not None:
                read: Place = (edit.when.direction.layer, edit.when.direction.site)
                writers.setdefault(read, Writer(self.state)).conditions.append(edit)
        self.writers = {place: writers[place] for place in sorted(writers, key=rank_of)}
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
