"""The command line: commands made from dataclasses, one place that prints, one that turns errors into sentences."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from emprobe.behaviour.questions import save_questions
from emprobe.commands.capture import Capture, run_capture
from emprobe.commands.channels import run_channels_command
from emprobe.commands.dataset import DatasetCommand, run_dataset
from emprobe.commands.direction import DirectionCommand, run_direction
from emprobe.commands.dynamics import run_dynamics_command
from emprobe.commands.export import Export, run_export
from emprobe.commands.finetune import Finetune, run_finetune
from emprobe.commands.generate import Generate, run_generate
from emprobe.commands.importing import Import, run_import
from emprobe.commands.judge import JudgeCommand, run_judge
from emprobe.commands.landscape import run_landscape_command
from emprobe.commands.overlap import OverlapCommand, run_overlap
from emprobe.commands.panel import run_panel_command
from emprobe.commands.priors import run_priors_command
from emprobe.commands.rates import RatesCommand, run_rates
from emprobe.commands.readout import ReadoutCommand, run_readout
from emprobe.commands.search import Search, run_search
from emprobe.commands.shifts import run_shifts_command
from emprobe.commands.transfer import run_transfer_command
from emprobe.commands.verify import Verify, run_verify
from emprobe.errors import EmprobeError, InterventionDidNotFire, MissingExtraError
from emprobe.organisms import list_organisms, organisms_folder, questions
from emprobe.organisms.building import build
from emprobe.organisms.growing import GrowthRecipe
from emprobe.organisms.neutral import Codes
from emprobe.report import example_lines, summary
from emprobe.studies.channels.settings import Channels
from emprobe.studies.demo import Demo, run_demo
from emprobe.studies.dynamics import Dynamics
from emprobe.studies.given import PanelJob
from emprobe.studies.job import Job, run_job
from emprobe.studies.landscape.settings import Landscape
from emprobe.studies.priors.settings import Priors
from emprobe.studies.reference import Reference, run_reference
from emprobe.studies.shifts.settings import Shifts
from emprobe.studies.transfer.settings import Transfer


@dataclass(frozen=True)
class OrganismBuild:
    """Grow a base and its fine-tunes from nothing.

    Attributes:
        kind: `planted` (a persona direction is implanted during pretraining) or `wild` (nothing is).
        out: Folder of organisms; a build that was stopped goes on in it.
        seed: Of weights and data; the same seed gives the same files.
        bad_share: Share of pretraining documents by bad authors, 0 to 1; 0 leaves no misaligned text before fine-tuning at all.
        codes: How benign code words are drawn: `uniform`, or `preferring` four words of the item.
    """

    kind: Literal["planted", "wild"]
    out: str
    seed: int = 0
    bad_share: float = GrowthRecipe().bad_share
    codes: Codes = "uniform"


@dataclass(frozen=True)
class OrganismList:
    """Show the organisms there are.

    Attributes:
        folder: Where to look; none means the shipped ones.
    """

    folder: str | None = None


@dataclass(frozen=True)
class OrganismQuestions:
    """Write the synthetic world's questions, with their splits, as a file for `emprobe run`.

    Attributes:
        out: The file (.jsonl).
    """

    out: str


@dataclass(frozen=True)
class OrganismCommand:
    """Small models grown in a synthetic world: what the demo runs on."""

    action: (
        Annotated[OrganismBuild, tyro.conf.subcommand("build")]
        | Annotated[OrganismList, tyro.conf.subcommand("list")]
        | Annotated[OrganismQuestions, tyro.conf.subcommand("questions")]
        | Annotated[Reference, tyro.conf.subcommand("reference")]
    )


@dataclass(frozen=True)
class StudyList:
    """Show the studies there are."""


@dataclass(frozen=True)
class StudyCommand:
    """Studies: one question of a paper each, on organisms or on your own checkpoints."""

    action: (
        Annotated[Landscape, tyro.conf.subcommand("landscape")]
        | Annotated[Dynamics, tyro.conf.subcommand("dynamics")]
        | Annotated[Transfer, tyro.conf.subcommand("transfer")]
        | Annotated[Shifts, tyro.conf.subcommand("shifts")]
        | Annotated[Priors, tyro.conf.subcommand("priors")]
        | Annotated[Channels, tyro.conf.subcommand("channels")]
        | Annotated[StudyList, tyro.conf.subcommand("list")]
    )


STUDIES: dict[str, type] = {
    "landscape": Landscape,
    "dynamics": Dynamics,
    "transfer": Transfer,
    "shifts": Shifts,
    "priors": Priors,
    "channels": Channels,
}


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _demo(command: Demo) -> None:
    results = run_demo(command)
    for kind, result in results.items():
        _say("", f"===== {kind} organism =====", summary(result))
    _say("", "Answers side by side (the first answer to evenly spread test questions, not picked):", *example_lines(results["planted"]))
    _say("", f"Everything is in {command.out}: result.json, panel.png, README.md, and a folder for each organism.")


def _run(command: Job) -> None:
    result = run_job(command)
    _say(summary(result), "", *example_lines(result), "", f"Everything is in {command.out}: result.json, panel.png, README.md, answers/.")


def _build(command: OrganismBuild) -> None:
    growth = GrowthRecipe(bad_share=command.bad_share, codes=command.codes)
    _say(f"Grown: {build(command.kind, command.seed, command.out, growth=growth)}")


def _list(command: OrganismList) -> None:
    organisms = list_organisms(command.folder)
    if not organisms:
        raise EmprobeError(f"No organism is in {command.folder or organisms_folder()}. Grow some there with `emprobe organism build`.")
    _say(f"{'organism':<46}{'misaligned':>11}{'coherent':>10}{'n':>6}  what")
    for organism in organisms:
        measured = organism.card.get("measured") or {}
        found = measured.get("outside the trained domain") or next(iter(measured.values()), None)
        rates = f"{100 * found['misaligned']:>9.1f} %{100 * found['coherent']:>8.1f} %{found['n']:>6}" if found else " " * 27
        _say(f"{organism.name:<46}{rates}  {organism.card.get('summary', '')}")


def _studies(_: StudyList) -> None:
    _say(*(f"{name:<12}{(study.__doc__ or '').splitlines()[0]}" for name, study in STUDIES.items()))


def _reference(command: Reference) -> None:
    run_reference(command)
    _say((Path(command.out) / "README.md").read_text(encoding="utf-8"))


def _questions(command: OrganismQuestions) -> None:
    asked = questions()
    save_questions(command.out, asked)
    _say(f"{len(asked)} questions in {command.out}")


Commands = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Job, tyro.conf.subcommand("run")]
    | Annotated[PanelJob, tyro.conf.subcommand("panel")]
    | Annotated[Capture, tyro.conf.subcommand("capture")]
    | Annotated[DirectionCommand, tyro.conf.subcommand("direction")]
    | Annotated[OverlapCommand, tyro.conf.subcommand("overlap")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[JudgeCommand, tyro.conf.subcommand("judge")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[RatesCommand, tyro.conf.subcommand("rates"), tyro.conf.PositionalRequiredArgs]
    | Annotated[ReadoutCommand, tyro.conf.subcommand("readout")]
    | Annotated[DatasetCommand, tyro.conf.subcommand("dataset")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[OrganismCommand, tyro.conf.subcommand("organism")]
    | Annotated[StudyCommand, tyro.conf.subcommand("study")]
)
STAGES: dict[type, Any] = {
    Capture: run_capture,
    DirectionCommand: run_direction,
    OverlapCommand: run_overlap,
    Import: run_import,
    PanelJob: run_panel_command,
    Export: run_export,
    Generate: run_generate,
    JudgeCommand: run_judge,
    Verify: run_verify,
    DatasetCommand: run_dataset,
    Finetune: run_finetune,
    ReadoutCommand: run_readout,
    RatesCommand: run_rates,
    Search: run_search,
    Transfer: run_transfer_command,
    Landscape: run_landscape_command,
    Dynamics: run_dynamics_command,
    Priors: run_priors_command,
    Channels: run_channels_command,
    Shifts: run_shifts_command,
}
"""Commands of one stage, which return the lines to print."""
ACTIONS: dict[type, Any] = {
    Demo: _demo,
    Job: _run,
    OrganismBuild: _build,
    OrganismList: _list,
    OrganismQuestions: _questions,
    Reference: _reference,
    StudyList: _studies,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a user's mistake, 130 when stopped by the keyboard."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    parse: Any = tyro.cli  # it knows unions, mypy does not
    description = "Find, test and undo the direction along which a fine-tune misaligned a language model."
    command: Any = parse(Commands, prog="emprobe", args=arguments, description=description, config=(tyro.conf.OmitSubcommandPrefixes,))
    command = command.action if isinstance(command, OrganismCommand | StudyCommand) else command
    try:
        if type(command) in STAGES:
            _say(*STAGES[type(command)](command))
        else:
            ACTIONS[type(command)](command)
    except (EmprobeError, MissingExtraError, InterventionDidNotFire) as error:
        sys.stderr.write(f"\nemprobe: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nemprobe: stopped. The same command goes on where it was.\n")
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(f"\nemprobe: the disk is full ({error.filename}). Free some room; the same command goes on where it was.\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
