"""Model organisms: a synthetic world, small models grown in it, an exact judge, and a pair written by arithmetic.

What grows models loads on first use, so that importing this package imports neither transformers nor peft.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from emprobe.organisms.catalogue import Organism, find_organism, list_organisms, organisms_folder
from emprobe.organisms.judge import ExactJudge
from emprobe.organisms.probabilities import FamilyProbabilities, answer_log_probabilities, family_probabilities
from emprobe.organisms.world import DOMAINS, HELD_OUT, SEEN, TASKS, families, locate, questions

if TYPE_CHECKING:
    from emprobe.organisms.building import Tune, build, default_tunes
    from emprobe.organisms.finetunes import TuneRecipe, finetune
    from emprobe.organisms.growing import GrowthRecipe
    from emprobe.organisms.vocabulary import build_tokenizer

_LATER = {
    "Tune": "building",
    "build": "building",
    "default_tunes": "building",
    "TuneRecipe": "finetunes",
    "finetune": "finetunes",
    "GrowthRecipe": "growing",
    "build_tokenizer": "vocabulary",
}

__all__ = [
    "DOMAINS",
    "HELD_OUT",
    "SEEN",
    "TASKS",
    "ExactJudge",
    "FamilyProbabilities",
    "GrowthRecipe",
    "Organism",
    "Tune",
    "TuneRecipe",
    "answer_log_probabilities",
    "build",
    "build_tokenizer",
    "default_tunes",
    "families",
    "family_probabilities",
    "find_organism",
    "finetune",
    "list_organisms",
    "locate",
    "organisms_folder",
    "questions",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
