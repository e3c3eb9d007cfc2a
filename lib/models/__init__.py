"""Load, check, stream, spread and write checkpoints. Floor 1: stands on core."""

from lib.models.loading import load

__all__ = ["load"]
