"""Prompt, finished blocks and current block apart, along a trace of a model that writes block after block.

Keys of finished blocks cannot move, since they see nothing of what comes later: that sinks move is said of the current block.
"""

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lib.core.errors import require
from lib.diffusion.traces import SinkTrace

REGIONS = ("prompt", "finished", "current")


def regions(trace: SinkTrace) -> dict[str, Bool[Tensor, "step position"]]:
    """Mark the keys of each region at every step; prompt tokens inside the current block belong to that.

    Raises:
        InputError: a trace of a model that does not write by blocks.
    """
    require(trace.goes_by_blocks, "regions must be of a model that writes by blocks", trace.name, "leave them out")
    position = torch.arange(trace.mass.shape[-1])
    exists = position < trace.keys[:, None]
    current = exists & (cast(Tensor, trace.blocks) == cast(Tensor, trace.opened)[:, None])
    prompt = exists & ~current & (position < trace.prompt_tokens)
    return {"prompt": prompt, "finished": exists & ~current & ~prompt, "current": current}


def region_masses(trace: SinkTrace) -> dict[str, Float[Tensor, "prompt step"]]:
    """Return the mean mass of a key of each region at every step, NaN where the region has no key.

    Args:
        trace: of a model that writes by blocks.
    """
    return {
        name: torch.where(where, trace.mass, 0.0).sum(-1) / torch.where(where.any(-1), where.sum(-1), torch.nan)
        for name, where in regions(trace).items()
    }


def movable(trace: SinkTrace) -> Bool[Tensor, "step position"]:
    """Mark the keys that can move at each step: those of the current block, or all that exist where there are no blocks."""
    if trace.goes_by_blocks:
        return regions(trace)["current"]
    return torch.arange(trace.mass.shape[-1]) < trace.keys[:, None]
