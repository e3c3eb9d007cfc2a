"""Follow attention sinks along a generation: diffusion models step by step, autoregressive ones by growing prefix."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib import attention, sampler, sinks
from lib.config import InputError
from lib.models import LanguageModel, network_body
from lib.sampler import DenoisingStep

MARKS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class SinkTrace:
    """Sink masses along the generation of several prompts by one model.

    Masses have mean 1 over the keys that exist at a step: all positions of a diffusion model, the prefix of an autoregressive
    one (later keys hold 0).

    Attributes:
        ids: what the network read at each step.
        is_masked: positions still masked at each step; all False for an autoregressive model.
        keys: number of keys at each step.
        mass: averaged over layers and heads.
        layer_mass: averaged over heads.
        mark_steps: the steps at 25, 50 and 75 % of the generation.
        head_mass: per layer and head, at the mark steps.
        gu_rate: share of layers and heads in which the first key is a sink by Gu's rule.
        gu_best: largest such share that any key reaches.
        rulli: mean number of sinks in a layer and head by Rulli's rule.
    """

    name: str
    prompt_tokens: int
    ids: Int[Tensor, "prompt step position"]
    is_masked: Bool[Tensor, "prompt step position"]
    keys: Int[Tensor, "step"]
    mass: Float[Tensor, "prompt step position"]
    layer_mass: Float[Tensor, "prompt step layer position"]
    mark_steps: tuple[int, ...]
    head_mass: Float[Tensor, "prompt mark layer head position"]
    gu_rate: Float[Tensor, "prompt step"]
    gu_best: Float[Tensor, "prompt step"]
    rulli: Float[Tensor, "prompt step"]

    @property
    def is_causal(self) -> bool:
        """Tell whether the keys grow with the steps."""
        return bool((self.keys[0] != self.keys[-1]).item())

    @property
    def frontier(self) -> Int[Tensor, "prompt step"]:
        """Length of the unmasked beginning: the first masked position of a diffusion model, the prefix of a causal one."""
        if self.is_causal:
            return self.keys.expand(self.mass.shape[:2])
        first = self.is_masked.int().argmax(-1)
        return torch.where(self.is_masked.any(-1), first, self.is_masked.shape[-1])


@dataclass(frozen=True)
class _StepStatistics:
    """What is kept of the masses of one step (all prompts) or one prompt (all steps); leading dimension `row`."""

    mass: Float[Tensor, "row position"]
    layer_mass: Float[Tensor, "row layer position"]
    gu_rate: Float[Tensor, "row"]
    gu_best: Float[Tensor, "row"]
    rulli: Float[Tensor, "row"]


def mark_steps(steps: int, fractions: Sequence[float] = MARKS) -> tuple[int, ...]:
    """Return the step indices at fractions of a generation of `steps` steps.

    >>> mark_steps(56)
    (14, 28, 42)
    """
    return tuple(min(round(fraction * steps), steps - 1) for fraction in fractions)


def prefix_lengths(*, prompt_tokens: int, positions: int, steps: int) -> tuple[int, ...]:
    """Return the prefix lengths of an autoregressive trace: as many as a diffusion model has steps, ending at the full text.

    >>> prefix_lengths(prompt_tokens=16, positions=24, steps=4)
    (18, 20, 22, 24)
    """
    new_tokens = positions - prompt_tokens
    return tuple(prompt_tokens + (step + 1) * new_tokens // steps for step in range(steps))


def trace(
    model: LanguageModel,
    prompts: Int[Tensor, "prompt position"],
    *,
    positions: int,
    steps: int,
    block_length: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> SinkTrace:
    """Generate from the prompts and record the masses on the way.

    Args:
        model: diffusion or autoregressive.
        prompts: token ids of equal length.
        positions: length of prompt and generated text together.
        steps: denoising steps, or prefix lengths.
        block_length: semi-autoregressive block of a diffusion model; None is one block.
        temperature: 0 is greedy.
        generator: CPU generator of the sampling stream, for a temperature above 0.

    Returns:
        The trace; both kinds of model have the same number of steps and end at the same length.

    Raises:
        InputError: the text would be longer than the model can read, or not longer than the prompt.

    Source: paper Figure 2 and section 3.1 (there on LLaDA, Dream, LLaMA-3.1 and Qwen-2.5).
    """
    longest = getattr(model.network.config, "max_position_embeddings", positions)
    if not prompts.shape[1] < positions <= longest:
        raise InputError(
            f"positions must be above the prompt's {prompts.shape[1]} and at most {longest} for {model.name}, got {positions}: "
            "change sink_traces.positions"
        )
    if model.is_causal:
        return _trace_prefixes(model, prompts, positions=positions, steps=steps, temperature=temperature, generator=generator)
    return _trace_denoising(
        model,
        prompts,
        positions=positions,
        steps=steps,
        block_length=block_length,
        temperature=temperature,
        generator=generator,
    )


def _trace_denoising(
    model: LanguageModel,
    prompts: Tensor,
    *,
    positions: int,
    steps: int,
    block_length: int | None,
    temperature: float,
    generator: torch.Generator | None,
) -> SinkTrace:
    """Record every denoising step of all prompts at once."""
    marks = mark_steps(steps)
    kept: list[_StepStatistics] = []
    ids, masked, heads = [], [], []
    with attention.record(model) as recorder:

        def on_step(step: DenoisingStep) -> None:
            """Keep the masses of the pass that was just made."""
            sums = recorder.pop()[:, : len(prompts), :, 0].cpu()
            kept.append(_reduce(sums.transpose(0, 1), keys=[positions] * len(prompts), is_causal=False))
            ids.append(step.input_ids.cpu())
            masked.append(step.is_masked.cpu())
            if step.step in marks:
                heads.append(sums.transpose(0, 1))

        sampler.sample(
            model,
            prompts,
            new_tokens=positions - prompts.shape[1],
            steps=steps,
            block_length=block_length,
            temperature=temperature,
            generator=generator,
            on_step=on_step,
        )
    return SinkTrace(
        name=model.name,
        prompt_tokens=prompts.shape[1],
        ids=torch.stack(ids, 1),
        is_masked=torch.stack(masked, 1),
        keys=torch.full((steps,), positions),
        mark_steps=marks,
        head_mass=torch.stack(heads, 1),
        **_stacked(kept, dim=1),
    )


def _trace_prefixes(
    model: LanguageModel,
    prompts: Tensor,
    *,
    positions: int,
    steps: int,
    temperature: float,
    generator: torch.Generator | None,
) -> SinkTrace:
    """Continue the prompts, then read the masses of every prefix from one pass a prompt."""
    lengths = prefix_lengths(prompt_tokens=prompts.shape[1], positions=positions, steps=steps)
    marks = mark_steps(steps)
    texts = sampler.continue_text(
        model, prompts, new_tokens=positions - prompts.shape[1], temperature=temperature, generator=generator
    )
    kept, heads = [], []
    for text in texts:  # one at a time: all prefixes of all heads of one text are already 10^8 numbers for a large model
        sums = attention.prefix_masses(model, text[None], lengths=lengths)[:, 0].cpu()
        by_step = sums.permute(2, 0, 1, 3)
        kept.append(_reduce(by_step, keys=lengths, is_causal=True))
        heads.append(by_step[list(marks)])
    ids = texts.cpu()[:, None].expand(-1, steps, -1)
    return SinkTrace(
        name=model.name,
        prompt_tokens=prompts.shape[1],
        ids=ids,
        is_masked=torch.zeros(ids.shape, dtype=torch.bool),
        keys=torch.tensor(lengths),
        mark_steps=marks,
        head_mass=torch.stack(heads),
        **_stacked(kept, dim=0),
    )


def _reduce(sums: Float[Tensor, "row layer head position"], *, keys: Sequence[int], is_causal: bool) -> _StepStatistics:
    """Reduce column sums to what a trace keeps; row r has `keys[r]` keys, and as many queries."""
    gu = torch.stack([sinks.gu_sink_rate(row, is_causal=is_causal, real_keys=n) for row, n in zip(sums, keys, strict=True)])
    by_key = gu.mean(dim=(1, 2))
    counts = [sinks.rulli_count(row[..., :n]).mean() for row, n in zip(sums, keys, strict=True)]
    return _StepStatistics(
        mass=sums.mean(dim=(1, 2)),
        layer_mass=sums.mean(dim=2),
        gu_rate=by_key[:, 0],
        gu_best=by_key.max(-1).values,
        rulli=torch.stack(counts),
    )


def _stacked(parts: list[_StepStatistics], *, dim: int) -> dict[str, Tensor]:
    """Join the kept statistics to tensors `[prompt, step, ...]`."""
    names = ("mass", "layer_mass", "gu_rate", "gu_best", "rulli")
    return {name: torch.stack([getattr(part, name) for part in parts], dim) for name in names}


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
    with attention.record(model, keep_map=True) as recorder:
        for step in steps:
            ids = trace.ids[prompt, step, : int(trace.keys[step])][None].to(model.device)
            network_body(model)(input_ids=ids, use_cache=False)
            frames.append(recorder.pop_map()[0].cpu())
    size = trace.ids.shape[-1]
    return torch.stack([torch.nn.functional.pad(frame, (0, size - frame.shape[1], 0, size - frame.shape[0])) for frame in frames])


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
