"""Fast decoding: four choices (commit, remask, recompute, visible), the systems made of them, late steps. Floor 5: on diffusion."""

from lib.decoding.decoder import DecodingPlan, decode
from lib.decoding.systems import fast_plan

__all__ = ["DecodingPlan", "decode", "fast_plan"]
