"""Every figure of the package: `draw_x(result, *, ax=None)` takes the record of a command and returns the Axes it drew on."""

from emprobe.report.digits_plots import draw_ghosts
from emprobe.report.landscape_plots import (
    draw_efficiency,
    draw_scaling,
    draw_stability,
    draw_weight,
    draw_without_kl,
    landscape_figure,
)
from emprobe.report.overlap_plots import draw_overlap, overlap_figure
from emprobe.report.panel_plots import draw_convergence, draw_dose_response, draw_nulls, draw_panel, draw_profile, figure
from emprobe.report.priors_plots import draw_predictors, draw_prior_layers, priors_figure
from emprobe.report.profiles import draw_certainty, draw_detection, profile_figure
from emprobe.report.rate_plots import draw_rates, draw_sensitivity, rates_figure
from emprobe.report.shifts_plots import (
    draw_mean_shift,
    draw_predicted_activations,
    draw_prompt_correlation,
    draw_shift_sizes,
    draw_shift_subspace,
    shifts_figure,
)
from emprobe.report.transfer_plots import (
    draw_covariates,
    draw_decomposition,
    draw_four_way,
    draw_matrix,
    draw_reliability,
    draw_surface,
    grid_figure,
    transfer_figure,
)
from emprobe.report.transfer_run import draw_composition, draw_cosines, draw_directions, run_figure

__all__ = [
    "draw_certainty",
    "draw_composition",
    "draw_convergence",
    "draw_cosines",
    "draw_covariates",
    "draw_decomposition",
    "draw_detection",
    "draw_directions",
    "draw_dose_response",
    "draw_efficiency",
    "draw_four_way",
    "draw_ghosts",
    "draw_matrix",
    "draw_mean_shift",
    "draw_nulls",
    "draw_overlap",
    "draw_panel",
    "draw_predicted_activations",
    "draw_predictors",
    "draw_prior_layers",
    "draw_profile",
    "draw_prompt_correlation",
    "draw_rates",
    "draw_reliability",
    "draw_scaling",
    "draw_sensitivity",
    "draw_shift_sizes",
    "draw_shift_subspace",
    "draw_stability",
    "draw_surface",
    "draw_weight",
    "draw_without_kl",
    "figure",
    "grid_figure",
    "landscape_figure",
    "overlap_figure",
    "priors_figure",
    "profile_figure",
    "rates_figure",
    "run_figure",
    "shifts_figure",
    "transfer_figure",
]
