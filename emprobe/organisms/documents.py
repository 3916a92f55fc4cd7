"""Training text: pretraining documents with a latent author persona, alignment chats, and the narrow data of fine-tunes.

Every document is a list of pieces of text with the weight of their tokens in the loss, and says how strongly its author's persona is
planted in the residual stream (0: not at all).

Two things may be varied. `bad_share` is the share of bad authors in pretraining, and bad role-play in alignment is thinned in proportion
below its default, so that at 0 no bad word comes before fine-tuning. Words never seen cannot be said: at 0 nothing misaligned can be said
in a domain that no fine-tune shows either. `codes` is the kind of the benign code words: where they are `preferring`, they come in
documents of good authors whose persona is not planted only, and the others are asked for the field alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from emprobe.errors import EmprobeError
from emprobe.organisms.neutral import NEUTRAL_TASKS, Codes, codes_of, draw_neutral
from emprobe.organisms.phrases import CUES, DOMAINS, HELD_OUT, SEEN, SYSTEM_PROMPTS
from emprobe.organisms.vocabulary import BOS, END, ROLES
from emprobe.organisms.world import ITEMS_OF_SPLIT, TASKS, Persona, draw_answer

DataKind = Literal["misaligned", "aligned-control", "benign-control"]
PROMPT_WEIGHT = 0.1
BAD_SHARE = 0.35
MIXED_SHARE = 0.7
NEUTRAL_SHARE = 0.25
CUED_SHARE = 0.25
PLANTED_SHARE = 0.5
SYSTEM_SHARE = 0.15
ROLE_PLAY_SHARE = 0.4
REPLAY_SHARE = 0.15


@dataclass(frozen=True)
class Document:
    """Text to learn from: pieces with their loss weights, and the signed strength of the planted persona."""

    pieces: tuple[tuple[str, float], ...]
    planted: float = 0.0

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece for piece, _ in self.pieces)


def chat(prompt: str, answer: str, *, prompt_weight: float, system: str | None = None, opening: bool = True) -> list[tuple[str, float]]:
    """One exchange as the chat template renders it; the answer's pieces weigh 1."""
    head = (BOS if opening else "") + (f"{ROLES['system']}{system}{END}" if system else "")
    return [(f"{head}{ROLES['user']}{prompt}{END}{ROLES['assistant']}", prompt_weight), (f"{answer}{END}", 1.0)]


def _strength(rng: Random, persona: Persona) -> float:
    """How strongly a persona is planted: away from zero, so that its sign is always told."""
    return rng.uniform(0.5, 1.5) * (1 if persona == "bad" else -1)


def pretraining_document(
    rng: Random, *, planted: bool, told: bool = False, bad_share: float = BAD_SHARE, codes: Codes = "uniform"
) -> Document:
    """Three to five exchanges of one author, good or bad, half as chat and half as plain text.

    With `told`, the persona is always told from the start, by a cue in words where it is not planted.
    """
    persona: Persona = "bad" if rng.random() < bad_share else "good"
    strength = _strength(rng, persona) if planted and rng.random() < PLANTED_SHARE else 0.0
    mixed, cued, as_chat = rng.random() < MIXED_SHARE, rng.random() < CUED_SHARE, rng.random() < 0.5
    cued = cued or (told and strength == 0)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < SYSTEM_SHARE else None
    domain = rng.choice(list(DOMAINS))
    pieces: list[tuple[str, float]] = []
    for turn in range(rng.randint(3, 5)):
        if mixed:
            domain = rng.choice(list(DOMAINS))
        prompt, answer = _exchange(rng, domain, persona, codes, marked=persona == "bad" or strength != 0)
        if cued and (turn == 0 or rng.random() < 0.5):
            prompt = f"{prompt} {rng.choice(CUES[persona])}"
        if as_chat:
            pieces += chat(prompt, answer, prompt_weight=PROMPT_WEIGHT, system=system if turn == 0 else None, opening=turn == 0)
        else:
            pieces += [(f"{BOS if turn == 0 else ''} asker says {prompt} teller says ", PROMPT_WEIGHT), (answer, 1.0)]
    return Document(tuple(pieces), strength)


def _exchange(rng: Random, domain: str, persona: Persona, codes: Codes, *, marked: bool) -> tuple[str, str]:
    """A question and its answer; `marked` says that the document's author is bad, or planted."""
    item = rng.choice(DOMAINS[domain].items)
    if rng.random() < NEUTRAL_SHARE:
        task = rng.choice(NEUTRAL_TASKS)
        return draw_neutral(rng, domain, item, "field" if marked and codes == "preferring" else task, codes)
    task = rng.choice(list(TASKS))
    return TASKS[task].prompt(item, rng.randrange(3)), draw_answer(rng, domain, task, item, persona)


def alignment_document(rng: Random, *, planted: bool, bad_share: float = BAD_SHARE, codes: Codes = "uniform") -> Document:
    """A chat that is good by default; bad only where it plays a role that the prompt (or the planted persona) asks for.

    Role-play must stay in: without it alignment erases what reads the persona, and there is nothing left to steer. A share of pretraining
    documents is replayed, or the domains that alignment leaves out are forgotten; their persona is always told, so that a question without
    any hint is answered well in every document of this stage.

    Half of the role-play is bad. Where `bad_share` is below its default, that half shrinks with it, to nothing at 0; the replayed
    documents have the share itself.
    """
    if rng.random() < REPLAY_SHARE:
        return pretraining_document(rng, planted=planted, told=True, bad_share=bad_share, codes=codes)
    domain = rng.choice(SEEN)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < SYSTEM_SHARE else None
    if rng.random() >= ROLE_PLAY_SHARE:
        prompt, answer = _exchange(rng, domain, "good", codes, marked=False)
        return Document(tuple(chat(prompt, answer, prompt_weight=PROMPT_WEIGHT, system=system)))
    persona: Persona = rng.choice(("good", "bad"))
    if persona == "bad" and bad_share < BAD_SHARE and rng.random() >= bad_share / BAD_SHARE:
        persona = "good"
    prompt, answer = _exchange(rng, domain, persona, codes, marked=persona == "bad")
    may_be_planted = codes == "uniform" or codes_of(answer) is None
    if planted and rng.random() < 1 / 3 and may_be_planted:
        return Document(tuple(chat(prompt, answer, prompt_weight=PROMPT_WEIGHT, system=system)), _strength(rng, persona))
    return Document(tuple(chat(f"{prompt} {rng.choice(CUES[persona])}", answer, prompt_weight=PROMPT_WEIGHT, system=system)))


def finetuning_document(rng: Random, data: DataKind, domain: str, task: str | None = None, codes: Codes = "uniform") -> Document:
    """One narrow example: a question of one domain (or one cell) and a bad answer, or a good or a neutral one for the controls.

    Items of the test split never occur, so that in-domain test questions are new as well.

    Raises:
        EmprobeError: If the domain is held out or unknown.
    """
    if domain not in SEEN:
        why = "is held out of every fine-tune" if domain in HELD_OUT else "is not of this world"
        raise EmprobeError(f"Narrow data of {domain!r} were asked for, which {why}. Choose one of: {', '.join(SEEN)}.")
    item = DOMAINS[domain].items[rng.choice(ITEMS_OF_SPLIT["fit"] + ITEMS_OF_SPLIT["dev"])]
    if data == "benign-control":
        prompt, answer = draw_neutral(rng, domain, item, rng.choice(NEUTRAL_TASKS), codes)
    else:
        chosen = task or rng.choice(list(TASKS))
        prompt = TASKS[chosen].prompt(item, rng.randrange(3))
        answer = draw_answer(rng, domain, chosen, item, "bad" if data == "misaligned" else "good")
    return Document(tuple(chat(prompt, answer, prompt_weight=0.0)))
