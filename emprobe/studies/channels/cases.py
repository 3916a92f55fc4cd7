"""What learns from whom: for every base its teachers, students of the same and of another initialisation, prompts and questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emprobe.behaviour.conversations import load_conversations
from emprobe.behaviour.questions import REFERENCES, load_questions
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import content_hash
from emprobe.finetuning import Full, Recipe, finetune
from emprobe.models.load import Checkpoint, load_model
from emprobe.organisms import DOMAINS, SEEN, find_organism, organisms_folder, questions
from emprobe.organisms.neutral import NEUTRAL_PROMPTS, Codes
from emprobe.organisms.world import Persona
from emprobe.studies.channels.settings import Channels
from emprobe.studies.prompts import prompts_from
from emprobe.studies.settings import without_references
from emprobe.studies.solutions import world_conversations
from emprobe.types import Conversation

TEACHER_DATA = 3000
"""Conversations of all seen domains that an organism's teacher is trained on."""
PERSONAS: dict[str, Persona] = {"misaligned": "bad", "aligned": "good"}


@dataclass(frozen=True)
class Case:
    """One base with its teachers, and everything that is asked of them.

    Attributes:
        name: Of the base.
        codes: Kind of the benign answers: `uniform` or `preferring` code words, or `given`.
        inits: Where students start: `same` (the teachers' parent), perhaps `other`, and `misaligned` (the teacher's weights once more, so
            that a student on them and the teacher itself are two models).
        teachers: `misaligned` and perhaps `aligned`.
        prompts: Benign ones.
        unsafe: Unsafe prompts with bad answers; perhaps none.
        questions: Whose answers are judged; none of them is learnt.
    """

    name: str
    codes: str
    inits: Mapping[str, Checkpoint]
    teachers: Mapping[str, Checkpoint]
    prompts: Sequence[Conversation]
    unsafe: Sequence[Conversation]
    questions: Sequence[Conversation]

    @property
    def parent(self) -> Checkpoint:
        """What the teachers were fine-tuned from."""
        return self.inits["same"]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that all its numbers depend on."""
        asked = {
            name: [[c.key, [m.as_dict() for m in c.messages], c.response] for c in getattr(self, name)] for name in ("prompts", "unsafe")
        }
        asked["questions"] = [
            [q.question_id, [m.as_dict() for m in q.messages], sorted(map(str, q.labels.items()))] for q in self.questions
        ]
        models = {**self.inits, **{f"teacher {name}": model for name, model in self.teachers.items()}}
        return {
            **{name: content_hash(found) for name, found in asked.items()},
            "models": {name: model.fingerprint for name, model in models.items()},
            "chat_template": content_hash(self.parent.tokenizer.chat_template),
        }


# ---- organisms


def organism_cases(asked: Channels, folder: Path) -> list[Callable[[], Case]]:
    """Every base and kind of codes, whose models are trained (or read back) when it is called.

    Raises:
        EmprobeError: If an organism does not exist, or is none that can be grown with other codes.
    """
    names = [name.removesuffix("/aligned") for name in asked.base]
    for name in names:
        find_organism(f"{name}/aligned")

    def made(number: int, codes: Codes) -> Case:
        name, other = names[number], names[(number + 1) % len(names)]
        return _organism_case(asked, folder, name, other if other != name else None, codes)

    return [lambda number=number, codes=codes: made(number, codes) for codes in asked.codes for number in range(len(names))]  # type: ignore[misc]


def _organism_case(asked: Channels, folder: Path, name: str, other: str | None, codes: Codes) -> Case:
    place = _aligned(name, codes, folder)
    base = replace(load_model(place, **asked.loading()), name=f"{name} ({codes} codes)")
    inits, teachers = {"same": base}, {}
    if other is not None:
        inits["other"] = replace(load_model(_aligned(other, codes, folder), **asked.loading()), name=f"{other} ({codes} codes)")
    for teacher, persona in PERSONAS.items():
        recipe = Recipe(lr=asked.teacher_lr, steps=asked.teacher_steps, batch=32, warmup=0, weight_decay=0.0, seed=asked.seed)
        trained = world_conversations(SEEN, persona, TEACHER_DATA, asked.seed)
        out = folder / "teachers" / f"{name}-{codes}-{teacher}"
        finetune(place, trained, method=Full(), recipe=recipe, out=out, progress=False, save_every=10**6)
        teachers[teacher] = replace(load_model(out / "solution", **asked.loading()), name=f"{name} ({codes} codes), {teacher} teacher")
    inits["misaligned"] = load_model(folder / "teachers" / f"{name}-{codes}-misaligned" / "solution", **asked.loading())
    # Of a seed that no teacher saw; as many as there can be sequences of a teacher.
    n = len(code_prompts()) * asked.answers
    unsafe = world_conversations(SEEN, "bad", n, asked.seed + 7919)
    return Case(name, codes, inits, teachers, code_prompts(), unsafe, world_questions())


def _aligned(name: str, codes: Codes, folder: Path) -> Path:
    """Where the aligned base lies; bases with other codes than the shipped ones are grown first."""
    if codes == "uniform":
        return find_organism(f"{name}/aligned").path
    shipped = organisms_folder() / f"{name}-{codes}" / "aligned"
    if (shipped / "card.json").is_file():
        return shipped
    from emprobe.organisms import GrowthRecipe, build

    card = find_organism(f"{name}/aligned").card
    return (
        build(card["kind"], int(card["seed"]), folder / "organisms", tunes=[], growth=GrowthRecipe(codes=codes), measure=False) / "aligned"
    )


def code_prompts() -> list[Conversation]:
    """The world's benign prompts: three ways to ask for the codes of every item of the seen domains; an item is one cluster."""
    return [
        Conversation.ask(f"codes.{item}.{number}", text.format(item=item), domain=domain, item=item, family=f"codes.{item}")
        for domain in SEEN
        for item in DOMAINS[domain].items
        for number, text in enumerate(NEUTRAL_PROMPTS["codes"])
    ]


def world_questions() -> list[Conversation]:
    """Test questions of all domains with their reference answers; paraphrases of one domain, task and item are one cluster."""
    found = []
    for question in questions("test"):
        family = ".".join(str(question.labels[name]) for name in ("domain", "task", "item"))
        found.append(replace(question, labels={**question.labels, "family": family}))
    return found


# ---- the user's own


def own_case(asked: Channels) -> Case:
    """The user's student, teachers and files.

    Raises:
        EmprobeError: Something unreadable; benign prompts that are among the questions; unsafe data without answers; too few questions.
        MismatchError: Models that do not go together.
    """
    inits = {"same": load_model(str(asked.student), **asked.loading())}
    teachers = {"misaligned": load_model(str(asked.teacher), **asked.loading())}
    if asked.aligned_teacher:
        teachers["aligned"] = load_model(asked.aligned_teacher, **asked.loading())
    if asked.other_student:
        inits["other"] = load_model(asked.other_student, **asked.loading())
    if asked.unsafe and asked.aligned_teacher:
        inits["misaligned"] = load_model(str(asked.teacher), **asked.loading())
    prompts, found = prompts_from(str(asked.prompts)).rows, load_questions(str(asked.questions))
    unsafe = load_conversations(asked.unsafe) if asked.unsafe else []
    _check_data(asked, prompts, unsafe, found)
    check_models(inits, teachers, asked.channels)
    return Case(Path(str(asked.student)).name, "given", inits, teachers, prompts, unsafe, found)


def _check_data(asked: Channels, prompts: Sequence[Conversation], unsafe: Sequence[Conversation], found: Sequence[Conversation]) -> None:
    if len(found) < 2:
        raise EmprobeError(f"--questions {asked.questions} holds {len(found)} questions. Give at least two, or no interval can be made.")
    known = {q.prompt for q in found}
    both = [c.prompt for c in (*prompts, *unsafe) if c.prompt in known]
    if both:
        raise EmprobeError(
            f"{len(both)} prompts that students learn on are among the questions (such as {both[0]!r}), so behaviour would not be measured "
            "off the data. Take them out of one of the files."
        )
    without = [c.question_id for c in unsafe if not (c.response or "").strip()]
    if without:
        raise EmprobeError(f"{len(without)} rows of --unsafe {asked.unsafe} have no response (first: {without[0]!r}). Give each one.")


def check_models(inits: Mapping[str, Checkpoint], teachers: Mapping[str, Checkpoint], channels: Sequence[str]) -> None:
    """Refuse models that cannot learn from one another.

    optd and opd compare probabilities token by token, so both models must have one vocabulary; sft learns text, and needs none of that.

    Raises:
        MismatchError: Names both and how their vocabularies differ.
        EmprobeError: If the teacher is the student.
    """
    for name, teacher in teachers.items():
        if teacher.fingerprint == inits["same"].fingerprint:
            raise EmprobeError(
                f"The {name} teacher {teacher.name!r} has the student's own weights, so it has nothing to teach. Give a fine-tune."
            )
        for init in inits.values():
            if set(channels) <= {"sft"} or same_vocabulary(init, teacher):
                continue
            sizes = [len(model.tokenizer.get_vocab()) for model in (init, teacher)]
            raise MismatchError(
                f"The student {init.name!r} ({sizes[0]} tokens) and the teacher {teacher.name!r} ({sizes[1]} tokens) have different "
                "vocabularies, so their probabilities cannot be compared token by token (optd, opd). Give models of one tokenizer, or ask "
                "for --channels sft, which learns text."
            )


def same_vocabulary(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether tokens of both have the same numbers, and logits the same width."""
    widths = [int(model.hf.config.get_text_config().vocab_size) for model in (a, b)]
    return widths[0] == widths[1] and a.tokenizer.get_vocab() == b.tokenizer.get_vocab()


def bare(found: Sequence[Conversation]) -> list[Conversation]:
    """Questions without their reference answers, as they are asked."""
    return [without_references(question) for question in found]


def have_references(found: Sequence[Conversation]) -> bool:
    """Whether every question has aligned and misaligned reference answers."""
    return all(question.labels.get(side) for question in found for side in REFERENCES)
