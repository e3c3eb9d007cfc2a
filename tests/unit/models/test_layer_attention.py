"""Short texts on a CPU are attended to by products, everything else by SDPA; both give what the formula says."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lib.core import processor
from lib.models.layers import attention

CHOICE = attention.is_onednn
ROWS, HEADS, KV_HEADS, QUERIES, DIM = 3, 6, 2, 9, 4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(*, keys: int = QUERIES, queries: int = QUERIES) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys))
    query, key, value = (drawn(ROWS, many, heads, DIM, seed=seed).transpose(1, 2) for seed, (heads, many) in enumerate(shapes))
    return query, key, value


def by_formula(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, *, scaling: float) -> Tensor:
    """Attention in float64, every head with a copy of its keys; `[row, query, head, dim]`."""
    key, value = (each.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * scaling).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).float()


def module(**attributes: Any) -> torch.nn.Module:
    made = torch.nn.Module()
    for name, value in {"num_key_value_groups": HEADS // KV_HEADS, **attributes}.items():
        setattr(made, name, value)
    return made


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that oneDNN multiplies; whatever does, products give the same."""
    monkeypatch.setattr(attention, "is_onednn", lambda: True)


@pytest.fixture(params=["as it is", "shares of a row", "chunks of two queries"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "shares of a row":
        monkeypatch.setattr(attention, "SHARE", 1)
    if request.param == "chunks of two queries":
        monkeypatch.setattr(attention, "CHUNK", 2)


@pytest.fixture
def by_sdpa(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count what is left to SDPA."""
    calls: list[int] = []
    plain = attention.sdpa_attention_forward

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(1)
        return plain(*given, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    return calls


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("shape", [None, (ROWS, 1, QUERIES, QUERIES), (1, HEADS, QUERIES, QUERIES), (ROWS, 1, 1, QUERIES)])
def test_products_give_what_the_formula_says(shape: tuple[int, ...] | None, by_sdpa: list[int]) -> None:
    mask = None if shape is None else drawn(*shape, seed=7) > 0
    if mask is not None:
        mask[..., 2] = True  # every query sees something
    allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
    found, _ = attention.attention(module(), *inputs(), mask, scaling=0.7, is_causal=False)
    torch.testing.assert_close(found, by_formula(*inputs(), allowed, scaling=0.7))
    assert not by_sdpa


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("told", [{"is_causal": True}, {}])  # by the call, or by the module
def test_the_causal_mask_is_the_calls_or_the_modules(told: dict[str, bool], by_sdpa: list[int]) -> None:
    lower = torch.ones(QUERIES, QUERIES).tril().bool()
    found, _ = attention.attention(
        module(is_causal=not told or not told["is_causal"]), *inputs(), None, scaling=DIM**-0.5, **told
    )
    torch.testing.assert_close(found, by_formula(*inputs(), lower, scaling=DIM**-0.5))
    assert not by_sdpa


def test_a_mask_takes_the_place_of_the_causal_one(by_sdpa: list[int]) -> None:
    everything = torch.ones(1, 1, QUERIES, QUERIES, dtype=torch.bool)
    found, _ = attention.attention(module(is_causal=True), *inputs(), everything)
    torch.testing.assert_close(found, by_formula(*inputs(), everything, scaling=DIM**-0.5))
    assert not by_sdpa


def left_to_sdpa() -> dict[str, tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, dict[str, Any]]]:
    blind = torch.ones(ROWS, 1, QUERIES, QUERIES, dtype=torch.bool)
    blind[0, 0, 3] = False  # a query with nothing to see: SDPA gives zeros, a softmax alone NaN
    added = torch.zeros(ROWS, 1, QUERIES, QUERIES)
    query, key, value = inputs()
    return {
        "float64": ((query.double(), key.double(), value.double()), None, {}),
        "bfloat16": ((query.bfloat16(), key.bfloat16(), value.bfloat16()), None, {}),
        "gradient": ((query.clone().requires_grad_(), key, value), None, {}),
        "one query": (inputs(queries=1), None, {}),
        "many keys": (inputs(keys=attention.KEYS + 1), None, {"is_causal": False}),
        "causal, earlier keys": (inputs(keys=QUERIES + 4), None, {"is_causal": True}),
        "nothing to see": ((query, key, value), blind, {}),
        "added mask": ((query, key, value), added, {}),
        "dropout": ((query, key, value), None, {"dropout": 0.5}),
    }


def test_products_go_with_the_processors_choice() -> None:
    assert (processor.use_products().kernels == "oneDNN") == CHOICE()


def test_where_mkl_multiplies_sdpa_is_as_fast(by_sdpa: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_onednn", lambda: False)
    attention.attention(module(is_causal=False), *inputs(), None)
    assert by_sdpa


@pytest.mark.parametrize("case", list(left_to_sdpa()))
def test_what_products_cannot_do_is_left_to_sdpa(case: str, by_sdpa: list[int]) -> None:
    given, mask, options = left_to_sdpa()[case]
    found, _ = attention.attention(module(is_causal=False), *given, mask, **options)
    assert by_sdpa and found.dtype == given[0].dtype and found.isfinite().all()
