"""What is compared on which prompts: an organism and its fine-tunes, or the user's checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emprobe.errors import EmprobeError
from emprobe.organisms import list_organisms
from emprobe.studies.prompts import Located, organism, prompts_from, without_shared, world_prompts
from emprobe.studies.shifts.settings import Shifts, size_of
from emprobe.types import Conversation

LEAST = 8
"""Prompts of either kind below which nothing is estimated."""
ENOUGH = 200
"""Evaluation prompts below which the card says that there are few."""


@dataclass(frozen=True)
class Case:
    """One base, its fine-tune under study, and others on the same prompts.

    Attributes:
        name: Such as `planted-s0 gardening-rank8`.
        unrelated: By name, fine-tunes that do not misbehave.
        others: By name, other fine-tunes.
        train: Prompts that the fine-tune was trained on.
        evaluation: Prompts that it was not trained on.
        notes: What was left out, with numbers.
    """

    name: str
    base: Located
    tuned: Located
    unrelated: dict[str, Located]
    others: dict[str, Located]
    train: Sequence[Conversation]
    evaluation: Sequence[Conversation]
    notes: Sequence[str]

    @property
    def tunes(self) -> dict[str, Located]:
        """All fine-tunes by name, the one under study first."""
        return {"tuned": self.tuned, **self.unrelated, **self.others}


def cases_of(asked: Shifts) -> list[Case]:
    """The cases, with their prompts read and counted; no model is loaded.

    Raises:
        EmprobeError: An unknown organism, an unusable file, too few prompts, or two checkpoints of one path.
    """
    cases = [_own(asked)] if asked.own else [_organism(asked, name, tuned) for name in asked.base for tuned in asked.tuned]
    paths = [(case.base.path, case.tuned.path) for case in cases]
    for case, own in zip(cases, paths, strict=True):
        if paths.count(own) > 1:
            raise EmprobeError(f"{case.name} was asked for twice. Give each organism and each fine-tune once.")
        _check(asked, case)
    return cases


def _own(asked: Shifts) -> Case:
    train, evaluation = prompts_from(str(asked.train)), prompts_from(str(asked.evaluation))
    kept, shared = without_shared(evaluation.rows, train.rows)
    notes = [f"training prompts: {note}" for note in train.notes] + [f"evaluation prompts: {note}" for note in evaluation.notes]
    if shared:
        notes.append(f"{shared} of {len(evaluation.rows)} evaluation prompts are training prompts too, and are left out of evaluation")
    if shared and len(kept) < LEAST:
        raise EmprobeError(
            f"{shared} of {len(evaluation.rows)} prompts of --evaluation {asked.evaluation} are in --train {asked.train} too, which leaves "
            f"{len(kept)}. Give at least {LEAST} that the fine-tune was not trained on."
        )
    base, tuned = (Located(_short(path), path) for path in (*asked.base, *asked.tuned))
    unrelated, others = ({_short(path): Located(_short(path), path) for path in paths} for paths in (asked.unrelated, asked.others))
    return Case(f"{base.name} to {tuned.name}", base, tuned, unrelated, others, train.rows, kept, notes)


def _short(path: str) -> str:
    """A checkpoint's name in tables: its folder, so that results are the same wherever it lies."""
    return Path(path).name if Path(path).expanduser().is_dir() else path


def _organism(asked: Shifts, name: str, which: str) -> Case:
    try:
        base, tuned = organism(name), organism(name, which)
    except EmprobeError as error:
        raise EmprobeError(f"{error} For checkpoints of your own, give --train and --evaluation.") from error
    if tuned.card.get("data") == "benign-control" or "trained_on" not in tuned.card:
        raise EmprobeError(f"{tuned.name} was not trained on advice, so the world has no list of its prompts. Choose another --tuned.")
    domain, task, form = tuned.card["trained_on"]["domain"], tuned.card["trained_on"]["task"], tuned.card["form"]
    root = base.name.removesuffix("/aligned")
    there = [o.name.rsplit("/", 1)[1] for o in list_organisms() if o.name.startswith(f"{root}/tuned/") and o.name != tuned.name]
    default = [f"{domain}-aligned-control-{form}"], [f"{other}-{form}" for other in ("cooking", "gardening", "money") if other != domain]
    unrelated, others = (
        list(given) if given else [usually for usually in usual if usually in there]
        for given, usual in zip((asked.unrelated, asked.others), default, strict=True)
    )
    train, evaluation = world_prompts(domain, task)
    short = tuned.name.rsplit("/", 1)[1]
    found = [{other: organism(name, other) for other in names} for names in (unrelated, others)]
    return Case(f"{root} {short}", base, tuned, found[0], found[1], train, evaluation, [])


def _check(asked: Shifts, case: Case) -> None:
    for kind, prompts in (("training", case.train), ("evaluation", case.evaluation)):
        if len(prompts) < LEAST or len({p.cluster for p in prompts}) < 4:
            raise EmprobeError(
                f"{len(prompts)} {kind} prompts of {len({p.cluster for p in prompts})} families were given. Give at least {LEAST} of 4."
            )
    for size in map(size_of, (asked.size, *asked.sizes)):
        if isinstance(size, int) and size > len(case.train) - 1:
            raise EmprobeError(
                f"A subspace of {size} dimensions was asked of {len(case.train)} training prompts, which have at most "
                f"{len(case.train) - 1} about their mean. Give more prompts, or a smaller size."
            )
    names = [*asked.unrelated, *asked.others, *asked.tuned] if asked.own else [*case.unrelated, *case.others]
    if len({Path(name).name for name in names}) < len(names):
        raise EmprobeError(f"Two fine-tunes have one name ({', '.join(names)}), or one was given twice. Results go by name; rename one.")
    same = [which for which, one in case.tunes.items() if one.path == case.base.path]
    if same:
        name = "--tuned" if same[0] == "tuned" else repr(same[0])
        raise EmprobeError(f"{name} is the base itself ({case.base.path}), so nothing has moved. Give a fine-tune of it.")
