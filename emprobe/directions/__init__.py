"""Linear directions from activations."""

from emprobe.directions.direction import Direction
from emprobe.directions.fit import fit_direction, fit_directions
from emprobe.directions.mean_difference import MeanDifference

__all__ = ["Direction", "MeanDifference", "fit_direction", "fit_directions"]
