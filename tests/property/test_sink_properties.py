"""What must hold for every mass."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.attention import sinks

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")


@st.composite
def masses(draw: st.DrawFn, smallest: int = 2) -> Tensor:
    """A mass vector in float64, some values equal, none of them all zero."""
    values = draw(st.lists(st.integers(0, 1000), min_size=smallest, max_size=24).filter(any))
    return torch.tensor(values, dtype=torch.float64) / 64  # exact in binary, so that sums do not round


@given(masses(), st.integers(0, 5))
def test_leave_one_out_equals_mean_plus_shrunk_epsilon(mass: Tensor, epsilon: int) -> None:
    size = len(mass)
    margin = mass - mass.mean() - epsilon * (size - 1) / size
    clear = margin.abs() > 1e-9
    assert torch.equal(sinks.sinks_leave_one_out(mass, epsilon=float(epsilon))[clear], (margin > 0)[clear])


@given(masses(), st.floats(0.1, 4.0))
def test_mean_std_obeys_cantellis_bound(mass: Tensor, num_std: float) -> None:
    share = sinks.sinks_mean_std(mass, num_std=num_std).double().mean()
    assert share <= 1 / (1 + num_std**2) + 1e-9


@given(masses(), st.floats(0.01, 100.0))
def test_scale_changes_nothing_after_mean_one(mass: Tensor, scale: float) -> None:
    torch.testing.assert_close(sinks.mean_one(mass * scale), sinks.mean_one(mass), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(sinks.mean_one(mass).mean(), torch.tensor(1.0, dtype=torch.float64))


@given(masses(), st.integers(1, 5), st.randoms(use_true_random=False))
def test_padding_changes_nothing(mass: Tensor, extra: int, random) -> None:
    order = list(range(len(mass) + extra))
    random.shuffle(order)
    real = torch.tensor([True] * len(mass) + [False] * extra)[order]
    padded = torch.cat([mass, torch.full((extra,), 777.0, dtype=torch.float64)])[order]
    got = sinks.mean_one(padded, real)
    assert (got[~real] == 0).all()
    inside = torch.tensor([index for index in order if index < len(mass)])
    torch.testing.assert_close(got[real], sinks.mean_one(mass)[inside])


@given(masses(), st.integers(1, 24), st.permutations(range(24)))
def test_top_k_share_is_bounded_rises_and_ignores_order(mass: Tensor, k: int, order: list[int]) -> None:
    k = min(k, len(mass))
    share = float(sinks.top_k_share(mass, k=k))
    assert k / len(mass) - 1e-12 <= share <= 1 + 1e-12
    if k > 1:
        assert share >= float(sinks.top_k_share(mass, k=k - 1)) - 1e-12
    shuffled = mass[[index for index in order if index < len(mass)]]
    assert abs(float(sinks.top_k_share(shuffled, k=k)) - share) < 1e-12


@given(masses(), st.integers(1, 24))
def test_top_k_positions_are_the_largest_in_order(mass: Tensor, k: int) -> None:
    k = min(k, len(mass))
    expected = sorted(range(len(mass)), key=lambda index: (-float(mass[index]), index))[:k]
    assert sinks.top_k_positions(mass, k=k).tolist() == expected


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.integers(1, 5), st.randoms(use_true_random=False))
def test_wander_rate_ignores_names_and_order(positions: list[int], shift: int, random) -> None:
    rate = float(sinks.wander_rate(torch.tensor(positions)))
    commonest = max(positions.count(value) for value in positions)
    assert abs(rate - (1 - commonest / len(positions))) < 1e-6
    moved = [value * shift + shift for value in positions]
    random.shuffle(moved)
    assert abs(float(sinks.wander_rate(torch.tensor(moved))) - rate) < 1e-6


@given(masses(), st.floats(0.1, 10))
def test_score_and_weight_lie_in_the_unit_interval_and_order_as_the_mass(mass: Tensor, alpha: float) -> None:
    score = sinks.soft_score(mass, sinks.mean_std_threshold(mass), alpha=alpha)
    assert ((score >= 0) & (score <= 1)).all()
    assert (score[mass.argsort()].diff() >= -1e-12).all()  # vector and scalar sigmoids differ in the last bit
    torch.testing.assert_close(score + sinks.token_weight(score), torch.ones_like(score))
