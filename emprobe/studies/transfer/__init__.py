"""How misalignment spreads over a grid of domains and tasks from the cell that was trained (arXiv 2605.12798)."""

from emprobe.studies.transfer.agreement import correlation, grids_agree, learnt_and_spread
from emprobe.studies.transfer.analysis import analyse, compared
from emprobe.studies.transfer.cell_rates import CellRate, cell_rates, relation
from emprobe.studies.transfer.covariate_tables import Units, units_of
from emprobe.studies.transfer.covariates import covariate_effects
from emprobe.studies.transfer.decomposition import Decomposition, decompose
from emprobe.studies.transfer.judged import Judged, judged
from emprobe.studies.transfer.matching import Matching, match
from emprobe.studies.transfer.matrices import matrices, matrix
from emprobe.studies.transfer.settings import Transfer
from emprobe.studies.transfer.study import run_transfer
from emprobe.studies.transfer.summary import differences, four_way

__all__ = [
    "CellRate",
    "Decomposition",
    "Judged",
    "Matching",
    "Transfer",
    "Units",
    "analyse",
    "cell_rates",
    "compared",
    "correlation",
    "covariate_effects",
    "decompose",
    "differences",
    "four_way",
    "grids_agree",
    "judged",
    "learnt_and_spread",
    "match",
    "matrices",
    "matrix",
    "relation",
    "run_transfer",
    "units_of",
]
