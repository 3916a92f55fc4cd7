"""Interventions as files and requests that other programs carry out."""

from emprobe.interventions.export.registry import TARGETS, Exported, export

__all__ = ["TARGETS", "Exported", "export"]
