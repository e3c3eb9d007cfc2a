"""Fast decoding: caches, commit rules, late steps. Floor 5: stands on diffusion."""

from lib.decoding.decoder import DecodingPlan, decode

__all__ = ["DecodingPlan", "decode"]
