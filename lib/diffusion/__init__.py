"""Noise, the NELBO, samplers, and sinks traced along a generation. Floor 3: stands on attention."""
