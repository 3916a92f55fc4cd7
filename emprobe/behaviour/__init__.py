"""Behaviour: questions, sampled answers, judges, and rates with their doubt."""

from emprobe.behaviour.sampling import generate

__all__ = ["generate"]
