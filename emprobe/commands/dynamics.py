"""`emprobe study dynamics`: in-domain loss against out-of-domain alignment, of a table, an organism, or your own model."""

from __future__ import annotations

from emprobe.report.dynamics_card import dynamics_lines
from emprobe.studies.dynamics import Dynamics, run_dynamics


def run_dynamics_command(command: Dynamics) -> list[str]:
    """Run the study, write its folder, and return the lines to print.

    Raises:
        EmprobeError: As `run_dynamics`.
        MismatchError: As `run_dynamics`.
    """
    result = run_dynamics(command)
    more = "" if command.way == "table" else ", runs.csv, and every stage"
    return [*dynamics_lines(result), "", f"Everything is in {command.out}: result.json, dynamics.png, README.md{more}."]
