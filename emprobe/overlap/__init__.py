"""Overlap of directions, always with its null."""

from emprobe.overlap.cosine import cosine_null, random_directions

__all__ = ["cosine_null", "random_directions"]
