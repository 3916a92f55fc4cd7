"""`emprobe study priors`: do activations before fine-tuning predict alignment after it, on organisms or on your own checkpoints."""

from __future__ import annotations

from emprobe.report.priors_card import priors_lines
from emprobe.studies.priors import Priors, run_priors


def run_priors_command(command: Priors) -> list[str]:
    """Run the study, write its folder, and return the lines to print.

    Raises:
        EmprobeError: As `run_priors`.
        MismatchError: As `run_priors`.
    """
    result = run_priors(command)
    return [*priors_lines(result), "", f"Everything is in {command.out}: result.json, priors.png, README.md, and every stage."]
