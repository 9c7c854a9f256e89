"""Bark checkpoints in both published formats, read into one set of parameter names."""

from bark_fast.checkpoint.load import Checkpoint, load_checkpoint

__all__ = ["Checkpoint", "load_checkpoint"]
