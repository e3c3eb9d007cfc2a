"""Planted attention is what it says, so that the measures can be checked on it."""

import pytest
import torch

from lib.attention import planted, sinks, stability, variance
from lib.core.errors import InputError
from tests.unit import slow_variance as slow


@pytest.mark.parametrize("share", [0.0, 0.1, 0.8, 1.0])
def test_every_query_gives_the_share_to_one_key_and_the_rest_evenly(share: float) -> None:
    path, keys = [4, 0, 4], 6
    attention = planted.planted_attention(path, keys=keys, share=share)
    assert attention.shape == (3, keys, keys) and attention.dtype == torch.float64
    for step, position in enumerate(path):
        for query in range(keys):
            for key in range(keys):
                expected = share if key == position else (1 - share) / (keys - 1)
                assert float(attention[step, query, key]) == expected
    assert attention.sum(-1).flatten().tolist() == pytest.approx([1.0] * 3 * keys, abs=1e-12)


def test_a_sink_below_the_even_share_is_a_hole() -> None:
    mass = planted.planted_attention([2], keys=5, share=0.0).sum(-2)
    assert mass[0].tolist() == pytest.approx([1.25, 1.25, 0.0, 1.25, 1.25])


@pytest.mark.parametrize(
    ("positions", "keys", "share"), [([0, 5], 5, 0.5), ([-1], 5, 0.5), ([0], 5, -0.1), ([0], 5, 1.1), ([0], 5, float("nan"))]
)
def test_what_cannot_be_planted_is_refused(positions: list[int], keys: int, share: float) -> None:
    with pytest.raises(InputError, match=rf"planted in \[0, {keys}\) with a share in \[0, 1\], got \["):
        planted.planted_attention(positions, keys=keys, share=share)


def test_one_key_alone_is_refused() -> None:
    with pytest.raises(InputError, match=r"planted in \[0, 1\)"):
        planted.planted_attention([0], keys=1, share=1.0)


def test_paths() -> None:
    assert planted.fixed(steps=3, position=5) == [5, 5, 5]
    assert planted.drifting(steps=4, start=9, per_step=-3) == [9, 6, 3, 0]
    assert planted.alternating(steps=5, positions=(2, 7)) == [2, 7, 2, 7, 2]
    assert planted.alternating(steps=4, positions=(1, 2, 3)) == [1, 2, 3, 1]


def test_noise_rows_sum_to_1_and_masses_vary_as_a_uniform_simplex_says() -> None:
    """Var of a column sum is (K - 1) / (K (K + 1)) about the mean 1.

    Its estimate from n = T K masses has a relative error of about sqrt(2 / n) = 0.011 here; 5 of them are allowed. Rows made as
    normalised uniform numbers have a third of the variance.
    """
    steps, keys = 800, 20
    attention = planted.noise_attention(steps, keys=keys, generator=torch.Generator().manual_seed(0))
    assert attention.shape == (steps, keys, keys) and attention.dtype == torch.float64
    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum(-1), torch.ones(steps, keys, dtype=torch.float64), atol=1e-12, rtol=0)
    mass = attention.sum(-2)
    assert float(mass.mean()) == pytest.approx(1, abs=1e-12)
    expected = (keys - 1) / (keys * (keys + 1))
    assert float(((mass - 1) ** 2).mean()) == pytest.approx(expected, rel=5 * (2 / (steps * keys)) ** 0.5)
    assert not torch.equal(attention[0], attention[1])  # drawn anew at every step


def test_noise_follows_its_seed() -> None:
    first, again, other = (
        planted.noise_attention(2, keys=4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("k", [1, 5])
def test_noise_has_sinks_everywhere_equally_often(k: int) -> None:
    """Each key is among the k largest in k / K of the steps: binomial, 5 standard errors allowed; exactly so on average."""
    steps, keys = 600, 15
    mass = planted.noise_attention(steps, keys=keys, generator=torch.Generator().manual_seed(3)).sum(-2)
    frequency = variance.frequency_variance(variance.in_top_k(mass, k=k))
    share = k / keys
    assert float(frequency.mean()) == pytest.approx(1 - share, abs=1e-6)
    assert frequency.tolist() == pytest.approx([1 - share] * keys, abs=5 * (share * (1 - share) / steps) ** 0.5)
    assert float(variance.sink_frequency_variance(variance.in_top_k(mass, k=k))) == pytest.approx(1 - share, abs=1e-6)


def test_noise_has_a_small_spatial_variance_that_falls_with_the_steps_and_positions_all_over() -> None:
    """The mean of T independent masses has variance v / T; a uniform position on 0 ... K - 1 has (K² - 1) / 12.

    Var over K keys that sum to a constant is chi-squared with K - 1 degrees of freedom: relative error sqrt(2 / (K - 1)) = 0.23.
    The variance of n uniform positions has a relative error of about sqrt(0.8 / n) = 0.032. Again 5 of them are allowed, or 3 of
    the coarse one.
    """
    steps, keys = 800, 40
    mass = planted.noise_attention(steps, keys=keys, generator=torch.Generator().manual_seed(4)).sum(-2)
    one = (keys - 1) / (keys * (keys + 1))
    assert float(variance.spatial_variance(mass)) == pytest.approx(one / steps, rel=3 * (2 / (keys - 1)) ** 0.5)
    place = variance.position_variance(sinks.top_k_positions(mass, k=1))
    assert float(place.total) == pytest.approx((keys**2 - 1) / 12, rel=5 * (0.8 / steps) ** 0.5)


def test_noise_has_no_sinks_by_rullis_rule() -> None:
    """A mass has a standard deviation of about 1 / sqrt(K), far from the margin of 3."""
    mass = planted.noise_attention(50, keys=30, generator=torch.Generator().manual_seed(5)).sum(-2)
    assert not sinks.sinks_leave_one_out(mass).any()
    assert stability.overlap_by_distance(sinks.sinks_leave_one_out(mass), [1]).isnan().all()


def test_the_chance_of_the_loops_is_the_mean_over_all_pairs_of_sets() -> None:
    """The formula that noise is compared with, counted out for 2 of 4 keys: 1 pair alike, 4 share one key, 1 shares none."""
    mean, spread = slow.chance_moments(2, 4)
    assert mean == pytest.approx((1 + 4 / 3 + 0) / 6)
    assert spread == pytest.approx((1 + 4 / 9) / 6 - mean**2)
