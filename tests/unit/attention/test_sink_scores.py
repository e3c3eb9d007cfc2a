"""Scores of heads and the rules on column sums, against loops over the attention matrix itself."""

from math import isnan, nan

import pytest
import torch
from torch import Tensor

from lib.attention import planted, sinks
from tests.unit import slow_variance as slow

BATCH = (2, 3, 2)  # prompt, layer, head
SIZE = 8


def attention_of(seed: int, *, causal: bool, sharpness: float = 5.0) -> Tensor:
    """Attention with some columns that receive much."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*BATCH, SIZE, SIZE, dtype=torch.float64, generator=generator)
    scores = scores + sharpness * torch.rand(*BATCH, 1, SIZE, dtype=torch.float64, generator=generator)
    if causal:
        scores = scores.masked_fill(torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("causal", [False, True])
def test_first_token_score_equals_a_loop(causal: bool) -> None:
    attention = attention_of(0, causal=causal)
    got = sinks.first_token_score(attention.sum(-2), queries=SIZE)
    torch.testing.assert_close(got, slow.each(slow.first_token_score, BATCH, attention), atol=1e-12, rtol=1e-12)
    assert ((got >= 0) & (got <= 1)).all()


def test_first_token_score_of_a_planted_sink_is_its_share() -> None:
    mass = planted.planted_attention([0, 3], keys=7, share=0.4).sum(-2)
    assert sinks.first_token_score(mass, queries=7).tolist() == pytest.approx([0.4, 0.6 / 6], abs=1e-12)


def test_first_token_score_divides_by_queries_and_not_by_keys() -> None:
    """4 queries on 6 keys, as when keys are cached."""
    sums = torch.full((4, 6), 1 / 6, dtype=torch.float64).sum(0)
    assert float(sinks.first_token_score(sums, queries=4)) == pytest.approx(1 / 6, abs=1e-12)


def test_first_token_score_reads_the_first_column_alone() -> None:
    """Also where the other keys were cut off, so that what is left does not sum to the number of queries."""
    sums = attention_of(4, causal=False).sum(-2)
    assert torch.equal(sinks.first_token_score(sums[..., :3], queries=SIZE), sinks.first_token_score(sums, queries=SIZE))


def test_value_norm_ratio_equals_a_loop_over_the_vectors() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(*BATCH, SIZE, 5, dtype=torch.float64, generator=generator)
    marked = torch.rand(*BATCH, SIZE, generator=generator) < 0.3
    marked[0, 0, 0], marked[1, 0, 0] = False, True
    got = sinks.value_norm_ratio(values.norm(dim=-1), marked)
    expected = slow.each(slow.value_norm_ratio, BATCH, values, marked)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12, equal_nan=True)
    assert got.isnan().any() and not got.isnan().all()


def test_value_norm_ratio_compares_with_the_other_keys_and_not_with_all() -> None:
    """Means 2 and 6; the mean of all is 4.4, the ratio of sums 4 / 18."""
    norms = torch.tensor([1.0, 3.0, 5.0, 6.0, 7.0], dtype=torch.float64)
    marked = torch.tensor([True, True, False, False, False])
    assert float(sinks.value_norm_ratio(norms, marked)) == pytest.approx(1 / 3, abs=1e-12)
    assert float(sinks.value_norm_ratio(norms, ~marked)) == pytest.approx(3, abs=1e-12)


def test_value_norm_ratio_needs_sinks_and_others() -> None:
    norms = torch.tensor([1.0, 2.0])
    for marked in ([False, False], [True, True]):
        assert isnan(sinks.value_norm_ratio(norms, torch.tensor(marked)))
    assert isnan(sinks.value_norm_ratio(torch.tensor([nan, 2.0]), torch.tensor([True, False])))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("epsilon", [0.5, 1.5, 3.0])
def test_rullis_sets_equal_a_loop(causal: bool, epsilon: float) -> None:
    attention = attention_of(2, causal=causal)
    sums = attention.sum(-2)
    expected = slow.each(lambda rows: slow.rulli_sinks(rows, epsilon), BATCH, attention)
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(sinks.sinks_leave_one_out(sums, epsilon=epsilon).double(), expected)
    assert torch.equal(sinks.rulli_count(sums, epsilon=epsilon).double(), expected.sum(-1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.3])
def test_gus_rate_is_the_share_of_layers_and_heads(causal: bool, epsilon: float) -> None:
    attention = attention_of(3, causal=causal)
    got = sinks.gu_sink_rate(attention.sum(-2), is_causal=causal, epsilon=epsilon).double().mean((1, 2))
    for prompt in range(BATCH[0]):
        maps = attention[prompt].tolist()
        expected = [slow.gu_rate(maps, key, causal=causal, epsilon=epsilon) for key in range(SIZE)]
        assert got[prompt].tolist() == pytest.approx(expected, abs=1e-6)
        assert 0 < sum(expected) < SIZE


@pytest.mark.parametrize("share", [0.29, 0.31])
def test_gus_rate_of_a_planted_sink_turns_at_epsilon(share: float) -> None:
    """The mean attention that the sink receives is its share; the others receive 0.69 / 9 or so."""
    mass = planted.planted_attention([0, 4], keys=10, share=share).sum(-2)
    got = sinks.gu_sink_rate(mass, is_causal=False)
    expected = torch.zeros(2, 10)
    expected[0, 0] = expected[1, 4] = float(share > sinks.GU_EPSILON)
    assert torch.equal(got, expected)
