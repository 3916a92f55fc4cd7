"""What is written at one place, whichever runtime's hooks come to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from emprobe.interventions.edit import Edit
from emprobe.interventions.kernels import Kernel, State

Write = Callable[[Tensor], Tensor]
"""The hidden state as it goes on; the same tensor where nothing is written."""


@dataclass
class Writer:
    """At one place: conditions are read, then every kernel writes in turn."""

    state: State
    kernels: Sequence[Kernel] = field(default_factory=list)
    conditions: Sequence[Edit] = field(default_factory=list)

    def __call__(self, hidden: Tensor) -> Tensor:
        """See `Write`."""
        for edit in self.conditions:
            assert edit.when is not None
            self.state.held[id(edit)] = edit.when.holds(hidden)
        for kernel in self.kernels:
            hidden = kernel.write(hidden, self.state)
        return hidden

    def shortest(self) -> Write:
        """The same in as few calls as can be: a kernel that is alone stands for itself."""
        return partial(self.kernels[0].write, state=self.state) if len(self.kernels) == 1 and not self.conditions else self


def written_in_sum(entered: Tensor, added: Tensor, write: Write) -> Tensor:
    """What attention adds, changed by what is to change in the stream after it, which no module holds.

    In half precision the sum is formed in float32, so that what is to change is rounded once.
    """
    exact = added if added.dtype in (torch.float32, torch.float64) else added.float()
    middle = entered + exact
    return (exact + (write(middle) - middle)).to(added.dtype)
