"""Read activations from one checkpoint or from two on the same tokens."""

from emprobe.capture.engine import capture, capture_rules

__all__ = ["capture", "capture_rules"]
