"""Generate text: the masked diffusion samplers of LLaDA with a callback per denoising step, and greedy autoregression."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.diffusion import ancestral, block_sampler, commits
from lib.diffusion.block_rules import in_steps
from lib.diffusion.commits import DenoisingStep, Remasking
from lib.models.finite import require_finite
from lib.models.language_model import LanguageModel, check_length, closing_token, logits_at, may_be_noised, require_masks


@torch.inference_mode()
def sample(
    model: LanguageModel,
    prompt: Int[Tensor, "batch prompt"],
    *,
    new_tokens: int,
    steps: int,
    block_length: int | None = None,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: Remasking = "low_confidence",
    closed: bool = False,
    generator: torch.Generator | None = None,
    on_step: Callable[[DenoisingStep], None] | None = None,
) -> Int[Tensor, "batch position"]:
    """Denoise from all-masked to text, or from the noise that the model was trained with.

    Args:
        model: a diffusion model.
        prompt: prompts of equal length.
        new_tokens: tokens to generate.
        steps: forward passes in all, split evenly over the blocks.
        block_length: tokens of a semi-autoregressive block; None is one block, or the blocks of a model that has them.
        temperature: 0 is greedy.
        cfg_scale: classifier-free guidance: logits become u + (1 + scale)(c - u), u with the prompt masked.
        remasking: keep the most confident predictions, or random ones.
        closed: let the last new token be the model's `closing_token` from the start, if it has one: a row as it was trained on.
        generator: CPU generator of the sampling stream; needed for random remasking or a temperature.
        on_step: called after the forward pass of every step.

    Returns:
        Prompt and generated tokens.

    Raises:
        InputError: an autoregressive model, lengths that do not divide, missing randomness, or guidance under other noise.

    Source: ML-GSAI/LLaDA, generate.py; block_sampler.py, its text read anew at each step, for attention by blocks;
        ancestral.py for uniform and mixed noise.
    """
    if model.goes_by_blocks:
        check_blocks(model, block_length=block_length, cfg_scale=cfg_scale)
        own = {"rule": in_steps(model, remasking), "steps": steps, "temperature": temperature, "generator": generator}
        return block_sampler.generate(model, prompt, new_tokens=new_tokens, use_cache=False, on_step=on_step, **own).ids
    given: dict[str, Any] = {"new_tokens": new_tokens, "steps": steps, "block_length": block_length, "temperature": temperature}
    given |= {"remasking": remasking, "generator": generator, "on_step": on_step}
    if not model.noise.is_masked:
        check_noise(model, cfg_scale=cfg_scale)
        return ancestral.generate(model, prompt, **given)
    return _filled_in(model, prompt, cfg_scale=cfg_scale, last=closing_token(model) if closed else None, **given)


def _filled_in(
    model: LanguageModel,
    prompt: Tensor,
    *,
    new_tokens: int,
    steps: int,
    block_length: int | None,
    temperature: float,
    cfg_scale: float,
    last: int | None,
    remasking: Remasking,
    generator: torch.Generator | None,
    on_step: Callable[[DenoisingStep], None] | None,
) -> Tensor:
    """Turn masks into tokens, as many in every step."""
    block = block_length or new_tokens
    check_sampling(model, new_tokens=new_tokens, steps=steps, block=block)
    commits.check_generator(generator, needed=temperature > 0 or remasking == "random")
    start, mask_id = prompt.shape[1], cast(int, model.mask_token_id)
    ids = F.pad(prompt.to(model.device, torch.long), (0, new_tokens), value=mask_id)
    prompt_positions, per_block = ids != mask_id, steps // (new_tokens // block)
    if last is not None:
        ids[:, -1] = last
    for step in range(steps):
        first = start + step // per_block * block
        masked, where = ids == mask_id, ids == mask_id
        where[:, :first], where[:, first + block :] = False, False
        if step % per_block == 0:
            counts = commits.commit_schedule(where.sum(1), steps=per_block)
        logits = guided_logits(model, ids, where, prompt_positions, cfg_scale=cfg_scale)
        logits = written_alone(model, logits)
        chosen = commits.choose_tokens(logits, temperature=temperature, generator=generator)
        confidence = torch.full(ids.shape, float("-inf"), dtype=torch.float64, device=ids.device)
        confidence[where] = commits.keeping_order(logits, chosen, remasking=remasking, generator=generator)
        committed = commits.most_confident(confidence, counts[:, step % per_block])
        if on_step is not None:
            on_step(DenoisingStep(step, ids.clone(), masked, committed.clone(), float(masked[:, start:].float().mean())))
        ids = torch.where(committed, ids.masked_scatter(where, chosen), ids)
    return ids


def written_alone(model: LanguageModel, logits: Float[Tensor, "selected vocab"]) -> Float[Tensor, "selected vocab"]:
    """Leave no probability to what is never written, where a model was always shown some tokens.

    A hidden token is none of these, and an encoder would also write its mask. The numbers stay finite, for entropies.

    Args:
        model: a diffusion model.
        logits: of its own; changed in place.
    """
    if model.seen_token_ids:
        logits[:, [*model.seen_token_ids, cast(int, model.mask_token_id)]] = torch.finfo(logits.dtype).min
    return logits


def guided_logits(
    model: LanguageModel,
    ids: Int[Tensor, "batch position"],
    where: Bool[Tensor, "batch position"],
    prompt_positions: Bool[Tensor, "batch position"],
    *,
    cfg_scale: float,
    attention_mask: Int[Tensor, "batch position"] | Bool[Tensor, "_ 1 position position"] | None = None,
) -> Float[Tensor, "selected vocab"]:
    """Return logits at the positions `where`, steered away from what the network predicts with the prompt masked.

    Args:
        model: a diffusion model when there is guidance.
        ids: what the network reads, masks included.
        where: positions whose token is to be predicted.
        prompt_positions: what guidance masks, but for tokens that the model was always shown.
        cfg_scale: as in `sample`; 0 is none, and one pass instead of two.
        attention_mask: as `logits_at` takes it.

    Raises:
        InputError: guidance of a model whose attention goes by blocks.
    """
    check_blocks(model, cfg_scale=cfg_scale)
    if cfg_scale <= 0:
        return logits_at(model, ids, where, attention_mask=attention_mask)
    unguided = ids.masked_fill(prompt_positions & may_be_noised(model, ids), cast(int, model.mask_token_id))
    mask = None if attention_mask is None else attention_mask.repeat(2, 1)
    both = logits_at(model, torch.cat([ids, unguided]), torch.cat([where, where]), attention_mask=mask)
    conditional, unconditional = both.chunk(2)
    return unconditional + (cfg_scale + 1.0) * (conditional - unconditional)


def check_blocks(model: LanguageModel, *, block_length: int | None = None, cfg_scale: float = 0.0) -> None:
    """Refuse other blocks than a model's own, and guidance, where attention goes by blocks.

    Raises:
        InputError: see above.
    """
    if model.goes_by_blocks:
        rule, remedy = f"block_length must be that of {model.name}, {model.block_length}", "leave it out"
        require(block_length in (None, model.block_length), rule, str(block_length), remedy)
        require(cfg_scale <= 0, "guidance must go with attention that is not by blocks", str(cfg_scale), "use cfg_scale=0")


def check_noise(model: LanguageModel, *, cfg_scale: float = 0.0) -> None:
    """Refuse guidance under other noise than masks.

    Raises:
        InputError: see above.
    """
    if not model.noise.is_masked:
        got = f"{cfg_scale:g} with {model.noise} noise in {model.name}"
        require(cfg_scale <= 0, "guidance must go with masked noise (it masks the prompt)", got, "use cfg_scale=0")


def check_masks(model: LanguageModel) -> None:
    """Refuse what is not written by filling masks in: nothing of it is finished before the last step.

    Raises:
        InputError: an autoregressive model, or noise that is not all mask.
    """
    remedy = "use sampler.sample, in which any token may change until the last step"
    require_masks(model, "sampling by denoising", instead="use continue_text", remedy=remedy)


def check_sampling(model: LanguageModel, *, new_tokens: int, steps: int, block: int) -> None:
    """Refuse what `sample` cannot do, before any work.

    Raises:
        InputError: an autoregressive model, noise that is not all mask, or lengths that do not divide.
    """
    check_masks(model)
    commits.check_steps(new_tokens=new_tokens, steps=steps, block=block)


@torch.inference_mode()
def continue_text(
    model: LanguageModel,
    prompt: Int[Tensor, "batch prompt"],
    *,
    new_tokens: int,
    temperature: float = 0.0,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch position"]:
    """Continue prompts of equal length token by token with an autoregressive model.

    Args:
        model: an autoregressive model.
        prompt: prompts of equal length.
        new_tokens: tokens to generate; generation does not stop at an end token, so that lengths stay equal.
        temperature: 0 is greedy.
        use_cache: False reads the whole text again for every token, as blocking keys needs.
        generator: CPU generator of the sampling stream; needed for a temperature above 0.

    Returns:
        Prompt and continuation.

    Raises:
        InputError: a diffusion model, missing randomness, or a logit that is no finite number.
    """
    if not model.is_causal:
        raise InputError(f"token-by-token generation must use a causal model, got {model.name}: use sample")
    commits.check_generator(generator, needed=temperature > 0)
    ids, past = prompt.to(model.device), None
    check_length(model, ids.shape[1] + new_tokens - 1)  # the last token is not read again
    for _ in range(new_tokens):
        step_input = ids if past is None else ids[:, -1:]
        output = model.network(input_ids=step_input, past_key_values=past, use_cache=use_cache, logits_to_keep=1)
        past = output.past_key_values if use_cache else None
        logits = output.logits[:, -1].float()
        whole = partial(model.network, input_ids=ids, use_cache=False, logits_to_keep=1)
        require_finite(logits, whole, network=model.network, name=model.name)
        if temperature > 0:
            logits = logits / temperature
        chosen = commits.choose_tokens(logits, temperature=float(temperature > 0), generator=generator)
        ids = torch.cat([ids, chosen[:, None]], dim=1)
    return ids
