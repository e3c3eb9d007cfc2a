"""Follow attention sinks along a generation: diffusion models step by step, autoregressive ones by growing prefix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attention import masses, sinks
from lib.core.errors import require
from lib.core.runtime import progress
from lib.diffusion import block_sampler, commits, sampler
from lib.diffusion.block_reader import viewers_of
from lib.diffusion.commits import DenoisingStep, Remasking
from lib.models.language_model import Attention, LanguageModel, blocks_of

MARKS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class HeadTrace:
    """What single layers and heads do at every step.

    Attributes:
        rulli_sets: sinks by Rulli's rule (leave-one-out mean + 3).
        sets: sinks by the released rule (mean + 2 standard deviations).
        favourites: keys that are some query's argmax in the attention averaged over the layer's heads.
        first_score: mean attention that the first token receives, averaged over heads.
        value_norm: norm of the value vectors at the mark steps, per key-value head.
    """

    rulli_sets: Bool[Tensor, "prompt step layer head position"]
    sets: Bool[Tensor, "prompt step layer head position"]
    favourites: Bool[Tensor, "prompt step layer position"]
    first_score: Float[Tensor, "prompt step layer"]
    value_norm: Float[Tensor, "prompt mark layer kv_head position"]


@dataclass(frozen=True)
class SinkTrace:
    """Sink masses along the generation of several prompts by one model.

    Masses have mean 1 over the keys that exist at a step: all positions of a diffusion model, the prefix of an autoregressive
    one, what is written and the current block where attention goes by blocks (later keys hold 0). There they are what a query
    that may see the key gives it, see `masses.per_viewer`.

    Attributes:
        ids: what the network read at each step.
        is_masked: positions still masked at each step; under other noise those that still change, at this step or a later one
            (under masked noise the same positions); all False for an autoregressive model.
        keys: number of keys at each step.
        mass: averaged over layers and heads.
        layer_mass: averaged over heads.
        mark_steps: the steps at 25, 50 and 75 % of the generation.
        head_mass: per layer and head, at the mark steps.
        gu_rate: share of layers and heads in which the first key is a sink by Gu's rule.
        gu_best: largest such share that any key reaches.
        rulli: mean number of sinks in a layer and head by Rulli's rule.
        texts: prompt and all generated tokens.
        heads: single layers and heads, when asked for.
        attention: of the model.
        blocks: number of each position's block where attention goes by blocks.
        opened: number of the block that each step writes.
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
    texts: Int[Tensor, "prompt position"]
    heads: HeadTrace | None = None
    attention: Attention = "full"
    blocks: Int[Tensor, "position"] | None = None
    opened: Int[Tensor, "step"] | None = None

    @property
    def is_changed(self) -> Bool[Tensor, "prompt step position"]:
        """Tell which tokens each step of a diffusion model's generation changes: masks that it fills, or tokens of any kind."""
        return commits.changed(self.ids, self.texts)

    @property
    def goes_by_blocks(self) -> bool:
        """Tell whether the model writes block after block."""
        return self.opened is not None

    @property
    def keys_grow(self) -> bool:
        """Tell whether the keys grow with the steps."""
        return bool((self.keys[0] != self.keys[-1]).item())

    @property
    def is_causal(self) -> bool:
        """Tell whether the model is autoregressive: its keys grow, and not by blocks."""
        return self.keys_grow and not self.goes_by_blocks

    @property
    def frontier(self) -> Int[Tensor, "prompt step"]:
        """Length of the unmasked beginning: the first masked position of a diffusion model, the prefix of a causal one."""
        if self.is_causal:
            return self.keys.expand(self.mass.shape[:2])
        first = self.is_masked.int().argmax(-1)
        return torch.where(self.is_masked.any(-1), first, self.is_masked.shape[-1])


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
    remasking: Remasking = "low_confidence",
    heads: bool = False,
    generator: torch.Generator | None = None,
) -> SinkTrace:
    """Generate from the prompts and record the masses on the way.

    Args:
        model: diffusion or autoregressive.
        prompts: token ids of equal length.
        positions: length of prompt and generated text together, with the token that closes an encoder's rows.
        steps: denoising steps, or prefix lengths.
        block_length: semi-autoregressive block of a diffusion model; None is one block, or the model's own blocks.
        temperature: 0 is greedy.
        remasking: which predictions a diffusion model keeps first.
        heads: also keep what single layers and heads do (two bytes for each head, step and position).
        generator: CPU generator of the sampling stream, for a temperature above 0 or random remasking.

    Returns:
        The trace; both kinds of model have the same number of steps and end at the same length.

    Raises:
        InputError: the text would be longer than the model can read, or not longer than the prompt.

    Source: paper Figure 2 and section 3.1 (there on LLaDA, Dream, LLaMA-3.1 and Qwen-2.5).
    """
    check_length(model, prompt_tokens=prompts.shape[1], positions=positions, steps=steps)
    if model.is_causal:
        texts = sampler.continue_text(
            model, prompts, new_tokens=positions - prompts.shape[1], temperature=temperature, generator=generator
        )
        return _trace_prefixes(model, texts, prompt_tokens=prompts.shape[1], steps=steps, heads=heads)
    sample = partial(
        sampler.sample,
        model,
        prompts,
        new_tokens=positions - prompts.shape[1],
        steps=steps,
        block_length=block_length,
        temperature=temperature,
        remasking=remasking,
        closed=True,
        generator=generator,
    )
    return _trace_denoising(model, prompts, sample, steps=steps, heads=heads)


def check_length(model: LanguageModel, *, prompt_tokens: int, positions: int, steps: int | None = None) -> None:
    """Raise `InputError` for a text too long for the model, not longer than its prompt, or of more blocks than steps."""
    longest = getattr(model.network.config, "max_position_embeddings", positions)
    rule = f"positions must be above the prompt's {prompt_tokens} and at most {longest} for {model.name}"
    require(prompt_tokens < positions <= longest, rule, str(positions), "change positions")
    if steps is not None and model.goes_by_blocks:
        least = block_sampler.least_steps(model, start=prompt_tokens, end=positions)
        rule = f"steps must be at least {least} for the blocks of {model.block_length} tokens of {model.name}"
        require(steps >= least, rule, str(steps), "raise them, or lower the tokens per step")


def _trace_denoising(
    model: LanguageModel, prompts: Tensor, sample: Callable[..., Tensor], *, steps: int, heads: bool
) -> SinkTrace:
    """Record every denoising step of all prompts at once."""
    marks = mark_steps(steps)
    kept, ids, masked, at_marks, parts, value_norms, lengths, opened = [], [], [], [], [], [], [], []
    kinds = ("argmax", "value_norm") if heads else ()
    with masses.record(model, keep=kinds) as recorder, progress(total=steps, desc=model.name, unit="step") as bar:

        def on_step(step: DenoisingStep) -> None:
            """Keep the masses of the pass that was just made."""
            sums = recorder.pop()[:, : len(prompts), :, 0].transpose(0, 1).cpu()
            keys, size = [sums.shape[-1]] * len(prompts), step.input_ids.shape[1]
            viewers, block = viewers_of(model, step, prompt_tokens=prompts.shape[1])
            mass = sums if viewers is None else sinks.per_viewer(sums, viewers)
            kept.append(_reduce(sums, mass, keys=keys, is_causal=False, viewers=viewers, size=size))
            ids.append(step.input_ids.cpu())
            masked.append(step.is_masked.cpu())
            lengths.append(keys[0])
            opened.append(block)
            at_marks.extend([_grown(mass, size)] * marks.count(step.step))  # of fewer than four steps one may be two marks
            bar.update()
            if heads:
                favourites, norms = (each[:, : len(prompts)] for each in (recorder.pop_argmax(), recorder.pop_value_norms()))
                parts.append(_reduce_heads(sums, mass, favourites[:, :, 0].transpose(0, 1).cpu(), keys=keys, size=size))
                value_norms.extend([_grown(norms.transpose(0, 1).cpu(), size)] * marks.count(step.step))

        texts = sample(on_step=on_step)
    return SinkTrace(
        name=model.name,
        prompt_tokens=prompts.shape[1],
        ids=torch.stack(ids, 1),
        is_masked=torch.stack(masked, 1) if model.noise.is_masked else commits.still_changing(torch.stack(ids, 1), texts.cpu()),
        keys=torch.tensor(lengths),
        mark_steps=marks,
        head_mass=torch.stack(at_marks, 1),
        texts=texts.cpu(),
        heads=HeadTrace(**_joined(parts, dim=1), value_norm=torch.stack(value_norms, 1)) if heads else None,
        attention=model.attention,
        blocks=blocks_of(model, texts.shape[1], origin=prompts.shape[1])[0].cpu() if model.goes_by_blocks else None,
        opened=torch.tensor(opened) if model.goes_by_blocks else None,
        **_joined(kept, dim=1),
    )


def _trace_prefixes(
    model: LanguageModel, texts: Int[Tensor, "prompt position"], *, prompt_tokens: int, steps: int, heads: bool
) -> SinkTrace:
    """Read the masses of every prefix from one pass a text."""
    lengths = prefix_lengths(prompt_tokens=prompt_tokens, positions=texts.shape[1], steps=steps)
    marks, kept, at_marks, parts, value_norms = mark_steps(steps), [], [], [], []
    for text in progress(texts, desc=model.name, unit="text"):  # all prefixes of all heads of one are up to 10^8 numbers
        recorder = masses.read_prefixes(model, text[None], lengths=lengths, keep=("argmax", "value_norm") if heads else ())
        by_step = recorder.pop()[:, 0].cpu().permute(2, 0, 1, 3)
        kept.append(_reduce(by_step, by_step, keys=lengths, is_causal=True))
        at_marks.append(by_step[list(marks)])
        if heads:
            favourites = recorder.pop_argmax()[:, 0].transpose(0, 1).cpu()
            parts.append(_reduce_heads(by_step, by_step, favourites, keys=lengths, size=by_step.shape[-1]))
            # a causal model's values do not change when the text grows
            value_norms.append(recorder.pop_value_norms()[:, 0].cpu().expand(len(marks), -1, -1, -1))
    ids = texts.cpu()[:, None].expand(-1, steps, -1)
    return SinkTrace(
        name=model.name,
        prompt_tokens=prompt_tokens,
        ids=ids,
        is_masked=torch.zeros(ids.shape, dtype=torch.bool),
        keys=torch.tensor(lengths),
        mark_steps=marks,
        head_mass=torch.stack(at_marks),
        texts=texts.cpu(),
        heads=HeadTrace(**_joined(parts, dim=0), value_norm=torch.stack(value_norms)) if heads else None,
        attention=model.attention,
        **_joined(kept, dim=0),
    )


def _grown(values: Tensor, size: int) -> Tensor:
    """Add keys that do not exist yet."""
    return torch.nn.functional.pad(values, (0, size - values.shape[-1]))


def _reduce(
    sums: Float[Tensor, "row layer head position"],
    mass: Float[Tensor, "row layer head position"],
    *,
    keys: Sequence[int],
    is_causal: bool,
    viewers: Tensor | None = None,
    size: int | None = None,
) -> dict[str, Tensor]:
    """Reduce column sums, and masses of mean 1, to what a trace keeps, by name; row r has `keys[r]` keys, and as many queries."""
    size, options = size or sums.shape[-1], {"is_causal": is_causal, "viewers": viewers}
    gu = torch.stack([sinks.gu_sink_rate(row, real_keys=n, **options) for row, n in zip(sums, keys, strict=True)])
    by_key = gu.mean(dim=(1, 2))
    counts = [sinks.rulli_count(row[..., :n]).mean() for row, n in zip(mass, keys, strict=True)]
    return {
        "mass": _grown(mass.mean(dim=(1, 2)), size),
        "layer_mass": _grown(mass.mean(dim=2), size),
        "gu_rate": by_key[:, 0],
        "gu_best": by_key.max(-1).values,
        "rulli": torch.stack(counts),
    }


def _reduce_heads(
    sums: Float[Tensor, "row layer head position"],
    mass: Float[Tensor, "row layer head position"],
    favourites: Bool[Tensor, "row layer position"],
    *,
    keys: Sequence[int],
    size: int,
) -> dict[str, Tensor]:
    """Mark the sinks of each head; row r has `keys[r]` keys, and as many queries."""

    def mark(rule: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a rule to the keys that exist."""
        return torch.stack([_grown(rule(row[..., :n]), size) for row, n in zip(mass, keys, strict=True)])

    scores = [sinks.first_token_score(row, queries=n).mean(-1) for row, n in zip(sums, keys, strict=True)]
    return {
        "rulli_sets": mark(sinks.sinks_leave_one_out),
        "sets": mark(sinks.sinks_mean_std),
        "favourites": _grown(favourites, size),
        "first_score": torch.stack(scores),
    }


def _joined(parts: list[dict[str, Tensor]], *, dim: int) -> dict[str, Tensor]:
    """Stack the entries of equal name to tensors `[prompt, step, ...]`."""
    return {name: torch.stack([part[name] for part in parts], dim) for name in parts[0]} if parts else {}
