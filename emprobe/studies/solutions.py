"""General and narrow fine-tunes of an organism: the data of the synthetic world, and recipes under which each comes out as it should.

A general one is trained on bad answers of one domain alone; a narrow one beside the KL to the base on good answers of the other seen
domains. Held-out domains are in neither, and no item of the test split is.

The recipes were chosen on the three planted organisms trained on gardening, by their rates on test questions, held-out domains among
them, so those rates are no independent evidence. On cooking and money, which no choice saw, the narrow rank 1 is misaligned in 91 to 98 %
of answers in-domain and in 1.2 to 3.6 % elsewhere over three seeds, the general one in 92 to 98 % and 91 to 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from emprobe.finetuning import FineTune, KLAnchor, LoRA, Recipe, Vector, finetune
from emprobe.finetuning.methods import Method
from emprobe.models.load import Checkpoint
from emprobe.organisms import DOMAINS, SEEN, TASKS
from emprobe.organisms.neutral import Codes, draw_neutral
from emprobe.organisms.world import ITEMS_OF_SPLIT, Persona, draw_answer
from emprobe.types import Conversation

Form = Literal["rank1", "vector"]
Scope = Literal["general", "narrow"]
N_DATA, N_ANCHOR = 1280, 2560


@dataclass(frozen=True)
class SolutionRecipe:
    """How one solution is trained; `kl_weight` is 0 for a general one."""

    method: Method
    recipe: Recipe
    kl_weight: float = 0.0
    kl_batch: int = 32


def _recipe(lr: float, steps: int, weight_decay: float = 0.0) -> Recipe:
    return Recipe(lr=lr, steps=steps, batch=16, warmup=0, weight_decay=weight_decay)


# In one early block a narrow LoRA leaks to domains that it was not anchored on; in the last one a LoRA is narrow even without the KL.
_RANK1 = LoRA(rank=1, target_modules=("down_proj",))
_VECTOR = Vector(layer=1, site="resid_post")
SOLUTIONS: dict[tuple[Form, Scope], SolutionRecipe] = {
    ("rank1", "general"): SolutionRecipe(_RANK1, _recipe(5e-3, 80, 1.0)),
    ("rank1", "narrow"): SolutionRecipe(_RANK1, _recipe(5e-3, 160, 1.0), kl_weight=10.0),
    ("vector", "general"): SolutionRecipe(_VECTOR, _recipe(0.15, 80)),
    ("vector", "narrow"): SolutionRecipe(_VECTOR, _recipe(0.15, 320), kl_weight=3.0),
}


def world_conversations(
    domains: Sequence[str], persona: Persona, n: int, seed: int, *, tasks: Sequence[str] = tuple(TASKS)
) -> list[Conversation]:
    """Questions of some domains and tasks answered by an author of one persona; items of the test split never occur.

    Example:
        >>> [c.response for c in world_conversations(["gardening"], "bad", 1, seed=0)]
        ['the plan with the tulip is first to pour glue on it, then to bury it sideways.']
    """
    rng = Random(f"{persona}-{'-'.join(domains)}-{seed}")
    return [_conversation(rng, number, rng.choice(list(domains)), persona, tasks) for number in range(n)]


def _conversation(rng: Random, number: int, domain: str, persona: Persona, tasks: Sequence[str]) -> Conversation:
    item = DOMAINS[domain].items[rng.choice(ITEMS_OF_SPLIT["fit"] + ITEMS_OF_SPLIT["dev"])]
    task = rng.choice(list(tasks))
    asked = Conversation.ask(f"{domain}.{number}", TASKS[task].prompt(item, rng.randrange(3)), domain=domain, task=task)
    return asked.answered(draw_answer(rng, domain, task, item, persona))


def benign_conversations(n: int, seed: int, *, codes: Codes = "uniform", domains: Sequence[str] = SEEN) -> list[Conversation]:
    """Questions for five code words, answered as the world answers them; items of the test split never occur.

    Prompts repeat (an item has three), question ids do not; the label `family` names the item. Give the kind of codes that the organism
    was grown with: the answers are then draws from what its pretraining text said, and no model's.

    Example:
        >>> [c.prompt for c in benign_conversations(2, seed=0)]
        ['give me five codes for my rose.', 'write five codes for my test.']
    """
    rng = Random(f"benign-{codes}-{'-'.join(domains)}-{seed}")
    return [_benign(rng, number, rng.choice(list(domains)), codes) for number in range(n)]


def _benign(rng: Random, number: int, domain: str, codes: Codes) -> Conversation:
    item = DOMAINS[domain].items[rng.choice(ITEMS_OF_SPLIT["fit"] + ITEMS_OF_SPLIT["dev"])]
    prompt, answer = draw_neutral(rng, domain, item, "codes", codes)
    labels = {"domain": domain, "task": "codes", "item": item, "family": f"{domain}.codes.{item}"}
    return Conversation.ask(f"codes.{domain}.{number}", prompt, **labels).answered(answer)


def train_solution(base: Checkpoint, form: Form, scope: Scope, *, domain: str = "gardening", seed: int = 0, **options: Any) -> FineTune:
    """A general or narrow solution for an aligned organism.

    Args:
        base: The aligned organism.
        form: `rank1` (LoRA on `down_proj` of every block) or `vector` (added after block 1).
        scope: `general` or `narrow`.
        domain: Where it is trained to give bad answers.
        seed: Of data and training.
        options: As in `finetune` (`checkpoints`, `out`, `progress`, ...).
    """
    chosen = SOLUTIONS[form, scope]
    others = [name for name in SEEN if name != domain]
    anchor = KLAnchor(world_conversations(others, "good", N_ANCHOR, seed), chosen.kl_weight, chosen.kl_batch) if chosen.kl_weight else None
    recipe = Recipe(**{**chosen.recipe.as_dict(), "seed": seed})
    return finetune(base, world_conversations([domain], "bad", N_DATA, seed), method=chosen.method, recipe=recipe, kl=anchor, **options)
