"""Published decoders as plans: what each is made of, by the four choices."""

from typing import Literal

from lib.core.errors import InputError
from lib.decoding.commit import Quota, Threshold
from lib.decoding.decoder import DecodingPlan
from lib.decoding.late_steps import LateStep
from lib.decoding.recompute import Adaptive, Blockwise, Recompute
from lib.decoding.visible import Visible

CacheKind = Literal["none", "prefix", "dual", "adaptive"]


def fast_plan(
    cache: CacheKind = "none",
    *,
    threshold: float | None = None,
    steps_per_block: int | None = None,
    refresh_every: int | None = None,
    refresh_ratio: float | None = None,
    suffix_blocks: int | None = None,
    early_stop: bool = False,
    late_share: float | None = None,
    late_step: LateStep | None = None,
) -> DecodingPlan:
    """Return a plan of the most usual choices.

    Args:
        cache: `"none"`; `"prefix"` or `"dual"` as in `recompute.Blockwise`; `"adaptive"` as in `recompute.Adaptive`.
        threshold: commit every token above this probability, and the best one in any case; 1 is one token a step.
        steps_per_block: commit a fixed number of tokens a step instead, as `sampler.sample` does.
        refresh_every: passes from one full pass to the next within a block; None is one at the block's start.
        refresh_ratio: share of positions recomputed by an adaptive cache, in (0, 1].
        suffix_blocks: masked blocks after the current one that the network sees; None is all of them.
        early_stop, late_share, late_step: as in `DecodingPlan`.

    Raises:
        InputError: a value out of range, or options that do not go together.

    Source: Fast-dLLM (arXiv 2505.22618), dLLM-Cache (arXiv 2506.06295), Streaming-dLLM (arXiv 2601.17917).
    """
    if (threshold is None) == (steps_per_block is None):
        raise InputError(
            f"a plan must have either threshold or steps_per_block, got {threshold} and {steps_per_block}: set one of them"
        )
    if cache == "none" and refresh_every is not None:
        raise InputError(f"refresh_every must go with a cache, got {refresh_every} without: drop it or choose a cache")
    if (cache == "adaptive") != (refresh_ratio is not None):
        raise InputError(f"refresh_ratio must go with cache='adaptive', got {refresh_ratio} with {cache!r}: set both or none")
    if cache == "none":
        recompute = Recompute()
    elif refresh_ratio is not None:
        recompute = Adaptive(refresh_ratio, refresh_every)
    else:
        recompute = Blockwise(refresh_every, cache)  # type: ignore[arg-type]
    commit = Quota(steps_per_block) if threshold is None else Threshold(threshold)
    visible = Visible(suffix_blocks=suffix_blocks)
    return DecodingPlan(commit, recompute, visible, early_stop=early_stop, late_share=late_share, late_step=late_step)
