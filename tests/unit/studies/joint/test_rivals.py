"""Which recipe is compared with which, and what lists of recipes hold."""

from dataclasses import replace

import pytest
import torch

from lib.core.errors import InputError
from lib.pruning.methods import Target
from lib.quantization.rounding import Grid
from lib.studies.joint import comparisons, rivals
from lib.studies.joint.runs import Measured, Recipe

LOSSES = {"a": 1.0, "b": 2.0, "c": 4.0}


def measured(bits: int = 4, *, model: str = "m", shift: float = 0.0) -> list[Measured]:
    recipe = Recipe(Grid(bits), Target(0.5))
    windows = torch.linspace(0.0, 0.3, 6).double()
    return [Measured(model, f"{name}{bits}", recipe, 0, 0.5, 10, windows + value + shift) for name, value in LOSSES.items()]


@pytest.mark.parametrize(("first", "worst", "expected"), [
    ("a4", False, 1.0), ("b4", False, -1.0), ("c4", False, -3.0), ("c4", True, 2.0), ("a4", True, -3.0),
])  # fmt: skip
def test_the_rival_is_the_best_or_the_worst_of_the_same_bits_and_model(first: str, worst: bool, expected: float) -> None:
    found = [*measured(), *measured(3, shift=-9.0), *measured(model="n", shift=-5.0)]
    got = rivals.against_others(found, model="m", first=first, worst=worst, seed=0)
    assert got.estimate == pytest.approx(expected)


def test_outcomes_have_the_names_and_targets_of_recipes() -> None:
    found = rivals.outcomes_of(measured())
    assert [(one.method, one.sparsity, one.pattern, one.seed) for one in found] == [
        (name, 0.5, "unstructured", 0) for name in ("a4", "b4", "c4")
    ]


@pytest.mark.parametrize("causal", [False, True])
def test_lists_name_what_they_hold(causal: bool) -> None:
    listed = dict(comparisons.baselines(comparisons.BASELINES, [4, 2], group_size=8, causal=causal))
    assert len(listed) == 8 and all(recipe.order == "prune, quantize" for recipe in listed.values())
    assert listed["Wanda, refit + GPTQ, 2 bits"].method.repair == "refit" and listed["ALPS + GPTQ, 4 bits"].grid.bits == 4
    shifts = dict(comparisons.shifts(group_size=8))
    assert replace(shifts["GPTQ, 3 bits, shifted"], shifted=False) == shifts["GPTQ, 3 bits"]
    two = dict(comparisons.two_bits(group_size=8, levels=2, causal=causal))
    assert len(two) == (2 if causal else 4) and all(recipe.grid.bits == 2 for recipe in two.values())
    if not causal:
        masked = two["planes, 2 bits, masked text"].method
        assert masked.inputs.clean_share == 0.25 and masked == two["GPTQ, 2 bits, masked text"].method
    with pytest.raises(InputError, match="baselines must be among SparseGPT, Wanda"):
        comparisons.baselines(["OBR"], [4], group_size=8, causal=causal)
