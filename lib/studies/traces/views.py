"""Look at a trace again: maps, single heads, masses relative to the frontier, and the masses that a mask alone would give."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attention import masses, sinks
from lib.core.runtime import progress
from lib.diffusion.block_reader import pass_mask
from lib.diffusion.traces import SinkTrace
from lib.models import visibility
from lib.models.language_model import LanguageModel, network_body, tokenizer_of
from lib.report.explorer import Scene
from lib.report.results import in_words

VALUES = 1_000_000  # masses of an interactive page: less than three of its five megabytes


@torch.inference_mode()
def attention_maps(
    model: LanguageModel, trace: SinkTrace, *, prompt: int, steps: Sequence[int]
) -> Float[Tensor, "frame query key"]:
    """Return the attention matrices of one prompt at some steps, averaged over layers and heads.

    Args:
        model: the model that made the trace.
        trace: its trace.
        prompt: which prompt.
        steps: which steps; one forward pass each.

    Source: the authors' sink_dynamics animation.
    """
    frames = []
    with masses.record(model, keep=("map",)) as recorder:
        for _ in _passes(model, trace, prompt=prompt, steps=steps):
            frames.append(recorder.pop_map()[0].cpu())
    size = trace.ids.shape[-1]
    return torch.stack([torch.nn.functional.pad(frame, (0, size - frame.shape[1], 0, size - frame.shape[0])) for frame in frames])


@torch.inference_mode()
def head_masses(
    model: LanguageModel, trace: SinkTrace, *, prompt: int, steps: Sequence[int]
) -> Float[Tensor, "frame layer head position"]:
    """Return the masses of single layers and heads for one prompt at some steps; a trace keeps them at its marks alone.

    Args:
        model: the model that made the trace.
        trace: its trace.
        prompt: which prompt.
        steps: rising; a diffusion model takes one forward pass each, a causal one a single pass.
    """
    if trace.is_causal:
        lengths, text = [int(trace.keys[step]) for step in steps], trace.texts[prompt][None].to(model.device)
        return masses.read_prefixes(model, text, lengths=lengths).pop()[:, 0].cpu().permute(2, 0, 1, 3)
    frames = []
    with masses.record(model) as recorder:
        for mask in _passes(model, trace, prompt=prompt, steps=steps):
            sums = recorder.pop()[:, 0, :, 0]
            frames.append((sums if mask is None else sinks.per_viewer(sums, visibility.viewers(mask)[0])).cpu())
    size = trace.ids.shape[-1]
    return torch.stack([torch.nn.functional.pad(frame, (0, size - frame.shape[-1])) for frame in frames])


def _passes(
    model: LanguageModel, trace: SinkTrace, *, prompt: int, steps: Sequence[int]
) -> Iterator[Bool[Tensor, "1 1 query key"] | None]:
    """Read one prompt again as it was at some steps, a forward pass each; tell the mask of each, where there is one."""
    for step in progress(steps, desc=model.name, unit="step"):
        ids, mask = trace.ids[prompt, step, : int(trace.keys[step])][None], _mask_of(trace, step, model.device)
        network_body(model)(input_ids=ids.to(model.device), attention_mask=mask, use_cache=False)
        yield mask


def scene(model: LanguageModel, trace: SinkTrace, *, prompt: int = 0, values: int = VALUES) -> Scene:
    """Take from a trace what the interactive page shows of one prompt.

    Args:
        model: the model that made the trace.
        trace: its trace.
        prompt: which prompt.
        values: masses that are kept at most: of up to 20 steps and 8 layers, spread evenly, and all heads.
    """
    heads, positions = trace.head_mass.shape[3:]
    steps = _spread(trace.mass.shape[1], max(2, min(20, values // (heads * positions))))
    masses_of = head_masses(model, trace, prompt=prompt, steps=steps)
    kept = _spread(masses_of.shape[1], max(1, min(8, values // (len(steps) * heads * positions))))
    tokenizer, ids = tokenizer_of(model), trace.ids[prompt, steps]
    shown = {token: str(tokenizer.decode([token])) for token in ids.unique().tolist()}
    ratios = trace.is_masked[prompt, steps, trace.prompt_tokens :].float().mean(-1).tolist()
    keys = trace.keys[steps]
    titles = [
        f"step {step + 1} of {trace.mass.shape[1]}, " + (f"{count} tokens" if trace.is_causal else f"mask ratio {ratio:.2f}")
        for step, count, ratio in zip(steps, keys.tolist(), ratios, strict=True)
    ]
    return Scene(
        name=in_words(model.describe()),
        steps=titles,
        layers=[f"layer {layer}" for layer in kept],
        depth=masses_of.shape[1],
        tokens=[[shown[token] for token in row] for row in ids.tolist()],
        masked=trace.is_masked[prompt, steps].numpy(),
        keys=keys.numpy(),
        mass=masses_of[:, kept].double().numpy(),
    )


def _spread(count: int, most: int) -> list[int]:
    """Return at most so many of the numbers below a count, from the first to the last, evenly."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def scenes(models: Sequence[LanguageModel], traces: Sequence[SinkTrace]) -> list[Scene]:
    """Take the first prompt of each trace, so much of it that one page can show all of them."""
    return [scene(model, trace, values=VALUES // len(traces)) for model, trace in zip(models, traces, strict=True)]


def relative_to_frontier(
    mass: Float[Tensor, "prompt step position"], frontier: Int[Tensor, "prompt step"], *, keys: Int[Tensor, "step"], reach: int
) -> Float[Tensor, "step offset"]:
    """Average masses over prompts at equal distance from the frontier.

    Args:
        mass: masses of a trace.
        frontier: first position that is not yet written, per prompt and step.
        keys: keys that exist at each step.
        reach: offsets from -reach to reach - 1 are returned; offset 0 is the frontier itself.

    Returns:
        Mean mass by step and offset; NaN where no prompt has a key at that offset.
    """
    offsets = torch.arange(-reach, reach)
    positions = frontier[..., None] + offsets
    exists = (positions >= 0) & (positions < keys[None, :, None])
    taken = mass.gather(2, positions.clamp(0, mass.shape[-1] - 1))
    return torch.where(exists, taken, float("nan")).nanmean(0)


def uniform_mass(keys: int, *, is_causal: bool) -> Float[Tensor, "key"]:
    """Return the masses that attention without any preference gives: 1 each, or a harmonic sum under the causal mask.

    The first key of a causal model gets the most even then, since every query sees it: the baseline for concentration.

    >>> uniform_mass(2, is_causal=True).tolist()
    [1.5, 0.5]
    """
    if not is_causal:
        return torch.ones(keys)
    rows = torch.tril(torch.ones(keys, keys, dtype=torch.float64))
    return (rows / rows.sum(1, keepdim=True)).sum(0).float()


def uniform_of(trace: SinkTrace, step: int) -> Float[Tensor, "key"]:
    """Return the masses that attention without any preference gives under the mask of a trace's step."""
    mask = _mask_of(trace, step, torch.device("cpu"))
    if mask is None:
        return uniform_mass(int(trace.keys[step]), is_causal=trace.is_causal)
    rows = mask[:, 0].double()
    return sinks.per_viewer((rows / rows.sum(-1, keepdim=True)).sum(-2), visibility.viewers(mask))[0].float()


def _mask_of(trace: SinkTrace, step: int, device: torch.device) -> Bool[Tensor, "1 1 query key"] | None:
    """Return the mask under which a step was read, where attention goes by blocks."""
    if trace.blocks is None or trace.opened is None:
        return None
    blocks = trace.blocks[None, : int(trace.keys[step])].to(device)
    opened = int(trace.opened[step])
    return pass_mask(trace.attention, blocks, opened=opened if bool((blocks == opened).any()) else None)
