"""The objectives of the five members: what of a row is noised, what may see what, and the loss.

`ar` predicts the next token; `bd` is masked in blocks, each given the clean blocks before it (the two-copy mask); `dlm`, `udlm`
and `xdlm` see everything and differ in the noise. All losses are means over rows of the loss per answer token, in nats.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM

from lib.diffusion import noise
from recipes.family.batches import Rows

Member = Literal["ar", "bd", "dlm", "udlm", "xdlm"]
MEMBERS: tuple[Member, ...] = get_args(Member)
BLOCK = 16
NOISE: dict[Member, dict[str, object]] = {"udlm": {"kind": "uniform"}, "xdlm": {"kind": "mixed", "uniform": 0.1}}


def stated(member: Member, *, mask_token_id: int) -> dict[str, Any]:
    """Return what a member's configuration says of it beside the network: attention, mask token, blocks and noise.

    `lib.checkpoints.facts` reads it, so that a folder tells by itself what it is.

    >>> stated("udlm", mask_token_id=3)
    {'is_causal': False, 'mask_token_id': 3, 'noise': {'kind': 'uniform'}}
    """
    if member == "ar":
        return {"is_causal": True}
    blocks = {"attention_kind": "block-causal", "block_length": BLOCK, "block_origin": "start"} if member == "bd" else {}
    noise_kind = {"noise": NOISE[member]} if member in NOISE else {}
    return {"is_causal": False, "mask_token_id": mask_token_id, **blocks, **noise_kind}


def noise_of(member: Member, *, vocab_size: int, mask_token_id: int) -> noise.Noise:
    """Return the noise that a diffusion member is trained with."""
    if member == "udlm":
        return noise.uniform_noise(vocab_size, mask_token_id=mask_token_id)
    if member == "xdlm":
        return noise.mixed_noise(vocab_size, mask_token_id=mask_token_id)
    return noise.masked_noise(vocab_size, mask_token_id=mask_token_id)


def blocks_seen(length: int, *, block: int = BLOCK) -> Bool[Tensor, "query key"]:
    """Return block-causal attention: a position sees its own block and the blocks before it."""
    number = torch.arange(length) // block
    return number[:, None] >= number[None, :]


def two_copies_seen(length: int, *, block: int = BLOCK) -> Bool[Tensor, "query key"]:
    """Return who sees whom in a row that holds its noised copy and then its clean one.

    A noised block sees itself and the clean blocks before it; a clean block sees itself and the clean blocks before it.

    >>> two_copies_seen(2, block=1).int().tolist()
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    number = torch.arange(length) // block
    same, earlier = number[:, None] == number[None, :], number[:, None] > number[None, :]
    return torch.cat([torch.cat([same, earlier], 1), torch.cat([torch.zeros_like(same), same | earlier], 1)])


def attention_bias(
    member: Member, is_real: Bool[Tensor, "row position"], *, copies: int = 1
) -> Float[Tensor, "row 1 query key"] | None:
    """Return what is added to the scores: 0 where a query may look, a large negative number elsewhere; None where all see all.

    Padding is seen by itself alone, so that no query is left without a key.
    """
    length = is_real.shape[1]
    if member == "ar":
        seen = torch.ones((length, length), dtype=torch.bool).tril()
    elif member == "bd":
        seen = two_copies_seen(length) if copies == 2 else blocks_seen(length)
    else:
        seen = torch.ones((length, length), dtype=torch.bool)
    if bool(is_real.all()) and bool(seen.all()):
        return None
    real = is_real.repeat(1, copies)
    own = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    allowed = (seen.to(real.device)[None] & real[:, None, :]) | own
    return torch.zeros(allowed.shape, device=real.device).masked_fill_(~allowed, -1e9)[:, None]


def hidden_states(
    member: Member, network: Callable[..., Any], ids: Int[Tensor, "row position"], rows: Rows
) -> Float[Tensor, "row position width"]:
    """Run the network without its head on (noised) ids, as this member sees them while training."""
    if member != "bd":
        return network(input_ids=ids, attention_mask=attention_bias(member, rows.is_real)).last_hidden_state
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device).repeat(2)[None].expand(len(ids), -1)
    bias = attention_bias(member, rows.is_real, copies=2)
    both = torch.cat([ids, rows.ids], 1)
    return network(input_ids=both, attention_mask=bias, position_ids=positions).last_hidden_state[:, :length]


def times(member: Member, rows: Rows, *, generator: torch.Generator) -> Float[Tensor, "row position"]:
    """Draw the noise times: one a row, stratified over the rows; of `bd` one a block, stratified over all blocks."""
    count, length = rows.ids.shape
    if member != "bd":
        return noise.training_times(count, generator=generator)[:, None].expand(-1, length)
    blocks = -(-length // BLOCK)
    drawn = noise.training_times(count * blocks, generator=generator).view(count, blocks)
    return drawn.repeat_interleave(BLOCK, 1)[:, :length]


def row_losses(
    member: Member, model: LlamaForCausalLM, network: Callable[..., Any], rows: Rows, *, generator: torch.Generator
) -> Float[Tensor, "row"]:
    """Return the loss of each row per answer token.

    Args:
        member: which objective.
        model: the network with its head and config.
        network: the network without its head (perhaps compiled).
        rows: clean rows.
        generator: CPU generator of times and noise.
    """
    if member == "ar":
        hidden = hidden_states(member, network, rows.ids, rows)[:, :-1]
        wanted = rows.is_answer[:, 1:]
        losses = F.cross_entropy(model.lm_head(hidden[wanted]).float(), rows.ids[:, 1:][wanted], reduction="none")
        return _per_row(losses, wanted)
    config = model.config
    process = noise_of(member, vocab_size=config.vocab_size, mask_token_id=config.mask_token_id)
    t = times(member, rows, generator=generator)
    noised = process.corrupt(rows.ids, t, generator=generator, may_change=rows.is_answer)
    where = rows.is_answer & (noised.input_ids == config.mask_token_id) if process.uniform_share == 0.0 else rows.is_answer
    hidden = hidden_states(member, network, noised.input_ids, rows)
    log_probs = model.lm_head(hidden[where]).float().log_softmax(-1)
    losses = process.loss(log_probs, rows.ids[where], noised.input_ids[where], noised.t[where])
    return _per_row(losses, where, count=rows.is_answer.sum(1))


def _per_row(losses: Float[Tensor, "selected"], where: Bool[Tensor, "row position"], *, count: Tensor | None = None) -> Tensor:
    """Sum losses over the chosen positions of each row and divide by the number of answer tokens."""
    row = where.nonzero()[:, 0]
    sums = torch.zeros(len(where), device=losses.device).index_add(0, row, losses)
    return sums / (where.sum(1) if count is None else count).clamp(min=1)
