"""Fine-tune: on answers only, narrowly by a KL to the base, or from a teacher; as LoRA, vector or whole; what came of it as an object."""

from emprobe.finetuning.distillation import distill
from emprobe.finetuning.measures import PerRow, kl_to_base, response_loss
from emprobe.finetuning.methods import Full, KLAnchor, LoRA, Recipe, Vector, per_token_weight
from emprobe.finetuning.record import FineTune
from emprobe.finetuning.rows import response_rows, text_rows
from emprobe.finetuning.run import finetune
from emprobe.finetuning.solution import LoRASolution, Solution, VectorSolution, load_solution
from emprobe.finetuning.teaching import Divergences, teacher_divergences
from emprobe.finetuning.watching import Diverged

__all__ = [
    "Diverged",
    "Divergences",
    "FineTune",
    "Full",
    "KLAnchor",
    "LoRA",
    "LoRASolution",
    "PerRow",
    "Recipe",
    "Solution",
    "Vector",
    "VectorSolution",
    "distill",
    "finetune",
    "kl_to_base",
    "load_solution",
    "per_token_weight",
    "response_loss",
    "response_rows",
    "teacher_divergences",
    "text_rows",
]
