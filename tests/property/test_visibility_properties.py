"""The mask builders against their definitions, position by position."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.models import visibility


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, list[int], Tensor]:
    """Draw a length, a block length, an origin for each row, and which tokens are real."""
    length, rows = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    origins = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    real = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows))
    return length, draw(st.integers(1, 13)), origins, torch.tensor(real)


def block_of(position: int, block_length: int, origin: int) -> int:
    return -1 if position < origin else (position - origin) // block_length


@given(grids())
def test_block_causal_by_definition(grid: tuple[int, int, list[int], Tensor]) -> None:
    length, size, origins, real = grid
    blocks = visibility.block_numbers(length, block_length=size, origin=torch.tensor(origins))
    mask = visibility.block_causal(blocks, real=real)
    assert mask.shape == (len(origins), 1, length, length)
    for row, origin in enumerate(origins):
        for q in range(length):
            for k in range(length):
                sees = block_of(k, size, origin) <= block_of(q, size, origin) and bool(real[row, k])
                assert bool(mask[row, 0, q, k]) == sees
    assert torch.equal(visibility.viewers(mask), mask[:, 0].sum(1))


@given(grids(), st.booleans())
def test_two_copies_by_definition(grid: tuple[int, int, list[int], Tensor], causal: bool) -> None:
    length, size, origins, real = grid
    blocks = visibility.block_numbers(length, block_length=size, origin=torch.tensor(origins))
    mask = visibility.two_copies(blocks, causal_context=causal, real=real)
    for row, origin in enumerate(origins):
        for q in range(2 * length):
            for k in range(2 * length):
                mine, theirs = block_of(q % length, size, origin), block_of(k % length, size, origin)
                noisy_q, noisy_k = q < length, k < length
                if noisy_q:
                    sees = mine == theirs if noisy_k else theirs < mine
                else:
                    sees = not noisy_k and (k <= q if causal else theirs <= mine)
                assert bool(mask[row, 0, q, k]) == (sees and bool(real[row, k % length]))


@given(grids())
def test_an_open_block_by_definition(grid: tuple[int, int, list[int], Tensor]) -> None:
    length, size, origins, real = grid
    blocks = visibility.block_numbers(length, block_length=size, origin=torch.tensor(origins))
    is_open = blocks == blocks[:, -1:]
    mask = visibility.open_block(is_open, real=real)
    for row in range(len(origins)):
        for q in range(length):
            for k in range(length):
                sees = k <= q or bool(is_open[row, q] and is_open[row, k])
                assert bool(mask[row, 0, q, k]) == (sees and bool(real[row, k]))


@given(grids())
def test_one_block_is_full_attention_and_single_tokens_are_causal(grid: tuple[int, int, list[int], Tensor]) -> None:
    length = grid[0]
    assert visibility.block_causal(visibility.block_numbers(length, block_length=length)).all()
    singles = visibility.block_causal(visibility.block_numbers(length, block_length=1))
    assert torch.equal(singles[0, 0], torch.ones(length, length, dtype=torch.bool).tril())
    none_open = visibility.open_block(torch.zeros((1, length), dtype=torch.bool))
    assert torch.equal(singles, none_open)
