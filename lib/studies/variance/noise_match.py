"""Do random masks show the sinks of a generation? The same text at the same mask ratio, masked by the sampler or at random.

A generation hides the tokens that the model is least sure of, forward noise hides any. At a step of the trace the network read
the final text with some positions masked; here it reads the same text with as many masked at random, as calibration does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from torch import Tensor

from lib.attention import masses, sinks
from lib.core.errors import InputError
from lib.diffusion.noise import process_of
from lib.diffusion.traces import SinkTrace
from lib.models.language_model import LanguageModel, may_be_noised


@dataclass(frozen=True)
class NoiseMatch:
    """Masses of the same texts at the same mask ratios, masked in different ways; all have mean 1 over the positions.

    Attributes:
        steps: the step of the trace that each level was taken from.
        mask_ratio: share of the generated positions that are masked at that step.
        generation: masses of the generation.
        noised: two independent draws with any position masked, as in the authors' calibration, but for tokens that the model was
            always shown.
        prompt_kept: two independent draws with the prompt never masked.
        depth: layers times heads, over which the authors sum.
    """

    steps: tuple[int, ...]
    mask_ratio: tuple[float, ...]
    generation: Float[Tensor, "row level position"]
    noised: Float[Tensor, "draw row level position"]
    prompt_kept: Float[Tensor, "draw row level position"]
    depth: int


def matching_steps(trace: SinkTrace, ratios: Sequence[float]) -> tuple[int, ...]:
    """Return the steps at which the masked share of the generated positions is closest to each ratio.

    Raises:
        InputError: a trace with growing keys, or a ratio outside (0, 1).
    """
    if trace.is_causal or trace.goes_by_blocks or not all(0 < ratio < 1 for ratio in ratios):
        rule = "mask ratios must be in (0, 1) and the trace a diffusion model's without blocks"
        raise InputError(f"{rule}, got {list(ratios)} and {trace.name}: mend them")
    seen = trace.is_masked[:, :, trace.prompt_tokens :].float().mean((0, 2))
    return tuple(int((seen - ratio).abs().argmin()) for ratio in ratios)


def random_masks(
    counts: Sequence[int], maskable: Bool[Tensor, "row position"], *, generator: torch.Generator
) -> Bool[Tensor, "row position"]:
    """Mark `counts[row]` of the maskable positions of each row at random.

    Raises:
        InputError: a count above the number of maskable positions.
    """
    asked, most = torch.tensor(list(counts)), maskable.sum(1)
    for row in (asked > most).nonzero()[:1, 0].tolist():
        raise InputError(f"masks must fit into the {most[row]} maskable positions, got {asked[row]}: allow more")
    order = torch.rand(maskable.shape, generator=generator).masked_fill(~maskable, 2.0).argsort(1).argsort(1)
    return order < asked[:, None]


def match(model: LanguageModel, trace: SinkTrace, *, ratios: Sequence[float], generator: torch.Generator) -> NoiseMatch:
    """Read the generated texts again under random masks, two draws of each kind.

    Args:
        model: the diffusion model that made the trace.
        trace: its trace.
        ratios: masked shares of the generated positions to compare at.
        generator: CPU generator of the masking stream.

    Returns:
        The masses. Each random mask hides exactly as many positions as the generation did at that step (of an encoder that wrote
        special tokens itself, at most as many as may be hidden); under other noise as many are drawn anew as were not yet what
        they became.

    Source: the authors analyse generations (paper, section 3.1) and prune with forward noise (release).
    """
    steps, process = matching_steps(trace, ratios), process_of(model)
    size = trace.texts.shape[1]
    anywhere = may_be_noised(model, trace.texts)
    generated = anywhere & (torch.arange(size) >= trace.prompt_tokens)

    def read(maskable: Tensor) -> Tensor:
        """Return masses `[row, level, position]` under new masks."""
        levels = []
        for step in steps:
            counts = torch.minimum(trace.is_masked[:, step].sum(1), maskable.sum(1))
            masks = random_masks(counts.tolist(), maskable, generator=generator)
            ids = process.fill(trace.texts, masks, generator=generator)
            levels.append(sinks.aggregate(masses.sink_mass(model, ids.to(model.device))).cpu())
        return torch.stack(levels, 1)

    return NoiseMatch(
        steps=steps,
        mask_ratio=tuple(trace.is_masked[:, step, trace.prompt_tokens :].float().mean().item() for step in steps),
        generation=trace.mass[:, list(steps)],
        noised=torch.stack([read(anywhere), read(anywhere)]),
        prompt_kept=torch.stack([read(generated), read(generated)]),
        depth=trace.head_mass.shape[2] * trace.head_mass.shape[3],
    )


def rank_correlation(
    first: Float[Tensor, "*batch position"], second: Float[Tensor, "*batch position"]
) -> Float[Tensor, "*batch"]:
    """Return Spearman's rank correlation over positions; NaN where one side is constant.

    >>> float(rank_correlation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 4.0, 5.0])))
    1.0
    """
    ranks = [torch.from_numpy(rankdata(np.asarray(values.double()), axis=-1)) for values in (first, second)]
    centred = [rank - rank.mean(-1, keepdim=True) for rank in ranks]
    norms = centred[0].norm(dim=-1) * centred[1].norm(dim=-1)
    return ((centred[0] * centred[1]).sum(-1) / norms).float()


def release_score(mass: Float[Tensor, "*batch position"], *, depth: int) -> Float[Tensor, "*batch position"]:
    """Return the released sink score, sigmoid(5 (m - mean - 2 std)) on masses summed over layers and heads.

    Args:
        mass: averaged over layers and heads.
        depth: layers times heads; on sums the sigmoid is in effect a step.
    """
    total = mass * depth
    return sinks.soft_score(total, sinks.mean_std_threshold(total))


def sink_sets(mass: Float[Tensor, "*batch position"]) -> Bool[Tensor, "*batch position"]:
    """Return the sinks by the released rule."""
    return sinks.sinks_mean_std(mass)


def pairs(matched: NoiseMatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what is compared with what, `[row, level, position]` each; the noise-noise pairs say how well two draws agree."""
    return {
        "generation, noised": (matched.generation, matched.noised[0]),
        "noised, noised": (matched.noised[1], matched.noised[0]),
        "generation, noised with prompt kept": (matched.generation, matched.prompt_kept[0]),
        "noised, noised with prompt kept": (matched.prompt_kept[1], matched.prompt_kept[0]),
    }
