"""Attention sinks from attention masses: positions, scores, concentration. Tensors in, tensors out.

Masses have mean 1 over keys (see `mean_one`), so that a threshold means the same for every model: the rule
"leave-one-out mean + 3" on a mass summed over 1024 heads would mark almost every position above the average.
"""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lib.core.errors import InputError

RULLI_EPSILON = 3.0  # Rulli et al. (arXiv 2510.15731), on column sums
GU_EPSILON = 0.3  # Gu et al. (arXiv 2410.10781)
RELEASE_STD = 2.0  # the authors' release: mean + 2 population standard deviations
RELEASE_ALPHA = 5.0


def mean_one(mass: Float[Tensor, "*batch key"], real: Bool[Tensor, "*batch key"] | None = None) -> Float[Tensor, "*batch key"]:
    """Scale masses so that their mean over the (real) keys is 1; padding gets 0.

    Args:
        mass: attention received, in any unit.
        real: False for padding.

    Raises:
        InputError: a row has no mass at all.

    >>> mean_one(torch.tensor([1.0, 3.0])).tolist()
    [0.5, 1.5]
    """
    real = torch.ones_like(mass, dtype=torch.bool) if real is None else real.expand(mass.shape)
    kept = torch.where(real, mass, 0.0)
    total = kept.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise InputError("every row of masses must have a positive sum, got one without: record it with a forward pass first")
    return kept * real.sum(-1, keepdim=True) / total


def per_viewer(mass: Float[Tensor, "*batch key"], viewers: Int[Tensor, "*shared key"]) -> Float[Tensor, "*batch key"]:
    """Return the attention that a key receives from a query that may see it, scaled to mean 1 over the keys that are seen.

    Args:
        mass: attention received, summed over queries.
        viewers: how many queries may see each key; broadcast.

    >>> per_viewer(torch.tensor([3.0, 1.0]), torch.tensor([3, 1])).tolist()
    [1.0, 1.0]
    """
    is_seen = (viewers > 0).expand(mass.shape)
    return mean_one(mass / viewers.clamp(min=1), is_seen)


def aggregate(mass: Float[Tensor, "layer batch head key"]) -> Float[Tensor, "batch key"]:
    """Average masses over layers and heads (mean 1 stays mean 1).

    Source: m(i) of the paper, which sums where this averages.
    """
    return mass.mean(dim=(0, 2))


def leave_one_out_threshold(mass: Float[Tensor, "*batch key"], *, epsilon: float = RULLI_EPSILON) -> Float[Tensor, "*batch key"]:
    """Return, for each key, the mean of all *other* keys plus epsilon.

    Args:
        mass: attention received.
        epsilon: margin in the unit of the mass.

    Source: Rulli et al., sink condition; paper Eq. 9 as its pipeline figure shows it.

    >>> leave_one_out_threshold(torch.tensor([5.0, 18.0, 9.0, 22.0, 7.0])).tolist()
    [17.0, 13.75, 16.0, 12.75, 16.5]
    """
    keys = mass.shape[-1]
    if keys < 2:
        raise InputError(f"a leave-one-out mean must have at least 2 keys, got {keys}: use longer sequences")
    return (mass.sum(-1, keepdim=True) - mass) / (keys - 1) + epsilon


def mean_std_threshold(mass: Float[Tensor, "*batch key"], *, num_std: float = RELEASE_STD) -> Float[Tensor, "*batch 1"]:
    """Return mean + `num_std` population standard deviations over the keys.

    Source: the authors' release. At most 1 / (1 + num_std^2) of the keys can lie above (Cantelli); none of five.
    """
    return mass.mean(-1, keepdim=True) + num_std * mass.std(-1, keepdim=True, correction=0)


def sinks_leave_one_out(mass: Float[Tensor, "*batch key"], *, epsilon: float = RULLI_EPSILON) -> Bool[Tensor, "*batch key"]:
    """Mark the keys above the leave-one-out mean plus epsilon.

    >>> sinks_leave_one_out(torch.tensor([5.0, 18.0, 9.0, 22.0, 7.0])).tolist()
    [False, True, False, True, False]
    """
    return mass > leave_one_out_threshold(mass, epsilon=epsilon)


def sinks_mean_std(mass: Float[Tensor, "*batch key"], *, num_std: float = RELEASE_STD) -> Bool[Tensor, "*batch key"]:
    """Mark the keys above mean + `num_std` standard deviations (the released rule)."""
    return mass > mean_std_threshold(mass, num_std=num_std)


def top_k_positions(mass: Float[Tensor, "*batch key"], *, k: int) -> Int[Tensor, "*batch k"]:
    """Return the k positions with the largest mass, largest first; of equal masses the earlier position.

    Raises:
        InputError: k is not in [1, number of keys].
    """
    if not 1 <= k <= mass.shape[-1]:
        raise InputError(f"k must be in [1, {mass.shape[-1]}] (the number of keys), got {k}: lower it")
    return mass.argsort(dim=-1, descending=True, stable=True)[..., :k]


def soft_score(
    mass: Float[Tensor, "*batch key"], threshold: Float[Tensor, "*batch key_or_one"], *, alpha: float = RELEASE_ALPHA
) -> Float[Tensor, "*batch key"]:
    """Return sigmoid(alpha (mass - threshold)), a sink score in [0, 1].

    Source: the authors' release, alpha = 5 on masses summed over heads and layers, where it is in effect a hard step.
    """
    return torch.sigmoid(alpha * (mass - threshold))


def token_weight(score: Float[Tensor, "*batch key"]) -> Float[Tensor, "*batch key"]:
    """Return omega = 1 - score, the weight of a token in the pruning statistics (paper Eq. 12)."""
    return 1.0 - score


def top_k_share(mass: Float[Tensor, "*batch key"], *, k: int) -> Float[Tensor, "*batch"]:
    """Return the share of all mass that the k largest keys receive, in [k / keys, 1].

    >>> float(top_k_share(torch.tensor([6.0, 2.0, 0.0, 0.0]), k=1))
    0.75
    """
    return mass.gather(-1, top_k_positions(mass, k=k)).sum(-1) / mass.sum(-1)


def rulli_count(mass: Float[Tensor, "*batch key"], *, epsilon: float = RULLI_EPSILON) -> Float[Tensor, "*batch"]:
    """Count the sinks of each layer and head by Rulli's rule on column sums."""
    return sinks_leave_one_out(mass, epsilon=epsilon).sum(-1).float()


def gu_sink_rate(
    column_sums: Float[Tensor, "*batch key"],
    *,
    is_causal: bool,
    epsilon: float = GU_EPSILON,
    real_keys: int | None = None,
    viewers: Int[Tensor, "key"] | None = None,
) -> Float[Tensor, "*batch key"]:
    """Return 1 where a key's mean received attention exceeds epsilon; average over layers and heads for the sink rate.

    Args:
        column_sums: attention summed over queries (not rescaled), last dimension keys.
        is_causal: key k is then seen by `real_keys` - k queries, else by all of them.
        epsilon: threshold on the mean attention, in [0, 1].
        real_keys: length of the sequence when the tensor is longer.
        viewers: how many queries may see each key, where that is neither.

    Returns:
        Indicator per key. Gu's Sink_k is its mean over layers and heads at key k (k = 0 for the first token).

    Source: Gu et al. (arXiv 2410.10781), importance score and sink metric; the bidirectional form divides by all queries.
    """
    keys = column_sums.shape[-1] if real_keys is None else real_keys
    positions = torch.arange(column_sums.shape[-1], device=column_sums.device)
    seen_by = (keys - positions).clamp(min=1) if is_causal else torch.full_like(positions, keys)
    seen_by = seen_by if viewers is None else viewers.to(seen_by.device).clamp(min=1)
    return ((column_sums / seen_by > epsilon) & (positions < keys)).float()


def first_token_score(column_sums: Float[Tensor, "*batch key"], *, queries: int) -> Float[Tensor, "*batch"]:
    """Return the mean attention that the first token receives, in [0, 1].

    Args:
        column_sums: attention summed over queries (not rescaled).
        queries: how many queries were summed.

    Source: BOS sink score of a head, (1/T) sum_t alpha_{t, 0} (arXiv 2601.06787); a layer's is the mean over its heads.

    >>> float(first_token_score(torch.tensor([3.0, 1.0]), queries=4))
    0.75
    """
    return column_sums[..., 0] / queries


def value_norm_ratio(norms: Float[Tensor, "*batch key"], marked: Bool[Tensor, "*batch key"]) -> Float[Tensor, "*batch"]:
    """Return the mean norm of the value vectors of sinks over that of the other keys: below 1 when sinks carry little.

    Args:
        norms: norm of each key's value vector in one head.
        marked: that head's sinks.

    Returns:
        A ratio; NaN where there are no sinks, or nothing else; infinite where only sinks carry values.

    Source: value norms of sinks as in One Token Is Enough (arXiv 2601.19657), which averages them over heads.

    >>> float(value_norm_ratio(torch.tensor([1.0, 4.0, 4.0]), torch.tensor([True, False, False])))
    0.25
    """
    inside = torch.where(marked, norms, 0.0).sum(-1) / marked.sum(-1)
    outside = torch.where(marked, 0.0, norms).sum(-1) / (~marked).sum(-1)
    return inside / outside


def dominant_position(mass: Float[Tensor, "*batch key"]) -> Int[Tensor, "*batch"]:
    """Return the position with the largest mass (the earliest of equals)."""
    return top_k_positions(mass, k=1)[..., 0]


def wander_rate(positions: Int[Tensor, "*batch step"], *, groups: Int[Tensor, "step"] | None = None) -> Float[Tensor, "*batch"]:
    """Return the share of steps at which the dominant sink is not at its most frequent position: 0 = it never moves.

    Args:
        positions: dominant position at each step.
        groups: number of each step's group; a step is then compared with those of its own group only.

    >>> float(wander_rate(torch.tensor([0, 0, 0, 7])))
    0.25
    >>> float(wander_rate(torch.tensor([0, 0, 0, 7]), groups=torch.tensor([0, 0, 0, 1])))
    0.0
    """
    same = positions[..., :, None] == positions[..., None, :]
    if groups is None:
        return 1.0 - same.sum(-1).max(-1).values / positions.shape[-1]
    counts = (same & (groups[:, None] == groups)).sum(-1)
    most = sum(counts[..., groups == group].max(-1).values for group in groups.unique())
    return 1.0 - cast(Tensor, most) / positions.shape[-1]


TokenKind = Literal["mask", "bos", "special", "newline", "punctuation", "digit", "word start", "word piece"]
TOKEN_KINDS: tuple[TokenKind, ...] = ("mask", "bos", "special", "newline", "punctuation", "digit", "word start", "word piece")


def token_kind(text: str, *, is_special: bool, is_mask: bool, is_bos: bool) -> TokenKind:
    """Sort a token by what it shows: a mask, a special token, white space with a newline, punctuation, digits or letters.

    Args:
        text: the token decoded alone, leading space kept.
        is_special: listed among the tokenizer's special tokens.
        is_mask: the mask token.
        is_bos: the token that begins a document.

    >>> [token_kind(t, is_special=False, is_mask=False, is_bos=False) for t in (",", "7", " the", "ing", "\\n")]
    ['punctuation', 'digit', 'word start', 'word piece', 'newline']
    """
    if is_mask or is_bos or is_special:
        return "mask" if is_mask else "bos" if is_bos else "special"
    if "\n" in text:
        return "newline"
    bare = text.strip()
    if not any(character.isalnum() for character in bare):
        return "punctuation"
    if bare.isdigit():
        return "digit"
    return "word start" if text[0] == " " else "word piece"


def shares(kinds: Sequence[str], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Return the share of each token kind in per cent, in the order of `TOKEN_KINDS`; kinds that do not occur get 0."""
    weights = [1.0] * len(kinds) if weights is None else weights
    total = sum(weights)
    return {
        kind: 100.0 * sum(weight for got, weight in zip(kinds, weights, strict=True) if got == kind) / total
        for kind in TOKEN_KINDS
    }
