"""Tables of notebook 05 on losses made by hand, and the list of recipes that they are about."""

import math
from collections import Counter

import pytest
import torch

from lib.core.errors import InputError
from lib.pruning.methods import METHODS, Method, Target, pattern_target
from lib.quantization.rounding import Grid
from lib.studies.joint import comparisons, tables
from lib.studies.joint.runs import Measured, Order, Recipe

HALF, FOUR, THREE = Target(0.5), Grid(4, 8), Grid(3, 8)
WINDOWS = torch.tensor([3.0, 4.0, 5.0, 3.5], dtype=torch.float64)
FIRST: Order = "prune, quantize"


def one(name: str, recipe: Recipe, cost: float, *, size: int = 100, seed: int = 0, spread: float = 0.0) -> Measured:
    """A measurement that costs `cost` on the mean window, more on later ones with a spread."""
    loss = WINDOWS + cost + spread * torch.tensor([-1.5, -0.5, 0.5, 1.5]) + 0.01 * seed
    return Measured("dlm", name, recipe, seed, 0.5, size, loss)


@pytest.fixture
def found() -> list[Measured]:
    return [
        one("dense", Recipe(), 0.0, size=400),
        one("A", Recipe(FOUR), 0.1, size=100),
        one("A", Recipe(THREE), 0.4, size=75),
        one("A", Recipe(target=HALF), 0.2, size=225, spread=0.01),
        one("A", Recipe(FOUR, HALF, order=FIRST), 0.35, size=75, spread=0.02),
        one("A", Recipe(FOUR, HALF, order="joint"), 0.3, size=75, spread=0.01),
        one("B", Recipe(THREE, HALF, Method("wanda"), FIRST, "nearest"), 0.9, size=60),
    ]


def test_every_recipe_has_its_row(found: list[Measured]) -> None:
    second = one("A", Recipe(FOUR), 0.1, size=100, seed=2)
    table = tables.loss_table([*found, second], seed=0)
    assert len(table) == 7 and table["seeds"].tolist() == [1, 2, 1, 1, 1, 1, 1]
    assert table["increase"].tolist() == pytest.approx([0.0, 0.11, 0.4, 0.2, 0.35, 0.3, 0.9])
    assert table["order"].tolist() == ["one step"] * 4 + [FIRST, "joint", FIRST]
    assert table["MB"].iloc[0] == 400 / 1e6 and table["zeros, %"].iloc[1] == 50.0
    assert table["sparsity"].tolist() == ["0 %"] * 3 + ["50 %"] * 4
    assert math.isnan(table["group"].iloc[0]) and table["group"].iloc[1] == 8


def test_a_table_without_its_dense_model_is_refused(found: list[Measured]) -> None:
    with pytest.raises(KeyError, match="no dense measurement of dlm"):
        tables.loss_table(found[1:], seed=0)


def test_the_excess_is_what_both_cost_beyond_their_sum(found: list[Measured]) -> None:
    table = tables.interactions(found[:-1], seed=0).set_index("order")
    assert table.loc[FIRST, "excess"] == pytest.approx(0.35 - 0.2 - 0.1)
    assert table.loc["joint", "excess"] == pytest.approx(0.0, abs=1e-12)
    assert table.loc[FIRST, "excess, %"] == pytest.approx(100 * 0.05 / 0.3)
    assert table.loc[FIRST, ["pruning", "rounding", "both"]].tolist() == pytest.approx([0.2, 0.1, 0.35])
    key = tables.key_of(found[4])
    assert tables.excess_of(found, key, seed=0).estimate == pytest.approx(0.05)
    # windows are paired: the joint sweep's spread is that of pruning, so nothing is left of it
    assert table.loc["joint", "high"] - table.loc["joint", "low"] == pytest.approx(0.0, abs=1e-9)


def test_an_excess_without_both_steps_alone_is_refused(found: list[Measured]) -> None:
    with pytest.raises(KeyError):
        tables.interactions(found, seed=0)  # B was never pruned or rounded alone


def test_gains_of_orders_are_over_pruning_first(found: list[Measured]) -> None:
    table = tables.order_gains(found, seed=0)
    assert len(table) == 1 and table["order"].tolist() == ["joint"]
    assert table["gain"].iloc[0] == pytest.approx(0.05)
    assert tables.order_gains(found[:3], seed=0).empty


def test_rivals_are_the_largest_unpruned_formats_that_are_not_larger(found: list[Measured]) -> None:
    table = tables.equal_bytes(found, seed=0).set_index("recipe")
    assert table.loc["A, 50 %", "rival"] == "4 bits" and table.loc["A, 50 %", "gain"] == pytest.approx(-0.1)
    assert table.loc["A, joint, 50 %, 4 bits", "rival"] == "3 bits"
    assert table.loc["A, joint, 50 %, 4 bits", "gain"] == pytest.approx(0.1)
    assert table.loc["A, joint, 50 %, 4 bits", "rival, MB"] == 75 / 1e6
    assert not [name for name in table.index if name.startswith("B")]  # nothing unpruned is as small


def test_the_front_is_marked_in_each_model_by_itself(found: list[Measured]) -> None:
    other = [Measured("ar", *(getattr(m, n) for n in ("name", "recipe", "seed", "zeros", "bytes", "loss"))) for m in found[:2]]
    table = tables.front_table(tables.loss_table([*found, *other], seed=0))
    front = table[table["on the front"]]
    assert sorted(zip(front["model"], front["MB"] * 1e6, strict=True)) == [
        ("ar", 100), ("ar", 400), ("dlm", 60), ("dlm", 75), ("dlm", 100), ("dlm", 400),
    ]  # fmt: skip
    assert front[front["model"] == "dlm"]["order"].tolist() == [FIRST, "joint", "one step", "one step"]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_dominates_the_front_and_all_else_is_dominated(seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    points = [(float(a), float(b)) for a, b in torch.randint(0, 6, (30, 2), generator=stream).tolist()]
    for own, marked in zip(points, tables.on_front(points), strict=True):
        better = [p for p in points if p[0] <= own[0] and p[1] <= own[1] and p != own]
        assert marked == (not better)


def test_increases_by_noise_are_paired_with_dense() -> None:
    dense = torch.stack([WINDOWS, WINDOWS + 1])
    losses = {"dense": dense, "GPTQ": dense + torch.tensor([[0.5], [0.25]])}
    table = tables.noise_table(losses, [0.1, 0.9], model="dlm", seed=0)
    assert table["increase"].tolist() == pytest.approx([0.5, 0.25])
    assert table["high"].tolist() == pytest.approx([0.5, 0.25]) and table["recipe"].tolist() == ["GPTQ"] * 2
    assert table["dense loss"].tolist() == pytest.approx([3.875, 4.875])


# --- the list of recipes -------------------------------------------------------------------------------------------------


def test_the_grid_has_every_combination_once() -> None:
    targets = [Target(0.25), pattern_target("2:4")]
    recipes = comparisons.grid(
        [comparisons.SPARSEGPT, comparisons.WANDA], targets, [4, 3], rounded=[3, 2], group_size=8, levels=2, causal=False
    )
    counts = Counter(name for name, _ in recipes)
    assert counts[comparisons.SPARSEGPT] == 3 + 2 * (1 + 2 * 3) and counts[comparisons.WANDA] == 3 + 2 * (1 + 2 * 2)
    assert len({(name, recipe) for name, recipe in recipes}) == len(recipes)
    assert all(recipe.grid.bits != 2 or not recipe.prunes for _, recipe in recipes)
    labels = {(comparisons.target_label(recipe.target), recipe.grid.bits) for _, recipe in recipes}
    assert labels == {("0 %", 4), ("0 %", 3), ("0 %", 2), *((t, b) for t in ("25 %", "2:4") for b in (16, 4, 3))}


def test_an_autoregressive_model_reads_clean_text_only() -> None:
    options = {"group_size": 8, "levels": 2, "causal": True}
    recipes = comparisons.grid([comparisons.SINK_AWARE], [HALF], [4], rounded=[3], **options) + comparisons.hessians(
        [3], **options
    )
    assert all(recipe.method.inputs.kind == "clean" for _, recipe in recipes)
    assert all(recipe.method.weighting is None or not recipe.method.weighting.averaged for _, recipe in recipes)
    assert recipes[0][1].method.weighting is not None


def test_noise_levels_are_those_of_the_profile_wherever_noised_text_is_read() -> None:
    options = {"group_size": 8, "levels": 2, "causal": False}
    recipes = [
        *comparisons.grid(comparisons.FAMILIES, [HALF], [4], rounded=[3], **options),
        *comparisons.hessians([3], **options),
    ]
    read = [found.method for _, found in recipes]
    assert {method.inputs.levels for method in read if method.inputs.kind != "clean"} == {2}
    assert {method.weighting.levels for method in read if method.weighting is not None} == {2}


def test_hessians_differ_in_one_thing_from_row_to_row() -> None:
    found = dict(comparisons.hessians([3], group_size=8, levels=2, causal=False))
    clean, noised = found["GPTQ, clean text"].method, found["GPTQ, noised text"].method
    weighted = found["GPTQ, noised text, sink weights"].method
    assert clean == METHODS["SparseGPT"] and noised.inputs.levels == 2 and noised.weighting is None
    assert weighted.inputs == noised.inputs and weighted.weighting is not None and weighted.sequential == noised.sequential


def test_ways_of_rounding_are_what_they_are_called() -> None:
    found = comparisons.quantization(["nearest, absmax", "GPTQ, weighted search"], [3], [None, 8])
    assert [(name, r.rounding, r.grid.scale_rule, r.weighted, r.grid.group_size) for name, r in found] == [
        ("nearest, absmax", "nearest", "absmax", False, None), ("nearest, absmax", "nearest", "absmax", False, 8),
        ("GPTQ, weighted search", "gptq", "search", True, None), ("GPTQ, weighted search", "gptq", "search", True, 8),
    ]  # fmt: skip


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"families must be among SparseGPT \+ GPTQ, .* got 'SparseGTP'"):
        comparisons.grid(["SparseGTP"], [HALF], [4], rounded=[], group_size=8, levels=2, causal=False)
    with pytest.raises(InputError, match=r"ways must be among nearest, absmax, .* got 'best'"):
        comparisons.quantization(["best"], [4], [8])
