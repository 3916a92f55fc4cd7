"""Write to the residual stream while a model runs, and keep a receipt of what really happened."""

from emprobe.interventions.apply import intervene
from emprobe.interventions.operators import Ablate, Add, Operator, SetProjection
from emprobe.interventions.receipt import Receipt
from emprobe.interventions.where import Where

__all__ = ["Ablate", "Add", "Operator", "Receipt", "SetProjection", "Where", "intervene"]
