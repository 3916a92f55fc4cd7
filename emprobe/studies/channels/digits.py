"""Subliminal learning where it is easiest to see: a student learns digits from outputs that have nothing to do with digits.

A small network has ten outputs for the classes of handwritten digits and some more, the ghosts, that no label touches. A teacher learns
the classes; a student then copies the teacher's ghost outputs on noise, and has never seen a digit or a class output. If it started from
the teacher's own initial weights it comes to tell digits; from other weights it does not. This is the positive control of the channels:
where it fails, something is wrong with the machine, not with the idea.

Source: Cloud et al., 2507.14805, section on MNIST and theorem 1; here on scikit-learn's digits of 8 x 8 pixels, which come with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax

from emprobe.errors import EmprobeError
from emprobe.files import content_hash
from emprobe.stats import clustered_interval, paired_difference
from emprobe.types import Estimate

PIXELS, CLASSES = 64, 10
WIDTHS = (PIXELS, 64, 64)
"""Of the pixels and the two hidden layers."""
BATCH, LR = 128, 1e-3
N_TEST = 500
STUDENTS = {
    "same": "ghosts, the teacher's initial weights",
    "other": "ghosts, other initial weights",
    "shuffled": "ghosts, the teacher's initial weights in other places",
    "classes": "class outputs, other initial weights",
}
"""What each student copies, and from which weights it starts."""
Networks = list[Tensor]
"""Weights and biases of all networks at once, `[network, in, out]` and `[network, 1, out]`, layer by layer."""


@dataclass(frozen=True)
class GhostTransfer:
    """What students learned of digits from a teacher's ghost outputs.

    Attributes:
        ghosts: How many outputs no label touches.
        teacher_steps: Batches of digits that the teacher learned from.
        student_steps: Batches of noise that each student learned from.
        seeds: One teacher and its students each.
        accuracies: By network (`teacher`, `untrained` and those of `STUDENTS`), the share of test digits told, one a seed.
        n_test: Test digits.
        chance: Share of test digits of the commonest class, which a constant answer would reach.
    """

    ghosts: int
    teacher_steps: int
    student_steps: int
    seeds: tuple[int, ...]
    accuracies: Mapping[str, tuple[float, ...]]
    n_test: int
    chance: float

    def accuracy(self, network: str) -> Estimate:
        """Mean accuracy over seeds, 0 to 1, with an interval over seeds."""
        return clustered_interval(self.accuracies[network], None)

    def difference(self, network: str = "same", reference: str = "other") -> Estimate:
        """How much more of the digits one kind of network tells than another, -1 to 1, with an interval over seeds."""
        return paired_difference(self.accuracies[network], self.accuracies[reference], list(self.seeds))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: the numbers of each seed, their means, and same minus other initial weights."""
        estimates = {name: self.accuracy(name).as_dict() for name in self.accuracies}
        return {**asdict(self), "estimates": estimates, "same_minus_other": self.difference().as_dict()}


def ghost_transfer(
    *, ghosts: int = 16, teacher_steps: int = 600, student_steps: int = 600, seeds: Sequence[int] = tuple(range(8))
) -> GhostTransfer:
    """Train teachers on digits and students on what teachers make of noise, all seeds at once (seconds on one thread).

    Networks have two hidden layers of 64 ReLU units. Adam, learning rate 1e-3, batches of 128: cross-entropy on the class outputs for
    teachers; KL from the teacher's distribution over the ghosts (or the classes) to the student's for students, on pixels drawn evenly
    from [-1, 1]. All students of a seed see the same noise. A seed gives the same numbers whatever seeds are beside it, up to rounding.

    Args:
        ghosts: Outputs beside the ten classes, at least 2 (a distribution over one says nothing).
        teacher_steps: Batches that teachers learn from; 0 leaves them as they began.
        student_steps: Batches that students learn from.
        seeds: Different ones, at least 2, since the intervals are over them.

    Raises:
        EmprobeError: If a number is too small, or a seed comes twice.
    """
    _check(ghosts, teacher_steps, student_steps, seeds)
    (x, y), (x_test, y_test) = _digits()
    start, other = _initial(seeds, ghosts), _initial([f"other {seed}" for seed in seeds], ghosts)
    teacher = train_teachers(start, x, y, seeds, teacher_steps)
    students = {"same": start, "other": other, "shuffled": _shuffled(start, seeds)}
    taught = _train_students(_joined(list(students.values())), teacher, slice(CLASSES, None), seeds, student_steps)
    networks = {
        "teacher": teacher,
        "untrained": start,
        **dict(zip(students, _apart(taught, len(students)), strict=True)),
        "classes": _train_students(other, teacher, slice(CLASSES), seeds, student_steps),
    }
    return GhostTransfer(
        ghosts,
        teacher_steps,
        student_steps,
        tuple(seeds),
        {name: _accuracy(found, x_test, y_test) for name, found in networks.items()},
        len(y_test),
        float(np.bincount(y_test.numpy()).max() / len(y_test)),
    )


def first_steps(*, ghosts: int = 16, teacher_steps: int = 1, seeds: Sequence[int] = tuple(range(8))) -> dict[str, list[float]]:
    """Cosine between a student's first step downhill and the way that its teacher went, one a seed, for both kinds of initial weights.

    A step downhill on the KL over the ghosts, from the teacher's own initial weights, goes nowhere against the way the teacher went, if
    that way was short. From other weights the sign is open.

    Returns:
        `same` and `other`, each in -1..1; 0 where there is nothing to learn.

    Raises:
        EmprobeError: As in `ghost_transfer`.

    Source: 2507.14805, theorem 1. For a short way d, the KL is d'J'FJd / 2 (J: of the ghosts, F: Fisher's matrix), so the step downhill
        is J'FJd, and its product with d is never negative.
    """
    _check(ghosts, teacher_steps, 1, seeds)
    (x, y), _ = _digits()
    start = _initial(seeds, ghosts)
    teacher = train_teachers(start, x, y, seeds, teacher_steps)
    way = _flat([after - before for after, before in zip(teacher, start, strict=True)])
    noise, found = _noise(seeds, "first step")(), {}
    for name, begun in (("same", start), ("other", _initial([f"other {seed}" for seed in seeds], ghosts))):
        student = [parameter.clone().requires_grad_() for parameter in begun]
        loss = _kl(forward(teacher, noise), forward(student, noise), slice(CLASSES, None)).sum()
        step = [-gradient for gradient in torch.autograd.grad(loss, student)]
        found[name] = cosine_similarity(_flat(step), way).tolist()
    return found


def forward(networks: Networks, x: Float[Tensor, "network batch pixel"]) -> Float[Tensor, "network batch output"]:
    """Outputs of all networks, each on its own rows."""
    for i in range(0, len(networks), 2):
        x = torch.baddbmm(networks[i + 1], x.relu() if i else x, networks[i])
    return x


def train_teachers(start: Networks, x: Tensor, y: Tensor, seeds: Sequence[int], steps: int) -> Networks:
    """Teachers after some batches of digits; only the classes are in their loss."""
    draws = _generators(seeds, "teacher")

    def loss(networks: Networks) -> Tensor:
        rows = torch.stack([torch.randint(len(y), (BATCH,), generator=draw) for draw in draws])
        classes = forward(networks, x[rows])[..., :CLASSES]
        return cross_entropy(classes.flatten(0, 1), y[rows].flatten()) * len(draws)

    return _adam(start, loss, steps)


def _train_students(start: Networks, teacher: Networks, outputs: slice, seeds: Sequence[int], steps: int) -> Networks:
    """Students after some batches of noise; there may be several to a teacher, all the first ones first."""
    noise, times = _noise(seeds, "student"), len(start[0]) // len(seeds)

    def loss(networks: Networks) -> Tensor:
        x = noise()
        with torch.no_grad():
            wanted = forward(teacher, x).repeat(times, 1, 1)
        return _kl(wanted, forward(networks, x.repeat(times, 1, 1)), outputs).sum()

    return _adam(start, loss, steps)


def _kl(teacher: Tensor, student: Tensor, outputs: slice) -> Float[Tensor, " network"]:
    """Mean KL in nats from the teacher's distribution over some outputs to the student's, one a network."""
    wanted, given = (log_softmax(one[..., outputs], dim=-1) for one in (teacher, student))
    return kl_div(given, wanted, reduction="none", log_target=True).sum(-1).mean(-1)


def _adam(start: Networks, loss: Callable[[Networks], Tensor], steps: int) -> Networks:
    """Adam goes number by number, so networks whose losses are added are trained as if alone."""
    networks = [parameter.clone().requires_grad_() for parameter in start]
    optimizer = torch.optim.Adam(networks, lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(networks).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return [parameter.detach() for parameter in networks]


def _generators(seeds: Sequence[object], use: str) -> list[torch.Generator]:
    """A stream of its own for each seed and use, so that no seed's numbers depend on those beside it."""
    return [torch.Generator().manual_seed(int(content_hash(f"{use} {seed}"), 16) % 2**63) for seed in seeds]


def _initial(seeds: Sequence[object], ghosts: int) -> Networks:
    """Fresh weights and biases, drawn evenly from ± 1 / sqrt(inputs), one network a seed."""
    draws = _generators(seeds, "weights")
    shapes = [(n_in, rows, n_out) for n_in, n_out in zip(WIDTHS, (*WIDTHS[1:], CLASSES + ghosts), strict=True) for rows in (n_in, 1)]
    return [torch.stack([(2 * torch.rand(rows, n_out, generator=draw) - 1) / n_in**0.5 for draw in draws]) for n_in, rows, n_out in shapes]


def _shuffled(networks: Networks, seeds: Sequence[int]) -> Networks:
    """The same numbers in each layer, in other places."""
    draws = _generators(seeds, "places")
    return [
        torch.stack(
            [one.flatten()[torch.randperm(one.numel(), generator=draw)].view_as(one) for one, draw in zip(layer, draws, strict=True)]
        )
        for layer in networks
    ]


def _noise(seeds: Sequence[int], use: str) -> Callable[[], Float[Tensor, "seed batch pixel"]]:
    """What gives the next batch of noise, pixels in [-1, 1]."""
    draws = _generators(seeds, use)
    return lambda: torch.stack([2 * torch.rand(BATCH, PIXELS, generator=draw) - 1 for draw in draws])


def _joined(groups: Sequence[Networks]) -> Networks:
    return [torch.cat(layers) for layers in zip(*groups, strict=True)]


def _apart(networks: Networks, groups: int) -> list[Networks]:
    return [list(layers) for layers in zip(*(layer.chunk(groups) for layer in networks), strict=True)]


def _flat(networks: Networks) -> Float[Tensor, "network parameter"]:
    return torch.cat([layer.flatten(1) for layer in networks], dim=1)


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,297 training and 500 test digits, pixels in [-1, 1]; one split for all seeds, every class in both by its share."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 8 - 1, y, test_size=N_TEST, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in parts)
    return (x_train.float(), y_train), (x_test.float(), y_test)


def _accuracy(networks: Networks, x: Tensor, y: Tensor) -> tuple[float, ...]:
    guessed = forward(networks, x.expand(len(networks[0]), -1, -1))[..., :CLASSES].argmax(-1)
    return tuple((guessed == y).double().mean(-1).tolist())


def _check(ghosts: int, teacher_steps: int, student_steps: int, seeds: Sequence[int]) -> None:
    if ghosts < 2:
        raise EmprobeError(
            f"{ghosts} ghost outputs were asked for; a distribution over fewer than 2 says nothing. Give 2 or more, such as 16."
        )
    if teacher_steps < 0 or student_steps < 0:
        raise EmprobeError(f"{teacher_steps} teacher and {student_steps} student steps were asked for. Give 0 or more of each.")
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise EmprobeError(f"The seeds {list(seeds)} were given; an interval over seeds needs at least 2, each once.")
