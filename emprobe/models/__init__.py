"""Checkpoints: loading, pairing, rendering chats, and finding where to read."""

from emprobe.models.chat import Encoded, encode
from emprobe.models.load import Checkpoint, load_model
from emprobe.models.pair import CheckpointPair, load_pair

__all__ = ["Checkpoint", "CheckpointPair", "Encoded", "encode", "load_model", "load_pair"]
