"""Attention masses as a network computes them; sinks, variances and stability of masses (pure). Floor 3: stands on models."""

from lib.attention.masses import sink_mass

__all__ = ["sink_mass"]
