"""Token weights: what is taken out, how many, that controls take out as many as there are sinks, and instability by hand."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lib.calibration import token_weights
from lib.calibration.token_weights import CONTROLS, INSTABILITY, Kind, Weighting
from lib.core.errors import InputError
from tests.unit import slow_pruning as slow

SCORE = torch.tensor([[0.9, 0.1, 0.8, 0.0, 0.0, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
IDS = torch.tensor([[9, 1, 2, 9, 9, 3], [9, 9, 1, 2, 3, 4]])
NORM = torch.tensor([[1.0, 5.0, 2.0, 7.0, 0.5, 3.0], [4.0, 1.0, 9.0, 2.0, 3.0, 0.0]])


def options(seed: int = 0) -> dict[str, Any]:
    return {"input_ids": IDS, "mask_token_id": 9, "activation_norm": NORM, "generator": torch.Generator().manual_seed(seed)}


def taken(weights: Tensor) -> list[list[int]]:
    """Positions of weight 0."""
    return [row.nonzero()[:, 0].tolist() for row in weights == 0]


# --- scores --------------------------------------------------------------------------------------------------------------


def drawn_mass() -> Tensor:
    """`[layer, sample, head, position]`, with sinks at places that differ by layer, sample and head."""
    mass = torch.rand(2, 3, 4, 12, generator=torch.Generator().manual_seed(0)).double()
    for layer in range(2):
        for sample in range(3):
            for head in range(4):
                mass[layer, sample, head, (5 * layer + 2 * sample + 3 * head) % 12] += 8.0
            mass[layer, sample, :, sample] += 8.0
    return mass


def parts(mass: Tensor, level: str, unit: str) -> Tensor:
    """What is compared at each level, written out: sums (or means) over layers and heads, over heads, or over nothing."""
    if level == "head":
        return mass
    over_heads = sum(mass[:, :, head] for head in range(4)) / (4 if unit == "mean_one" else 1)
    assert isinstance(over_heads, Tensor)
    return over_heads if level == "layer" else (over_heads[0] + over_heads[1]) / (2 if unit == "mean_one" else 1)


@pytest.mark.parametrize("alpha", [None, 0.7])
@pytest.mark.parametrize("unit", ["sum", "mean_one"])
@pytest.mark.parametrize("level", ["aggregate", "layer", "head"])
def test_scores_at_every_level_against_a_loop(level: Any, unit: Any, alpha: float | None) -> None:
    mass = drawn_mass()
    got = token_weights.sink_score(mass, Weighting(level=level, unit=unit, alpha=alpha, margin=1.5))
    values = parts(mass, level, unit)
    assert got.shape == values.shape
    for row, expected in zip(got.reshape(-1, 12), values.reshape(-1, 12).tolist(), strict=True):
        scores = torch.tensor(slow.scores(expected, num_std=1.5, alpha=alpha), dtype=torch.float64)
        torch.testing.assert_close(row, scores, atol=1e-9, rtol=0)
    assert got.max() - got.min() > 0.3
    # the mean over the levels below is another score than the score of the mean
    if level != "head":
        heads = token_weights.sink_score(mass, Weighting(level="head", alpha=alpha, margin=1.5))
        assert not torch.allclose(heads.mean(2) if level == "layer" else heads.mean((0, 2)), got, atol=0.1)


@pytest.mark.parametrize("level", ["aggregate", "layer", "head"])
def test_the_leave_one_out_rule_at_every_level(level: Any) -> None:
    mass, weighting = drawn_mass(), Weighting(level=level, rule="leave_one_out", margin=2.0, alpha=None)
    got = token_weights.sink_score(mass, weighting)
    for row, values in zip(got.reshape(-1, 12).tolist(), parts(mass, level, "sum").reshape(-1, 12).tolist(), strict=True):
        expected = [float(value > (sum(values) - value) / 11 + 2.0) for value in values]
        assert row == expected and any(expected)
    # its margin is in the unit of the mass, unlike standard deviations
    assert not token_weights.sink_score(mass / 50, weighting).any()
    assert token_weights.sink_score(mass / 50, Weighting(level=level, margin=2.0, alpha=None)).any()


def test_the_unit_decides_how_steep_a_score_is_and_not_where_its_middle_lies() -> None:
    mass = drawn_mass()
    summed, averaged = (
        token_weights.sink_score(mass, Weighting(unit=unit, margin=1.0, alpha=0.05)) for unit in ("sum", "mean_one")
    )
    assert torch.equal(summed > 0.5, averaged > 0.5)
    # sigmoid(0.05 x 8 d) against sigmoid(0.05 x d): there are 8 maps
    torch.testing.assert_close(summed.logit(), 8 * averaged.logit(), atol=1e-9, rtol=1e-6)


def test_the_defaults_are_those_of_the_release() -> None:
    default = Weighting()
    assert (default.kind, default.level, default.rule, default.unit) == ("sinks_down", "aggregate", "mean_std", "sum")
    assert (default.margin, default.alpha, default.averaged) == (2.0, 5.0, False)


def test_down_and_up_are_mirror_images() -> None:
    assert torch.equal(token_weights.sinks_down(SCORE), 1 - SCORE)
    assert torch.equal(token_weights.sinks_up(SCORE, boost=2.0), 1 + 2 * SCORE)
    assert torch.equal(token_weights.sinks_up(SCORE) + token_weights.sinks_down(SCORE), torch.full_like(SCORE, 2.0))


def test_levels_are_averaged_per_window() -> None:
    weight = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]])
    assert token_weights.average_over_levels(weight).tolist() == [[0.5, 0.0], [0.5, 1.0]]


# --- instability ---------------------------------------------------------------------------------------------------------

POSITIONS, LEVELS = 40, 8


def planted(levels_of: dict[int, int], *, base: float = 0.75) -> Tensor:
    """One window whose position p is a sink (mass 8, dyadic so that sums are exact) at the first `levels_of[p]` levels."""
    mass = torch.full((1, LEVELS, POSITIONS), base).double()
    for position, levels in levels_of.items():
        mass[0, :levels, position] = 8.0
    return mass


def test_presence_is_four_f_times_one_minus_f() -> None:
    """Position 0 is a sink at all levels, 5 at half of them, 9 at a quarter, 20 at seven of eight, the others never."""
    score = token_weights.instability_score(planted({0: 8, 5: 4, 9: 2, 20: 7}), kind="presence", margin=1.0)
    expected = torch.zeros(1, POSITIONS).double()
    expected[0, 5], expected[0, 9], expected[0, 20] = 1.0, 0.75, 4 * 7 / 64
    assert torch.equal(score, expected)
    assert torch.equal(token_weights.sinks_down(score)[0, [0, 5]], torch.tensor([1.0, 0.0]).double())


def test_presence_is_that_of_every_window_alone() -> None:
    both = torch.cat([planted({0: 8, 5: 4}), planted({5: 8, 7: 2})])
    score = token_weights.instability_score(both, kind="presence", margin=1.0)
    assert score[0].nonzero()[:, 0].tolist() == [5] and score[1].nonzero()[:, 0].tolist() == [7]


def test_variance_marks_what_changes_and_not_what_is_large() -> None:
    """The always-sink has the largest mass and no variance; half-time sinks vary most, a quarter-time sink by 3/4 of that."""
    mass = planted({0: 8, 5: 4})
    assert token_weights.instability_score(mass, kind="variance").nonzero().tolist() == [[0, 5]]
    both = planted({0: 8, 5: 4, 9: 2})
    over_time = {5: 7.25**2 / 4, 9: 7.25**2 * 3 / 16}  # f (1 - f) (8 - 0.75)^2
    mean = sum(over_time.values()) / POSITIONS
    std = (sum(value**2 for value in over_time.values()) / POSITIONS - mean**2) ** 0.5
    between = (sum(over_time.values()) / 2 - mean) / std
    for margin, marked in ((between - 1.0, [5, 9]), (between, [5]), (between + 1.0, [])):
        score = token_weights.instability_score(both, kind="variance", margin=margin)
        assert score[0].nonzero()[:, 0].tolist() == marked, margin


@pytest.mark.parametrize("levels", [2, 3, 7, 10])
def test_a_mass_that_never_changes_is_stable_however_it_rounds(levels: int) -> None:
    for seed in range(20):
        mass = torch.rand(2, 1, 50, generator=torch.Generator().manual_seed(seed)).pow(6) * 20
        held = mass.expand(2, levels, 50).contiguous()
        for kind in ("variance", "presence"):
            assert not token_weights.instability_score(held, kind=kind).any()


@pytest.mark.parametrize("kind", INSTABILITY)
def test_one_level_cannot_tell_stable_from_unstable(kind: Any) -> None:
    with pytest.raises(InputError, match="instability must be measured over at least 2 noise levels, got 1: raise levels"):
        token_weights.instability_score(planted({})[:, :1], kind=kind)
    assert not token_weights.instability_score(planted({0: 1})[:, :2].flip(2)[:, :, :4], kind=kind).any()


# --- controls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", CONTROLS)
def test_controls_take_out_as_many_as_there_are_sinks(control: str) -> None:
    weights = token_weights.control_down(SCORE, control, **options())
    assert ((weights == 0) | (weights == 1)).all()
    assert [len(row) for row in taken(weights)] == [2, 1]


def test_a_sink_is_a_score_above_one_half() -> None:
    score = torch.tensor([[0.5, 0.51, 0.49, 0.5], [1.0, 1.0, 1.0, 0.0]])
    weights = token_weights.control_down(score, "first", input_ids=torch.zeros(2, 4).long())
    assert taken(weights) == [[0], [3]]  # as many others; three sinks leave one other position
    assert torch.equal(token_weights.control_down(score * 0, "first", input_ids=IDS[:, :4]), torch.ones(2, 4))


def test_each_control_takes_out_its_own_kind() -> None:
    def gone(control: str, seed: int = 0) -> list[list[int]]:
        return taken(token_weights.control_down(SCORE, control, **options(seed)))

    assert gone("first") == [[1, 3], [0]]  # 0 and 2 are sinks
    assert gone("norm") == [[1, 3], [2]]
    masks = {tuple(gone("mask", seed)[0]) for seed in range(40)}
    assert masks == {(3, 4)}  # the mask at 0 is a sink
    assert {tuple(gone("mask", seed)[1]) for seed in range(40)} == {(0,), (1,)}
    assert len({tuple(gone("random", seed)[0]) for seed in range(60)}) == 6  # all pairs of the four others


@pytest.mark.parametrize("control", ["random", "mask"])
def test_drawn_controls_follow_their_generator(control: str) -> None:
    wide = torch.arange(60).view(1, 60) < 12
    given: Callable[[int], dict[str, Any]] = lambda seed: {  # noqa: E731
        "input_ids": torch.full((1, 60), 9),
        "mask_token_id": 9,
        "generator": torch.Generator().manual_seed(seed),
    }
    first, again, other = (token_weights.control_down(wide.float(), control, **given(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert [len(row) for row in taken(other)] == [12]


def test_fewer_mask_tokens_than_sinks_are_all_taken_out() -> None:
    many = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    weights = token_weights.control_down(many, "mask", **options())
    assert torch.equal(weights == 0, IDS == 9)


# --- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "missing"),
    [("random", "generator"), ("mask", "generator"), ("mask", "mask_token_id"), ("norm", "activation_norm")],
)
def test_what_a_control_needs_is_asked_for(control: str, missing: str) -> None:
    with pytest.raises(InputError, match=f"the control {control!r} must be given"):
        token_weights.control_down(SCORE, control, **{**options(), missing: None})


@pytest.mark.parametrize("boost", [0.0, -1.0])
def test_a_boost_that_boosts_nothing_is_refused(boost: float) -> None:
    with pytest.raises(InputError, match=f"boost must be positive, got {boost:g}"):
        Weighting("sinks_up", boost=boost)


def test_an_unknown_kind_is_refused() -> None:
    """The rule is asked directly: under test the constructor's types catch it first."""
    unknown = object.__new__(Weighting)
    object.__setattr__(unknown, "kind", "sinks_off")
    with pytest.raises(
        InputError, match="a weighting must be a known kind, got 'sinks_off': choose sinks_down, sinks_up, random"
    ):
        unknown.__post_init__()


@pytest.mark.parametrize("level", ["layer", "head"])
def test_only_sinks_can_be_weighted_by_layer_or_head(level: Any) -> None:
    for kind in get_args(Kind):
        if kind in ("sinks_down", "sinks_up"):
            assert Weighting(kind, level=level).level == level
            continue
        with pytest.raises(InputError, match=f"weights by layer or head must be those of sinks, got {kind}: use level aggregate"):
            Weighting(kind, level=level)


def test_what_comes_from_several_noise_levels() -> None:
    assert [kind for kind in get_args(Kind) if Weighting(kind).over_levels] == ["variance", "presence"]
    assert Weighting(averaged=True).over_levels
