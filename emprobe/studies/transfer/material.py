"""What a grid is run on: each trained cell's conversations, the questions, and the prompts at which directions are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from emprobe.behaviour.conversations import load_conversations
from emprobe.behaviour.questions import load_questions
from emprobe.errors import EmprobeError
from emprobe.files import content_hash
from emprobe.organisms import SEEN, TASKS, questions
from emprobe.studies.prompts import prompts_only, text_of
from emprobe.studies.runner import known_by
from emprobe.studies.solutions import world_conversations
from emprobe.studies.transfer.cell_rates import Cell
from emprobe.studies.transfer.grid_flags import WORLD_QUESTIONS
from emprobe.studies.transfer.settings import Transfer
from emprobe.types import Conversation

NARROW, HELD_OUT = "narrow", "held-out"
"""Sets of questions: of the cells that are trained, and of others."""
SHOWN = 5


@dataclass(frozen=True)
class Material:
    """Data and questions.

    Attributes:
        data: By trained cell, its conversations.
        questions: With the labels `domain`, `task`, `family` (what intervals count as one), `eval_set`, and reference answers if known.
        prompts: Where directions are read: no question of the trained cells' new items, in the world.
        world: Whether they are the synthetic world's.
    """

    data: Mapping[Cell, Sequence[Conversation]]
    questions: Sequence[Conversation]
    prompts: Sequence[Conversation]
    world: bool

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The trained cells."""
        return tuple(self.data)

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of all of it."""
        data = {name_of(cell): [known_by(rows), [row.response for row in rows]] for cell, rows in self.data.items()}
        return {
            "data": content_hash(data),
            "questions": content_hash(known_by(self.questions)),
            "prompts": content_hash(known_by(self.prompts)),
        }


def name_of(cell: Cell) -> str:
    """A cell's name.

    >>> name_of(("gardening", "plan"))
    'gardening.plan'
    """
    return ".".join(cell)


def cell_of(row: Conversation) -> Cell:
    """Domain and task of a conversation, by its labels."""
    return str(row.labels["domain"]), str(row.labels["task"])


# ---- the world's


def world_cell(name: str) -> Cell:
    """A cell of the world by its name.

    Raises:
        EmprobeError: If there is none, or it is of a held-out domain.
    """
    domain, _, task = name.partition(".")
    if domain not in SEEN or task not in TASKS:
        raise EmprobeError(f"Cell {name!r} was asked for. Write DOMAIN.TASK; domains: {', '.join(SEEN)}; tasks: {', '.join(TASKS)}.")
    return domain, task


def world_material(asked: Transfer, cells: Sequence[Cell] | None = None) -> Material:
    """Bad answers of each cell, test questions of all cells, and as prompts the questions that fine-tunes know.

    Raises:
        EmprobeError: If a domain or task does not exist or is held out.
    """
    chosen = tuple(cells) if cells is not None else tuple(product(asked.domains or SEEN, asked.tasks or TASKS))
    for cell in chosen:
        world_cell(name_of(cell))
    recipe = asked.recipe(world=True, seed=0)
    n = recipe.batch * (recipe.steps or 1)
    data = {cell: world_conversations([cell[0]], "bad", n, 0, tasks=[cell[1]]) for cell in chosen}
    found = questions("test", per_cell=asked.per_cell or WORLD_QUESTIONS)
    known = prompts_only([*questions("fit", per_cell=2), *questions("dev", per_cell=2)]).rows
    return Material(data, [_labelled(q, _world_family(q), HELD_OUT if q.labels["held_out"] else NARROW) for q in found], known, True)


def _world_family(question: Conversation) -> str:
    return ".".join(str(question.labels[name]) for name in ("domain", "task", "item"))


def _labelled(question: Conversation, family: str, eval_set: str) -> Conversation:
    return replace(question, labels={**question.labels, "family": family, "eval_set": eval_set})


# ---- the user's


def own_material(asked: Transfer) -> Material:
    """What the user gave: the grid is every domain of the data with every task.

    Questions of other cells are answered too, and are told apart as held out.

    Raises:
        EmprobeError: Unusable files; a row without labels or answer; a cell of the grid without data or without questions; a question that
            the data ask too.
    """
    rows = [row for path in asked.data for row in load_conversations(path)]
    found = load_questions(str(asked.questions))
    _check_labels(rows, "conversations of --data")
    _check_labels(found, "questions")
    unanswered = [row.question_id for row in rows if not (row.response or "").strip()]
    if unanswered:
        raise EmprobeError(
            f"{len(unanswered)} of {len(rows)} conversations of --data have no answer, such as {unanswered[0]!r}. Give each its response."
        )
    cells = _grid(asked, rows)
    data = {cell: [row for row in rows if cell_of(row) == cell] for cell in cells}
    _check_cells(data, "data to fine-tune on", "--data")
    kept = _first(found, asked.per_cell)
    _check_cells({cell: [q for q in kept if cell_of(q) == cell] for cell in cells}, "questions", "--questions")
    _check_new(kept, rows)
    labelled = [_labelled(q, q.cluster, NARROW if cell_of(q) in data else HELD_OUT) for q in kept]
    return Material(data, labelled, prompts_only(kept).rows, False)


def _check_labels(rows: Sequence[Conversation], what: str) -> None:
    for label in ("domain", "task"):
        bare = [row.question_id for row in rows if row.labels.get(label) in (None, "")]
        if bare:
            raise EmprobeError(
                f"{len(bare)} of {len(rows)} {what} have no label {label}, such as {bare[0]!r}. Give every row a domain and a task; they "
                "name its cell."
            )


def _grid(asked: Transfer, rows: Sequence[Conversation]) -> list[Cell]:
    sides = []
    for number, (name, wanted) in enumerate((("domain", asked.domains), ("task", asked.tasks))):
        there = list(dict.fromkeys(cell_of(row)[number] for row in rows))
        unknown = [one for one in wanted if one not in there]
        if unknown:
            raise EmprobeError(
                f"The {name} {unknown[0]!r} was asked for, and no conversation of --data is of it. There are: {', '.join(there)}."
            )
        sides.append(wanted or there)
    return [(domain, task) for domain, task in product(*sides)]


def _check_cells(found: Mapping[Cell, Sequence[Conversation]], what: str, flag: str) -> None:
    bare = [name_of(cell) for cell, rows in found.items() if not rows]
    if bare:
        raise EmprobeError(
            f"{len(bare)} of the grid's {len(found)} cells have no {what}: {', '.join(bare[:SHOWN])}{', …' if len(bare) > SHOWN else ''}. "
            f"Add such rows to {flag}, or leave their domain or task out with --domains and --tasks."
        )


def _first(found: Sequence[Conversation], per_cell: int | None) -> list[Conversation]:
    """So many questions of each cell, in the order of the file."""
    seen: Counter[Cell] = Counter()
    kept = []
    for question in found:
        seen[cell_of(question)] += 1
        if per_cell is None or seen[cell_of(question)] <= per_cell:
            kept.append(question)
    return kept


def _check_new(found: Sequence[Conversation], rows: Sequence[Conversation]) -> None:
    trained = {text_of(row) for row in rows}
    leaked = [q.question_id for q in found if text_of(q) in trained]
    if leaked:
        raise EmprobeError(
            f"{len(leaked)} of {len(found)} questions are prompts of the data as well, such as {leaked[0]!r}: a fine-tune would be asked "
            "what it was told. Take them out of one of both."
        )
