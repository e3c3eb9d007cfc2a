"""The factorial: which methods its cells are, and effects of planted sizes and signs."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.calibration.sets import CLEAN, NOISED, Inputs
from lib.core.errors import InputError
from lib.pruning.methods import RELEASE, SINKS, Target
from lib.studies.pruning import attribution, runs
from lib.studies.pruning.runs import Bench, Outcome
from tests import tiny

Subset = tuple[int, ...]
SUBSETS = [subset for order in range(1, 5) for subset in itertools.combinations(range(4), order)]
sizes = st.dictionaries(st.sampled_from(SUBSETS), st.floats(-2, 2).map(lambda value: round(value, 3)), max_size=8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(effects: Mapping[Subset, float], *, seeds: int = 2, windows: int = 6) -> dict[attribution.Cell, Tensor]:
    """Quality of every cell: what seeds and windows share, plus half of each effect, up or down by the levels' product."""
    base = -3.0 + noise(seeds, windows)
    return {
        cell: base + sum(size / 2 * math.prod(1 if cell[index] else -1 for index in subset) for subset, size in effects.items())
        for cell in itertools.product((0, 1), repeat=4)
    }


def outcomes_of(values: Mapping[attribution.Cell, Tensor]) -> list[Outcome]:
    """What measuring would return for these qualities, seed by seed as `compare` does."""
    seeds = len(next(iter(values.values())))
    return [
        Outcome("m", attribution.name_of(cell), 0.5, "unstructured", seed, 0.5, -values[cell][seed])
        for seed in range(seeds)
        for cell in values
    ]


# --- cells ---------------------------------------------------------------------------------------------------------------


def test_the_cells_are_all_sixteen_combinations_and_sixteen_different_methods() -> None:
    cells = attribution.cells()
    assert len(cells) == len(set(cells)) == 16 and all(len(cell) == 4 and set(cell) <= {0, 1} for cell in cells)
    assert len({attribution.name_of(cell) for cell in cells}) == 16
    assert len({attribution.method_of(cell, noised=NOISED) for cell in cells}) == 16


def test_the_corners_are_the_released_methods() -> None:
    assert attribution.method_of(attribution.WANDA, noised=NOISED) == RELEASE["wanda"]
    assert attribution.method_of(attribution.SINK_AWARE, noised=NOISED) == RELEASE["sink_wanda"]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("corner", [attribution.WANDA, attribution.SINK_AWARE])
def test_each_factor_changes_one_choice_alone(corner: attribution.Cell, index: int) -> None:
    """The field of each factor, in the order of their names; the name of the cell tells it too."""
    few = Inputs("noised", times="uniform", levels=3)
    field = {"noised text": "inputs", "sink weights": "weighting", "one-shot": "sequential", "sum of norms": "aggregate"}
    values = {"inputs": (CLEAN, few), "weighting": (None, SINKS), "sequential": (True, False)}
    values["aggregate"] = ("root_mean_square", "sum_of_norms")
    name = field[attribution.FACTORS[index]]
    flipped = tuple(1 - on if position == index else on for position, on in enumerate(corner))
    before, after = (attribution.method_of(cell, noised=few) for cell in (corner, flipped))
    assert getattr(before, name) == values[name][corner[index]] and after == replace(
        before, **{name: values[name][flipped[index]]}
    )
    words = [attribution.name_of(cell).split(", ") for cell in (corner, flipped)]
    assert [position for position, pair in enumerate(zip(*words, strict=True)) if pair[0] != pair[1]] == [index]


def test_measuring_runs_every_cell_with_every_seed(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=False)
    bench = Bench(model, tiny.ids(8, 12), tiny.ids(3, 12, seed=1), 3, 2, 0)
    few = Inputs("noised", levels=2)
    found = attribution.measure(bench, sparsity=0.5, seeds=[4, 7], noised=few)
    wanted = [(seed, attribution.name_of(cell)) for seed in (4, 7) for cell in attribution.cells()]
    assert [(outcome.seed, outcome.method) for outcome in found] == wanted
    assert {outcome.sparsity for outcome in found} == {0.5} and {outcome.measured_sparsity for outcome in found} == {0.5}
    values = attribution.quality(found)
    for cell in [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0)]:
        alone = runs.compare(bench, {"x": attribution.method_of(cell, noised=few)}, [Target(0.5)], seeds=[7])
        assert torch.equal(values[cell][1], -alone[0].loss)
    assert len({tuple(quality[1].tolist()) for quality in values.values()}) == 16  # no change is without consequence


# --- effects -------------------------------------------------------------------------------------------------------------


def test_quality_is_minus_the_loss_seed_by_seed() -> None:
    values = planted({(0,): 1.0, (1, 3): 0.5})
    outcomes = outcomes_of(values)
    found = attribution.quality(outcomes)
    assert set(found) == set(values) and all(torch.equal(found[cell], values[cell]) for cell in values)
    with pytest.raises(InputError, match="a factorial must be of one model, got m, m2: take them one by one"):
        attribution.quality([*outcomes, replace(outcomes[0], model="m2")])
    with pytest.raises(InputError, match="must have outcomes on both sides, got none"):
        attribution.quality([outcome for outcome in outcomes if outcome.method != attribution.name_of((0, 1, 1, 0))])


def test_planted_effects_come_back_with_size_and_sign() -> None:
    """Lower loss is a gain: +0.4 for the weights means that the cells with weights have a loss lower by 0.4 on average."""
    wanted = {(1,): 0.4, (0,): -0.2, (3,): 0.05, (0, 1): 0.3, (1, 2, 3): -0.1, (0, 1, 2, 3): 0.7}
    outcomes = outcomes_of(planted(wanted))
    found = attribution.effects(attribution.quality(outcomes), seed=0)
    names = [" x ".join(attribution.FACTORS[index] for index in subset) for subset in SUBSETS]
    assert found["effect"].tolist() == names and found["order"].tolist() == [len(subset) for subset in SUBSETS]
    assert found["gain"].tolist() == pytest.approx([wanted.get(subset, 0.0) for subset in SUBSETS], abs=1e-12)
    with_weights, without = ([o.loss for o in outcomes if f"weights {level}" in o.method] for level in ("on", "off"))
    assert float(torch.stack(without).mean() - torch.stack(with_weights).mean()) == pytest.approx(0.4)


@given(sizes)
def test_the_whole_change_is_the_sum_of_effects_of_odd_order(effects: dict[Subset, float]) -> None:
    """Interactions of two or four changes are the same at both corners."""
    result = attribution.total(planted(effects), seed=0)
    assert result.estimate == pytest.approx(sum(size for subset, size in effects.items() if len(subset) % 2), abs=1e-9)


def test_the_whole_change_is_paired_and_positive_when_sink_aware_is_better() -> None:
    """Window by window it is 0.5, though windows differ by far more."""
    values = planted({}, seeds=3, windows=8)
    values[attribution.SINK_AWARE] = values[attribution.WANDA] + 0.5
    result = attribution.total(values, seed=0)
    assert result.estimate == pytest.approx(0.5) and result.interval == pytest.approx((0.5, 0.5))
    assert float(values[attribution.WANDA].std()) > 0.7 and result.n == 8


@given(sizes)
def test_main_effects_are_those_of_the_table_for_every_seed_and_window(effects: dict[Subset, float]) -> None:
    values = planted(effects)
    for factor in range(4):
        effect = attribution.main_effect(values, factor)
        assert effect.shape == (2, 6)
        assert torch.allclose(effect, torch.tensor(effects.get((factor,), 0.0)).double(), atol=1e-9)


def test_a_main_effect_differs_by_window_where_the_change_does() -> None:
    gain = noise(2, 6, seed=5)
    values = {cell: value + (gain if cell[2] else 0.0) for cell, value in planted({(0,): 0.3}).items()}
    assert torch.allclose(attribution.main_effect(values, 2), gain)


@given(sizes)
def test_the_weights_are_compared_with_the_three_other_changes_together(effects: dict[Subset, float]) -> None:
    result = attribution.weights_beyond_the_rest(planted(effects), seed=0)
    weights, *others = (effects.get((index,), 0.0) for index in (1, 0, 2, 3))
    assert result.estimate == pytest.approx(weights - sum(others), abs=1e-9)


def test_the_weights_against_the_rest_are_paired_by_window() -> None:
    """The weights gain 1 and each other change 0.2, all times the same factor by window: 0.4 of it is left."""
    factor = 1.0 + noise(1, 7, seed=3).abs()
    share = (0.2, 1.0, 0.2, 0.2)
    values = {
        cell: value + factor * sum(part for part, on in zip(share, cell, strict=True) if on)
        for cell, value in planted({}, windows=7).items()
    }
    result = attribution.weights_beyond_the_rest(values, seed=0)
    assert result.estimate == pytest.approx(0.4 * float(factor.mean())) and result.interval[0] > 0.4
    assert result.smallest_effect == pytest.approx(2.8015852 * 0.4 * float(factor.std()) / 7**0.5)


def test_the_table_of_cells_shows_losses_and_levels() -> None:
    outcomes = outcomes_of(planted({(1,): 0.4, (0, 2): 0.2}))
    table = attribution.cell_table(outcomes, seed=0)
    assert len(table) == 16 and list(table.columns) == ["inputs", "weights", "order", "norm", "loss", "low", "high"]
    for row in table.to_dict("records"):
        name = f"{row['inputs']}, weights {row['weights']}, {row['order']}, {row['norm']}"
        mean = torch.stack([o.loss for o in outcomes if o.method == name]).mean()
        low, loss, high = float(row["low"]), float(row["loss"]), float(row["high"])
        assert loss == pytest.approx(float(mean)) and low < loss < high
    assert all(loss > 0 for loss in table["loss"].tolist())


@pytest.mark.parametrize(
    ("effects", "adjusted", "wanted"),
    [
        ({(1,): 0.5, (0,): 0.1}, 0.01, "reproduced"),
        ({(1,): 0.5, (0,): 0.1}, 0.05, "inconclusive"),  # not adjusted for how much is claimed
        ({(1,): 0.5, (0,): 0.3, (2,): 0.3}, 0.01, "not reproduced"),  # the weights gain most, the others together more
        ({(1,): 0.0, (0,): 0.4}, 0.01, "not reproduced"),
        ({(1,): -0.1, (0,): -0.6}, 0.01, "inconclusive"),  # the weights harm least: nothing to attribute
        ({(1,): -0.5, (0,): -0.1}, 0.01, "inconclusive"),  # the weights harm most: there is no gain either
        ({(1,): 0.1, (0,): -0.6}, 0.01, "inconclusive"),  # the weights gain, the whole change loses
        ({(1,): -0.1, (0,): -0.6, (0, 1, 2): 2.0}, 0.01, "inconclusive"),  # the whole gains, the weights do not
        ({(1,): 0.3, (0,): 0.1, (3,): 0.2}, 0.01, "inconclusive"),  # as much as the others together
        ({(1,): 0.5, (0, 1, 2): -0.8}, 0.01, "inconclusive"),  # a main effect that does not make the whole a gain
    ],
)
def test_a_gain_is_due_to_the_weights_when_there_is_one_and_they_outweigh_the_rest(
    effects: Mapping[Subset, float], adjusted: float, wanted: str
) -> None:
    values = {
        cell: value + 0.02 * noise(2, 14, seed=40 + index)
        for index, (cell, value) in enumerate(planted(effects, windows=14).items())
    }
    table = attribution.effects(values, seed=0)
    assert attribution.due_to_weights(values, table, adjusted=adjusted, seed=0) == wanted


def test_the_weights_own_effect_must_hold_against_all_fifteen() -> None:
    """Its interval is above 0, but not its p-value once it is one of fifteen effects."""
    values = {
        cell: value + 0.02 * noise(2, 14, seed=40 + index)
        for index, (cell, value) in enumerate(planted({(1,): 0.5}, windows=14).items())
    }
    table = attribution.effects(values, seed=0)
    is_weights = table["effect"] == "sink weights"
    for changes in ({"p_holm": 0.05}, {"low": -0.01}, {"low": 0.0}):
        changed = table.copy()
        for name, value in changes.items():
            changed.loc[is_weights, name] = value
        assert attribution.due_to_weights(values, changed, adjusted=0.01, seed=0) == "inconclusive"
    others = table.copy()
    others.loc[~is_weights, ["p_holm", "low"]] = [1.0, -1.0]
    assert attribution.due_to_weights(values, others, adjusted=0.01, seed=0) == "reproduced"
