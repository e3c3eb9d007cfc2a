"""Score and cut texts for evaluation: how requests are answered, how they are tokenised, and their likelihoods in batches."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import require
from lib.core.runtime import generator, progress
from lib.diffusion import likelihood, sampler
from lib.models.language_model import LanguageModel, may_be_noised, own_mask


@dataclass(frozen=True)
class EvaluationSettings:
    """How requests are answered; to be stored beside every number.

    Attributes:
        draws: Monte-Carlo masks per continuation of two tokens or more (one token needs one: it is exact); or noised copies.
        seed: of the masks, which depend on it and on the texts alone.
        batch_size: rows of a forward pass (draws of any requests of one length); does not change results.
        cfg_scale: classifier-free guidance as in LLaDA, 0 = off.
        gen_length: most tokens to generate; a request may ask for fewer.
        steps: denoising steps of `gen_length` tokens; fewer tokens take proportionally fewer.
        block_length: tokens of a semi-autoregressive block.
        max_length: longest text in tokens, where less than the network takes is wanted.
    """

    draws: int = 32
    seed: int = 0
    batch_size: int = 32
    cfg_scale: float = 0.0
    gen_length: int = 64
    steps: int = 64
    block_length: int = 64
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("draws", "batch_size", "gen_length", "steps", "block_length"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", str(getattr(self, name)), "raise it")
        require(self.cfg_scale >= 0, "cfg_scale must not be negative", str(self.cfg_scale), "use 0 for no guidance")
        blocks, rest = divmod(self.gen_length, self.block_length)
        got = f"{self.block_length} and {self.gen_length}"
        require(rest == 0, "block_length must divide gen_length", got, "choose a divisor")
        require(self.steps % blocks == 0, f"steps must be a multiple of the {blocks} blocks", str(self.steps), "change steps")


@dataclass(frozen=True)
class Passage:
    """Token ids of which those from `start` on are to be scored, and the name of their stream of masks."""

    ids: tuple[int, ...]
    start: int
    stream: tuple[str | int, ...]


@dataclass(frozen=True)
class Row:
    """One row of a forward pass: which passage it scores, where, and what its log-probability counts."""

    index: int
    ids: Int[Tensor, "position"]
    where: Bool[Tensor, "position"]
    start: int
    weight: float


def score(model: LanguageModel, passages: Sequence[Passage], *, settings: EvaluationSettings) -> list[tuple[float, bool]]:
    """Score the ends of passages, rows of equal length together.

    With k of its n tokens masked, n / k times their log-probability is an unbiased estimate of a lower bound; its mean over
    `settings.draws` masks is returned. Under other noise than masks, the end is noised behind its clean context, see
    `likelihood.masked_log_likelihood`. Neither the order of the passages nor the batch size changes a result.

    Returns:
        (nats, whether an autoregressive model's greedy decoding gives these tokens; False for a diffusion model).

    Source: LLaDA (arXiv 2502.09992), Eq. 6, and its `get_log_likelihood`; counts stratified as in `diffusion.exact_counts`.
    """
    totals, is_greedy = [0.0] * len(passages), [model.is_causal] * len(passages)
    bar = progress(total=len(passages), desc="likelihoods", unit="text")
    for indices in grouped([len(passage.ids) for passage in passages]):
        if not (model.is_causal or model.noise.is_masked):
            for index in indices:
                totals[index] = _noised_likelihood(model, passages[index], settings)
            bar.update(len(indices))
            continue
        rows = itertools.chain.from_iterable(_rows(model, index, passages[index], settings) for index in indices)
        for part in batched(rows, settings.batch_size):
            values, are_best = log_likelihoods(model, part, cfg_scale=settings.cfg_scale)
            for row, value, is_best in zip(part, values.tolist(), are_best.tolist(), strict=True):
                totals[row.index] += row.weight * value
                is_greedy[row.index] &= is_best
        bar.update(len(indices))
    bar.close()
    return list(zip(totals, is_greedy, strict=True))


def _noised_likelihood(model: LanguageModel, passage: Passage, settings: EvaluationSettings) -> float:
    """Return the bound of one passage under other noise than masks, one token's too: what is seen of it may be another one."""
    sampler.check_noise(model, cfg_scale=settings.cfg_scale)
    ids, stream = torch.tensor(passage.ids), generator(settings.seed, *passage.stream)
    options = {"draws": settings.draws, "generator": stream, "batch_size": settings.batch_size}
    return float(likelihood.masked_log_likelihood(model, ids, torch.arange(len(ids)) >= passage.start, **options).mean())


def _rows(model: LanguageModel, index: int, passage: Passage, settings: EvaluationSettings) -> Iterator[Row]:
    """Yield the rows that score one passage: one per draw (and block), or the only one of an autoregressive model.

    What a diffusion model was always shown is given, not scored.
    """
    ids = torch.tensor(passage.ids)
    target = torch.arange(len(ids)) >= passage.start
    if model.is_causal:
        yield Row(index, ids, target, passage.start, 1.0)
        return
    stream, target = generator(settings.seed, *passage.stream), target & may_be_noised(model, ids)
    for part in likelihood.parts(model, target) if bool(target.any()) else []:
        count = int(part.sum())
        draws = 1 if count == 1 else settings.draws
        for mask in likelihood.exact_count_masks(part, draws, generator=stream):
            yield Row(index, ids, mask, passage.start, count / int(mask.sum()) / draws)


@torch.inference_mode()
def log_likelihoods(
    model: LanguageModel, rows: Sequence[Row], *, cfg_scale: float
) -> tuple[Float[Tensor, "row"], Bool[Tensor, "row"]]:
    """Return each row's summed log-probability, and whether all its tokens are the likeliest ones.

    Rows that read the same go through the network once: with all of an answer masked, as A, B, C and D always are, the choices of
    a question differ in what is read off only.
    """
    ids = torch.stack([row.ids for row in rows]).to(model.device)
    where = torch.stack([row.where for row in rows]).to(model.device)
    starts = torch.tensor([row.start for row in rows], device=model.device)
    prompt = torch.arange(ids.shape[1], device=model.device) < starts[:, None]
    read = ids if model.mask_token_id is None else ids.masked_fill(where, model.mask_token_id)
    distinct, origin = torch.unique(torch.cat([read, where.long(), prompt.long()], dim=1), dim=0, return_inverse=True)
    read, asked, context = distinct.chunk(3, dim=1)
    mask = own_mask(model, read, origin=context.sum(1)) if model.goes_by_blocks else None
    logits = sampler.guided_logits(model, read, asked.bool(), context.bool(), cfg_scale=cfg_scale, attention_mask=mask)
    slots = torch.zeros_like(asked).masked_scatter(asked.bool(), torch.arange(len(logits), device=model.device))
    picked, tokens, owner = slots[origin][where], ids[where], where.nonzero()[:, 0].cpu()
    values = (logits[picked, tokens] - logits.logsumexp(-1)[picked]).double().cpu()
    misses = (logits.argmax(-1)[picked] != tokens).double().cpu()
    empty = torch.zeros(len(rows), dtype=torch.float64)
    return empty.index_add(0, owner, values), empty.index_add(0, owner, misses) == 0


def grouped(keys: Sequence[Any]) -> list[list[int]]:
    """Group indices by key, smallest key first."""
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [groups[key] for key in sorted(groups)]


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Cut a stream into lists of `size`."""
    stream = iter(items)
    while part := list(itertools.islice(stream, size)):
        yield part
