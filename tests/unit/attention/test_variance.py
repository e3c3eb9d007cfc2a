"""The variances against slow loops, on planted sinks whose answer is a formula, and on empty sets."""

from math import isnan, nan

import pytest
import torch
from torch import Tensor

from lib.attention import planted, sinks, stability, variance
from lib.core.errors import InputError
from tests.unit import slow_variance as slow

BATCH = (2, 3, 2)  # prompt, layer, head
STEPS, SIZE = 6, 9
GROWING = torch.tensor([4, 4, 6, 7, 9, 9])


def random(seed: int, *shape: int) -> Tensor:
    """Uniform numbers in float64."""
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mass_of(seed: int) -> Tensor:
    """Masses of mean 1 for every prompt, layer, head and step."""
    return sinks.mean_one(random(seed, *BATCH, STEPS, SIZE) ** 4)


def sometimes(seed: int, share: float = 0.3) -> Tensor:
    """Sink sets of varying size; with the default share about one step in 25 has none."""
    return random(seed, *BATCH, STEPS, SIZE) < share


def equal(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Compare in float64, NaN where NaN is expected."""
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)


# --- against the loops ---------------------------------------------------------------------------------------------------


def test_existing_marks_the_first_keys_of_each_step() -> None:
    got = variance.existing(torch.tensor([0, 2, 3]), size=3)
    assert got.tolist() == [[key < count for key in range(3)] for count in (0, 2, 3)]


def test_trajectory_mean_and_spatial_variance_equal_a_loop() -> None:
    mass = mass_of(0)
    equal(variance.trajectory_mean(mass), slow.each(slow.trajectory_mean, BATCH, mass))
    equal(variance.spatial_variance(mass), slow.each(slow.spatial_variance, BATCH, mass))


@pytest.mark.parametrize("keys", [GROWING, torch.tensor([9, 3, 9, 1, 2, 5])], ids=["growing", "any order"])
def test_keys_that_do_not_exist_are_left_out_of_the_mean(keys: Tensor) -> None:
    mass = mass_of(1)
    mass = sinks.mean_one(mass, variance.existing(keys, size=SIZE).expand(mass.shape))
    means = slow.each(lambda rows: slow.trajectory_mean(rows, keys.tolist()), BATCH, mass)
    equal(variance.trajectory_mean(mass, keys=keys), means)
    spread = slow.each(lambda rows: slow.spatial_variance(rows, keys.tolist()), BATCH, mass)
    equal(variance.spatial_variance(mass, keys=keys), spread)
    assert ((spread - variance.spatial_variance(mass)).abs() > 1e-3).all()  # dividing by all steps is something else


def test_what_stands_in_a_key_that_does_not_exist_is_not_read() -> None:
    mass = mass_of(1)
    strange = torch.where(variance.existing(GROWING, size=SIZE), mass, nan)
    equal(variance.spatial_variance(strange, keys=GROWING), variance.spatial_variance(mass, keys=GROWING))


def test_centroid_equals_a_loop() -> None:
    mass, marked = mass_of(2), sometimes(3)
    got = variance.centroid(mass, marked)
    equal(got, slow.each(slow.centroid, (*BATCH, STEPS), mass, marked))
    assert got.isnan().any() and not got.isnan().all()
    position = torch.arange(SIZE, dtype=torch.float64)
    unweighted = (marked * position).sum(-1) / marked.sum(-1)
    assert ((got - unweighted).abs() > 1e-2).any()


@pytest.mark.parametrize("length", [1, SIZE])
def test_temporal_variance_equals_a_loop_and_skips_steps_without_sinks(length: int) -> None:
    centroids = variance.centroid(mass_of(2), sometimes(3, share=0.1))
    assert centroids.isnan().any()
    got = variance.temporal_variance(centroids, length=length)
    equal(got, slow.each(lambda row: slow.temporal_variance(row, length), BATCH, centroids))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_position_variance_equals_a_loop(k: int) -> None:
    positions = sinks.top_k_positions(mass_of(4), k=k)
    got = variance.position_variance(positions)
    equal(got.total, slow.each(slow.position_variance_total, BATCH, positions))
    equal(got.between, slow.each(slow.position_variance_between, BATCH, positions))
    within = slow.each(lambda step: slow.variance([float(p) for p in step]), (*BATCH, STEPS), positions).mean(-1)
    equal(got.total, got.between + within)
    assert bool((within > 0.1).all()) is (k > 1)


@pytest.mark.parametrize("k", [1, 3, SIZE])
def test_frequency_variance_of_top_k_sets_equals_a_loop(k: int) -> None:
    mass = (mass_of(5) * 2).round()  # many equal masses: the earlier key goes first
    got = variance.frequency_variance(variance.in_top_k(mass, k=k))
    equal(got, slow.each(lambda rows: slow.frequency_variance_top_k(rows, k), BATCH, mass), 1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_frequency_variance_of_favourites_equals_a_loop(causal: bool) -> None:
    """The digest's batched form: the mean over heads comes before the favourite, and a key counts once a step."""
    scores = 3 * random(6, 2, STEPS, 4, SIZE, SIZE)  # prompt, step, head, query, key
    hidden = torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1) if causal else torch.zeros(SIZE, SIZE, dtype=torch.bool)
    attention = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    present = variance.is_argmax(attention.mean(2))
    expected = slow.each(slow.frequency_variance_argmax, (2,), attention)
    equal(variance.frequency_variance(present), expected, 1e-6)
    one_head = variance.is_argmax(attention).any(2)  # favourites of single heads, brought together afterwards
    assert not torch.equal(one_head, present)
    assert int(present.sum(-1).min()) < SIZE  # some queries share their favourite


def test_a_key_is_a_favourite_once_however_many_queries_share_it() -> None:
    attention = torch.tensor([[[0.2, 0.8, 0.0], [0.1, 0.9, 0.0], [0.0, 0.4, 0.6]], [[0.5, 0.5, 0.0]] * 3])
    present = variance.is_argmax(attention)
    assert present.tolist() == [[False, True, True], [True, False, False]]
    assert variance.frequency_variance(present).tolist() == [0.5, 0.5, 0.5]


def test_the_mean_over_heads_has_its_own_favourite() -> None:
    """Each head prefers another key, their mean a third."""
    heads = torch.tensor([[[0.6, 0.0, 0.4]], [[0.0, 0.6, 0.4]]])
    assert variance.is_argmax(heads).tolist() == [[True, False, False], [False, True, False]]
    assert variance.is_argmax(heads.mean(0)).tolist() == [False, False, True]


def test_sink_frequency_variance_equals_a_loop_and_leaves_out_keys_that_are_never_sinks() -> None:
    present = sometimes(7, share=0.1)
    got = variance.sink_frequency_variance(present)
    equal(got, slow.each(slow.sink_frequency_variance, BATCH, present), 1e-6)
    assert ((variance.frequency_variance(present).mean(-1) - got) > 0.02).all()


# --- one step, no step, no sink ------------------------------------------------------------------------------------------


def test_one_step_does_not_vary() -> None:
    mass = mass_of(8)[..., :1, :]
    marked = variance.in_top_k(mass, k=2)
    assert variance.temporal_variance(variance.centroid(mass, marked)).eq(0).all()
    assert variance.position_variance(sinks.top_k_positions(mass, k=2)).between.eq(0).all()
    assert variance.sink_frequency_variance(marked).eq(0).all()


def test_an_empty_set_has_no_centroid_and_one_without_mass_neither() -> None:
    mass = torch.tensor([[1.0, 0.0, 3.0], [1.0, 0.0, 3.0], [1.0, 0.0, 3.0]])
    marked = torch.tensor([[False, False, False], [False, True, False], [True, True, True]])
    got = variance.centroid(mass, marked).tolist()
    assert isnan(got[0]) and isnan(got[1]) and got[2] == 1.5


def test_what_an_unmarked_key_holds_is_not_read() -> None:
    assert float(variance.centroid(torch.tensor([nan, 1.0, 3.0]), torch.tensor([False, True, True]))) == 1.75


def test_temporal_variance_without_any_sink_is_not_a_number() -> None:
    got = variance.temporal_variance(torch.tensor([[nan, nan, nan], [nan, 5.0, nan], [1.0, nan, 3.0]]))
    assert isnan(got[0]) and got[1:].tolist() == [0.0, 1.0]


def test_frequency_variance_without_any_sink() -> None:
    never = torch.zeros(4, 3, dtype=torch.bool)
    assert variance.frequency_variance(never).tolist() == [1.0, 1.0, 1.0]
    assert isnan(variance.sink_frequency_variance(never))


def test_a_key_that_exists_at_no_step_is_refused() -> None:
    for function in (variance.trajectory_mean, variance.spatial_variance):
        with pytest.raises(InputError, match="every key must exist at some step, got 2 without: cut the masses"):
            function(torch.ones(2, 5), keys=torch.tensor([2, 3]))


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_outside_the_keys_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=rf"k must be in \[1, 3\].*got {k}"):
        variance.in_top_k(torch.ones(2, 3), k=k)


# --- planted sinks: S keys, share s for one of them, mass a = s S there and b = (S - a) / (S - 1) elsewhere ---------------


PLANTED_SIZE, SHARE = 21, 0.5
PEAK = SHARE * PLANTED_SIZE
REST = (PLANTED_SIZE - PEAK) / (PLANTED_SIZE - 1)


def mass_along(path: list[int]) -> Tensor:
    """Column sums of planted attention, which have mean 1 as its rows sum to 1."""
    mass = planted.planted_attention(path, keys=PLANTED_SIZE, share=SHARE).sum(-2)
    torch.testing.assert_close(mass.mean(-1), torch.ones(len(path), dtype=torch.float64))
    return mass


def moved_by(mass: Tensor, marked: Tensor, *, length: int = 1) -> float:
    """Temporal variance of a trajectory."""
    return float(variance.temporal_variance(variance.centroid(mass, marked), length=length))


@pytest.mark.parametrize(("steps", "position"), [(5, 0), (8, 13), (1, 20)])
def test_a_fixed_sink(steps: int, position: int) -> None:
    """Spatial variance (a - 1)² / (S - 1); nothing moves."""
    mass = mass_along(planted.fixed(steps=steps, position=position))
    assert float(variance.spatial_variance(mass)) == pytest.approx((PEAK - 1) ** 2 / (PLANTED_SIZE - 1), abs=1e-12)
    top = variance.in_top_k(mass, k=1)
    assert variance.centroid(mass, top).tolist() == pytest.approx([position] * steps, abs=1e-12)
    assert moved_by(mass, top) == pytest.approx(0, abs=1e-12)
    place = variance.position_variance(sinks.top_k_positions(mass, k=1))
    assert (float(place.total), float(place.between)) == (0.0, 0.0)
    expected = [0.0 if key == position else 1.0 for key in range(PLANTED_SIZE)]
    assert variance.frequency_variance(top).tolist() == expected
    assert float(variance.sink_frequency_variance(top)) == 0.0


def test_rullis_rule_finds_the_planted_sink_alone() -> None:
    """a - b = 10 > 3, and no other key is above the mean of the others."""
    path = planted.drifting(steps=6, start=2, per_step=3)
    mass = mass_along(path)
    assert PEAK - REST > sinks.RULLI_EPSILON
    assert [row.nonzero()[:, 0].tolist() for row in sinks.sinks_leave_one_out(mass)] == [[position] for position in path]


@pytest.mark.parametrize(("steps", "start", "per_step"), [(6, 1, 3), (7, 20, -2), (2, 5, 1)])
def test_a_drifting_sink(steps: int, start: int, per_step: int) -> None:
    """Temporal variance v² (T² - 1) / 12; the mean mass spreads over T keys: ((a - b) / T)² (T / S) (1 - T / S)."""
    mass = mass_along(planted.drifting(steps=steps, start=start, per_step=per_step))
    top = variance.in_top_k(mass, k=1)
    moved = per_step**2 * (steps**2 - 1) / 12
    assert moved_by(mass, top) == pytest.approx(moved, abs=1e-12)
    assert moved_by(mass, top, length=PLANTED_SIZE) == pytest.approx(moved / PLANTED_SIZE**2, abs=1e-12)
    place = variance.position_variance(sinks.top_k_positions(mass, k=1))
    assert float(place.total) == pytest.approx(moved, abs=1e-12) and float(place.between) == pytest.approx(moved, abs=1e-12)
    part = steps / PLANTED_SIZE
    spread = ((PEAK - REST) / steps) ** 2 * part * (1 - part)
    assert float(variance.spatial_variance(mass)) == pytest.approx(spread, abs=1e-12)
    visited = planted.drifting(steps=steps, start=start, per_step=per_step)
    expected = [1 - 1 / steps if key in visited else 1.0 for key in range(PLANTED_SIZE)]
    assert variance.frequency_variance(top).tolist() == pytest.approx(expected, abs=1e-6)
    assert float(variance.sink_frequency_variance(top)) == pytest.approx(1 - 1 / steps, abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [(4, 15), (9, 0)])
def test_two_alternating_sinks(first: int, second: int) -> None:
    """Temporal variance (p - q)² / 4 for even T, frequency variance 1/2 at both."""
    mass = mass_along(planted.alternating(steps=10, positions=(first, second)))
    top = variance.in_top_k(mass, k=1)
    assert moved_by(mass, top) == pytest.approx((first - second) ** 2 / 4, abs=1e-12)
    assert float(variance.position_variance(sinks.top_k_positions(mass, k=1)).total) == pytest.approx((first - second) ** 2 / 4)
    expected = [0.5 if key in (first, second) else 1.0 for key in range(PLANTED_SIZE)]
    assert variance.frequency_variance(top).tolist() == expected
    assert float(variance.sink_frequency_variance(top)) == 0.5


def test_an_odd_number_of_alternations_has_unequal_shares() -> None:
    """p in (T + 1) / 2 of T steps: variance (p - q)² (T² - 1) / (4 T²), frequency variance (T - 1) / 2T and (T + 1) / 2T."""
    steps, first, second = 7, 3, 11
    mass = mass_along(planted.alternating(steps=steps, positions=(first, second)))
    top = variance.in_top_k(mass, k=1)
    assert moved_by(mass, top) == pytest.approx((first - second) ** 2 * (steps**2 - 1) / (4 * steps**2), abs=1e-12)
    frequency = variance.frequency_variance(top)
    assert [float(frequency[first]), float(frequency[second])] == pytest.approx([3 / 7, 4 / 7], abs=1e-6)
    assert float(variance.sink_frequency_variance(top)) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("weight", [0.5, 0.6, 0.75])
def test_a_heavy_fixed_sink_beside_a_drifting_one(weight: float) -> None:
    """The centroid weighs the two by mass, so it moves by the drifting one's share of their mass; positions do not weigh.

    With p fixed and q_t = q_0 + v t: c_t = (m_p p + m_q q_t) / (m_p + m_q), so the temporal variance is r² v² (T² - 1) / 12 with
    r = m_q / (m_p + m_q). Position variance between steps has r = 1/2 always; within a step it is ((q_t - p) / 2)².
    """
    steps, position, start, per_step = 8, 2, 5, 2
    path = planted.drifting(steps=steps, start=start, per_step=per_step)
    mass = weight * mass_along(planted.fixed(steps=steps, position=position)) + (1 - weight) * mass_along(path)
    marked = variance.in_top_k(mass, k=2)
    heavy, light = weight * PEAK + (1 - weight) * REST, (1 - weight) * PEAK + weight * REST
    ratio = light / (heavy + light)
    moved = per_step**2 * (steps**2 - 1) / 12
    expected = [(heavy * position + light * there) / (heavy + light) for there in path]
    assert variance.centroid(mass, marked).tolist() == pytest.approx(expected, abs=1e-12)
    assert moved_by(mass, marked) == pytest.approx(ratio**2 * moved, abs=1e-12)
    place = variance.position_variance(sinks.top_k_positions(mass, k=2))
    within = sum(((there - position) / 2) ** 2 for there in path) / steps
    assert float(place.between) == pytest.approx(moved / 4, abs=1e-12)
    assert float(place.total) == pytest.approx(moved / 4 + within, abs=1e-12)
    assert float(variance.sink_frequency_variance(marked)) == pytest.approx((0 + steps * (1 - 1 / steps)) / (1 + steps), abs=1e-6)


def test_growing_prefixes_with_even_attention_have_no_spatial_variance() -> None:
    """Mass 1 on all that exists: counting a missing key as 0 would make the late keys look weak."""
    keys = torch.tensor([2, 5, 6])
    mass = variance.existing(keys, size=6).double()
    assert variance.trajectory_mean(mass, keys=keys).tolist() == [1.0] * 6
    assert float(variance.spatial_variance(mass, keys=keys)) == 0.0
    assert float(variance.spatial_variance(mass)) > 0.05


def test_a_fixed_first_sink_of_growing_prefixes() -> None:
    """With share s for key 0 of n_t keys: m_t(0) = s n_t, and (1 - s) n_t / (n_t - 1) elsewhere."""
    lengths, share = (4, 6, 9), 0.4
    mass = torch.zeros(3, 9, dtype=torch.float64)
    for step, count in enumerate(lengths):
        mass[step, :count] = planted.planted_attention([0], keys=count, share=share)[0].sum(0)
    expected = []
    for key in range(9):
        there = [count for count in lengths if key < count]
        expected.append(sum(share * n if key == 0 else (1 - share) * n / (n - 1) for n in there) / len(there))
    keys = torch.tensor(lengths)
    assert variance.trajectory_mean(mass, keys=keys).tolist() == pytest.approx(expected, abs=1e-12)
    assert float(variance.spatial_variance(mass, keys=keys)) == pytest.approx(slow.variance(expected), abs=1e-12)
    assert moved_by(mass, variance.in_top_k(mass, k=1)) == 0.0


def test_spatial_variance_is_largest_when_one_key_receives_everything() -> None:
    mass = planted.planted_attention([3, 3], keys=PLANTED_SIZE, share=1.0).sum(-2)
    assert float(variance.spatial_variance(mass)) == pytest.approx(PLANTED_SIZE - 1, abs=1e-12)
    even = planted.planted_attention([3, 3], keys=PLANTED_SIZE, share=1 / PLANTED_SIZE).sum(-2)
    assert float(variance.spatial_variance(even)) == pytest.approx(0, abs=1e-12)


def test_the_four_trajectories_are_told_apart() -> None:
    """High and still, low and moving, as the paper reads its two families of models; overlap says the same of the sets."""
    still = mass_along(planted.fixed(steps=6, position=0))
    moving = mass_along(planted.drifting(steps=6, start=0, per_step=4))
    for measure, above in ((variance.spatial_variance, still), (lambda m: moved_by(m, variance.in_top_k(m, k=1)), moving)):
        below = moving if above is still else still
        assert float(measure(above)) > float(measure(below)) + 1
    overlaps = [float(stability.overlap_by_distance(variance.in_top_k(mass, k=1), [1])) for mass in (still, moving)]
    assert overlaps == [1.0, 0.0]
