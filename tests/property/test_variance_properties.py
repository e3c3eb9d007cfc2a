"""What must hold for every trajectory: order of heads, scale, padding, place, and the two nulls."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.attention import sinks, stability, variance
from lib.core.errors import InputError

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")

SEEDS = st.integers(0, 2**31 - 1)
COLUMNS = 2 ** torch.arange(12)  # a row of marks as one number


@st.composite
def trajectories(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Masses `[prompt, head, step, key]` in float64 and sink sets, some of them empty, some masses equal."""
    shape = [draw(st.integers(*limits)) for limits in ((1, 3), (1, 4), (2, 6), (2, 8))]
    generator = torch.Generator().manual_seed(draw(SEEDS))
    mass = torch.randint(1, 200, shape, generator=generator).double() / 64  # exact in binary, so that sums do not round
    share = draw(st.sampled_from([0.1, 0.4, 0.9]))
    return mass, torch.rand(shape, generator=generator) < share


def quantities(mass: Tensor, sets: Tensor) -> dict[str, Tensor]:
    """Everything that has one value for a trajectory, and needs no spatial mean."""
    centroids = variance.centroid(mass, sets)
    signed, absolute = stability.drift(centroids)
    return {
        "temporal": variance.temporal_variance(centroids),
        "frequency": variance.sink_frequency_variance(sets),
        "overlap": stability.overlap_by_distance(sets, range(1, sets.shape[-2])).movedim(-1, 0),
        "lifetime": stability.mean_lifetime(sets),
        "signed drift": signed,
        "absolute drift": absolute,
    }


def same(got: Tensor | dict[str, Tensor], expected: Tensor | dict[str, Tensor]) -> None:
    """Compare numbers, NaN where NaN is expected; what is made of counts has single precision."""
    if isinstance(got, dict) and isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name, values in got.items():
            same(values, expected[name])
        return
    assert isinstance(got, Tensor) and isinstance(expected, Tensor)
    tolerance = 1e-6 if got.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


# --- order, scale, padding, place ----------------------------------------------------------------------------------------


@given(trajectories(), st.randoms(use_true_random=False))
def test_the_order_of_heads_only_orders_the_results(case: tuple[Tensor, Tensor], random) -> None:
    mass, sets = case
    order = random.sample(range(mass.shape[1]), mass.shape[1])
    moved, moved_sets = mass[:, order], sets[:, order]
    same(variance.spatial_variance(moved), variance.spatial_variance(mass)[:, order])
    same(variance.centroid(moved, moved_sets), variance.centroid(mass, sets)[:, order])
    before, after = quantities(mass, sets), quantities(moved, moved_sets)
    same(after, {name: values[..., order] for name, values in before.items()})
    # and heads that are averaged may come in any order
    same(variance.spatial_variance(moved.mean(1)), variance.spatial_variance(mass.mean(1)))
    marked = sets.any(1)
    same(quantities(moved.mean(1), marked), quantities(mass.mean(1), marked))


@given(trajectories(), st.floats(0.01, 100.0))
def test_the_unit_of_the_masses_does_not_matter_after_mean_one(case: tuple[Tensor, Tensor], scale: float) -> None:
    mass, sets = case
    first, second = sinks.mean_one(mass), sinks.mean_one(mass * scale)
    same(variance.spatial_variance(second), variance.spatial_variance(first))
    same(quantities(second, sets), quantities(first, sets))
    same(quantities(mass * scale, sets), quantities(mass, sets))  # a centroid is a ratio anyway
    # spatial variance is in squared units of the mass, which is why masses are brought to mean 1
    same(variance.spatial_variance(mass * scale) / scale**2, variance.spatial_variance(mass))


@given(trajectories(), st.integers(1, 4))
def test_padding_at_the_end_changes_nothing(case: tuple[Tensor, Tensor], extra: int) -> None:
    mass, sets = case
    size = mass.shape[-1]
    padded = torch.cat([mass, torch.full((*mass.shape[:-1], extra), 777.0, dtype=mass.dtype)], -1)
    real = (torch.arange(size + extra) < size).expand(padded.shape)
    scaled = sinks.mean_one(padded, real)
    same(scaled[..., :size], sinks.mean_one(mass))
    wide = torch.cat([sets, torch.zeros(*sets.shape[:-1], extra, dtype=torch.bool)], -1)
    same(quantities(scaled, wide), quantities(mass, sets))
    same(quantities(padded, wide), quantities(mass, sets))
    assert (variance.frequency_variance(wide)[..., size:] == 1).all()
    # the mean mass has no use for keys that never exist, and says so
    keys = torch.full((mass.shape[-2],), size)
    same(variance.spatial_variance(scaled[..., :size], keys=keys), variance.spatial_variance(sinks.mean_one(mass)))
    with pytest.raises(InputError, match=f"got {extra} without"):
        variance.spatial_variance(scaled, keys=keys)


@given(trajectories(), st.lists(st.integers(1, 8), min_size=6, max_size=6))
def test_keys_that_do_not_exist_yet_do_not_count(case: tuple[Tensor, Tensor], lengths: list[int]) -> None:
    """Whatever stands there; and a constant mass over what exists has mean 1 and no variance."""
    mass, _ = case
    steps, size = mass.shape[-2:]
    keys = torch.tensor(lengths[:steps]).clamp(max=size)
    keys[-1] = size
    present = variance.existing(keys, size=size)
    first = variance.spatial_variance(torch.where(present, mass, 0.0), keys=keys)
    same(variance.spatial_variance(torch.where(present, mass, 1e6), keys=keys), first)
    same(variance.spatial_variance(present.double(), keys=keys), torch.zeros((), dtype=torch.float64))
    means = variance.trajectory_mean(mass, keys=keys)
    lowest, highest = (torch.where(present, mass, limit) for limit in (torch.inf, -torch.inf))
    assert ((means >= lowest.amin(-2) - 1e-9) & (means <= highest.amax(-2) + 1e-9)).all()


@given(trajectories(), st.integers(0, 5), st.integers(0, 5))
def test_a_shift_of_all_positions_moves_the_centroid_and_nothing_else(case: tuple[Tensor, Tensor], left: int, room: int) -> None:
    mass, sets = case
    wide = torch.nn.functional.pad(mass, (0, left + room)), torch.nn.functional.pad(sets, (0, left + room))
    moved = [tensor.roll(left, -1) for tensor in wide]
    same(variance.centroid(moved[0], moved[1]), variance.centroid(mass, sets) + left)
    same(quantities(moved[0], moved[1]), quantities(mass, sets))
    same(variance.spatial_variance(moved[0]), variance.spatial_variance(wide[0]))
    positions = [sinks.top_k_positions(masses, k=2) for masses in (mass, moved[0])]
    before, after = (variance.position_variance(found) for found in positions)
    same((positions[1] - positions[0]).double(), torch.full(positions[0].shape, float(left), dtype=torch.float64))
    same(torch.stack([after.total, after.between]), torch.stack([before.total, before.between]))


@given(trajectories())
def test_a_mirror_turns_the_drift_and_nothing_else(case: tuple[Tensor, Tensor]) -> None:
    mass, sets = case
    before, after = quantities(mass, sets), quantities(mass.flip(-1), sets.flip(-1))
    same(after | {"signed drift": -after["signed drift"]}, before)


@given(trajectories())
def test_time_may_run_backwards(case: tuple[Tensor, Tensor]) -> None:
    """Only the signed drift knows the direction; a mean over time does not."""
    mass, sets = case
    before, after = quantities(mass, sets), quantities(mass.flip(-2), sets.flip(-2))
    same(after | {"signed drift": -after["signed drift"]}, before)
    same(variance.spatial_variance(mass.flip(-2)), variance.spatial_variance(mass))


# --- bounds --------------------------------------------------------------------------------------------------------------


@given(trajectories())
def test_everything_stays_within_its_bounds(case: tuple[Tensor, Tensor]) -> None:
    mass, sets = case
    steps, size = mass.shape[-2:]
    frequency = variance.frequency_variance(sets)
    assert ((frequency >= 0) & (frequency <= 1)).all()
    found = quantities(mass, sets)
    limits = {
        "temporal": (0.0, (size - 1) ** 2 / 4),
        "frequency": (0.0, 1 - 1 / steps),  # a sink was there at least once
        "overlap": (0.0, 1.0),
        "lifetime": (1.0, float(steps)),
        "signed drift": (1.0 - size, size - 1.0),
        "absolute drift": (0.0, size - 1.0),
    }
    for name, (low, high) in limits.items():
        values = found[name][~found[name].isnan()]
        assert ((values >= low - 1e-6) & (values <= high + 1e-6)).all(), name
    same(found["signed drift"].abs().maximum(found["absolute drift"]), found["absolute drift"])
    spatial = variance.spatial_variance(sinks.mean_one(mass))
    assert ((spatial >= 0) & (spatial <= size - 1)).all()
    without = ~sets.any(-1).any(-1)
    for name in ("temporal", "frequency", "lifetime"):
        assert torch.equal(found[name].isnan(), without)


@given(trajectories(), st.integers(1, 8))
def test_top_k_sets_are_sinks_k_times_a_step_on_average(case: tuple[Tensor, Tensor], k: int) -> None:
    mass, _ = case
    k = min(k, mass.shape[-1])
    frequency = variance.frequency_variance(variance.in_top_k(mass, k=k))
    same(frequency.mean(-1), torch.full(mass.shape[:-2], 1 - k / mass.shape[-1]))
    place = variance.position_variance(sinks.top_k_positions(mass, k=k))
    assert (place.between <= place.total + 1e-9).all()
    if k == 1:
        same(place.between, place.total)


# --- nulls ---------------------------------------------------------------------------------------------------------------


@given(trajectories(), SEEDS)
def test_shuffled_steps_keep_each_prompts_sets_and_all_its_heads_together(case: tuple[Tensor, Tensor], seed: int) -> None:
    _, sets = case
    got = stability.shuffle_steps(sets, generator=torch.Generator().manual_seed(seed))
    numbers = [(tensor * COLUMNS[: sets.shape[-1]]).sum(-1) for tensor in (sets, got)]  # prompt, head, step
    for before, after in zip(*numbers, strict=True):
        assert sorted(before.T.tolist()) == sorted(after.T.tolist())  # a step is the tuple of its heads' sets
    same(variance.sink_frequency_variance(got), variance.sink_frequency_variance(sets))


@given(trajectories(), SEEDS, st.lists(st.integers(1, 8), min_size=6, max_size=6))
def test_shuffled_positions_keep_sizes_the_keys_that_exist_and_all_heads_together(
    case: tuple[Tensor, Tensor], seed: int, lengths: list[int]
) -> None:
    _, sets = case
    steps, size = sets.shape[-2:]
    keys = torch.tensor(lengths[:steps]).clamp(max=size)
    for counts in (None, keys):
        got = stability.shuffle_positions(sets, generator=torch.Generator().manual_seed(seed), keys=counts)
        assert torch.equal(got.sum(-1), sets.sum(-1))
        absent = ~variance.existing(keys if counts is not None else torch.full((steps,), size), size=size)
        assert torch.equal(got & absent, sets & absent)
        numbers = [(tensor.movedim(1, -1) * COLUMNS[: sets.shape[1]]).sum(-1) for tensor in (sets, got)]  # prompt, step, key
        assert torch.equal(numbers[0].sort(-1).values, numbers[1].sort(-1).values)  # a key is the tuple of its heads' marks


@settings(max_examples=15)
@given(st.integers(4, 9), st.integers(1, 4), st.integers(1, 2), SEEDS)
def test_overlap_of_shuffled_steps_does_not_depend_on_the_distance(steps: int, width: int, speed: int, seed: int) -> None:
    """A window that drifts overlaps less and less; in random order every distance shows the mean J over all pairs of steps.

    The mean over the pairs at one distance varies no more than one pair does, so over n independent prompts its standard error is
    at most sd(J) / sqrt(n), with the mean and sd of J taken over all pairs. 6 of these are allowed: 120 comparisons at most
    would be wrong once in 10^7 runs.
    """
    prompts = 1500
    size = width + speed * (steps - 1)
    window = torch.stack([torch.arange(size).sub(speed * step) for step in range(steps)])
    sets = (window >= 0) & (window < width)
    pairs = [stability.jaccard(sets[first], sets[second]).item() for first, second in combinations(range(steps), 2)]
    mean = sum(pairs) / len(pairs)
    deviation = (sum((value - mean) ** 2 for value in pairs) / len(pairs)) ** 0.5
    distances = range(1, steps)
    real = stability.overlap_by_distance(sets, distances)
    assert (real.diff() <= 1e-6).all()
    shuffled = stability.shuffle_steps(sets.expand(prompts, 2, -1, -1), generator=torch.Generator().manual_seed(seed))
    null = stability.overlap_by_distance(shuffled, distances).double().mean((0, 1))
    allowed = 6 * deviation / prompts**0.5 + 1e-6
    assert ((null - mean).abs() <= allowed).all()
    if width > speed:  # the real overlap does decay, by more than the null is allowed to
        assert float(real[0] - real[-1]) > 2 * allowed
