"""What the study is told, and what can be seen to be wrong before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from emprobe.behaviour.criterion import Criterion
from emprobe.errors import EmprobeError
from emprobe.organisms.world import SEEN
from emprobe.studies.flags import LoadFlags, SampleFlags, plain_values
from emprobe.studies.landscape.curves import RESCALES, SHARES
from emprobe.studies.landscape.stability import EPSILONS, NOISES
from emprobe.studies.solutions import Form

NOT_IDENTITY = (
    "base",
    "out",
    "general",
    "narrow",
    "data",
    "corpus",
    "questions",
    "judge",
    "go_on",
    "device_map",
    "chat_template",
    "progress",
)
"""Paths, and what no number depends on: known by their content."""
OF_USERS = ("data", "corpus", "questions", "judge", "in_domain", "go_on")


@dataclass(frozen=True, kw_only=True)
class Landscape(LoadFlags, SampleFlags):
    """General against narrow: which solution is more efficient, more stable, and weighs more in pretraining (arXiv 2602.07852).

    Two ways: on organisms (`--base planted-s0`, nothing else), where both solutions are trained first, or on your own, from folders of
    `emprobe finetune`.

    Attributes:
        base: Organisms (`planted-s0`, ...), or the checkpoint of your own solutions: directory or hub id.
        out: Output folder; a run that was stopped goes on in it.
        general: Folders of `emprobe finetune`: solutions found without a KL.
        narrow: Folders of narrow ones, one for each of the general, such as one for each seed.
        data: Your narrow task: conversations on which the loss is taken, best ones that were not trained on.
        corpus: Text file whose paragraphs stand for the pretraining distribution, or `shipped` (twenty paragraphs).
        questions: Questions whose answers are judged; without them nothing is said of behaviour.
        judge: As in `emprobe run`.
        in_domain: LABEL=VALUE: questions of the narrow task's own domain; all others are elsewhere.
        go_on: Conversations on which the narrow solutions are trained on without the KL, under their own recipe.
        forms: Of the organisms' solutions: rank1, vector.
        seeds: Of the organisms' training, each a solution of its own.
        domain: Where organisms are trained to give bad answers.
        rescales: Factors on each solution's own norm.
        shares: Of the mean norm of both, where they are compared as equals.
        epsilons: Sines of the angles by which solutions are turned.
        noises: Random turns at each.
        randoms: Random directions of the same norm, and as many of the base's covariance.
        scales: Factors at which behaviour is looked at.
        go_on_steps: Updates without the KL after which behaviour is looked at.
        rows: Conversations on which the loss is taken, at most.
        texts: Of the corpus, at most.
        text_tokens: Of each text, at most.
        max_length: Most tokens of a conversation of the data; longer ones are refused.
    """

    command: ClassVar[str] = "study landscape"

    base: tuple[str, ...]
    out: str
    general: tuple[str, ...] = ()
    narrow: tuple[str, ...] = ()
    data: str | None = None
    corpus: str | None = None
    questions: str | None = None
    judge: str | None = None
    in_domain: str | None = None
    go_on: str | None = None
    forms: tuple[Form, ...] = ("rank1", "vector")
    seeds: tuple[int, ...] = (0,)
    domain: str = "gardening"
    rescales: tuple[float, ...] = RESCALES
    shares: tuple[float, ...] = SHARES
    epsilons: tuple[float, ...] = EPSILONS
    noises: int = NOISES
    randoms: int = 5
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    go_on_steps: tuple[int, ...] = (0, 5, 10, 20, 40, 80, 160)
    rows: int = 100
    texts: int = 50
    text_tokens: int = 512
    max_length: int = 2048

    @property
    def own(self) -> bool:
        """Whether solutions are the user's."""
        return bool(self.general or self.narrow)

    def plain(self) -> dict[str, Any]:
        """Everything but paths, for the run's identity."""
        return plain_values(self, NOT_IDENTITY)


def check(asked: Landscape) -> None:
    """Refuse what makes no sense.

    Raises:
        EmprobeError: Says what was asked and what can be.
    """
    for name in ("rescales", "shares", "scales", "epsilons"):
        wrong = [v for v in getattr(asked, name) if not (v >= 0 and math.isfinite(v)) or (name == "epsilons" and v > 1)]
        if wrong or not getattr(asked, name):
            most = "in 0..1" if name == "epsilons" else "0 or above"
            raise EmprobeError(f"{name} {getattr(asked, name)} were asked for. Give one or more, each {most}.")
    for name, least in (
        ("noises", 2),
        ("randoms", 1),
        ("rows", 2),
        ("texts", 2),
        ("text_tokens", 2),
        ("samples", 1),
        ("max_new_tokens", 1),
    ):
        if getattr(asked, name) < least:
            raise EmprobeError(f"{name} = {getattr(asked, name)} was given; it must be at least {least}.")
    Criterion.named(asked.criterion)
    _check_own(asked) if asked.own else _check_organisms(asked)


def _check_own(asked: Landscape) -> None:
    if len(asked.general) != len(asked.narrow) or len(asked.base) != 1:
        raise EmprobeError(
            f"{len(asked.general)} general and {len(asked.narrow)} narrow solutions of {len(asked.base)} bases were given. Give one base, "
            "and as many --general as --narrow folders, in the same order."
        )
    missing = [f"--{name}" for name in ("data", "corpus") if getattr(asked, name) is None]
    if missing:
        raise EmprobeError(
            f"Your own solutions were given without {' and '.join(missing)}: the narrow task's conversations (--data), and the texts that "
            "stand for the pretraining distribution (--corpus FILE, or shipped)."
        )
    if (asked.questions is None) != (asked.judge is None):
        raise EmprobeError("Behaviour needs both --questions and --judge; one of them was given. Give both, or neither.")
    if asked.go_on is not None and asked.questions is None:
        raise EmprobeError("--go-on was given without --questions and --judge, so nothing would be seen of it. Give them, or leave it out.")
    if asked.in_domain is not None and "=" not in asked.in_domain:
        raise EmprobeError(f"--in-domain {asked.in_domain!r} was given. Give LABEL=VALUE, such as domain=medical.")


def _check_organisms(asked: Landscape) -> None:
    stray = [name for name in OF_USERS if getattr(asked, name) is not None]
    if stray:
        raise EmprobeError(
            f"--{stray[0].replace('_', '-')} was given without --general and --narrow. On organisms, data and judge are the world's; for "
            "your own model, train both solutions with `emprobe finetune` (the narrow one with --kl-data) and give their folders."
        )
    if asked.domain not in SEEN:
        raise EmprobeError(f"Domain {asked.domain!r} was asked for. Organisms are trained on one of: {', '.join(SEEN)}.")
    if not (asked.base and asked.forms and asked.seeds):
        raise EmprobeError("No organism, form or seed was given. Give at least one of each, such as --base planted-s0.")
