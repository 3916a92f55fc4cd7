"""In-domain loss against out-of-domain alignment over many short fine-tunes, and the way of the direction (arXiv 2606.20814, part 1)."""

from emprobe.studies.dynamics.change_point import ChangePoint, change_point
from emprobe.studies.dynamics.max_diff import MaxDiff, max_diff
from emprobe.studies.dynamics.openings import Openings, openings
from emprobe.studies.dynamics.relation import run_correlation
from emprobe.studies.dynamics.relations import relations_of
from emprobe.studies.dynamics.settings import Dynamics
from emprobe.studies.dynamics.study import run_dynamics
from emprobe.studies.dynamics.table import Columns, read_runs
from emprobe.studies.dynamics.trajectory import component_shares, local_cosines, trajectory, walk_cosines, walk_shares

__all__ = [
    "ChangePoint",
    "Columns",
    "Dynamics",
    "MaxDiff",
    "Openings",
    "change_point",
    "component_shares",
    "local_cosines",
    "max_diff",
    "openings",
    "read_runs",
    "relations_of",
    "run_correlation",
    "run_dynamics",
    "trajectory",
    "walk_cosines",
    "walk_shares",
]
