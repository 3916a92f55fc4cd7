"""Overlap of directions, always with its null."""

from emprobe.overlap.cosine import cosine_null, random_directions
from emprobe.overlap.subspace import Subspace

__all__ = ["Subspace", "cosine_null", "random_directions"]
