"""Overlap, its nulls, lifetime and drift: against slow loops, on planted sinks, and on empty sets."""

from math import isnan, nan

import pytest
import torch
from torch import Tensor

from lib.attention import planted, stability, variance
from lib.core.errors import InputError
from tests.unit import slow_variance as slow

BATCH = (2, 3, 2)  # prompt, layer, head
STEPS, SIZE = 7, 8
PLANTED_SIZE = 25


def random_sets(seed: int, share: float) -> Tensor:
    """Sink sets of varying size, the sparse ones often empty."""
    drawn = torch.rand(*BATCH, STEPS, SIZE, generator=torch.Generator().manual_seed(seed))
    return drawn < share


def equal(got: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Compare in float64, NaN where NaN is expected."""
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def sets_along(path: list[int]) -> Tensor:
    """The top-1 set of each step of planted attention."""
    return variance.in_top_k(planted.planted_attention(path, keys=PLANTED_SIZE, share=0.3).sum(-2), k=1)


def centroids_along(path: list[int]) -> Tensor:
    """The centroid of that set."""
    mass = planted.planted_attention(path, keys=PLANTED_SIZE, share=0.3).sum(-2)
    return variance.centroid(mass, variance.in_top_k(mass, k=1))


# --- against the loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_overlap_equals_a_loop_at_every_distance(share: float) -> None:
    sets = random_sets(0, share)
    distances = list(range(1, STEPS))
    got = stability.overlap_by_distance(sets, distances)
    assert got.shape == (*BATCH, len(distances))
    equal(got, slow.each(lambda rows: [slow.overlap(rows, distance) for distance in distances], BATCH, sets))


def test_overlap_follows_the_order_of_the_distances() -> None:
    sets = random_sets(1, 0.4)
    back = stability.overlap_by_distance(sets, [5, 2])
    equal(back, stability.overlap_by_distance(sets, [2, 5]).flip(-1).double(), 0.0)


def test_jaccard_equals_a_loop() -> None:
    first, second = random_sets(2, 0.2), random_sets(3, 0.4)
    expected = slow.each(lambda one, two: slow.jaccard(slow.kept(one), slow.kept(two)), (*BATCH, STEPS), first, second)
    equal(stability.jaccard(first, second), expected)
    equal(stability.jaccard(second, first), expected)


def test_jaccard_divides_by_the_union() -> None:
    """|A ∩ B| = 1, |A ∪ B| = 4: dividing by the smaller, the larger or the mean size gives 1/2, 1/3 or 2/5."""
    first, second = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
    assert float(stability.jaccard(first, second)) == 0.25


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_mean_lifetime_equals_a_walk_along_each_key(share: float) -> None:
    sets = random_sets(4, share)
    equal(stability.mean_lifetime(sets), slow.each(slow.mean_lifetime, BATCH, sets))


def test_mean_lifetime_counts_appearances_and_not_keys() -> None:
    """Runs of 1, 1 and 4 steps: 2 on average. By key it would be (1 + 4) / 2, in steps per key 3."""
    sets = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 1], [0, 1]]).bool()
    assert slow.lifetimes(sets.tolist()) == [1, 1, 4]
    assert float(stability.mean_lifetime(sets)) == 2.0


def test_mean_lifetime_leaves_its_input_as_it_was() -> None:
    sets = random_sets(5, 0.5)
    before = sets.clone()
    stability.mean_lifetime(sets)
    assert torch.equal(sets, before)


def test_drift_equals_a_loop_and_needs_both_neighbours() -> None:
    generator = torch.Generator().manual_seed(6)
    centroids = 20 * torch.rand(*BATCH, STEPS, dtype=torch.float64, generator=generator)
    centroids[torch.rand(centroids.shape, generator=generator) < 0.3] = nan
    equal(torch.stack(stability.drift(centroids), -1), slow.each(slow.drift, BATCH, centroids), 1e-12)


def test_drift_does_not_bridge_a_step_without_sinks() -> None:
    signed, absolute = stability.drift(torch.tensor([0.0, 2.0, nan, 90.0, 89.0], dtype=torch.float64))
    assert (float(signed), float(absolute)) == (0.5, 1.5)


# --- no sink, no step ----------------------------------------------------------------------------------------------------


def test_two_empty_sets_have_no_overlap_and_one_has_none() -> None:
    empty, some = torch.zeros(3, dtype=torch.bool), torch.tensor([True, False, False])
    assert isnan(stability.jaccard(empty, empty))
    assert float(stability.jaccard(empty, some)) == 0.0


def test_pairs_of_empty_sets_are_left_out_of_the_mean() -> None:
    sets = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0]]).bool()
    got = stability.overlap_by_distance(sets, [1, 2])
    assert got.tolist() == [0.5, 0.0]  # at distance 1: 1, 0, none
    assert stability.overlap_by_distance(torch.zeros(4, 2, dtype=torch.bool), [1, 3]).isnan().all()


def test_without_sinks_there_is_no_lifetime_and_no_drift() -> None:
    assert isnan(stability.mean_lifetime(torch.zeros(4, 3, dtype=torch.bool)))
    for centroids in ([nan, nan, nan], [1.0, nan, 3.0], [4.0]):
        assert all(isnan(value) for value in stability.drift(torch.tensor(centroids)))


def test_one_step_is_a_life_of_one_step() -> None:
    assert float(stability.mean_lifetime(torch.tensor([[True, True, False]]))) == 1.0


@pytest.mark.parametrize("distances", [[], [0], [4], [1, 5], [-1], [2, 0]])
def test_distances_out_of_range_are_refused(distances: list[int]) -> None:
    with pytest.raises(InputError, match=r"step distances must be in \[1, 3\], got \["):
        stability.overlap_by_distance(torch.ones(4, 2, dtype=torch.bool), distances)


# --- planted sinks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 9])
def test_a_fixed_sink(steps: int) -> None:
    path = planted.fixed(steps=steps, position=7)
    assert stability.overlap_by_distance(sets_along(path), range(1, steps)).tolist() == [1.0] * (steps - 1)
    assert float(stability.mean_lifetime(sets_along(path))) == steps
    assert [float(value) for value in stability.drift(centroids_along(path))] == [0.0, 0.0]


@pytest.mark.parametrize(("start", "per_step"), [(1, 3), (22, -2)])
def test_a_drifting_sink(start: int, per_step: int) -> None:
    path = planted.drifting(steps=8, start=start, per_step=per_step)
    assert stability.overlap_by_distance(sets_along(path), range(1, 8)).tolist() == [0.0] * 7
    assert float(stability.mean_lifetime(sets_along(path))) == 1.0
    signed, absolute = stability.drift(centroids_along(path))
    assert float(signed) == pytest.approx(per_step, abs=1e-12) and float(absolute) == pytest.approx(abs(per_step), abs=1e-12)


def test_two_alternating_sinks() -> None:
    """Overlap 0 at odd and 1 at even distances; T - 1 moves of p - q in turn leave (q - p) / (T - 1) for even T."""
    steps, first, second = 8, 4, 19
    path = planted.alternating(steps=steps, positions=(first, second))
    got = stability.overlap_by_distance(sets_along(path), range(1, steps))
    assert got.tolist() == [float(distance % 2 == 0) for distance in range(1, steps)]
    assert float(stability.mean_lifetime(sets_along(path))) == 1.0
    signed, absolute = stability.drift(centroids_along(path))
    assert float(signed) == pytest.approx((second - first) / (steps - 1), abs=1e-12)
    assert float(absolute) == pytest.approx(abs(first - second), abs=1e-12)


@pytest.mark.parametrize("width", [2, 5])
def test_a_wide_sink_that_drifts_loses_its_overlap_step_by_step(width: int) -> None:
    """Sets {t, ..., t + w - 1}: J = (w - d) / (w + d), and each key lives for w steps unless an end cuts it off."""
    steps = 9
    sets = torch.zeros(steps, PLANTED_SIZE, dtype=torch.bool)
    for step in range(steps):
        sets[step, step : step + width] = True
    distances = range(1, steps)
    expected = [max(0, width - distance) / (width + min(distance, width)) for distance in distances]
    assert stability.overlap_by_distance(sets, distances).tolist() == pytest.approx(expected, abs=1e-6)
    assert float(stability.mean_lifetime(sets)) == pytest.approx(steps * width / (steps + width - 1), abs=1e-6)


def test_noise_overlaps_by_chance_lives_shortly_and_goes_nowhere() -> None:
    """Independent k-sets of S keys share j of them with hypergeometric probability.

    Overlaps of two pairs are uncorrelated even when they share a step, so the standard error is sd / sqrt(pairs); 5 of them are
    allowed. Of T k marks, k + (T - 1) k (1 - k / S) begin a run on average.
    """
    steps, size, k = 400, 12, 4
    mass = planted.noise_attention(steps, keys=size, generator=torch.Generator().manual_seed(0)).sum(-2)
    sets = variance.in_top_k(mass, k=k)
    chance, spread = slow.chance_moments(k, size)
    distances = (1, 2, 7, 100, 300)
    overlaps = stability.overlap_by_distance(sets, distances)
    for distance, got in zip(distances, overlaps.tolist(), strict=True):
        allowed = 5 * (spread / (steps - distance)) ** 0.5
        assert got == pytest.approx(chance, abs=allowed)
        left = float(stability.beyond_chance(torch.tensor(got), torch.tensor(chance)))
        assert left == pytest.approx(0, abs=allowed / (1 - chance))
    begun = k + (steps - 1) * k * (1 - k / size)
    assert float(stability.mean_lifetime(sets)) == pytest.approx(steps * k / begun, rel=0.1)
    signed, _ = stability.drift(variance.centroid(mass, sets))
    assert abs(float(signed)) < size / (steps - 1)  # the moves sum to last minus first


def test_beyond_chance_puts_chance_at_0_and_identity_at_1() -> None:
    got = stability.beyond_chance(torch.tensor([0.2, 1.0, 0.6, 0.0]), torch.full((4,), 0.2))
    assert got.tolist() == pytest.approx([0.0, 1.0, 0.5, -0.25], abs=1e-6)


# --- nulls ---------------------------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shuffled_steps_are_the_same_steps_in_another_order_for_all_heads_of_a_prompt() -> None:
    steps = 20
    labels = torch.arange(steps)
    sets = torch.stack([(labels >> bit) & 1 for bit in range(5)], -1).bool()  # the step's number in binary: no two alike
    many = sets.expand(4, 3, 2, steps, 5)
    orders = (stability.shuffle_steps(many, generator=seeded()) * 2 ** torch.arange(5)).sum(-1)
    assert (orders.sort(-1).values == labels).all()
    assert (orders == orders[:, :1, :1]).all()
    assert len({tuple(row) for row in orders[:, 0, 0].tolist()}) == 4  # each prompt has its own order
    assert not (orders[:, 0, 0] == labels).all(-1).any()


def test_shuffled_positions_are_drawn_anew_for_each_step_and_prompt_but_not_for_each_head() -> None:
    size = 40
    sets = torch.zeros(3, 2, 2, 5, size, dtype=torch.bool)
    sets[..., :8] = True
    got = stability.shuffle_positions(sets, generator=seeded())
    assert (got.sum(-1) == 8).all()
    assert (got == got[:, :1, :1]).all()
    assert len({tuple(row) for row in got[:, 0, 0].flatten(0, 1).tolist()}) == 15


def test_shuffled_positions_stay_among_the_keys_that_exist() -> None:
    keys = torch.tensor([2, 5, 9])
    sets = torch.zeros(50, 2, 3, 9, dtype=torch.bool)
    sets[..., 0] = True
    got = stability.shuffle_positions(sets, generator=seeded(), keys=keys)
    reached = got.any(0)[0]
    assert torch.equal(reached, variance.existing(keys, size=9))  # 50 prompts reach every existing key, and no other
    assert (got.sum(-1) == 1).all()


@pytest.mark.parametrize("shuffle", [stability.shuffle_steps, stability.shuffle_positions])
def test_a_shuffle_follows_its_seed_and_leaves_its_input_as_it_was(shuffle) -> None:
    sets = random_sets(8, 0.4)
    before = sets.clone()
    first, again, other = (shuffle(sets, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(sets, before)


def test_shuffles_take_sets_without_layers_and_heads() -> None:
    sets = random_sets(9, 0.4)[:, 0, 0]
    steps, positions = stability.shuffle_steps(sets, generator=seeded()), stability.shuffle_positions(sets, generator=seeded())
    assert steps.shape == positions.shape == sets.shape
    assert torch.equal(steps.sum(-2), sets.sum(-2)) and torch.equal(positions.sum(-1), sets.sum(-1))


def test_position_shuffles_bring_a_fixed_sink_down_to_chance() -> None:
    size, k = 10, 3
    sets = torch.zeros(1500, 2, size, dtype=torch.bool)
    sets[..., :k] = True
    chance, spread = slow.chance_moments(k, size)
    assert (stability.overlap_by_distance(sets, [1]) == 1).all()
    got = stability.overlap_by_distance(stability.shuffle_positions(sets, generator=seeded()), [1])
    assert float(got.mean()) == pytest.approx(chance, abs=5 * (spread / 1500) ** 0.5)
