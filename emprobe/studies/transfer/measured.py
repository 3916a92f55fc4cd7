"""What is measured on the base before any fine-tuning: functional similarity, room for coherent harm, solvability, the cell's start.

In the world, whole families of answers are known, so probabilities are exact. On a user's questions, what reference answers tell is
measured, and the rest is left out and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from emprobe.behaviour.cells import Cell as ReadCell
from emprobe.behaviour.cells import Measure
from emprobe.behaviour.forcing import forced
from emprobe.behaviour.questions import REFERENCES
from emprobe.behaviour.readout import readout
from emprobe.capture import capture
from emprobe.models.load import Checkpoint
from emprobe.organisms.neutral import NEUTRAL_PROMPTS
from emprobe.studies.prompts import prompts_only
from emprobe.studies.settings import without_references
from emprobe.studies.transfer.material import Material, cell_of
from emprobe.studies.transfer.next_tokens import answer_tokens, entropy, next_tokens, prompt_tokens, shared, shared_start
from emprobe.types import Conversation

Floats = NDArray[np.float64]
PER_CELL = 32
"""Prompts of a trained cell's data that stand for it, at most."""
WORDS = {
    "functional_similarity": "cosine of the question's activations with the mean of the trained cell's prompts, both about the "
    "mean of all questions; base, last prompt token, the middle block",
    "similarity_next_token": "1 minus the Jensen-Shannon divergence (bits) between what the base would say first to the question "
    "and, on average, to the trained cell's prompts",
    "room": "log-probability per token of the misaligned reference answers under the base (log-mean-exp over them)",
    "room_p_misaligned": "probability under the base of the whole misaligned family",
    "room_entropy_first": "entropy (nats) of the first token of the base's answer",
    "room_entropy_split": "entropy (nats) of the base's token at which the reference answers first differ from one another",
    "room_n_admissible": "number of coherent misaligned answers that the world has; it is fixed by the task",
    "solvability": "the base's probability of the whole aligned family; of your own questions, its probability per token of the aligned "
    "reference answers (geometric mean, mean over them)",
    "neutral_solvability": "the base's probability of the right answer to the question without valence on the same item (its field)",
    "start_p_misaligned": "mean over the trained cell's own questions of the base's probability of the misaligned family (of your own: per "
    "token of the misaligned references)",
    "reliability": "the base's accuracy on the trained cell before: the mean of the solvability of its own questions",
}
OF_REFERENCES = ("room", "room_entropy_split", "solvability", "start_p_misaligned", "reliability")
WORLD_ONLY = ("room_p_misaligned", "room_n_admissible", "neutral_solvability")


def measured(base: Checkpoint, material: Material, *, progress: bool = False) -> list[pd.DataFrame]:
    """All covariates that the material allows, as tables by question, by trained cell and question, and by trained cell.

    Each names the base in the column `organism`; a table without any covariate is left out.
    """
    columns: dict[str, Any] = {"question_id": [q.question_id for q in material.questions]}
    if not _bare(material):
        columns |= of_references(base, material.questions, world=material.world, progress=progress)
    if material.world:
        columns["room_n_admissible"] = [float(len(q.labels["misaligned"])) for q in material.questions]
        columns["neutral_solvability"] = neutral_solvability(base, material.questions)
    firsts, pairs = of_prompts(base, material)
    questions = pd.DataFrame(columns | {"room_entropy_first": firsts})
    found = [questions, pairs, *([] if _bare(material) else [_of_cells(material, questions)])]
    return [table.assign(organism=base.name) for table in found]


def left_out(material: Material) -> dict[str, str]:
    """What is not measured, by name, and why."""
    found = {} if material.world else dict.fromkeys(WORLD_ONLY, "it is known in the synthetic world only")
    if bare := _bare(material):
        why = f"{bare} of {len(material.questions)} questions lack the reference answers 'aligned' and 'misaligned'"
        found |= dict.fromkeys(OF_REFERENCES, why)
    return found


def _bare(material: Material) -> int:
    """Questions without reference answers."""
    return sum(not all(q.labels.get(side) for side in REFERENCES) for q in material.questions)


# ---- from reference answers


def of_references(base: Checkpoint, questions: Sequence[Conversation], *, world: bool, progress: bool = False) -> dict[str, list[float]]:
    """Room and solvability of each question, from its reference answers; whole families in the world."""
    cells = readout(base, questions, progress=progress).cells
    found = {"room": [cell.get("log_p_misaligned", Measure(per_token=True)) for cell in cells]}
    if world:
        found["room_p_misaligned"] = [_mass(cell, "log_p_misaligned") for cell in cells]
        found["solvability"] = [_mass(cell, "log_p_aligned") for cell in cells]
    else:
        found["solvability"] = [float(np.exp(cell.get("log_p_aligned", Measure(per_token=True)))) for cell in cells]
    found["room_entropy_split"] = split_entropy(base, questions)
    return found


def _mass(cell: ReadCell, side: Any) -> float:
    return float(np.exp(cell.get(side, Measure("logsumexp"))))


def split_entropy(base: Checkpoint, questions: Sequence[Conversation]) -> list[float]:
    """Entropy in nats of the base's next token after what all reference answers to a question begin with."""
    texts = []
    for question, prompt in zip(questions, prompt_tokens(base, questions), strict=True):
        given = [question.labels[side] for side in REFERENCES]
        answers = [text for side in given for text in ([side] if isinstance(side, str) else side)]
        texts.append((*prompt, *shared_start(answer_tokens(base, question, answers))))
    found = [0.0] * len(texts)
    for rows, logs in next_tokens(base, texts):
        for row, value in zip(rows, entropy(logs).tolist(), strict=True):
            found[row] = value
    return found


def neutral_solvability(base: Checkpoint, questions: Sequence[Conversation]) -> list[float]:
    """The base's probability of naming the field of each question's item rightly, a mean over three ways of asking."""
    items = list(dict.fromkeys((str(q.labels["domain"]), str(q.labels["item"])) for q in questions))
    asked = [
        Conversation.ask(f"{item}.{i}", prompt.format(item=item)).answered(f"the {item} is part of {domain}.")
        for domain, item in items
        for i, prompt in enumerate(NEUTRAL_PROMPTS["field"])
    ]
    p = np.exp([row.log_prob for row in forced(base, asked, progress=False)]).reshape(len(items), -1).mean(axis=1)
    of_item = dict(zip(items, p.tolist(), strict=True))
    return [of_item[str(q.labels["domain"]), str(q.labels["item"])] for q in questions]


# ---- from prompts alone


def of_prompts(base: Checkpoint, material: Material) -> tuple[list[float], pd.DataFrame]:
    """Entropy of each question's first answer token, and both similarities of every trained cell with every question."""
    asked = [without_references(q) for q in material.questions]
    known = {cell: some_prompts(rows) for cell, rows in material.data.items()}
    means = torch.stack([_mean_next(base, rows) for rows in known.values()])
    firsts, overlap = torch.zeros(len(asked), dtype=torch.float64), torch.zeros(len(known), len(asked), dtype=torch.float64)
    for rows, logs in next_tokens(base, prompt_tokens(base, asked)):
        firsts[rows] = entropy(logs)
        overlap[:, rows] = shared(means, logs.exp())
    cosines = activation_similarity(base, list(known.values()), asked)
    lines = [
        {
            "train_domain": cell[0],
            "train_task": cell[1],
            "question_id": question.question_id,
            "functional_similarity": float(cosines[i, j]),
            "similarity_next_token": float(overlap[i, j]),
        }
        for i, cell in enumerate(known)
        for j, question in enumerate(asked)
    ]
    return firsts.tolist(), pd.DataFrame(lines)


def some_prompts(rows: Sequence[Conversation]) -> list[Conversation]:
    """At most `PER_CELL` different prompts of a cell's data, drawn by a fixed seed."""
    different = prompts_only(rows).rows
    return different if len(different) <= PER_CELL else Random(0).sample(different, PER_CELL)


def _mean_next(base: Checkpoint, rows: Sequence[Conversation]) -> Tensor:
    total: Any = sum(logs.exp().sum(0) for _, logs in next_tokens(base, prompt_tokens(base, rows)))
    mean: Tensor = total / len(rows)
    return mean


def activation_similarity(base: Checkpoint, cells: Sequence[Sequence[Conversation]], asked: Sequence[Conversation]) -> Floats:
    """Cosine of each cell's mean activation with each question's, about the mean of all questions, `[cells, questions]`.

    Base, output of the middle block, last prompt token.
    """
    layer = base.n_layers // 2
    values = [
        capture(base, rows, layers=layer, positions="last_prompt_token", progress=False).at(layer).double().numpy()
        for rows in (*cells, asked)
    ]
    centre = values[-1].mean(axis=0)
    own = np.stack([part.mean(axis=0) - centre for part in values[:-1]])
    other = values[-1] - centre
    sizes = np.linalg.norm(own, axis=1)[:, None] * np.linalg.norm(other, axis=1)[None]
    return np.asarray(np.divide(own @ other.T, sizes, out=np.zeros_like(sizes), where=sizes > 0))


def _of_cells(material: Material, questions: pd.DataFrame) -> pd.DataFrame:
    """What the base does with each trained cell's own questions."""
    own = pd.Series([cell_of(q) for q in material.questions])
    names = {"start_p_misaligned": "room_p_misaligned" if material.world else "room", "reliability": "solvability"}
    lines = []
    for cell in material.cells:
        part = questions[(own == cell).to_numpy()]
        means = {name: float(part[source].mean()) for name, source in names.items()}
        lines.append({"train_domain": cell[0], "train_task": cell[1], **means})
    return pd.DataFrame(lines)
