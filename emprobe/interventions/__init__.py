"""Write to the residual stream while a model runs, and keep a receipt of what really happened."""

from emprobe.interventions.apply import intervene, intervene_rows
from emprobe.interventions.operators import Ablate, Add, Cap, MeanAblate, Operator, Rotate, SetProjection
from emprobe.interventions.plan import Plan
from emprobe.interventions.receipt import Receipt
from emprobe.interventions.when import When
from emprobe.interventions.where import Where

__all__ = [
    "Ablate",
    "Add",
    "Cap",
    "MeanAblate",
    "Operator",
    "Plan",
    "Receipt",
    "Rotate",
    "SetProjection",
    "When",
    "Where",
    "intervene",
    "intervene_rows",
]
