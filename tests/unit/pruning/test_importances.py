"""Masks and importances: exact counts, slow loops, the paper's worked example, and what is refused."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import cast

import pytest
import torch
from torch import Tensor

from lib.attention import sinks
from lib.calibration.sums import InputStatistics
from lib.core.errors import InputError
from lib.pruning import importances
from tests.unit import slow_pruning as slow

SHAPES = [(3, 10), (1, 100), (4, 7), (5, 3), (2, 1), (7, 12)]
SPARSITIES = ["0.3", "0.29", "1/3", "0.7", "0", "0.5", "0.58"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- how many go ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_row_loses_exactly_the_floor(shape: tuple[int, int], sparsity: str) -> None:
    count = slow.removed(shape[1], sparsity)
    for importance in (drawn(*shape).abs(), torch.ones(shape)):  # ties must not change the number
        mask = importances.keep_mask(importance, sparsity=float(Fraction(sparsity)))
        assert (~mask).sum(1).tolist() == [count] * shape[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_matrix_loses_exactly_the_floor_when_all_weights_compete(shape: tuple[int, int], sparsity: str) -> None:
    count = slow.removed(shape[0] * shape[1], sparsity)
    for importance in (drawn(*shape).abs(), torch.ones(shape)):
        mask = importances.keep_mask(importance, sparsity=float(Fraction(sparsity)), granularity="layer")
        assert int((~mask).sum()) == count
        assert torch.equal(mask, slow.keep_by_layer(importance, count))


@pytest.mark.parametrize(
    ("size", "sparsity", "count"), [(10, 0.3, 3), (100, 0.29, 29), (3, 1 / 3, 1), (10, 0.7, 7), (10, 0.69, 6)]
)
def test_a_product_that_rounds_below_a_whole_number_counts_as_it(size: int, sparsity: float, count: int) -> None:
    assert importances.removed_count(size, sparsity) == count


def test_some_of_these_sparsities_are_awkward_in_floats() -> None:
    assert int(100 * 0.29) == 28  # what plain truncation would remove
    assert int(100 * 0.58) == 57


@pytest.mark.parametrize("size", [2048, 14336, 1536 * 8960, 5120 * 25600])
def test_counts_are_exact_at_the_size_of_real_matrices(size: int) -> None:
    for percent in range(100):
        assert importances.removed_count(size, percent / 100) == size * percent // 100


def test_rows_and_layer_are_different_questions() -> None:
    importance = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    by_row = importances.keep_mask(importance, sparsity=0.5)
    by_layer = importances.keep_mask(importance, sparsity=0.5, granularity="layer")
    assert by_row.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert by_layer.int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (1, 3)])
def test_n_of_m_along_the_input_features(n: int, m: int) -> None:
    """Rows of very different size, and groups of very different size inside a row, keep n of m all the same."""
    importance = (
        drawn(3 * m, 2 * m, seed=1).abs() * torch.logspace(0, 3, 3 * m)[:, None] * torch.tensor([1.0, 50.0]).repeat_interleave(m)
    )
    mask = importances.keep_mask(importance, sparsity=1 - n / m, pattern=f"{n}:{m}")
    assert (mask.view(-1, 2, m).sum(-1) == n).all()
    assert torch.equal(mask, slow.keep_by_group(importance, n, m))
    # the same weights grouped along the other axis, or interleaved, would be another mask
    assert not (mask.view(3, m, -1).sum(1) == n).all()
    assert not (mask.view(-1, m, 2).sum(1) == n).all()


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_granularity_does_not_matter_for_n_of_m(granularity: importances.Granularity) -> None:
    importance = drawn(3, 8, seed=2).abs()
    mask = importances.keep_mask(importance, sparsity=0.5, pattern="2:4", granularity=granularity)
    assert torch.equal(mask, slow.keep_by_group(importance, 2, 4))


# --- which ones go -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_smallest_go_and_of_equals_the_earlier(sparsity: str) -> None:
    few_values = drawn(6, 17, seed=3).mul(1.5).round().abs()  # many ties
    for importance in (few_values, drawn(6, 17, seed=4), torch.zeros(2, 17)):
        mask = importances.keep_mask(importance, sparsity=float(Fraction(sparsity)))
        assert torch.equal(mask, slow.keep_by_row(importance, slow.removed(17, sparsity)))


def test_ties_inside_groups_go_from_the_left() -> None:
    mask = importances.keep_mask(torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 2.0]]), sparsity=0.5, pattern="2:4")
    assert mask.int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]]


def test_pruned_weights_are_exact_zeros_and_the_rest_is_untouched() -> None:
    weight = drawn(4, 6, seed=5)
    weight[0, 0], weight[3, 5] = float("inf"), -0.0
    before, mask = weight.clone(), drawn(4, 6, seed=6) > 0
    mask[0, 0] = False
    got = importances.prune(weight, mask)
    assert torch.equal(weight, before)
    assert torch.equal(got[mask], weight[mask]) and bool((got[~mask] == 0).all())


# --- importance ----------------------------------------------------------------------------------------------------------


def test_magnitude_ignores_the_sign() -> None:
    assert importances.magnitude_importance(torch.tensor([[-3.0, 2.0, -0.0]])).tolist() == [[3.0, 2.0, 0.0]]


def test_random_importance_comes_from_the_generator_alone() -> None:
    def rank(weight: Tensor, seed: int) -> Tensor:
        return importances.random_importance(weight, generator=torch.Generator().manual_seed(seed))

    weight = drawn(20, 50, seed=7)
    assert torch.equal(rank(weight, 0), rank(torch.zeros_like(weight), 0))
    assert not torch.equal(rank(weight, 0), rank(weight, 1))
    # each weight goes with the same chance: large ones as often as small ones (1000 drawn, standard error 0.016)
    gone = ~importances.keep_mask(rank(weight, 2), sparsity=0.5)
    assert abs(float(gone[weight.abs() > weight.abs().median()].double().mean()) - 0.5) < 0.08


def calibration_inputs() -> Tensor:
    """Samples of tokens whose features differ in size by token and by sample, so that norms of another kind rank differently."""
    inputs = (
        drawn(4, 9, 12, seed=8) * torch.logspace(-0.6, 0.6, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(9))]
    )
    inputs[0, :, ::3] *= 9.0  # these features live in one sample
    inputs[:, 0, 1::3] *= 9.0  # and these in one token of each
    return inputs


def slow_wanda(weight: Tensor, inputs: Tensor) -> Tensor:
    importance = torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            squares = [float(token[column]) ** 2 for sample in inputs for token in sample]
            importance[row, column] = abs(float(weight[row, column])) * math.sqrt(sum(squares))
    return importance


def wanda_mask(weight: Tensor, norm: Tensor) -> Tensor:
    return importances.keep_mask(importances.wanda_importance(weight, norm), sparsity=0.5)


def test_wanda_against_a_loop() -> None:
    weight, inputs = drawn(16, 12, seed=10), calibration_inputs()
    norm = inputs.flatten(0, 1).norm(dim=0)
    expected = slow_wanda(weight, inputs)
    torch.testing.assert_close(importances.wanda_importance(weight, norm).double(), expected, atol=0, rtol=1e-6)
    assert torch.equal(wanda_mask(weight, norm), slow.keep_by_row(expected, 6))
    # a row compares only its own weights, so a common factor of the norms does nothing
    assert torch.equal(wanda_mask(weight, norm * 0.25), wanda_mask(weight, norm))


WRONG: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared norm": lambda weight, inputs: slow_wanda(weight, inputs).div(weight.abs()).square() * weight.abs(),
    "square of the weight": lambda weight, inputs: slow_wanda(weight, inputs) * weight.abs(),
    "mean of the samples' norms": lambda weight, inputs: weight.abs() * inputs.norm(dim=1).mean(0),
    "mean of absolute values": lambda weight, inputs: weight.abs() * inputs.abs().mean((0, 1)),
    "largest value": lambda weight, inputs: weight.abs() * inputs.abs().amax((0, 1)),
    "weights alone": lambda weight, inputs: weight.abs(),
    "sign kept": lambda weight, inputs: slow_wanda(weight, inputs) * weight.sign(),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variants_of_wanda_give_another_mask_here(name: str) -> None:
    """Else the loop above would prove nothing."""
    weight, inputs = drawn(16, 12, seed=10), calibration_inputs()
    expected = wanda_mask(weight, inputs.flatten(0, 1).norm(dim=0))
    assert not torch.equal(slow.keep_by_row(WRONG[name](weight, inputs), 6), expected)


def test_wanda_over_the_whole_layer_gives_another_mask_here() -> None:
    weight, inputs = drawn(16, 12, seed=10), calibration_inputs()
    expected = wanda_mask(weight, inputs.flatten(0, 1).norm(dim=0))
    assert not torch.equal(slow.keep_by_layer(slow_wanda(weight, inputs), 96), expected)


def test_the_worked_example_of_the_pipeline_figure() -> None:
    """Masses to sinks to ω to norms; the weights are chosen so that sinks decide which two of four stay."""
    mass = torch.tensor([5.0, 18.0, 9.0, 22.0, 7.0])
    inputs = torch.tensor([[2.0, 3, 1, 4], [10, 9, 6, 7], [3, 4, 2, 4], [9, 11, 10, 9], [1, 3, 2, 1]])
    omega = sinks.token_weight(sinks.sinks_leave_one_out(mass).float())
    assert omega.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    found = {name: InputStatistics(4, hessian=True, device=torch.device("cpu")) for name in ("plain", "weighted")}
    found["plain"].add(inputs[None], None)
    found["weighted"].add(inputs[None], omega[None])
    norm = found["weighted"].input_norm("root_mean_square")
    torch.testing.assert_close(norm, torch.tensor([[3.74, 5.83, 3.00, 5.74]]), atol=0.005, rtol=0)
    products = [[14.0, 21, 10, 21], [21, 34, 17, 31], [10, 17, 9, 14], [21, 31, 14, 33]]
    assert cast(Tensor, found["weighted"].products).tolist() == products
    weight = torch.tensor([[1.2, -1.0, -1.3, 1.0]])
    assert wanda_mask(weight, norm).tolist() == [[False, True, False, True]]
    assert wanda_mask(weight, found["plain"].input_norm("root_mean_square")).tolist() == [[True, False, True, False]]


def test_rows_of_a_head_have_their_own_norms() -> None:
    """Two heads of three rows each; norms that belong to the other head, or alternate, give another mask."""
    weight, norms = drawn(6, 8, seed=12), torch.tensor([[1.0, 4.0] * 4, [4.0, 1.0] * 4])
    got = importances.wanda_importance(weight, norms)
    for row in range(6):
        assert torch.equal(got[row], weight[row].abs() * norms[row // 3])
    mask = importances.keep_mask(got, sparsity=0.5)
    for wrong in (norms.flip(0), norms[:1], norms[1:]):
        assert not torch.equal(importances.keep_mask(importances.wanda_importance(weight, wrong), sparsity=0.5), mask)
    assert not torch.equal(importances.keep_mask(weight.abs() * norms.repeat(3, 1), sparsity=0.5), mask)
    assert torch.equal(importances.wanda_importance(weight, norms[:1]), importances.wanda_importance(weight, norms[0]))


# --- exact numbers -------------------------------------------------------------------------------------------------------


def test_what_is_left_over_goes_from_the_rows_whose_next_weight_matters_least() -> None:
    importance = torch.tensor([[1.0, 3.0, 2.0], [9.0, 7.0, 8.0], [4.0, 5.0, 6.0]])
    assert importances.keep_mask_by_count(importance, removed=4).int().tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 1]]
    assert importances.keep_mask_by_count(importance, removed=5).int().tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 1]]
    # the smallest four of the matrix are others
    assert importances.keep_mask(importance, sparsity=4 / 9, granularity="layer").int().tolist() == [
        [0, 0, 0],
        [1, 1, 1],
        [0, 1, 1],
    ]


@pytest.mark.parametrize("total", [0, 1, 6, 7, 20, 41])
def test_rows_lose_the_same_number_but_for_one(total: int) -> None:
    for importance in (
        drawn(6, 7, seed=13).abs(),
        torch.ones(6, 7),
        drawn(6, 7, seed=14).abs() * torch.logspace(0, 4, 6)[:, None],
    ):
        mask = importances.keep_mask_by_count(importance, removed=total)
        gone = (~mask).sum(1)
        assert int(gone.sum()) == total and int(gone.max() - gone.min()) <= 1
        for row in range(6):
            expected = slow.keep_by_row(importance[row : row + 1], int(gone[row]))
            assert torch.equal(mask[row : row + 1], expected)


def test_an_exact_number_that_rows_divide_is_the_mask_of_that_sparsity() -> None:
    importance = drawn(4, 10, seed=15).abs()
    assert torch.equal(importances.keep_mask_by_count(importance, removed=12), importances.keep_mask(importance, sparsity=0.3))


@pytest.mark.parametrize("total", [-1, 8, 50])
def test_an_exact_number_out_of_range_is_refused(total: int) -> None:
    with pytest.raises(
        InputError, match=rf"removed weights must be in \[0, 8\), got {total} for a matrix: lower the layer's sparsity"
    ):
        importances.keep_mask_by_count(drawn(2, 4), removed=total)


# --- the release's rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("shape", [(3, 10), (5, 7)])
def test_the_release_removes_one_more(shape: tuple[int, int], sparsity: float) -> None:
    weight = drawn(*shape, seed=11)
    mask = importances.release_magnitude_mask(weight, sparsity=sparsity)
    count = math.floor(weight.numel() * Fraction(str(sparsity))) + 1
    assert int((~mask).sum()) == count
    assert torch.equal(mask, slow.keep_by_layer(weight.abs(), count))


def test_the_release_removes_every_weight_equal_to_its_threshold() -> None:
    weight = torch.tensor([[1.0, -2.0, 2.0, -2.0], [3.0, 2.0, 5.0, -6.0]])
    mask = importances.release_magnitude_mask(weight, sparsity=0.25)  # rank 2 of 1 2 2 2 2 3 5 6
    assert mask.int().tolist() == [[0, 0, 0, 0], [1, 0, 1, 1]]
    exact = importances.keep_mask(weight.abs(), sparsity=0.25, granularity="layer")
    assert exact.int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


# --- refusals: the rule, what was got, the remedy ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "got", "remedy"),
    [
        (50, "50", "a fraction, not per cent: use 0.5"),
        (-0.1, "-0.1", "choose a fraction"),
        (1.0, "1", "a fraction"),
        (math.nan, "nan", "choose a fraction"),
        (math.inf, "inf", "choose a fraction"),
    ],
)
def test_a_sparsity_out_of_range_is_refused(sparsity: float, got: str, remedy: str) -> None:
    weight = drawn(2, 4)
    for call in (
        lambda: importances.check_sparsity(sparsity),
        lambda: importances.keep_mask(weight, sparsity=sparsity),
        lambda: importances.release_magnitude_mask(weight, sparsity=sparsity),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith(f"sparsity must be in [0, 1), got {got}")
        assert remedy in str(caught.value)


@pytest.mark.parametrize("pattern", ["4:2", "124", "2:2", "0:4", "2:", ":4", "a:b", "2:4:8", "-2:4", "", "Unstructured"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InputError) as caught:
        importances.keep_mask(drawn(2, 8), sparsity=0.5, pattern=pattern)
    message = str(caught.value)
    assert message.startswith('sparsity_pattern must be "unstructured" or "N:M" with 0 < N < M, ')
    assert f"got {pattern!r}: quote it in YAML" in message


def test_a_pattern_that_contradicts_the_sparsity_or_the_width_is_refused() -> None:
    with pytest.raises(InputError, match=r"sparsity must be 0\.5 for the pattern 2:4, got 0\.3: change one of them"):
        importances.keep_mask(drawn(2, 8), sparsity=0.3, pattern="2:4")
    with pytest.raises(InputError, match=r"sparsity must be 0\.75 for the pattern 1:4, got 0\.5: change"):
        importances.keep_mask(drawn(2, 8), sparsity=0.5, pattern="1:4")
    with pytest.raises(InputError, match=r"the pattern 2:4 must divide the input features, got 6: use another pattern"):
        importances.keep_mask(drawn(8, 6), sparsity=0.5, pattern="2:4")  # 8 output features do not help


def test_patterns_are_read_with_and_without_the_checks() -> None:
    assert importances.parse_pattern("4:8", sparsity=0.5, width=16) == (4, 8)
    assert importances.parse_pattern("1:3", sparsity=2 / 3, width=6) == (1, 3)
    assert importances.parse_pattern("2:4") == (2, 4)
    assert importances.parse_pattern("unstructured", sparsity=0.3, width=7) is None


def test_the_sparsity_that_the_message_asks_for_is_accepted() -> None:
    assert importances.parse_pattern("1:3", sparsity=0.666667) == (1, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weight = drawn(3, 4)
    importances.check_finite(weight, name="model.layers.1.mlp.up_proj.weight", what="weights")
    weight[1, 2] = weight[2, 0] = value
    with pytest.raises(InputError) as caught:
        importances.check_finite(weight, name="model.layers.1.mlp.up_proj.weight", what="weights")
    expected = (
        "weights of model.layers.1.mlp.up_proj.weight must be finite, got 2 that are not: check the checkpoint and its dtype"
    )
    assert str(caught.value) == expected
