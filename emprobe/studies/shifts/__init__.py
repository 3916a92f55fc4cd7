"""Do shifts of activations on training and on evaluation prompts share a subspace (arXiv 2606.20814, part 3)."""

from emprobe.studies.shifts.beside import CLAIMS, PAPER, signs_of
from emprobe.studies.shifts.chance import halves, nulls_of
from emprobe.studies.shifts.measures import Components, ShiftSpan, along_mean, shift_measures
from emprobe.studies.shifts.predicted import least_squares_dose, prediction
from emprobe.studies.shifts.settings import Shifts
from emprobe.studies.shifts.study import run_shifts

__all__ = [
    "CLAIMS",
    "PAPER",
    "Components",
    "ShiftSpan",
    "Shifts",
    "along_mean",
    "halves",
    "least_squares_dose",
    "nulls_of",
    "prediction",
    "run_shifts",
    "shift_measures",
    "signs_of",
]
