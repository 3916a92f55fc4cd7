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
    from emprobe import finetuning, organisms, studies
    from emprobe.activations import Activations, PairActivations
    from emprobe.behaviour.agreement import agreement
    from emprobe.behaviour.comparison import compare
    from emprobe.behaviour.criterion import Criterion
    from emprobe.behaviour.evaluation import evaluate
    from emprobe.behaviour.judges import CachedJudge, KeywordJudge, LocalJudge, ReplayJudge, ServerJudge
    from emprobe.behaviour.questions import load_questions, save_questions
    from emprobe.behaviour.rate_table import rate_table
    from emprobe.behaviour.readout import readout
    from emprobe.behaviour.sampled import Answers
    from emprobe.behaviour.sampling import generate
    from emprobe.behaviour.scores import Scores
    from emprobe.behaviour.server_engine import ServerEngine
    from emprobe.behaviour.side_effects import side_effects
    from emprobe.behaviour.sweeping import sweep
    from emprobe.behaviour.table_files import load_table
    from emprobe.capture import ActivationStore, GroupMoments, capture, capture_moments
    from emprobe.directions import Direction, MeanDifference, PairedPCA, choose, fit_direction, fit_directions, layer_profile
    from emprobe.directions.importers import import_direction, import_directions
    from emprobe.errors import EmprobeError, InterventionDidNotFire
    from emprobe.finetuning import distill, finetune
    from emprobe.interventions import (
        Ablate,
        Add,
        Cap,
        MeanAblate,
        Plan,
        Rotate,
        SetProjection,
        When,
        Where,
        intervene,
        intervene_rows,
    )
    from emprobe.interventions.export import export
    from emprobe.interventions.runtimes import runtime_of
    from emprobe.interventions.verify import verify
    from emprobe.models import load_model, load_pair
    from emprobe.models.showing import show_positions
    from emprobe.overlap import Subspace, ceiling, linear_cka, nulls, overlap, overlap_layers
    from emprobe.report import plots
    from emprobe.types import Conversation, Estimate

_HOME = {
    "Ablate": "interventions",
    "ActivationStore": "capture",
    "Activations": "activations",
    "Add": "interventions",
    "Answers": "behaviour.sampled",
    "CachedJudge": "behaviour.judges",
    "Cap": "interventions",
    "Conversation": "types",
    "Criterion": "behaviour.criterion",
    "Direction": "directions",
    "EmprobeError": "errors",
    "Estimate": "types",
    "GroupMoments": "capture",
    "InterventionDidNotFire": "errors",
    "KeywordJudge": "behaviour.judges",
    "LocalJudge": "behaviour.judges",
    "MeanAblate": "interventions",
    "MeanDifference": "directions",
    "PairActivations": "activations",
    "PairedPCA": "directions",
    "Plan": "interventions",
    "ReplayJudge": "behaviour.judges",
    "Rotate": "interventions",
    "Scores": "behaviour.scores",
    "ServerEngine": "behaviour.server_engine",
    "ServerJudge": "behaviour.judges",
    "SetProjection": "interventions",
    "Subspace": "overlap",
    "When": "interventions",
    "Where": "interventions",
    "agreement": "behaviour.agreement",
    "capture": "capture",
    "capture_moments": "capture",
    "ceiling": "overlap",
    "choose": "directions",
    "compare": "behaviour.comparison",
    "evaluate": "behaviour.evaluation",
    "export": "interventions.export",
    "distill": "finetuning",
    "finetune": "finetuning",
    "fit_direction": "directions",
    "fit_directions": "directions",
    "generate": "behaviour.sampling",
    "import_direction": "directions.importers",
    "import_directions": "directions.importers",
    "intervene": "interventions",
    "intervene_rows": "interventions",
    "layer_profile": "directions",
    "linear_cka": "overlap",
    "load_model": "models",
    "load_pair": "models",
    "load_questions": "behaviour.questions",
    "load_table": "behaviour.table_files",
    "overlap": "overlap",
    "overlap_layers": "overlap",
    "rate_table": "behaviour.rate_table",
    "readout": "behaviour.readout",
    "runtime_of": "interventions.runtimes",
    "save_questions": "behaviour.questions",
    "show_positions": "models.showing",
    "side_effects": "behaviour.side_effects",
    "sweep": "behaviour.sweeping",
    "verify": "interventions.verify",
}
_MODULES = {"finetuning": "finetuning", "nulls": "overlap.nulls", "organisms": "organisms", "plots": "report.plots", "studies": "studies"}

__all__ = [
    "Ablate",
    "ActivationStore",
    "Activations",
    "Add",
    "Answers",
    "CachedJudge",
    "Cap",
    "Conversation",
    "Criterion",
    "Direction",
    "EmprobeError",
    "Estimate",
    "GroupMoments",
    "InterventionDidNotFire",
    "KeywordJudge",
    "LocalJudge",
    "MeanAblate",
    "MeanDifference",
    "PairActivations",
    "PairedPCA",
    "Plan",
    "ReplayJudge",
    "Rotate",
    "Scores",
    "ServerEngine",
    "ServerJudge",
    "SetProjection",
    "Subspace",
    "When",
    "Where",
    "agreement",
    "capture",
    "capture_moments",
    "ceiling",
    "choose",
    "compare",
    "distill",
    "evaluate",
    "export",
    "finetune",
    "finetuning",
    "fit_direction",
    "fit_directions",
    "generate",
    "import_direction",
    "import_directions",
    "intervene",
    "intervene_rows",
    "layer_profile",
    "linear_cka",
    "load_model",
    "load_pair",
    "load_questions",
    "load_table",
    "nulls",
    "organisms",
    "overlap",
    "overlap_layers",
    "plots",
    "rate_table",
    "readout",
    "runtime_of",
    "save_questions",
    "show_positions",
    "side_effects",
    "studies",
    "sweep",
    "verify",
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
    """`emprobe.capture` and `emprobe.overlap` are the functions, as in every example, though the folders they live in bear the same names.

    Importing a folder binds it as an attribute of its parent; these attributes take no such binding.
    """

    @property
    def capture(self) -> Any:
        return __getattr__("capture")

    @capture.setter
    def capture(self, value: Any) -> None:
        pass

    @property
    def overlap(self) -> Any:
        return __getattr__("overlap")

    @overlap.setter
    def overlap(self, value: Any) -> None:
        pass


sys.modules[__name__].__class__ = _Package
