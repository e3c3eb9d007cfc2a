"""Which recipe is compared with which, and what lists of recipes hold."""

from dataclasses import replace

import pytest
import torch

from lib.core.errors import InputError
from lib.evaluation import paired
from lib.pruning.methods import Target
from lib.quantization.rounding import Grid
from lib.studies.joint import comparisons, foldings, rivals
from lib.studies.joint.runs import Measured, Recipe
from lib.timing.effort import Effort
from tests import tiny

WAVE = torch.tensor([0.3, -0.3] * 6).double()


def measured(name: str, value: float, *, spread: float = 0.0, bits: int = 4, model: str = "m") -> Measured:
    """A recipe with a mean loss; `spread` makes its windows differ from those of others."""
    loss = torch.linspace(0.0, 0.3, 12).double() + value + spread * WAVE
    return Measured(model, name, Recipe(Grid(bits), Target(0.5)), 0, 0.5, 10, loss)


def test_a_gain_over_all_is_over_the_least_sure_rival_and_not_over_the_best() -> None:
    """The best rival, b, is beaten for sure; c is worse on average, but its gain is unsure."""
    found = [measured("a", 1.0), measured("b", 1.1), measured("c", 1.15, spread=2.0), measured("b", 0.0, model="n")]
    each = [paired.paired_difference(rival.loss, found[0].loss, seed=0) for rival in found[1:3]]
    got = rivals.against_each(found, model="m", first="a", others=["b", "c"], worse=False, seed=0)
    assert got is not None and got.estimate == pytest.approx(0.15) and got.interval == each[1].interval
    assert got.interval[0] < 0 < each[0].interval[0] and got.p_value == max(one.p_value for one in each) > 0.05


def test_the_p_value_is_the_largest_of_all_rivals_also_of_one_that_is_not_shown() -> None:
    found = [measured("a", 1.0), measured("b", 1.05), measured("c", 1.3, spread=0.9)]
    found[1].loss[0] += 2.0  # an outlier: the interval is above 0, the signs flip easily
    each = [paired.paired_difference(rival.loss, found[0].loss, seed=0) for rival in found[1:]]
    got = rivals.against_each(found, model="m", first="a", others=["b", "c"], worse=False, seed=0)
    assert got is not None and got.interval[0] == min(one.interval[0] for one in each)
    assert got.p_value == max(one.p_value for one in each)


def test_worse_than_all_is_the_other_way_round_and_a_rival_that_is_missing_gives_no_answer() -> None:
    found = [measured("a", 1.0), measured("b", 0.9), measured("c", 0.8)]
    got = rivals.against_each(found, model="m", first="a", others=["b", "c"], worse=True, seed=0)
    assert got is not None and got.estimate == pytest.approx(0.1)
    assert rivals.against_each(found, model="m", first="a", others=["b", "d"], worse=True, seed=0) is None
    assert rivals.against_each(found, model="n", first="a", others=["b"], worse=True, seed=0) is None


@pytest.mark.parametrize(("bits", "expected"), [(4, 0.2), (3, 0.2), (2, -0.3)])
def test_a_refit_has_the_same_rivals_whatever_else_was_measured(bits: int, expected: float) -> None:
    """Another refit that is better than all is no rival; in 2 bits the question is whether it is worse."""
    losses = {"SparseGPT": 1.3, "Wanda": 1.2, "Wanda, refit": 1.0, "ALPS": 0.5}
    found = [measured(comparisons.baseline_name(name, bits), value, bits=bits) for name, value in losses.items()]
    assert (rivals.REFITS, rivals.WITHOUT) == (("Wanda, refit", "ALPS"), ("SparseGPT", "Wanda"))
    for listed in (found, found[:3]):
        got = rivals.of_refit(listed, model="m", refit="Wanda, refit", bits=bits, seed=0)
        assert got is not None and got.estimate == pytest.approx(expected)
    assert rivals.of_refit(found[1:], model="m", refit="ALPS", bits=bits, seed=0) is None  # without one of its rivals


def test_what_awq_owes_to_sinks_is_the_weaker_of_two_differences() -> None:
    """Without sink tokens the scales must be worse than with all, and worse than without as many others."""
    awq, without, control = foldings.SCALED

    def owed(losses: dict[str, float]) -> tuple[float, bool]:
        found = [measured(name, value) for name, value in losses.items()]
        got = rivals.owed_to_sinks(found, model="m", recipe="RTN", seed=0)
        assert got is not None
        return got[0].estimate, got[1]

    names = ["RTN", f"RTN, {awq}", f"RTN, {without}", f"RTN, {control}"]
    assert owed(dict(zip(names, (2.0, 1.0, 1.5, 1.1), strict=True))) == (pytest.approx(0.4), True)
    assert owed(dict(zip(names, (2.0, 1.0, 1.5, 1.6), strict=True))) == (pytest.approx(-0.1), True)  # any tokens would do
    assert owed(dict(zip(names, (2.0, 1.4, 1.5, 1.1), strict=True))) == (pytest.approx(0.1), True)
    assert owed(dict(zip(names, (0.9, 1.0, 1.5, 1.1), strict=True))) == (pytest.approx(0.4), False)  # no gain, nothing owed
    found = [measured(name, 1.0) for name in names[:3]]
    assert rivals.owed_to_sinks(found, model="m", recipe="RTN", seed=0) is None


def test_outcomes_have_the_names_and_targets_of_recipes() -> None:
    took = Effort(2.0, 3.0)
    found = rivals.outcomes_of([replace(measured("a", 1.0), effort=took), measured("b", 2.0)])
    assert [(one.method, one.sparsity, one.pattern, one.seed) for one in found] == [
        (name, 0.5, "unstructured", 0) for name in ("a", "b")
    ]
    assert found[0].effort == took


@pytest.mark.parametrize("causal", [False, True])
def test_lists_name_what_they_hold(causal: bool) -> None:
    listed = dict(comparisons.baselines(comparisons.BASELINES, [4, 2], group_size=8, causal=causal))
    assert len(listed) == 8 and all(recipe.order == "prune, quantize" for recipe in listed.values())
    assert listed["Wanda, refit + GPTQ, 2 bits"].method.repair == "refit" and listed["ALPS + GPTQ, 4 bits"].grid.bits == 4
    shifts = dict(comparisons.shifts(group_size=8))
    assert replace(shifts["GPTQ, 3 bits, shifted"], shifted=False) == shifts["GPTQ, 3 bits"]
    two = dict(comparisons.two_bits(group_size=8, levels=2))
    assert len(two) == 4 and all(recipe.grid.bits == 2 for recipe in two.values())
    masked = two["planes, 2 bits, masked text"].method
    assert masked.inputs.clean_share == 0.25 and masked == two["GPTQ, 2 bits, masked text"].method
    with pytest.raises(InputError, match="baselines must be among SparseGPT, Wanda"):
        comparisons.baselines(["OBR"], [4], group_size=8, causal=causal)


def test_names_of_nothing_are_refused_with_the_nearest() -> None:
    model = tiny.of_network(tiny.network(causal=False))
    with pytest.raises(InputError, match=r"further must be among GPTQ, 3 bits, .*'GPTQ, 3 bit'.* did you mean 'GPTQ, 3 bits'"):
        comparisons.further(model, ["GPTQ, 3 bit"], group_size=8, levels=2)
    with pytest.raises(InputError, match=r"a rewriting must be among as it is, .* got 'rotate': did you mean 'rotated'\?"):
        foldings.possible(model, ["rotate"])
    with pytest.raises(InputError, match=r"baselines must be among .* got 'Wanda refit': did you mean 'Wanda, refit'\?"):
        comparisons.baselines(["Wanda refit"], [4], group_size=8, causal=False)


def test_what_a_model_cannot_take_is_known_before_any_work() -> None:
    names = ["GPTQ, 3 bits", "GPTQ, 3 bits, shifted", "planes, 2 bits, masked text", "nearest, 3 bits"]
    every = list(foldings.FOLDINGS)
    plain, causal = (tiny.of_network(tiny.network(causal=each), is_causal=each) for each in (False, True))
    listed, why_not = comparisons.further(plain, names, group_size=8, levels=2)
    assert [name for name, _ in listed] == names[:3] and not why_not  # the last is of rewritten models
    assert foldings.possible(plain, every) == (every, {})
    listed, why_not = comparisons.further(causal, names, group_size=8, levels=2)
    assert [name for name, _ in listed] == names[:2] and list(why_not) == [names[2]]
    mixture = tiny.mixture("qwen3_moe")
    listed, why_not = comparisons.further(mixture, names, group_size=8, levels=2)
    assert names[1] not in dict(listed) and "two streams must pass the same matrices" in why_not[names[1]]
    allowed, why_not = foldings.possible(mixture, every)
    assert allowed == [foldings.NONE] and all("must have dense blocks" in reason for reason in why_not.values())
    plain.network.config.tie_word_embeddings = True
    allowed, why_not = foldings.possible(plain, every)
    assert list(why_not) == [foldings.ROTATED] and "a head of its own, got tied embeddings" in why_not[foldings.ROTATED]
