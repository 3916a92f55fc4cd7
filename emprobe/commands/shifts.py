"""`emprobe study shifts`: activation shifts on training and on evaluation prompts, on organisms or on your own checkpoints."""

from __future__ import annotations

from emprobe.report.shifts_card import shifts_lines
from emprobe.studies.shifts import Shifts, run_shifts


def run_shifts_command(command: Shifts) -> list[str]:
    """Run the study, write its folder, and return the lines to print.

    Raises:
        EmprobeError: As `run_shifts`.
        MismatchError: As `run_shifts`.
    """
    result = run_shifts(command)
    return [
        *shifts_lines(result),
        "",
        f"Everything is in {command.out}: result.json, prompts.parquet, shifts.png, README.md, and every stage.",
    ]
