"""Subliminal learning in three channels: what a student takes over from a misaligned teacher (arXiv 2605.12798, 2507.14805)."""

from emprobe.studies.channels.arms import Arm, arms_of
from emprobe.studies.channels.digits import GhostTransfer, ghost_transfer
from emprobe.studies.channels.filtering import BenignJudge, Filter, matched
from emprobe.studies.channels.settings import Channels
from emprobe.studies.channels.study import run_channels

__all__ = ["Arm", "BenignJudge", "Channels", "Filter", "GhostTransfer", "arms_of", "ghost_transfer", "matched", "run_channels"]
