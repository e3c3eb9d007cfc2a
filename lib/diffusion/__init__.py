"""Noise, the NELBO, samplers, and sinks traced along a generation. Floor 4: stands on attention."""
