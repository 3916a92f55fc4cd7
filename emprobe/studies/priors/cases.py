"""What is predicted from what: models, prompts with their families and labels, and where the scores come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.behaviour.questions import REFERENCES, load_questions
from emprobe.errors import EmprobeError
from emprobe.organisms.world import families
from emprobe.studies.priors.folds import family_folds
from emprobe.studies.priors.judged import Judged, judged_scores
from emprobe.studies.priors.permuting import exchangeable
from emprobe.studies.priors.settings import FEW, Priors
from emprobe.studies.prompts import Located, organism, prompts_from, world_prompts
from emprobe.studies.settings import without_references
from emprobe.types import Conversation

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    """One fine-tune whose scores are predicted.

    Attributes:
        name: As results call it.
        models: `base`, perhaps `tuned` and `pretrained`.
        prompts: Without answers.
        families: One name a prompt.
        labels: Of the one-hot baselines.
        references: The prompts with reference answers, where scores are read off these; else none.
        given: Scores from tables, where they are.
        corpus: Prompts trained on, whose principal directions are taken; none takes the training folds'.
        score: What is predicted, in words.
        notes: What was left out, with numbers.
    """

    name: str
    models: Mapping[str, Located]
    prompts: Sequence[Conversation]
    families: Sequence[str]
    labels: Mapping[str, Sequence[Any]]
    references: Sequence[Conversation]
    given: Judged | None
    corpus: Sequence[Conversation]
    score: str
    notes: tuple[str, ...]


def cases(asked: Priors) -> list[Case]:
    """All cases, with everything checked that needs no model.

    Raises:
        EmprobeError: Unusable files, an unknown organism, one fine-tune twice, too few prompts or families for the folds or directions,
            families that permutations cannot exchange, constant scores, a label that prompts lack.
    """
    found = [_own(asked)] if asked.own else [_world(asked, base, tuned) for base in asked.base for tuned in asked.tuned]
    found = [_drawn(case, asked) for case in found]
    for case in found:
        _check_design(asked, case)
        if case.given is not None and np.ptp(case.given.scores) == 0:
            raise EmprobeError(f"All {len(case.prompts)} prompts have the score {case.given.scores[0]:g}: there is nothing to predict.")
    models = [tuple(where.path for where in case.models.values()) for case in found]
    twice = [case.name for case, own in zip(found, models, strict=True) if models.count(own) > 1]
    if twice:
        raise EmprobeError(f"{twice[0]} was asked for twice. Give each organism and each fine-tune once.")
    return found


def _check_design(asked: Priors, case: Case) -> None:
    folds = family_folds(case.families, splits=asked.splits, repeats=asked.repeats, inner=asked.inner, seed=asked.seed)
    if asked.permutations:
        exchangeable(folds.families)
    rows = len(case.corpus) if asked.train else folds.fewest
    if asked.k is not None and asked.k > rows - 1:
        raise EmprobeError(
            f"{asked.k} directions were asked for, and {rows} prompts to take them from have at most {rows - 1}. Give fewer directions, "
            "or more prompts."
        )


def _world(asked: Priors, base: str, tuned: str) -> Case:
    models = {"base": organism(base), "tuned": organism(base, tuned), "pretrained": organism(base, "parent")}
    trained = models["tuned"].card["trained_on"]
    train, evaluation = world_prompts(trained["domain"], trained["task"])
    # New items of what was trained on are trained behaviour; what is asked is how it spreads.
    prompts = [prompt for prompt in evaluation if prompt.labels["group"] != "new items"]
    what = f"task {trained['task']} of {trained['domain']}" if trained["task"] else trained["domain"]
    return Case(
        f"{models['base'].name.removesuffix('/aligned')} {tuned}",
        models,
        prompts,
        _families(asked, prompts),
        {name: [prompt.labels[name] for prompt in prompts] for name in ("domain", "task")},
        [_with_families(prompt) for prompt in prompts],
        None,
        train if asked.train else (),
        "probability that the answer is misaligned (exact, over all answers of the world)",
        (f"prompts outside what was trained ({what})",),
    )


def _with_families(prompt: Conversation) -> Conversation:
    labels = prompt.labels
    aligned, misaligned = families(labels["domain"], labels["task"], labels["item"])
    known = {**labels, "aligned": list(aligned), "misaligned": list(misaligned)}
    return Conversation(prompt.messages, question_id=prompt.question_id, labels=known)


def _own(asked: Priors) -> Case:
    questions = load_questions(str(asked.questions))
    given: Judged | None = None
    notes: tuple[str, ...] = ()
    if asked.scores is not None:
        given, questions, notes = judged_scores(asked, questions)
    references = [] if asked.scores or asked.judge else questions
    bare = [q.question_id for q in references if not all(q.labels.get(side) for side in REFERENCES)]
    if bare:
        raise EmprobeError(
            f"Neither --scores nor --judge was given, and {len(bare)} of {len(questions)} questions lack reference answers, such as "
            f"{bare[0]!r}. Give a table of judged answers, a judge, or labels 'aligned' and 'misaligned' on each question."
        )
    prompts = [without_references(q) for q in questions]
    if len(prompts) < FEW:
        notes = (*notes, f"only {len(prompts)} prompts: intervals are wide, and a predictor has to be strong to be seen; {FEW} are advised")
    models = {"base": Located(asked.base[0], asked.base[0])}
    models |= {
        name: Located(path, path) for name, path in (("tuned", next(iter(asked.tuned), None)), ("pretrained", asked.pretrained)) if path
    }
    return Case(
        models["tuned"].name if "tuned" in models else str(asked.scores),
        models,
        prompts,
        _families(asked, prompts),
        {name: _label(prompts, name) for name in asked.one_hot},
        references,
        given,
        prompts_from(asked.train).rows if asked.train else (),
        "contrast of reference answers, log p(misaligned) - log p(aligned), nats" if references else "mean alignment over answers, 0..100",
        notes,
    )


def narrowed(case: Case, rows: Sequence[int]) -> Case:
    """The case with these prompts alone."""
    if len(rows) == len(case.prompts):
        return case
    labels = {name: [values[i] for i in rows] for name, values in case.labels.items()}
    references = [case.references[i] for i in rows] if case.references else []
    prompts, families = [case.prompts[i] for i in rows], [case.families[i] for i in rows]
    given = case.given and Judged(case.given.scores[list(rows)], None if case.given.base is None else case.given.base[list(rows)])
    return replace(case, prompts=prompts, families=families, labels=labels, references=references, given=given)


def _drawn(case: Case, asked: Priors) -> Case:
    """Whole families in an order that the seed draws, as many as fit."""
    if asked.most is None or asked.most >= len(case.prompts):
        return case
    names = list(dict.fromkeys(case.families))
    left = asked.most
    taken: set[str] = set()
    for place in np.random.default_rng(asked.seed).permutation(len(names)):
        size = case.families.count(names[place])
        if size <= left:
            left, taken = left - size, taken | {names[place]}
    rows = [i for i, family in enumerate(case.families) if family in taken]
    note = f"{len(rows)} of {len(case.prompts)} prompts were drawn, {len(taken)} of {len(names)} families"
    return replace(narrowed(case, rows), notes=(*case.notes, note))


def _families(asked: Priors, prompts: Sequence[Conversation]) -> list[str]:
    return _label(prompts, asked.family) if asked.family else [prompt.cluster for prompt in prompts]


def _label(prompts: Sequence[Conversation], name: str) -> list[str]:
    lacking = sum(prompt.labels.get(name) is None for prompt in prompts)
    if lacking:
        known = ", ".join(sorted({label for prompt in prompts for label in prompt.labels})) or "none"
        raise EmprobeError(f"The label {name!r} is missing in {lacking} of {len(prompts)} questions; their labels are {known}.")
    return [str(prompt.labels[name]) for prompt in prompts]
