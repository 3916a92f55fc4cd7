"""`emprobe study transfer`: how misalignment spreads over a grid, from scores or from models that are fine-tuned first."""

from __future__ import annotations

from emprobe.report.transfer_card import transfer_lines
from emprobe.studies.transfer import Transfer, run_transfer


def run_transfer_command(command: Transfer) -> list[str]:
    """Run the study, write its folder, and return the lines to print.

    Raises:
        EmprobeError: As `run_transfer`.
        MismatchError: As `run_transfer`.
    """
    result = run_transfer(command)
    return [*transfer_lines(result), "", f"Everything is in {command.out}: result.json, README.md, transfer.png, grid.png."]
