"""Do activations on prompts before fine-tuning predict alignment after it, beyond cheap baselines (arXiv 2606.20814)."""

from emprobe.studies.priors.baselines import Words, length, one_hot
from emprobe.studies.priors.features import PCAProjections, RandomProjections, fixed, pca_directions, random_directions
from emprobe.studies.priors.folds import Fold, Folds, family_folds
from emprobe.studies.priors.intervals import over_folds
from emprobe.studies.priors.measure import Design, measure
from emprobe.studies.priors.permuting import permuted
from emprobe.studies.priors.pipelines import nested_lasso, plain_ridge
from emprobe.studies.priors.predictors import PromptTable
from emprobe.studies.priors.ridge import Measured, nested_ridge
from emprobe.studies.priors.settings import Priors
from emprobe.studies.priors.study import run_priors
from emprobe.studies.priors.verdict import verdict

__all__ = [
    "Design",
    "Fold",
    "Folds",
    "Measured",
    "PCAProjections",
    "Priors",
    "PromptTable",
    "RandomProjections",
    "Words",
    "family_folds",
    "fixed",
    "length",
    "measure",
    "nested_lasso",
    "nested_ridge",
    "one_hot",
    "over_folds",
    "pca_directions",
    "permuted",
    "plain_ridge",
    "random_directions",
    "run_priors",
    "verdict",
]
