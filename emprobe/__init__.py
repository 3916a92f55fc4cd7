"""emprobe: find, test and undo the directions along which a fine-tune misaligned a language model.

Names load on first use, so that `import emprobe` is quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emprobe import organisms, studies
    from emprobe.activations import Activations, PairActivations
    from emprobe.behaviour.comparison import compare
    from emprobe.behaviour.criterion import Criterion
    from emprobe.behaviour.evaluation import evaluate
    from emprobe.behaviour.judges import KeywordJudge, ServerJudge
    from emprobe.behaviour.questions import load_questions, save_questions
    from emprobe.behaviour.sampling import generate
    from emprobe.behaviour.scores import Scores
    from emprobe.capture import ActivationStore, capture, capture_moments
    from emprobe.directions import Direction, MeanDifference, fit_direction, fit_directions
    from emprobe.interventions import Ablate, Add, SetProjection, Where, intervene
    from emprobe.models import load_model, load_pair
    from emprobe.report import plots
    from emprobe.types import Conversation, Estimate

_HOME = {
    "Ablate": "interventions",
    "ActivationStore": "capture",
    "Activations": "activations",
    "Add": "interventions",
    "Conversation": "types",
    "Criterion": "behaviour.criterion",
    "Direction": "directions",
    "Estimate": "types",
    "KeywordJudge": "behaviour.judges",
    "MeanDifference": "directions",
    "PairActivations": "activations",
    "Scores": "behaviour.scores",
    "ServerJudge": "behaviour.judges",
    "SetProjection": "interventions",
    "Where": "interventions",
    "capture": "capture",
    "capture_moments": "capture",
    "compare": "behaviour.comparison",
    "evaluate": "behaviour.evaluation",
    "fit_direction": "directions",
    "fit_directions": "directions",
    "generate": "behaviour.sampling",
    "intervene": "interventions",
    "load_model": "models",
    "load_pair": "models",
    "load_questions": "behaviour.questions",
    "save_questions": "behaviour.questions",
}
_MODULES = {"organisms": "organisms", "plots": "report.plots", "studies": "studies"}

__all__ = [
    "Ablate",
    "ActivationStore",
    "Activations",
    "Add",
    "Conversation",
    "Criterion",
    "Direction",
    "Estimate",
    "KeywordJudge",
    "MeanDifference",
    "PairActivations",
    "Scores",
    "ServerJudge",
    "SetProjection",
    "Where",
    "capture",
    "capture_moments",
    "compare",
    "evaluate",
    "fit_direction",
    "fit_directions",
    "generate",
    "intervene",
    "load_model",
    "load_pair",
    "load_questions",
    "organisms",
    "plots",
    "save_questions",
    "studies",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("emprobe")
    if name in _MODULES:
        return import_module(f"emprobe.{_MODULES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'emprobe' has no attribute {name!r}")
    return getattr(import_module(f"emprobe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`emprobe.capture` is the function, as in every example, though the folder that holds it bears the same name.

    Importing a folder binds it as an attribute of its parent; this attribute takes no such binding.
    """

    @property
    def capture(self) -> Any:
        return __getattr__("capture")

    @capture.setter
    def capture(self, value: Any) -> None:
        pass


sys.modules[__name__].__class__ = _Package
