"""Fast decoding: four choices (commit, remask, recompute, visible) and the systems made of them. Floor 5: stands on diffusion."""

from lib.decoding.decoder import DecodingPlan, decode
from lib.decoding.systems import fast_plan

__all__ = ["DecodingPlan", "decode", "fast_plan"]
