"""`emprobe study channels`: subliminal learning in three channels, on organisms or on your own models."""

from __future__ import annotations

from emprobe.report.channels_card import channels_lines
from emprobe.studies.channels import Channels, run_channels


def run_channels_command(command: Channels) -> list[str]:
    """Run the study, write its folder, and return the lines to print.

    Raises:
        EmprobeError: As `run_channels`.
        MismatchError: As `run_channels`.
    """
    result = run_channels(command)
    return [*channels_lines(result), "", f"Everything is in {command.out}: result.json, channels.png, README.md, every student and stage."]
