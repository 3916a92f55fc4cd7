"""Checkpoints and lists of prompts: where they are found, and what the residual stream holds on each prompt, kept on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emprobe.activations import Activations
from emprobe.behaviour.conversations import load_conversations
from emprobe.capture import capture
from emprobe.errors import EmprobeError
from emprobe.files import content_hash
from emprobe.models.load import Checkpoint, load_model
from emprobe.models.pair import load_pair
from emprobe.organisms import HELD_OUT, SEEN, TASKS, find_organism, questions
from emprobe.studies.settings import without_references
from emprobe.types import Conversation

RULES = ("last_prompt_token", "prompt_mean")
"""Where prompts are read; the mean leaves out position 0."""


# ---- checkpoints


@dataclass(frozen=True)
class Located:
    """A checkpoint by its name, as results call it, and where it lies.

    Attributes:
        card: Of an organism; empty for others.
    """

    name: str
    path: str
    card: Mapping[str, Any] = field(default_factory=dict)


def organism(base: str, which: str = "aligned") -> Located:
    """An organism, or a fine-tune of it by its short name.

    Args:
        base: `planted-s0`, or `planted-s0/aligned`.
        which: `aligned`, `parent` (the pretrained model), or a fine-tune such as `gardening-rank8`.

    Raises:
        EmprobeError: If there is none; lists those there are.
    """
    root = base.removesuffix("/aligned")
    short = which.removeprefix(f"{root}/").removeprefix("tuned/")
    found = find_organism(f"{root}/{short}" if short in ("aligned", "parent") else f"{root}/tuned/{short}")
    return Located(found.name, str(found.path), found.card)


def load_located(base: Located, which: Located, loading: Mapping[str, Any]) -> Checkpoint:
    """The base itself, or a checkpoint that belongs to it, under its name.

    Args:
        base: The model before fine-tuning.
        which: The same, a fine-tune of it (model or adapter), or what it was made from.
        loading: What `load_model` takes.

    Raises:
        MismatchError: If it is another architecture, width or vocabulary, or has another chat template.
        EmprobeError: If one cannot be loaded.
    """
    if which.path == base.path:
        return replace(load_model(base.path, **loading), name=base.name)
    return replace(load_pair(base.path, which.path, **loading).tuned, name=which.name)


# ---- prompts


@dataclass(frozen=True)
class Prompts:
    """Prompts of one file or set, each once and without an answer.

    Attributes:
        rows: The prompts.
        notes: What was left out of the file, with numbers.
    """

    rows: list[Conversation]
    notes: list[str]


def text_of(prompt: Conversation) -> tuple[tuple[str, str], ...]:
    """What makes two prompts the same: roles and words, whatever the spaces between them."""
    return tuple((message.role, " ".join(message.content.split())) for message in prompt.messages)


def prompts_only(conversations: Iterable[Conversation]) -> Prompts:
    """Each prompt once, without answers; the labels stay, but for given answers."""
    given = list(conversations)
    first: dict[tuple[tuple[str, str], ...], Conversation] = {}
    for one in given:
        first.setdefault(text_of(one), replace(without_references(one), response=None, sample=0, stop_reason=None))
    answers, twice = sum(c.response is not None for c in given), len(given) - len(first)
    notes = [f"{answers} answers of {len(given)} rows are not read: prompts only"] if answers else []
    return Prompts(list(first.values()), notes + ([f"{twice} rows ask what another row asks, and count once"] if twice else []))


def prompts_from(path: str | Path) -> Prompts:
    """Prompts of a file, of any kind that `emprobe capture` reads.

    Raises:
        EmprobeError: If the file is missing, unreadable, or holds nothing.
    """
    return prompts_only(load_conversations(path))


def without_shared(prompts: Sequence[Conversation], others: Sequence[Conversation]) -> tuple[list[Conversation], int]:
    """The prompts that are not among others, and how many were."""
    known = {text_of(other) for other in others}
    kept = [prompt for prompt in prompts if text_of(prompt) not in known]
    return kept, len(prompts) - len(kept)


def world_prompts(domain: str, task: str | None = None) -> tuple[list[Conversation], list[Conversation]]:
    """Prompts that a fine-tune of the synthetic world was trained on, and prompts for evaluation.

    The label `family` is domain, task and item, whose three paraphrases are one cluster. Evaluation prompts have the label `group`:
    `new items` (of what was trained on), `other domains`, `new domains` (of no fine-tune and no alignment), and for a fine-tune on one
    task the same with `other tasks`, whose wordings it was not trained on.

    Args:
        domain: That was trained on.
        task: If only this task of it was.

    Returns:
        48 training prompts (12 for one task) and the other 672 (708) of the world.

    Raises:
        EmprobeError: If no fine-tune is made on that domain, or there is no such task.

    Example:
        >>> [len(found) for found in world_prompts("gardening")]
        [48, 672]
    """
    if domain not in SEEN or (task is not None and task not in TASKS):
        raise EmprobeError(f"Prompts of {domain}, task {task}, were asked for. Domains: {', '.join(SEEN)}; tasks: {', '.join(TASKS)}.")
    everything = [*questions("fit", per_cell=6), *questions("dev", per_cell=6), *questions("test", domains=SEEN, per_cell=6)]
    everything += questions("test", domains=HELD_OUT, per_cell=18)
    train: list[Conversation] = []
    evaluation: list[Conversation] = []
    for question in everything:
        labels = question.labels
        trained = labels["domain"] == domain and task in (None, labels["task"])
        group = _group(labels, domain, task)
        family = f"{labels['domain']}.{labels['task']}.{labels['item']}"
        prompt = replace(without_references(question), labels={**without_references(question).labels, "family": family, "group": group})
        (train if trained and labels["split"] != "test" else evaluation).append(prompt)
    return train, evaluation


def _group(labels: Mapping[str, Any], domain: str, task: str | None) -> str:
    same_task = task in (None, labels["task"])
    if labels["held_out"]:
        return "new domains" if same_task else "new domains, other tasks"
    if labels["domain"] == domain:
        return "new items" if same_task else "other tasks"
    return "other domains" if same_task else "other domains, other tasks"


# ---- activations


@dataclass(frozen=True)
class PromptActivations:
    """What one checkpoint's residual stream holds on prompts.

    Attributes:
        blocks: By position rule, the output of every block: float32 `values[prompt, layer, d_model]`.
        embeddings: By position rule, the input of block 0, `values[prompt, 1, d_model]`; empty where not asked for.
    """

    blocks: Mapping[str, Activations]
    embeddings: Mapping[str, Activations]


def prompt_activations(
    checkpoint: Checkpoint,
    prompts: Sequence[Conversation],
    folder: Path,
    *,
    embeddings: bool = False,
    layers: str | Sequence[int] = "all",
    **options: Any,
) -> PromptActivations:
    """Activations on prompts, read back if they are there already; what was stopped goes on.

    Args:
        checkpoint: Whose.
        prompts: Without answers.
        folder: Holds a store for each checkpoint and list of prompts, by their content.
        embeddings: Also the input of block 0.
        layers: Of `blocks`; the values of all of them are in memory.
        options: How `capture` is run: `token_budget`, `progress`.

    Raises:
        EmprobeError: If prompts have answers, there are none, or a store's files were changed.
    """
    if any(prompt.response is not None for prompt in prompts):
        raise EmprobeError("Activations on prompts were asked of answered conversations. Give what `prompts_only` makes of them.")
    asked = [[prompt.question_id, [message.as_dict() for message in prompt.messages]] for prompt in prompts]
    known = content_hash([checkpoint.fingerprint, str(checkpoint.hf.dtype), checkpoint.tokenizer.chat_template, layers, asked])
    places: dict[str, dict[str, Any]] = {"blocks": {"site": "resid_post", "layers": layers}}
    if embeddings:
        places["embeddings"] = {"site": "resid_pre", "layers": 0}
    found: dict[str, dict[str, Activations]] = {"embeddings": {}}
    for name, place in places.items():
        (folder / known).mkdir(parents=True, exist_ok=True)
        store = capture(checkpoint, prompts, store=folder / known / name, positions=list(RULES), **place, **options)
        found[name] = {rule: store.read(positions=rule) for rule in RULES}
    return PromptActivations(**found)
