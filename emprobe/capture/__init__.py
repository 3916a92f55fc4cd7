"""Read activations from one checkpoint or from two on the same tokens."""

from emprobe.capture.rows import capture
from emprobe.capture.store import ActivationStore
from emprobe.capture.streaming import GroupMoments, capture_moments

__all__ = ["ActivationStore", "GroupMoments", "capture", "capture_moments"]
