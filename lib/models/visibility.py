"""Who may look at whom, as boolean masks `[batch, 1, query, key]` (True = may look). Tensors in, tensors out.

A grid of blocks has its first border at an origin, one for all rows or one each; what lies before it is one block of its own. A
mask that is the same for all rows has one row. Padding is a logical and: nobody looks at it.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lib.core.errors import require


def block_numbers(
    length: int, *, block_length: int, origin: int | Int[Tensor, "batch"] = 0, device: torch.device | str = "cpu"
) -> Int[Tensor, "batch_or_one {length}"]:
    """Return the block of each position: -1 before the origin, then 0, 1, ...

    Args:
        length: number of positions.
        block_length: positions of a block; the last one may be cut.
        origin: where the grid begins.
        device: of the result, when the origin is a number.

    Raises:
        InputError: a block without positions.

    >>> block_numbers(7, block_length=2, origin=3).tolist()
    [[-1, -1, -1, 0, 0, 1, 1]]
    """
    require(block_length >= 1, "block_length must be at least 1", str(block_length), "use the checkpoint's own")
    begins = origin.view(-1, 1) if isinstance(origin, Tensor) else torch.tensor([[origin]], device=device)
    after = torch.arange(length, device=begins.device) - begins
    return torch.where(after < 0, -1, after.div(block_length, rounding_mode="floor"))


def block_causal(
    blocks: Int[Tensor, "grid position"], *, real: Bool[Tensor, "row position"] | None = None
) -> Bool[Tensor, "_ 1 query key"]:
    """Let every query see its own block and those before it.

    Args:
        blocks: from `block_numbers`.
        real: False for padding.

    Source: block diffusion at inference, as SDAR, Fast-dLLM v2, LLaDA 2 and Stable-DiffCoder have it (blocks from position 0).

    >>> block_causal(block_numbers(3, block_length=2))[0, 0].int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    return padded(blocks[:, None, :, None] >= blocks[:, None, None, :], real)


def two_copies(
    blocks: Int[Tensor, "grid position"], *, causal_context: bool = False, real: Bool[Tensor, "row position"] | None = None
) -> Bool[Tensor, "_ 1 double_query double_key"]:
    """Let a noisy copy see its own block and the clean copy of earlier blocks, in one sequence [noisy | clean].

    Both copies have the positions 0, 1, ...; so the noisy half gives what each block gives alone behind a clean prefix.

    Args:
        blocks: from `block_numbers`.
        causal_context: the clean copy is read causally instead of block by block.
        real: False for padding.

    Source: the training mask of BD3-LM (arXiv 2503.09573) and of SDAR, Fast-dLLM v2 and LLaDA 2.

    >>> two_copies(block_numbers(2, block_length=1))[0, 0].int().tolist()
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    query, key = blocks[:, None, :, None], blocks[:, None, None, :]
    clean = torch.ones_like(query >= key).tril() if causal_context else query >= key
    noisy = torch.cat([query == key, query > key], dim=-1)
    both = torch.cat([noisy, torch.cat([torch.zeros_like(clean), clean], dim=-1)], dim=-2)
    return padded(both, None if real is None else real.repeat(1, 2))


def open_block(
    is_open: Bool[Tensor, "grid position"], *, real: Bool[Tensor, "row position"] | None = None
) -> Bool[Tensor, "_ 1 query key"]:
    """Let every query see the positions up to its own, and those of the open block all of it.

    Args:
        is_open: the positions of the current block.
        real: False for padding.

    Source: Nemotron-Labs-Diffusion: causal context, one bidirectional block.

    >>> open_block(torch.tensor([[False, True, True]]))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    """
    inside = is_open[:, None, :, None] & is_open[:, None, None, :]
    return padded(torch.ones_like(inside).tril() | inside, real)


def padded(mask: Bool[Tensor, "_ 1 query key"], real: Bool[Tensor, "row key"] | None) -> Bool[Tensor, "_ 1 query key"]:
    """Take padding out of a mask as keys. A padding query may be left with nothing to see; SDPA gives it zeros.

    Args:
        mask: True = may look.
        real: False for padding; None when there is none.
    """
    return mask if real is None else mask & real[:, None, None, :]


def viewers(mask: Bool[Tensor, "batch 1 query key"]) -> Int[Tensor, "batch key"]:
    """Return how many queries may look at each key.

    >>> viewers(block_causal(block_numbers(3, block_length=2))).tolist()
    [[3, 3, 1]]
    """
    return mask[:, 0].sum(-2)
