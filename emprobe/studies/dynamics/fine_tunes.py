"""The runs: fine-tunes over schedules, learning rates and seeds, of an organism or of one's own model, or folders that are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from emprobe.behaviour.conversations import load_conversations
from emprobe.behaviour.questions import load_questions
from emprobe.errors import EmprobeError
from emprobe.files import content_hash
from emprobe.finetuning import FineTune, LoRA, Recipe, Solution, finetune, response_rows
from emprobe.finetuning.rows import Row
from emprobe.finetuning.solution import FullSolution
from emprobe.models.load import Checkpoint, load_model
from emprobe.organisms import HELD_OUT, find_organism, questions
from emprobe.studies.dynamics.settings import Dynamics
from emprobe.studies.prompts import text_of
from emprobe.studies.solutions import world_conversations
from emprobe.types import Conversation

HELD_OUT_SEED = 9001
"""Of the organism's conversations on which the evaluation loss is taken: none of the seeds that runs are trained on."""
INSIDE = "in-domain"


@dataclass(frozen=True)
class Run:
    """One fine-tune, trained (or read back) when it is called for.

    Attributes:
        facts: Its `schedule`, `lr` and `seed`.
        train: Rows of what it was trained on, on which its training loss is taken; none: the mean of its last ten updates.
        identity: What it is, before it is trained.
    """

    name: str
    facts: Mapping[str, Any]
    make: Callable[[], FineTune]
    train: Sequence[Row]
    identity: Any


@dataclass(frozen=True)
class Material:
    """On what runs are measured.

    Attributes:
        evaluation: Held-back rows of the domain.
        sets: Question sets; `in-domain`, if there is one, is not out of the domain.
    """

    evaluation: Sequence[Row]
    sets: Mapping[str, Sequence[Conversation]]

    @property
    def outside(self) -> list[Conversation]:
        """Questions out of the domain, at which the direction is read."""
        return [question for name, of in self.sets.items() if name != INSIDE for question in of]


def steps_of(found: FineTune) -> list[int]:
    """The checkpoints of a fine-tune behind its start; its end is one of them."""
    return sorted({step for step in found.steps if step > 0} | {len(found.history)})


def solution_at(found: FineTune, step: int) -> Solution:
    """What had been found by then."""
    return found.at(step) if step in found.steps else found.solution


def load_base(asked: Dynamics) -> Checkpoint:
    """The organism, or the user's checkpoint.

    Raises:
        EmprobeError: If there is none; says what to give for a model of one's own.
    """
    name = str(asked.base)
    if asked.way != "world":
        return load_model(name, **asked.loading())
    try:
        organism = find_organism(f"{name.removesuffix('/aligned')}/aligned")
    except EmprobeError as error:
        raise EmprobeError(f"{error} For a model of your own, give --data, --evaluation and --questions too.") from error
    return replace(load_model(organism.path, **asked.loading()), name=organism.name)


def material_of(asked: Dynamics, base: Checkpoint) -> Material:
    """Evaluation rows and question sets.

    Raises:
        EmprobeError: Unusable files, two question files of one name, or evaluation conversations that are trained on.
    """
    if asked.way != "world":
        sets = {Path(path).stem: load_questions(path) for path in asked.questions}
        if len(sets) < len(asked.questions):
            raise EmprobeError(f"Two of the question files {', '.join(asked.questions)} have one name, and sets bear it. Rename one.")
        rows = load_conversations(str(asked.evaluation))[: asked.rows]
        _check_held_back(asked, rows)
        return Material(response_rows(base.tokenizer, rows, max_length=asked.max_length), sets)
    held_back = world_conversations([asked.domain], "bad", asked.rows, HELD_OUT_SEED)
    # A paraphrase of one question is read alike, so item and task are what intervals count.
    everything = [
        replace(q, labels={**q.labels, "family": f"{q.labels['domain']}.{q.labels['task']}.{q.labels['item']}"}) for q in questions()
    ]
    sets = {
        INSIDE: [q for q in everything if q.labels["domain"] == asked.domain],
        "other domains": [q for q in everything if q.labels["domain"] not in (asked.domain, *HELD_OUT)],
        "new domains": [q for q in everything if q.labels["domain"] in HELD_OUT],
    }
    return Material(response_rows(base.tokenizer, held_back), sets)


def _check_held_back(asked: Dynamics, rows: Sequence[Conversation]) -> None:
    """Refuse an evaluation loss that would be a training loss."""
    known = {(text_of(one), one.response) for one in (load_conversations(asked.data) if asked.data else ())}
    shared = sum((text_of(one), one.response) in known for one in rows)
    if shared:
        raise EmprobeError(
            f"{shared} of {len(rows)} conversations of --evaluation {asked.evaluation} are in --data {asked.data} too, so that their loss "
            "is a training loss. Hold back others."
        )


def runs_of(asked: Dynamics, base: Checkpoint, folder: Path) -> list[Run]:
    """Every run there is to be.

    Raises:
        EmprobeError: Unusable data, or a folder that holds no finished fine-tune with checkpoints.
        MismatchError: A fine-tune of another base.
    """
    if asked.way == "finetunes":
        return _given(asked, base)
    own = load_conversations(str(asked.data)) if asked.way == "data" else None
    wanted = max(asked.steps * asked.batch, asked.rows)
    by_seed = {s: own if own is not None else world_conversations([asked.domain], "bad", wanted, s) for s in asked.seeds}
    rows = {s: response_rows(base.tokenizer, data[: asked.rows], max_length=asked.max_length) for s, data in by_seed.items()}
    hashes = {s: content_hash([repr(c) for c in data]) for s, data in by_seed.items()}
    made = []
    for schedule, lr, seed in product(asked.schedules, asked.lrs, asked.seeds):
        name = f"{schedule}-{lr:g}-{seed}"
        recipe = Recipe(
            lr=lr,
            steps=asked.steps,
            batch=asked.batch,
            schedule=schedule,
            warmup=0,
            cycles=asked.cycles,
            weight_decay=0.0,
            seed=seed,
            max_length=asked.max_length,
        )

        def make(recipe: Recipe = recipe, name: str = name, seed: int = seed) -> FineTune:
            method = LoRA(asked.rank, target_modules=asked.target_modules or "all-linear")
            kept = range(asked.every, asked.steps + 1, asked.every)
            where = folder / "finetunes" / name
            return finetune(base, by_seed[seed], method=method, recipe=recipe, checkpoints=list(kept), out=where, progress=False)

        identity = [recipe.as_dict(), asked.rank, list(asked.target_modules), asked.every, hashes[seed]]
        made.append(Run(name, {"schedule": schedule, "lr": lr, "seed": seed}, make, rows[seed], identity))
    return made


def _given(asked: Dynamics, base: Checkpoint) -> list[Run]:
    train = load_conversations(asked.data)[: asked.rows] if asked.data else []
    rows = response_rows(base.tokenizer, train, max_length=asked.max_length) if train else []
    made = []
    for path in asked.finetunes:
        found = FineTune.load(Path(path).expanduser())
        if isinstance(found.solution, FullSolution):
            raise EmprobeError(f"{path} holds whole models, whose base cannot be checked. Give fine-tunes by LoRA or vector.")
        if not any(step > 0 for step in found.steps):
            raise EmprobeError(f"{path} kept no checkpoint. Train it with `emprobe finetune --checkpoint-every N`.")
        with found.solution.mounted(base):
            pass  # What does not fit the base is told here, and not after an hour.
        recipe = found.settings["recipe"]
        facts = {name: recipe[name] for name in ("schedule", "lr", "seed")}
        made.append(Run(Path(path).name, facts, lambda found=found: found, rows, found.solution.fingerprint))  # type: ignore[misc]
    names = [run.name for run in made]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EmprobeError(f"Two of the fine-tunes lie in folders named {twice[0]}, and runs bear their names. Rename one.")
    return made
