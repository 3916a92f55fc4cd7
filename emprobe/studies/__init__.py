"""Studies: one module per question; the main job takes two checkpoints to a direction proved on behaviour."""

from emprobe.report import summary
from emprobe.studies import channels, dynamics, landscape, priors, prompts, shifts, solutions, transfer
from emprobe.studies.given import PanelJob, run_panel
from emprobe.studies.job import Job, run_job

__all__ = [
    "Job",
    "PanelJob",
    "channels",
    "dynamics",
    "landscape",
    "priors",
    "prompts",
    "run_job",
    "run_panel",
    "shifts",
    "solutions",
    "summary",
    "transfer",
]
