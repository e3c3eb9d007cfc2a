"""Load, stream, spread and write language models. Floor 2: stands on checkpoints."""

from lib.models.loading import load

__all__ = ["load"]
