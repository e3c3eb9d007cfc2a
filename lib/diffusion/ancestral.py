"""Sampling backwards through any noise: a step at a time from the mixing to clean tokens."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.core.runtime import generator as stream_of
from lib.diffusion import commits
from lib.diffusion.commits import DenoisingStep, Remasking
from lib.diffusion.noise import Noise, process_of
from lib.models.language_model import LanguageModel, check_length, logits_at

Greedy = Literal["never", "last", "always", "confident"]
Denoiser = Callable[[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]], Float[Tensor, "selected state"]]
Streams = torch.Generator | Sequence[torch.Generator]


@torch.no_grad()
def sample_back(
    denoiser: Denoiser,
    noise: Noise,
    input_ids: Int[Tensor, "batch position"],
    where: Bool[Tensor, "batch position"],
    *,
    steps: int,
    generator: Streams,
    greedy: Greedy = "last",
) -> Int[Tensor, "batch position"]:
    """Fill positions with tokens by `steps` equal steps of the reverse process, from the mixing at t = 1.

    Args:
        denoiser: gives x_theta, probabilities of the clean token at the chosen positions of noised ids.
        noise: the noise that the denoiser was trained with.
        input_ids: token ids; those outside `where` are kept.
        where: positions to fill.
        steps: number of steps; the error of independent draws falls as 1 / steps.
        generator: CPU generator, or one a row, whose text then does not depend on the other rows.
        greedy: `"never"` draws every step (ancestral sampling); `"last"` takes the most probable clean token in the last step
            (Duo's greedy tail); `"always"` takes the most probable state in every step; `"confident"` takes the most probable
            clean token everywhere, keeps the surest of them, as many more in every step, and draws the others anew.

    Returns:
        The ids with the positions filled.

    Raises:
        InputError: fewer than one step, or probabilities that are no finite numbers.

    Source: `Noise.reverse`. `"confident"` is LLaDA's low-confidence remasking under any noise: under masked noise the same text.
    """
    require(steps >= 1, "steps must be at least 1", f"{steps}", "use 8 or more")
    ids = _noised(noise, input_ids, where, generator)
    for _, _, after in _steps_back(denoiser, noise, ids, where, steps=steps, generator=generator, greedy=greedy):
        ids = after
    return ids


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Int[Tensor, "batch prompt"],
    *,
    new_tokens: int,
    steps: int,
    block_length: int | None = None,
    temperature: float = 0.0,
    remasking: Remasking = "low_confidence",
    greedy: Greedy | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[DenoisingStep], None] | None = None,
) -> Int[Tensor, "batch position"]:
    """Write behind prompts by going back through a model's own noise.

    Args:
        model: a diffusion model of any noise.
        prompt: prompts of equal length; they stay clean.
        new_tokens: tokens to generate.
        steps: forward passes in all, split evenly over the blocks.
        block_length: tokens of a block, which are finished before the next ones leave t = 1; None is one block.
        temperature: 0 takes the most probable clean token. Above, the surest tokens are drawn from their posterior raised to
            1 / temperature; in ancestral steps x_theta is.
        remasking: `"low_confidence"` keeps the surest tokens (`greedy="confident"`), `"random"` takes ancestral steps: under
            masked noise both are what `sampler.sample` calls so, the latter but for how many tokens a step fills in.
        greedy: as in `sample_back`, instead of what `remasking` says.
        generator: CPU generator of the sampling stream, needed but for the surest tokens at temperature 0: there None gives each
            row noise of its own, which depends on its prompt alone, so that neither batch nor order changes a text.
        on_step: called after the forward pass of every step; committed positions are those whose token changes in it. Masked
            ones are mask tokens; where the surest tokens are kept, all those whose token is noise.

    Returns:
        Prompt and generated tokens.

    Raises:
        InputError: an autoregressive model, lengths that do not divide, or missing randomness.

    Source: UDLM, Duo and XDLM sample ancestrally, with `greedy="never"` or `"last"`.
    """
    block, noise = block_length or new_tokens, process_of(model)
    commits.check_steps(new_tokens=new_tokens, steps=steps, block=block)
    kind: Greedy = greedy or ("confident" if remasking == "low_confidence" else "never")
    commits.check_generator(generator, needed=temperature > 0 or kind != "confident")
    start, blocks = prompt.shape[1], new_tokens // block
    check_length(model, start + new_tokens)
    streams = generator or [stream_of(0, "noise of a text", *row) for row in prompt.tolist()]
    ids = F.pad(prompt.to(model.device, torch.long), (0, new_tokens))
    column = torch.arange(ids.shape[1], device=model.device)
    places = [(column >= first).expand(ids.shape) & (column < first + block) for first in range(start, len(column), block)]
    ids = _noised(noise, ids, (column >= start).expand(ids.shape), streams)
    options: dict[str, Any] = {"generator": streams, "greedy": kind, "temperature": temperature}
    for step, after in _written(model, noise, ids, places, steps=steps // blocks, **options):
        if on_step is not None:
            on_step(step)
        ids = after
    return ids


def _written(
    model: LanguageModel,
    noise: Noise,
    ids: Tensor,
    places: Sequence[Tensor],
    *,
    steps: int,
    generator: Streams,
    greedy: Greedy,
    temperature: float,
) -> Iterator[tuple[DenoisingStep, Tensor]]:
    """Yield each step and the ids after it, block after block."""
    mask_id = -1 if model.mask_token_id is None else model.mask_token_id  # no id is negative

    def denoiser(noised: Tensor, where: Tensor) -> Tensor:
        """Return x_theta of the model."""
        probs = noise.clean_log_probs(logits_at(model, noised, where)).double().exp()
        return probs if greedy == "confident" else _sharpened(probs, temperature)

    for number, where in enumerate(places):
        later = torch.stack([torch.zeros_like(where), *places[number + 1 :]]).any(0)
        options: dict[str, Any] = {"generator": generator, "greedy": greedy, "temperature": temperature}
        for step, noisy, after in _steps_back(denoiser, noise, ids, where, steps=steps, **options):
            masked = noisy | later if greedy == "confident" else ids == mask_id
            level = (len(places) - number - step / steps) / len(places)
            yield DenoisingStep(number * steps + step, ids.clone(), masked, after != ids, level), after
            ids = after


def _steps_back(
    denoiser: Denoiser,
    noise: Noise,
    ids: Tensor,
    where: Tensor,
    *,
    steps: int,
    generator: Streams,
    greedy: Greedy,
    temperature: float = 0.0,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each step's index, which positions it read as noise, and the ids after it."""
    kept = commits.commit_schedule(where.sum(1), steps=steps).cumsum(1)
    noisy = where
    for step in range(steps):
        t, s = (steps - step) / steps, (steps - step - 1) / steps
        probs = denoiser(ids, where).double()
        got = "others" if bool(probs.isinf().any()) else "NaN"
        rule, remedy = "probabilities of a denoiser must be finite", "check its weights and dtype"
        require(math.isfinite(float(probs.sum())), rule, got, remedy)
        if greedy == "confident":
            posterior = noise.full_posterior(probs, ids[where], t=t)
            chosen = _drawn(_sharpened(posterior, temperature), ids, where, generator)
            left = _least_sure(posterior, chosen, where, kept=kept[:, step])
            after = _noised(noise, chosen, left, generator)
        else:
            back, left = noise.reverse(probs, ids[where], t=t, s=s), where
            is_best = greedy == "always" or (greedy == "last" and step == steps - 1)
            after = _drawn(_sharpened(back, 0.0) if is_best else back, ids, where, generator)
        yield step, noisy, after
        ids, noisy = after, left


def _sharpened(probs: Float[Tensor, "selected state"], temperature: float) -> Float[Tensor, "selected state"]:
    """Raise probabilities to 1 / temperature; at 0 the most probable one is all that is left."""
    if temperature == 0:
        return F.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs.dtype)
    return probs if temperature == 1 else (probs.log() / temperature).softmax(-1)


def _least_sure(posterior: Tensor, chosen: Tensor, where: Tensor, *, kept: Tensor) -> Bool[Tensor, "batch position"]:
    """Mark the positions that are not among the `kept` whose chosen token is most probable."""
    probability = posterior.gather(1, chosen[where][:, None])[:, 0]
    confidence = torch.full(where.shape, float("-inf"), dtype=torch.float64, device=where.device)
    return where & ~commits.most_confident(confidence.masked_scatter(where, probability), kept)


def _drawn(probs: Float[Tensor, "selected state"], ids: Tensor, where: Tensor, generator: Streams) -> Tensor:
    """Draw a token at each chosen position, row by row where each has its own generator; nothing where all are certain."""

    def draw(part: Tensor, stream: torch.Generator) -> Tensor:
        """Draw from each distribution."""
        best, tokens = part.max(-1)
        is_certain = bool((best == 1.0).all())
        return tokens if is_certain else torch.multinomial(part.cpu(), 1, generator=stream)[:, 0].to(part.device)

    if not len(probs):
        return ids
    if isinstance(generator, torch.Generator):
        return ids.masked_scatter(where, draw(probs, generator))
    rows = zip(probs.split(where.sum(1).tolist()), generator, strict=True)
    return ids.masked_scatter(where, torch.cat([draw(part, stream) for part, stream in rows if len(part)]))


def _noised(noise: Noise, ids: Tensor, where: Tensor, generator: Streams) -> Tensor:
    """Draw the chosen positions anew from the mixing, row by row where each has its own generator."""
    if isinstance(generator, torch.Generator):
        return noise.fill(ids, where, generator=generator)
    rows = zip(ids, where, generator, strict=True)
    return torch.stack([noise.fill(row, places, generator=stream) for row, places, stream in rows])
