"""On a CPU a layer is summed a few rows and heads at a time: the parts are those of the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lib.attention.recorder import MassRecorder
from lib.models.layers import attention as layer_attention

ROWS, HEADS, KV_HEADS, QUERIES, KEYS, DIM = 3, 6, 2, 11, 13, 4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks() -> dict[str, Tensor | None]:
    allowed = drawn(ROWS, HEADS, QUERIES, KEYS, seed=4) > -0.5
    allowed[..., 0] = True  # every query sees something
    return {
        "none": None,
        "by row and head": allowed,
        "by row": allowed[:, :1],
        "by head": allowed[:1],
        "one for all": allowed[:1, :1],
        "by key alone": allowed[:, :1, :1],
        "added": torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, :1],
    }


def recorded(
    share: int, monkeypatch: pytest.MonkeyPatch, *, mask: Tensor | None, is_causal: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    monkeypatch.setattr(layer_attention, "SHARE", share)
    sums = MassRecorder(query_chunk=4, **options)
    keys = QUERIES if is_causal else KEYS
    query, key, value = (
        drawn(ROWS, heads, many, DIM, seed=seed)
        for heads, many, seed in ((HEADS, QUERIES, 1), (KV_HEADS, keys, 2), (KV_HEADS, keys, 3))
    )
    output = sums.add(query, key, mask, scaling=0.7, is_causal=is_causal, value=value)
    assert output is not None
    whole_key, whole_value = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, whole_key, whole_value, attn_mask=mask, is_causal=is_causal, scale=0.7
    )
    torch.testing.assert_close(output, expected)
    return sums.pop(), output


# one head of one row; two kv heads of one row; two rows; everything
@pytest.mark.parametrize("share", [1, 400, 700, 10**9])
@pytest.mark.parametrize("mask", masks())
def test_parts_of_a_layer_sum_to_the_whole(share: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.arange(QUERIES) < torch.tensor([QUERIES, 7, 2])[:, None]
    options = {"mask": masks()[mask], "is_causal": False, "query_is_real": real}
    sums, _ = recorded(share, monkeypatch, **options)
    assert sums.shape == (1, ROWS, HEADS, 1, KEYS)
    torch.testing.assert_close(sums.sum(-1)[0, :, :, 0], real.sum(1).float()[:, None].expand(-1, HEADS))
    monkeypatch.undo()
    torch.testing.assert_close(sums, recorded(10**9, monkeypatch, **options)[0])


@pytest.mark.parametrize("share", [1, 400, 700, 10**9])
def test_one_row_of_real_queries_stands_for_all(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ready mask of a model's own has one row for the whole batch."""
    real = (torch.arange(QUERIES) < 7)[None]
    options = {"mask": masks()["one for all"], "is_causal": False}
    sums, _ = recorded(share, monkeypatch, query_is_real=real, **options)
    monkeypatch.undo()
    torch.testing.assert_close(sums, recorded(10**9, monkeypatch, query_is_real=real.expand(ROWS, -1), **options)[0])


@pytest.mark.parametrize("share", [1, 300, 10**9])
def test_parts_of_a_causal_layer_keep_the_marks(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sums, _ = recorded(share, monkeypatch, mask=None, is_causal=True, marks=(3, 8))
    assert torch.equal(sums[..., 0, 3:], torch.zeros_like(sums[..., 0, 3:])), "keys after a mark have no query before it"
    torch.testing.assert_close(sums.sum(-1), torch.tensor([3.0, 8.0]).expand(1, ROWS, HEADS, 2))
    torch.testing.assert_close(sums, recorded(10**9, monkeypatch, mask=None, is_causal=True, marks=(3, 8))[0])


def test_shares_cover_each_head_of_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.zeros(5, 12, 8, 2), torch.zeros(5, 4, 16, 2)
    for share in (1, 8 * 16 * 3, 8 * 16 * 3 * 3, 8 * 16 * 12, 8 * 16 * 12 * 2, 10**9):
        monkeypatch.setattr(layer_attention, "SHARE", share)
        seen = torch.zeros(5, 12)
        for rows, heads, kv_heads in layer_attention.shares(query, key, chunk=64):
            seen[rows, heads] += 1
            assert (heads.start, heads.stop) == (3 * kv_heads.start, 3 * kv_heads.stop)
            held = query[rows, heads].shape[0] * query[rows, heads].shape[1] * 8 * 16
            assert held <= max(share, 3 * 8 * 16), "more than the cache is to hold"
        assert torch.equal(seen, torch.ones(5, 12))
