"""Checkpoints of other formats, read into the names and shapes of our backbones."""

from byom.checkpoint.recognise import Checkpoint, read

__all__ = ["Checkpoint", "read"]
