"""Fast decoding: caches, commit rules, late steps. Floor 4: stands on diffusion."""

from lib.decoding.decoder import DecodingPlan, decode

__all__ = ["DecodingPlan", "decode"]
