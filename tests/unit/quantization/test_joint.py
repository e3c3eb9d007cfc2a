"""Sweeps that prune and round against a slow loop that inverts anew at every column, and what must hold whatever the numbers."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning import importances
from lib.pruning.sparsegpt import inverse_cholesky, sparsegpt
from lib.quantization.joint import Compressed, gptq, joint, shifted
from lib.quantization.rounding import SCALE_RULES, Grid, round_to_nearest
from tests.unit import slow_pruning as slow
from tests.unit.pruning.test_sparsegpt import layer, loss
from tests.unit.quantization.test_rounding import slow_scale

WIDTH = 24


def slow_sweep(
    weight: Tensor,
    hessian: Tensor,
    *,
    grid: Grid,
    given: Tensor | None = None,
    groups: tuple[int, int] | None = None,
    total: int | None = None,
    starts: tuple[int, ...] = (0,),
    weighted: bool = False,
) -> tuple[Tensor, Tensor]:
    """(weights, mask): fix the columns in their order, each time at the optimum of those that are left.

    A column is fixed at 0 or at the nearest point of the grid; by the equations of OBS the others then move by the error over
    [H^-1]_jj times row j of the inverse Hessian of what is left. `starts` are the first columns of blocks.
    """
    work, hessian = weight.double().clone(), hessian.double().clone()
    rows, width = work.shape
    mask = torch.ones(rows, width, dtype=torch.bool) if given is None else given.clone()
    work[~mask] = 0.0
    features = hessian.diagonal().tolist() if weighted else [1.0] * width
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width).double()
    inverse = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    edges = [*starts, width]
    blocks = dict(pairwise(edges))
    size = grid.group_size or width
    scales = [1.0] * rows

    def chosen(first: int, last: int) -> Tensor:
        """What would be kept of some columns, were it decided now."""
        stays = torch.ones(rows, last - first, dtype=torch.bool)
        costs = [[float(work[row, j] ** 2 / inverse[j][0, 0]) for j in range(first, last)] for row in range(rows)]
        if groups:
            for row in range(rows):
                for group in range(0, last - first, groups[1]):
                    for index in slow.smallest(costs[row][group : group + groups[1]], groups[1] - groups[0]):
                        stays[row, group + index] = False
        else:
            assert total is not None
            due = math.floor(Fraction(total * last, width)) - math.floor(Fraction(total * first, width))
            for index in slow.smallest([cost for row in costs for cost in row], due):
                stays.view(-1)[index] = False
        return stays

    for column in range(width):
        if groups and column % groups[1] == 0:
            mask[:, column : column + groups[1]] = chosen(column, column + groups[1])
        if total is not None and column in blocks:
            mask[:, column : blocks[column]] = chosen(column, blocks[column])
        if grid.rounds and column % size == 0:
            inside = any(first <= column and column + size <= last for first, last in blocks.items())
            undecided = groups or (total is not None and not inside)
            stays = chosen(column, column + size) if undecided else mask[:, column : column + size]
            for row in range(rows):
                values = torch.where(stays[row], work[row, column : column + size], 0.0).tolist()
                scales[row] = slow_scale(values, grid.bits, grid.scale_rule, features[column : column + size])
        for row in range(rows):
            end = float(work[row, column])
            if grid.rounds:
                end = min(max(round(end / scales[row]), grid.lowest), grid.highest) * scales[row]
            end = end if mask[row, column] else 0.0
            error = (float(work[row, column]) - end) / inverse[column][0, 0]
            for j in range(column, width):
                work[row, j] -= error * inverse[column][0, j - column]
            work[row, column] = end
    return work, mask


def close(got: Compressed, expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got.kept, expected[1])
    torch.testing.assert_close(got.weight, expected[0], atol=1e-8, rtol=1e-7)


def on_the_grid(got: Compressed, grid: Grid) -> None:
    assert got.quantized is not None
    assert got.quantized.grid == grid
    assert torch.equal(got.weight, got.quantized.dequantize(dtype=got.weight.dtype))
    assert grid.lowest <= int(got.quantized.codes.min()) and int(got.quantized.codes.max()) <= grid.highest
    assert bool((got.weight[~got.kept] == 0).all())


# --- against the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [128, 12, 5])
@pytest.mark.parametrize("group_size", [4, 12, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_equals_the_loop(bits: int, group_size: int | None, block: int) -> None:
    """Whatever the blocks: scales come from the weights as they stand when their group begins."""
    weight, hessian = layer(bits)
    grid = Grid(bits, group_size)
    got = gptq(weight, hessian, grid=grid, block=block)
    close(got, slow_sweep(weight, hessian, grid=grid))
    on_the_grid(got, grid)
    assert not torch.equal(got.weight, round_to_nearest(weight, grid).dequantize(dtype=torch.float64))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_rules_for_scales_equal_the_loop(rule: str, weighted: bool) -> None:
    weight, hessian = layer(1)
    grid = Grid(3, 8, rule)
    close(gptq(weight, hessian, grid=grid, weighted=weighted), slow_sweep(weight, hessian, grid=grid, weighted=weighted))
    whole = Grid(3, None, rule)
    got = joint(weight, hessian, grid=whole, sparsity=0.5, weighted=weighted, block=8)
    close(got, slow_sweep(weight, hessian, grid=whole, total=60, starts=(0, 8, 16), weighted=weighted))


@pytest.mark.parametrize("block", [128, 7])
@pytest.mark.parametrize("kind", ["unstructured", "2:4"])
def test_rounding_what_is_pruned_equals_the_loop(kind: str, block: int) -> None:
    weight, hessian = layer(2)
    kept = importances.keep_mask(importances.wanda_importance(weight, hessian.diagonal().sqrt()), sparsity=0.5, pattern=kind)
    for grid in (Grid(3, 6), Grid(2, None, "search"), Grid(16)):
        got = gptq(weight, hessian, grid=grid, kept=kept, block=block)
        close(got, slow_sweep(weight, hessian, grid=grid, given=kept))
        assert got.kept is not kept and torch.equal(got.kept, kept) and bool((got.weight[~kept] == 0).all())


@pytest.mark.parametrize(
    ("group_size", "block", "starts"),
    [
        (6, 128, (0,)),
        (6, 12, (0, 12)),
        (6, 15, (0, 12)),  # blocks end where groups do
        (12, 5, (0, 5, 10, 12, 17, 22)),  # and begin anew with a group that is longer
        (None, 10, (0, 10, 20)),
        (None, 24, (0,)),
    ],
)
@pytest.mark.parametrize("total", [60, 37])
@pytest.mark.parametrize("rule", ["absmax", "search"])
def test_joint_equals_the_loop(rule: str, total: int, group_size: int | None, block: int, starts: tuple[int, ...]) -> None:
    weight, hessian = layer(3)
    grid = Grid(3, group_size, rule)
    got = joint(weight, hessian, grid=grid, sparsity=0.9, removed=total, block=block)
    close(got, slow_sweep(weight, hessian, grid=grid, total=total, starts=starts))
    on_the_grid(got, grid)
    assert int((~got.kept).sum()) == total


@pytest.mark.parametrize("block", [128, 8, 6])
@pytest.mark.parametrize("group_size", [4, 8, 12, None])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_joint_n_of_m_equals_the_loop(n: int, m: int, group_size: int | None, block: int) -> None:
    weight, hessian = layer(4)
    grid = Grid(2, group_size, "search")
    got = joint(weight, hessian, grid=grid, sparsity=1 - n / m, pattern=f"{n}:{m}", block=block)
    close(got, slow_sweep(weight, hessian, grid=grid, groups=(n, m)))
    on_the_grid(got, grid)
    assert bool((got.kept.view(len(weight), -1, m).sum(-1) == n).all())


# --- special cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [128, 10, 8])
@pytest.mark.parametrize(
    ("sparsity", "pattern", "removed"), [(0.5, "unstructured", None), (0.5, "2:4", None), (0.1, "unstructured", 37)]
)
def test_without_rounding_it_is_sparsegpt(sparsity: float, pattern: str, removed: int | None, block: int) -> None:
    for weight, hessian in (layer(5), [part.float() for part in layer(6, rows=40, width=48, tokens=200)]):
        wanted = sparsegpt(weight, hessian, sparsity=sparsity, pattern=pattern, block=block, removed=removed)
        got = joint(weight, hessian, grid=Grid(16), sparsity=sparsity, pattern=pattern, block=block, removed=removed)
        assert got.quantized is None
        assert torch.equal(got.weight, wanted[0]) and torch.equal(got.kept, wanted[1])


@pytest.mark.parametrize("group_size", [8, None])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_without_pruning_it_is_gptq(rule: str, group_size: int | None) -> None:
    weight, hessian = layer(7)
    grid = Grid(3, group_size, rule)
    for block in (128, 8):
        first, second = (
            joint(weight, hessian, grid=grid, sparsity=0.0, block=block),
            gptq(weight, hessian, grid=grid, block=block),
        )
        assert torch.equal(first.weight, second.weight) and bool(first.kept.all())
    assert torch.equal(gptq(weight, hessian, grid=Grid(16)).weight, weight)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_without_correlations_it_is_rounding_to_nearest(rule: str) -> None:
    weight, _ = layer(8)
    hessian = torch.logspace(-1, 1, WIDTH).double().diag()
    grid = Grid(3, 8, rule)
    assert torch.equal(gptq(weight, hessian, grid=grid).weight, round_to_nearest(weight, grid).dequantize(dtype=torch.float64))
    # with pruning: masks of SparseGPT, scales of what stays
    kept = sparsegpt(weight, hessian, sparsity=0.5)[1]
    expected = round_to_nearest(torch.where(kept, weight, 0.0), grid).dequantize(dtype=torch.float64)
    assert torch.equal(joint(weight, hessian, grid=grid, sparsity=0.5).weight, expected)


def test_an_error_of_rounding_goes_to_the_feature_that_says_the_same() -> None:
    """Feature 1 is twice feature 0. With a scale of 1, 2.4 becomes 2, and half of the 0.4 that is lost goes to -3.5."""
    inputs = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [3.0, 6.0]]).double()
    weight = torch.tensor([[2.4, -3.5]]).double()
    got = gptq(weight, 2 * inputs.T @ inputs / 3, grid=Grid(3), damping=1e-9)
    assert got.quantized is not None and got.quantized.scales.tolist() == [[1.0]]
    assert got.weight.tolist() == [[2.0, -3.0]]  # alone, -3.5 would go to the even -4
    assert round_to_nearest(weight, Grid(3)).codes.tolist() == [[2, -4]]


def test_a_pruned_weight_takes_part_in_choosing_no_scale() -> None:
    """A large weight of a feature that says nothing goes; with it, its group would need a scale too coarse for the others."""
    weight = torch.tensor([[100.0, 1.5, -1.0, 0.5]]).double()
    hessian = torch.tensor([1e-6, 1.0, 1.0, 1.0]).double().diag()
    for block in (128, 2):
        got = joint(weight, hessian, grid=Grid(2, 4), sparsity=0.5, removed=1, damping=1e-9, block=block)
        assert got.quantized is not None
        if block == 128:
            assert got.kept.tolist() == [[False, True, True, True]]
            assert got.weight.tolist() == [[0.0, 1.0, -1.0, 0.0]]
        assert got.quantized.scales.tolist() == [[1.0]]
    got = joint(weight, hessian, grid=Grid(2, 4), sparsity=0.25, pattern="3:4", damping=1e-9)
    assert got.weight.tolist() == [[0.0, 1.0, -1.0, 0.0]]


# --- what must hold ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "unstructured"), (0.29, "unstructured"), (0.5, "2:4"), (0.5, "4:8")])
def test_counts_patterns_and_grids_in_single_precision(sparsity: float, pattern: str, bits: int) -> None:
    weight, hessian = (part.float() for part in layer(9, rows=20, width=160, tokens=400))
    for group_size in (32, 160, None):
        grid = Grid(bits, group_size)
        got = joint(weight, hessian, grid=grid, sparsity=sparsity, pattern=pattern)
        on_the_grid(got, grid)
        assert got.weight.dtype == torch.float32
        assert int((~got.kept).sum()) == importances.removed_count(weight.numel(), sparsity)
        if pattern != "unstructured":
            n, m = (int(part) for part in pattern.split(":"))
            assert bool(((got.weight.view(20, -1, m) != 0).sum(-1) <= n).all())
        again = gptq(got.weight, hessian, grid=grid, kept=got.kept)
        assert bool((again.weight[~got.kept] == 0).all())


@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_errs_less_than_rounding_to_nearest_on_correlated_inputs(bits: int, group_size: int | None) -> None:
    for rule in SCALE_RULES:
        grid = Grid(bits, group_size, rule)
        for seed in range(5):
            weight, hessian = layer(seed + 30, rows=64, width=48, tokens=200)
            hessian /= hessian.diagonal().outer(hessian.diagonal()).sqrt()  # else the last features, of large size, decide
            own = loss(weight, gptq(weight, hessian, grid=grid).weight, hessian)
            assert own < 0.7 * loss(weight, round_to_nearest(weight, grid).dequantize(dtype=torch.float64), hessian)


def test_more_bits_err_less() -> None:
    weight, hessian = layer(50, rows=16, width=48, tokens=200)
    for sparsity in (0.0, 0.5):
        grids = [Grid(bits, 16) for bits in (2, 3, 4, 8)] + [Grid(16)]
        errors = [loss(weight, joint(weight, hessian, grid=grid, sparsity=sparsity).weight, hessian) for grid in grids]
        assert errors[:3] == sorted(errors[:3], reverse=True)
        assert errors[3] < errors[2] and errors[3] == pytest.approx(errors[4], rel=0.05, abs=1e-3 * errors[0])


def test_one_sweep_beats_pruning_without_updates_before_or_after_rounding() -> None:
    grid, better = Grid(3, 16), {"before": 0, "after": 0}
    for seed in range(10):
        weight, hessian = layer(seed + 60, rows=16, width=48, tokens=200)
        own = loss(weight, joint(weight, hessian, grid=grid, sparsity=0.5).weight, hessian)
        norms = hessian.diagonal().sqrt()
        kept = importances.keep_mask(importances.wanda_importance(weight, norms), sparsity=0.5)
        rounded = gptq(weight, hessian, grid=grid).quantized
        assert rounded is not None
        on_grid = rounded.dequantize(dtype=torch.float64)
        after = rounded.masked(importances.keep_mask(importances.wanda_importance(on_grid, norms), sparsity=0.5))
        better["before"] += own < loss(weight, gptq(weight, hessian, grid=grid, kept=kept).weight, hessian)
        better["after"] += own < loss(weight, after.dequantize(dtype=torch.float64), hessian)
    assert min(better.values()) >= 9


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_features_that_are_always_zero_end_at_zero(pattern: str) -> None:
    weight, hessian = layer(11)
    dead = torch.zeros(WIDTH, dtype=torch.bool)
    dead[[0, 3, 9, WIDTH - 1]] = True
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    for got in (
        joint(weight, hessian, grid=Grid(4, 8), sparsity=0.5, pattern=pattern),
        gptq(weight, hessian, grid=Grid(4, 8)),
    ):
        assert bool(torch.isfinite(got.weight).all()) and bool((got.weight[:, dead] == 0).all())
    nothing = joint(weight, torch.zeros(WIDTH, WIDTH).double(), grid=Grid(4, 8), sparsity=0.5)
    assert bool((nothing.weight == 0).all())


def test_the_arguments_are_left_as_they_were() -> None:
    weight, hessian = layer(13)
    hessian[2], hessian[:, 2] = 0.0, 0.0
    kept = weight > 0
    before = weight.clone(), hessian.clone(), kept.clone()
    joint(weight, hessian, grid=Grid(4, 8), sparsity=0.5, block=8, weighted=True)
    gptq(weight, hessian, grid=Grid(4, 8), kept=kept, block=8)
    assert all(torch.equal(now, then) for now, then in zip((weight, hessian, kept), before, strict=True))


def test_the_result_has_the_dtype_of_the_weights() -> None:
    weight, hessian = layer(15)
    half, single = weight.bfloat16(), hessian.float()
    got, expected = (joint(given, single, grid=Grid(8, 8), sparsity=0.5) for given in (half, half.float()))
    assert got.weight.dtype == torch.bfloat16
    assert torch.equal(got.weight, expected.weight.bfloat16())
    assert got.quantized is not None and expected.quantized is not None
    assert torch.equal(got.quantized.codes, expected.quantized.codes)


def test_the_factor_is_the_one_of_sparsegpt() -> None:
    """Damping is a share of the mean diagonal, so the unit of the inputs does not matter, and how much there is does."""
    weight, hessian = layer(16)
    grid = Grid(3, 8)
    first = gptq(weight, hessian, grid=grid, damping=0.3)
    assert torch.equal(first.weight, gptq(weight, hessian * 64, grid=grid, damping=0.3).weight)
    assert not torch.equal(first.weight, gptq(weight, hessian, grid=grid).weight)
    assert inverse_cholesky(hessian, damping=0.3).shape == hessian.shape


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_a_hessian_that_is_not_positive_definite_is_refused_by_name() -> None:
    weight, hessian = layer(16)
    hessian[0, 1] = hessian[1, 0] = 10 * hessian.diagonal().max()
    for sweep in (
        lambda: gptq(weight, hessian, grid=Grid(4), name="layers.3.mlp.up_proj.weight"),
        lambda: joint(weight, hessian, grid=Grid(4), sparsity=0.5, name="layers.3.mlp.up_proj.weight"),
    ):
        with pytest.raises(InputError, match=r"the Hessian of layers\.3\.mlp\.up_proj\.weight must be positive definite"):
            sweep()


def test_bad_groups_are_refused_by_name() -> None:
    weight, hessian = layer(17)
    for sweep in (
        lambda: gptq(weight, hessian, grid=Grid(4, 10), name="o_proj"),
        lambda: joint(weight, hessian, grid=Grid(4, 10), sparsity=0.5, name="o_proj"),
    ):
        with pytest.raises(InputError, match="group_size must divide the input features, got 10 for 24 of o_proj"):
            sweep()
    with pytest.raises(InputError, match="the pattern 2:4 must divide the group_size of o_proj, got 6: use a multiple of 4"):
        joint(weight, hessian, grid=Grid(4, 6), sparsity=0.5, pattern="2:4", name="o_proj")


def test_bad_sparsities_weights_and_counts_are_refused() -> None:
    weight, hessian = layer(18)
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 50"):
        joint(weight, hessian, grid=Grid(4), sparsity=50)
    with pytest.raises(InputError, match=r"sparsity must be 0\.5 for the pattern 2:4, got 0\.3"):
        joint(weight, hessian, grid=Grid(4), sparsity=0.3, pattern="2:4")
    with pytest.raises(InputError, match="removed weights must be in"):
        joint(weight, hessian, grid=Grid(4), sparsity=0.5, removed=weight.numel())
    weight[0, 0] = math.inf
    with pytest.raises(InputError, match="the weights of q_proj must be finite"):
        gptq(weight, hessian, grid=Grid(4), name="q_proj")


# --- aiming at the dense stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.02])
def test_a_shifted_matrix_is_the_least_squares_solution_on_the_drifted_inputs(damping: float) -> None:
    stream = torch.Generator().manual_seed(0)
    dense = torch.randn(80, 10, generator=stream).double() @ torch.randn(10, 10, generator=stream).double()
    drifted = 0.8 * dense + 0.3 * torch.randn(80, 10, generator=stream).double()
    weight = torch.randn(4, 10, generator=stream).double()
    hessian, cross = (2 * each.T @ drifted / 80 for each in (drifted, dense))
    got = shifted(weight, hessian, cross, damping=damping)
    ridge = (damping * hessian.diagonal().mean() * 80 / 2).sqrt() * torch.eye(10).double()
    rows, targets = torch.cat([drifted, ridge]), torch.cat([dense, ridge]) @ weight.T
    expected = torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)

    def error(matrix: Tensor) -> float:
        return float((drifted @ matrix.T - dense @ weight.T).square().sum())

    assert error(got) < 0.5 * error(weight)
    torch.testing.assert_close(shifted(weight, hessian, hessian, damping=damping), weight, atol=1e-9, rtol=1e-9)
