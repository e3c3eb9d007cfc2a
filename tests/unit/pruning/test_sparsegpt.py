"""SparseGPT against a slow loop that inverts anew at every column, and what must hold whatever the numbers."""

import math
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning import importances
from lib.pruning.sparsegpt import inverse_cholesky, sparsegpt
from tests.unit import slow_pruning as slow

ROWS, WIDTH = 5, 24


def layer(seed: int = 0, *, rows: int = ROWS, width: int = WIDTH, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of inputs whose features are correlated and differ in size."""
    stream = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=stream).double() + 2 * torch.randn(width, 1, generator=stream).double()
    inputs = torch.randn(tokens, width, generator=stream).double() @ mix.T * torch.logspace(-0.5, 0.5, width).double()
    return torch.randn(rows, width, generator=stream).double(), 2 * inputs.T @ inputs / tokens


def loss(weight: Tensor, changed: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's outputs, summed over rows."""
    change = changed - weight
    return float(torch.einsum("ri,ij,rj->", change, hessian, change))


def close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], atol=1e-8, rtol=1e-7)


# --- against the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("block", [128, WIDTH, 10, 7, 1])
@pytest.mark.parametrize("sparsity", ["0.5", "0.3"])
def test_unstructured_equals_the_loop(sparsity: str, block: int, inclusive: bool) -> None:
    """Blocks of 10 and 7 leave a short last one; a block of 1 chooses column by column."""
    weight, hessian = layer()
    got = sparsegpt(weight, hessian, sparsity=float(sparsity), block=block, inclusive=inclusive)
    close(got, slow.sparsegpt(weight, hessian, sparsity=sparsity, block=block, inclusive=inclusive))
    assert bool((got[0][~got[1]] == 0).all())
    assert (got[0] - weight)[got[1]].abs().max() > 0.1  # the updates are not small


@pytest.mark.parametrize("block", [128, 8])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_equals_the_loop(n: int, m: int, block: int) -> None:
    weight, hessian = layer(1)
    got = sparsegpt(weight, hessian, sparsity=1 - n / m, pattern=f"{n}:{m}", block=block)
    close(got, slow.sparsegpt(weight, hessian, groups=(n, m)))
    assert (got[1].view(ROWS, -1, m).sum(-1) == n).all()


@pytest.mark.parametrize("damping", [0.001, 0.3])
def test_damping_is_a_share_of_the_mean_diagonal(damping: float) -> None:
    weight, hessian = layer(2)
    got = sparsegpt(weight, hessian, sparsity=0.5, damping=damping)
    close(got, slow.sparsegpt(weight, hessian, damping=damping))
    # so the unit of the inputs does not matter
    close(sparsegpt(weight, hessian * 64, sparsity=0.5, damping=damping), got)


def test_the_choice_of_a_group_sees_the_updates_before_it() -> None:
    """With the masks of the weights as they came, this input gives others."""
    weight, hessian = layer(1)
    factor = inverse_cholesky(hessian)
    at_once = slow.keep_by_group(weight**2 / factor.diagonal() ** 2, 2, 4)
    kept = sparsegpt(weight, hessian, sparsity=0.5, pattern="2:4")[1]
    assert torch.equal(kept[:, :4], at_once[:, :4])
    assert not torch.equal(kept, at_once)


@pytest.mark.parametrize("block", [4, 8, 12, 16, 20])
def test_blocks_do_not_matter_when_they_choose_the_same_weights(block: int) -> None:
    weight, hessian = layer(3)
    whole = sparsegpt(weight, hessian, sparsity=0.5, pattern="2:4", block=WIDTH)
    close(sparsegpt(weight, hessian, sparsity=0.5, pattern="2:4", block=block), whole)


def test_the_factor_is_the_upper_one_of_the_inverse() -> None:
    _, hessian = layer(4)
    factor = inverse_cholesky(hessian, damping=0.02)
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(WIDTH).double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(WIDTH).double(), atol=1e-9, rtol=0)
    # the square of its diagonal is the inverse Hessian of the columns from there on
    for column in (0, 7, WIDTH - 1):
        expected = torch.linalg.inv(damped[column:, column:])[0, 0]
        torch.testing.assert_close(factor[column, column] ** 2, expected, atol=0, rtol=1e-9)


# --- special cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_without_correlations_nothing_is_updated(sparsity: float) -> None:
    """The ranking is then w² (H_jj + damping), over all rows together."""
    weight, _ = layer(5)
    diagonal = torch.logspace(-1, 1, WIDTH).double()[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(6))]
    got, kept = sparsegpt(weight, diagonal.diag(), sparsity=sparsity)
    cost = weight**2 * (diagonal + 0.01 * diagonal.mean())
    count = importances.removed_count(weight.numel(), sparsity)
    assert torch.equal(kept, slow.keep_by_layer(cost, count))
    assert torch.equal(got, torch.where(kept, weight, 0.0))
    for wrong in (weight**2, weight**2 / diagonal, weight.abs() * diagonal, weight**2 * diagonal**2):
        assert not torch.equal(kept, slow.keep_by_layer(wrong, count))
    assert not torch.equal(kept, slow.keep_by_row(cost, importances.removed_count(WIDTH, sparsity)))


def test_two_features_that_say_the_same_replace_each_other() -> None:
    """Feature 1 is twice feature 0: what is taken from 0 goes to 1 at half its size."""
    inputs = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [3.0, 6.0]]).double()
    weight = torch.tensor([[0.4, 1.0]]).double()
    got, kept = sparsegpt(weight, 2 * inputs.T @ inputs / 3, sparsity=0.5, damping=1e-9)
    assert kept.tolist() == [[False, True]]
    torch.testing.assert_close(got, torch.tensor([[0.0, 1.2]]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("inclusive", [False, True])
def test_exact_counts_in_every_block(inclusive: bool) -> None:
    """10 of 36 weights in blocks of 5, 5 and 2 columns: 4, 8 and 10 are gone after each; the release removes one more of each."""
    weight, hessian = layer(7, rows=3, width=12)
    kept = sparsegpt(weight, hessian, sparsity=0.3, block=5, inclusive=inclusive)[1]
    gone = [int((~part).sum()) for part in kept.split(5, dim=1)]
    assert gone == ([5, 5, 2] if inclusive else [4, 4, 2])  # floor(4.5) + 1, floor(4.5) + 1, floor(1.8) + 1
    # 0.29 of 5 x 20 is 29, which plain truncation misses
    weight, hessian = layer(8, rows=5, width=20)
    assert int((~sparsegpt(weight, hessian, sparsity=0.29)[1]).sum()) == 29


@pytest.mark.parametrize("block", [128, 10, 7, 1])
@pytest.mark.parametrize("total", [0, 1, 37, 61, ROWS * WIDTH - 1])
def test_an_exact_number_is_shared_out_among_the_blocks(total: int, block: int) -> None:
    """Whatever the sparsity says: rounding each block down would lose some of 37 and of 61."""
    weight, hessian = layer(9)
    got = sparsegpt(weight, hessian, sparsity=0.9, block=block, removed=total)
    assert int((~got[1]).sum()) == int((got[0] == 0).sum()) == total
    close(got, slow.sparsegpt(weight, hessian, total=total, block=block))


@pytest.mark.parametrize("total", [-1, ROWS * WIDTH, 10**6])
def test_an_exact_number_out_of_range_is_refused(total: int) -> None:
    weight, hessian = layer(9)
    with pytest.raises(InputError, match="must be in"):
        sparsegpt(weight, hessian, sparsity=0.5, removed=total)


def test_rows_of_a_block_compete() -> None:
    weight, hessian = layer(9)
    weight[0] *= 1e-3
    kept = sparsegpt(weight, hessian, sparsity=0.3)[1]
    assert not kept[0].any()
    assert int((~kept).sum()) == importances.removed_count(weight.numel(), 0.3)


def test_nothing_to_remove_changes_nothing() -> None:
    weight, hessian = layer(10)
    got, kept = sparsegpt(weight, hessian, sparsity=0.0)
    assert torch.equal(got, weight) and kept.all()
    assert int((~sparsegpt(weight, hessian, sparsity=0.0, block=10, inclusive=True)[1]).sum()) == 3


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_features_that_are_always_zero_end_at_zero(pattern: str) -> None:
    weight, hessian = layer(11)
    dead = torch.zeros(WIDTH, dtype=torch.bool)
    dead[[0, 3, 9, WIDTH - 1]] = True
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    got, kept = sparsegpt(weight, hessian, sparsity=0.5, pattern=pattern)
    assert torch.isfinite(got).all()
    assert (got[:, dead] == 0).all()
    close((got, kept), slow.sparsegpt(weight, hessian, groups=(2, 4) if pattern == "2:4" else None))
    # they are what costs least, so they fill the quota first
    assert not kept[:, [0, 3]].any()
    assert (got[:, ~dead] != 0).any(1).all()


def test_a_layer_that_reads_nothing_but_zeros_ends_at_zero() -> None:
    weight, _ = layer(12)
    got, _ = sparsegpt(weight, torch.zeros(WIDTH, WIDTH).double(), sparsity=0.5)
    assert (got == 0).all()


# --- what it is good for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("seed", range(5))
def test_the_update_lowers_the_error_of_its_mask(seed: int, pattern: str) -> None:
    """It lies between refitting all kept weights at once, which is the best there is, and zeroing without an update."""
    weight, hessian = layer(seed + 20, rows=8)
    got, kept = sparsegpt(weight, hessian, sparsity=0.5, pattern=pattern, damping=1e-6)
    best = torch.zeros_like(weight)
    for row in range(8):
        free = kept[row]
        best[row, free] = torch.linalg.solve(hessian[free][:, free], hessian[free] @ weight[row])
    zeroed = loss(weight, torch.where(kept, weight, 0.0), hessian)
    assert loss(weight, best, hessian) <= loss(weight, got, hessian) < 0.7 * zeroed


def test_the_error_is_usually_below_that_of_wanda_and_of_magnitude() -> None:
    better = {"wanda": 0, "magnitude": 0}
    for seed in range(12):
        weight, hessian = layer(seed + 40, rows=8)
        own = loss(weight, sparsegpt(weight, hessian, sparsity=0.5)[0], hessian)
        ranked = {"wanda": importances.wanda_importance(weight, hessian.diagonal().sqrt()), "magnitude": weight.abs()}
        for name, importance in ranked.items():
            kept = importances.keep_mask(importance, sparsity=0.5)
            better[name] += own < loss(weight, importances.prune(weight, kept), hessian)
    assert better["wanda"] >= 11 and better["magnitude"] >= 11


# --- dtypes and arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_arguments_are_left_as_they_were(pattern: str) -> None:
    weight, hessian = layer(13)
    hessian[2], hessian[:, 2] = 0.0, 0.0  # a dead feature is mended in a copy
    before = weight.clone(), hessian.clone()
    sparsegpt(weight, hessian, sparsity=0.5, pattern=pattern, block=8)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    inverse_cholesky(layer(13)[1])
    assert torch.equal(hessian, before[1])


def test_single_precision_is_close_to_double() -> None:
    weight, hessian = layer(14, tokens=200)
    weight = weight.float().double()
    double = sparsegpt(weight, hessian, sparsity=0.5)
    single = sparsegpt(weight.float(), hessian.float(), sparsity=0.5)
    assert single[0].dtype == torch.float32
    assert torch.equal(single[1], double[1])
    assert (single[0].double() - double[0]).abs().max() < 1e-3 * double[0].abs().max()


def test_the_result_has_the_dtype_of_the_weights() -> None:
    weight, hessian = layer(15)
    half = weight.bfloat16()
    got, kept = sparsegpt(half, hessian.float(), sparsity=0.5)
    assert got.dtype == torch.bfloat16
    # computed in the Hessian's dtype and rounded once, at the end
    assert torch.equal(got, sparsegpt(half.float(), hessian.float(), sparsity=0.5)[0].bfloat16())
    assert int((~kept).sum()) == weight.numel() // 2


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_a_hessian_that_is_not_positive_definite_is_refused_by_name() -> None:
    weight, hessian = layer(16)
    hessian[0, 1] = hessian[1, 0] = 10 * hessian.diagonal().max()
    with pytest.raises(InputError) as caught:
        sparsegpt(weight, hessian, sparsity=0.5, name="model.layers.3.mlp.up_proj.weight")
    assert str(caught.value) == (
        "the Hessian of model.layers.3.mlp.up_proj.weight must be positive definite after damping, got one that is not: "
        "raise damping above 0.01"
    )
    sparsegpt(weight, hessian, sparsity=0.5, damping=100.0)  # the remedy works


def test_fewer_tokens_than_features_need_the_damping() -> None:
    weight, hessian = layer(17, tokens=3)
    assert torch.isfinite(sparsegpt(weight, hessian, sparsity=0.5)[0]).all()
    with pytest.raises(InputError, match=r"raise damping above -0\.001"):
        sparsegpt(weight, hessian, sparsity=0.5, damping=-0.001)


def test_too_little_damping_in_single_precision_is_refused_as_such() -> None:
    """Three tokens and 64 features: somewhere between enough and far too little, the inverse is what cannot be factored."""
    for seed in range(20):
        stream = torch.Generator().manual_seed(seed)
        inputs = torch.randn(64, 3, generator=stream) * torch.rand(64, 1, generator=stream) ** 4 * 100
        for damping in torch.logspace(-8, -4, 17).tolist():
            with suppress(InputError):
                assert torch.isfinite(inverse_cholesky(2 * inputs @ inputs.T, damping=damping)).all()


def test_a_hessian_with_nan_is_refused() -> None:
    weight, hessian = layer(18)
    hessian[4, 4] = math.nan
    with pytest.raises(InputError, match="the Hessian of a layer must be positive definite"):
        sparsegpt(weight, hessian, sparsity=0.5)


def test_bad_sparsities_and_patterns_are_refused() -> None:
    weight, hessian = layer(19)
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 50"):
        sparsegpt(weight, hessian, sparsity=50)
    with pytest.raises(InputError, match=r"sparsity must be 0\.5 for the pattern 2:4, got 0\.3"):
        sparsegpt(weight, hessian, sparsity=0.3, pattern="2:4")
    with pytest.raises(InputError, match="the pattern 3:5 must divide the input features, got 24"):
        sparsegpt(weight, hessian, sparsity=0.4, pattern="3:5")


@pytest.mark.parametrize(("width", "block"), [(24, 8), (192, 128)])
def test_groups_across_a_block_boundary(width: int, block: int) -> None:
    weight, hessian = layer(20, width=width, tokens=400)
    kept = sparsegpt(weight, hessian, sparsity=2 / 3, pattern="1:3", block=block)[1]
    assert (kept.view(ROWS, -1, 3).sum(-1) == 1).all()
