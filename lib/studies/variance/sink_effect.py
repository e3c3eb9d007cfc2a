"""Does a sink matter? The loss when chosen keys are blocked, against the same number of other keys."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.attention import blocking, variance
from lib.attention import masses as attention
from lib.attention.blocking import KeyBlocker, unstable_keys
from lib.core.errors import InputError, require
from lib.core.runtime import generator
from lib.diffusion import likelihood
from lib.diffusion.noise import process_of
from lib.evaluation import sums
from lib.models.language_model import LanguageModel, may_be_noised

NOTHING = "nothing"


@dataclass(frozen=True)
class Effect:
    """What blocking did to one model.

    Attributes:
        model: its name.
        blocked: what was blocked.
        amount: how much: keys per head, or the threshold of the digest's rule; 0 for nothing.
        loss: negative log-likelihood (a bound for a diffusion model): of windows in nats per token, of answers in nats each.
        correct: right answers, for sums.
        keys_per_head: keys blocked, on average.
        removed_share: share of the attention that the blocked keys would have received, in [0, 1].
    """

    model: str
    blocked: str
    amount: float
    loss: Float[Tensor, "text"]
    correct: tuple[bool, ...]
    keys_per_head: float
    removed_share: float


def text_loss(model: LanguageModel, windows: Int[Tensor, "window position"], *, draws: int, seed: int) -> Float[Tensor, "window"]:
    """Return the NELBO, or the exact negative log-likelihood of an autoregressive model, in nats per token of each window."""
    if model.is_causal:
        return likelihood.next_token_nll(model, windows).per_window
    return likelihood.nelbo(model, windows, draws=draws, seed=seed).per_window


def _conditions(counts: Sequence[int]) -> list[tuple[str, int, blocking.Rule]]:
    """Return (what is blocked, how many, rule) of every condition."""
    return [(name, k, rule) for k in counts for name, rule in blocking.rules(k).items()]


def _copies(model: LanguageModel) -> int:
    """Return how many copies of a text a pass of the bound reads: noised blocks are read beside the clean ones before them."""
    return 2 if model.goes_by_blocks else 1


def window_effects(
    model: LanguageModel, windows: Int[Tensor, "window position"], *, counts: Sequence[int], draws: int, seed: int
) -> list[Effect]:
    """Measure the loss on held-out windows with keys blocked.

    Args:
        model: diffusion or autoregressive.
        windows: clean token windows.
        counts: numbers of keys to block in every head.
        draws: masks per window; all conditions see the same ones.
        seed: of the masks and of the random keys.

    Returns:
        The dense loss first, then every condition. Keys are chosen from the masses of the same pass: a window has no step before.

    Source: Rulli et al. (arXiv 2510.15731), who measure generated answers only.
    """
    effects = [Effect(model.name, NOTHING, 0, text_loss(model, windows, draws=draws, seed=seed), (), 0.0, 0.0)]
    for name, k, rule in _conditions(counts):
        blocker = KeyBlocker(rule, generator(seed, "blocked", name, k), copies=_copies(model))
        with attention.blocking(model, blocker):
            loss = text_loss(model, windows, draws=draws, seed=seed)
        effects.append(Effect(model.name, name, k, loss, (), blocker.keys_per_head, blocker.removed_share))
    return effects


def sum_effects(
    model: LanguageModel,
    rows: Sequence[dict[str, str]],
    *,
    counts: Sequence[int],
    draws: int,
    seed: int,
    kind: sums.Questions = sums.SUMS,
) -> list[Effect]:
    """Measure exact answers and the likelihood of the right answer on sums with keys blocked.

    Args:
        model: diffusion or autoregressive.
        rows: questions and answers.
        counts: numbers of keys to block in every head.
        draws: masks per answer, for a diffusion model.
        seed: of the masks and of the random keys.
        kind: of the questions.

    Returns:
        The dense model first, then every condition. Answers are generated with the keys chosen at the step before, as in Rulli et
        al.; an autoregressive model reads its whole text again at every step, so that all its queries are blocked alike.
    """
    effects = []
    for name, k, rule in [(NOTHING, 0, None), *_conditions(counts)]:
        steps = None if rule is None else KeyBlocker(rule, generator(seed, "blocked answers", name, k), step_before=True)
        scored = None if rule is None else KeyBlocker(rule, generator(seed, "blocked scores", name, k), copies=_copies(model))
        with nullcontext() if steps is None else attention.blocking(model, steps):
            reset = None if steps is None else steps.reset
            answers = sums.answer_sums(model, rows, kind=kind, use_cache=steps is None, on_batch=reset)
        with nullcontext() if scored is None else attention.blocking(model, scored):
            loss = sums.answer_loss(model, rows, draws=draws, seed=seed, kind=kind)
        correct = tuple(sums.is_correct(answers, rows))
        keys, removed = (steps.keys_per_head, steps.removed_share) if steps else (0.0, 0.0)
        effects.append(Effect(model.name, name, k, loss, correct, keys, removed))
    return effects


def window_frequency_variance(
    model: LanguageModel, window: Int[Tensor, "position"], *, top_k: int, steps: int, stream: torch.Generator
) -> Float[Tensor, "layer head position"]:
    """Return the frequency variance of each layer, head and position of one text.

    Args:
        model: diffusion (its steps are `steps` random masks at evenly spread mask counts, or as many tokens drawn anew from its
            own noise) or autoregressive (growing prefixes).
        window: a clean text.
        top_k: largest keys of a head that count as sinks.
        steps: number of masks or prefixes.
        stream: CPU generator of the masks.
    """
    if model.is_causal:
        lengths = torch.linspace(max(top_k, len(window) / steps), len(window), steps).long().unique().tolist()
        masses = attention.read_prefixes(model, window[None].to(model.device), lengths=lengths).pop()[:, 0]
    else:
        masks = likelihood.exact_count_masks(may_be_noised(model, window.cpu()), steps, generator=stream)
        ids = process_of(model).fill(window.expand(steps, -1), masks, generator=stream)
        masses = attention.sink_mass(model, ids.to(model.device)).transpose(1, 2)
    return variance.frequency_variance(variance.in_top_k(masses, k=top_k))


def digest_effects(
    model: LanguageModel,
    windows: Int[Tensor, "window position"],
    *,
    thresholds: Sequence[float],
    top_k: int,
    steps: int,
    draws: int,
    seed: int,
) -> list[Effect]:
    """Measure the loss when positions with a high frequency variance are blocked, by each reading of the digest's rule.

    Args:
        model: diffusion or autoregressive.
        windows: clean token windows.
        thresholds: on the frequency variance, in [0, 1).
        top_k: largest keys of a head that count as sinks.
        steps: masks, or prefixes, that the frequency is counted over.
        draws: masks per window of the loss.
        seed: of the masks.

    Returns:
        The dense loss first, then every reading and threshold.

    Raises:
        InputError: a threshold outside [0, 1), or a model whose attention goes by blocks.
    """
    rule = "positions of a text must be blocked where attention is not by blocks (their bound is read from two copies)"
    require(not model.goes_by_blocks, rule, f"{model.attention} with {model.name}", "block keys by their rank")
    if not all(0 <= threshold < 1 for threshold in thresholds):
        raise InputError(f"thresholds must be in [0, 1), got {list(thresholds)}: 1 would block nothing")
    variances = [
        window_frequency_variance(model, window, top_k=top_k, steps=steps, stream=generator(seed, "frequency", index))
        for index, window in enumerate(windows)
    ]
    nothing = [torch.zeros_like(values, dtype=torch.bool) for values in variances]
    effects = [_fixed_effect(model, windows, nothing, label=(NOTHING, 0.0), draws=draws, seed=seed)]
    for reading, only_sinks in blocking.READINGS.items():
        for threshold in thresholds:
            sets = [unstable_keys(values, threshold=threshold, only_sinks=only_sinks) for values in variances]
            effects.append(_fixed_effect(model, windows, sets, label=(reading, threshold), draws=draws, seed=seed))
    return effects


def _fixed_effect(
    model: LanguageModel,
    windows: Tensor,
    sets: Sequence[Bool[Tensor, "layer head position"]],
    *,
    label: tuple[str, float],
    draws: int,
    seed: int,
) -> Effect:
    """Measure the loss of each window with its own keys blocked; window i has the masks of seed + i under every label."""
    losses, removed = [], []

    def block(layer: int, mass: Tensor) -> Tensor | None:
        """Block the same keys whatever the masses are."""
        chosen = blocked[layer].expand(mass.shape)
        removed.append(((mass * chosen).sum((1, 2)) / mass.sum((1, 2))).cpu())
        return chosen if bool(blocked[layer].any()) else None

    for index, (window, blocked) in enumerate(zip(windows, sets, strict=True)):  # noqa: B007 (block reads it)
        with attention.blocking(model, block):
            losses.append(text_loss(model, window[None], draws=draws, seed=seed + index))
    keys = float(torch.stack(list(sets)).float().sum(-1).mean())
    return Effect(model.name, label[0], label[1], torch.cat(losses), (), keys, float(torch.cat(removed).mean()))
