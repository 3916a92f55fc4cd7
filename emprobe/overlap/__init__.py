"""Subspaces and their overlap, always with its null."""

from emprobe.overlap.between import Overlap, overlap
from emprobe.overlap.cka import linear_cka
from emprobe.overlap.cosine import cosine_null, random_directions
from emprobe.overlap.measures import mahalanobis
from emprobe.overlap.nulls import false_discovery
from emprobe.overlap.resampling import ceiling
from emprobe.overlap.subspace import Subspace

__all__ = ["Overlap", "Subspace", "ceiling", "cosine_null", "false_discovery", "linear_cka", "mahalanobis", "overlap", "random_directions"]
