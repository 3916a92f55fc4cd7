"""The command line: commands made from dataclasses, one place that prints, one that turns errors into sentences."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from emprobe.errors import EmprobeError, InterventionDidNotFire, MissingExtraError
from emprobe.report import example_lines, summary
from emprobe.studies.demo import Demo, run_demo
from emprobe.studies.job import Job, run_job


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _demo(command: Demo) -> None:
    results = run_demo(command)
    for kind, result in results.items():
        _say("", f"===== {kind} organism =====", summary(result))
    _say("", "Answers side by side (first answer to evenly spread test questions):", *example_lines(results["planted"]))
    _say("", f"Everything is in {command.out}: result.json, panel.png, README.md, and the answers of every condition.")


def _run(command: Job) -> None:
    result = run_job(command)
    _say(summary(result), "", *example_lines(result), "", f"Everything is in {command.out}: result.json, panel.png, README.md, answers/.")


Commands = (
    Annotated[Demo, tyro.conf.subcommand("demo", description="The whole job on two shipped organisms, planted and wild.")]
    | Annotated[Job, tyro.conf.subcommand("run", description="The whole job on any two checkpoints, before and after a fine-tune.")]
)
ACTIONS: dict[type, Any] = {Demo: _demo, Job: _run}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a user's mistake, 130 when stopped by the keyboard."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    command: Any = tyro.cli(Commands, prog="emprobe", args=arguments, description=__doc__)  # type: ignore[arg-type]
    try:
        ACTIONS[type(command)](command)
    except (EmprobeError, MissingExtraError, InterventionDidNotFire) as error:
        sys.stderr.write(f"emprobe: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("emprobe: stopped. The same command goes on where it was.\n")
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(f"emprobe: the disk is full ({error.filename}). Free some room; the same command goes on where it was.\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
