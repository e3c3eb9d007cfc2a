"""Refit against lstsq and its gradient, swaps against trying every pair, ALPS against plain loops; and all of them in a model."""

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.calibration import one_shot, sets
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel
from lib.pruning import alps, importances, matrices, pruner, repairs
from lib.pruning.methods import METHODS, REPAIRS, STRONGER, Method, Target, repaired
from lib.pruning.sparsegpt import DAMPING, sparsegpt
from tests import tiny
from tests.unit import slow_pruning as slow
from tests.unit.pruning.test_sparsegpt import ROWS, WIDTH, layer, loss

HALF = Target(0.5)


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()


def uneven(seed: int = 0) -> Tensor:
    """A mask whose rows keep different numbers, one of them nothing and one everything."""
    kept = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) < torch.linspace(0.2, 0.8, ROWS)[:, None]
    kept[1], kept[3] = False, True
    return kept


def halved(weight: Tensor, hessian: Tensor, *, pattern: str = "unstructured") -> Tensor:
    return importances.keep_mask(importances.wanda_importance(weight, hessian.diagonal().sqrt()), sparsity=0.5, pattern=pattern)


# --- refit ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_refit_is_the_least_squares_solution(seed: int) -> None:
    """The dense outputs, and the dense weights as rows of their own for the damping, fitted by the features that stay."""
    stream = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, WIDTH, generator=stream).double() @ torch.randn(WIDTH, WIDTH, generator=stream).double()
    weight, kept = layer(seed)[0], uneven(seed)
    hessian = 2 * inputs.T @ inputs / 60
    ridge = (DAMPING * hessian.diagonal().mean() * 60 / 2).sqrt() * torch.eye(WIDTH).double()
    rows = torch.cat([inputs, ridge])
    expected = torch.zeros_like(weight)
    for row, mask in enumerate(kept):
        if bool(mask.any()):
            expected[row, mask] = torch.linalg.lstsq(rows[:, mask], rows @ weight[row], driver="gelsd").solution
    got = repairs.refit(weight, kept, hessian)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-7)
    assert torch.equal(got[3], weight[3]) and not bool(got[1].any())


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
def test_the_gradient_of_kept_weights_is_zero_and_no_update_is_better(damping: float) -> None:
    weight, hessian = layer(4)
    kept = uneven(4)
    got = repairs.refit(weight, kept, hessian, damping=damping)
    gradient = (got - weight) @ damped(hessian, damping)
    scale = float((weight @ hessian).abs().max())
    assert float(gradient[kept].abs().max()) < 1e-8 * scale < float(gradient[~kept].abs().max())
    updated, chosen = sparsegpt(weight, hessian, sparsity=0.5, damping=damping)
    for other, mask in ((weight, kept), (updated, chosen)):
        plain = importances.prune(other, mask)
        own = repairs.refit(weight, mask, hessian, damping=damping)
        assert loss(weight, own, damped(hessian, damping)) < loss(weight, plain, damped(hessian, damping))
        assert not bool(own[~mask].any())


@pytest.mark.parametrize("at_once", [1, 2**20])
def test_masks_together_are_refitted_as_each_alone(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike and unlike ones, with nothing and everything in common."""
    weight, hessian = layer(11)
    alike = uneven(11)
    alike[:, :3] = ~alike[:, :3]
    masks = torch.stack([uneven(11), alike, ~uneven(11), torch.ones_like(alike)])
    exact = [slow_refit(weight, mask, hessian) for mask in masks]
    monkeypatch.setattr(repairs, "AT_ONCE", at_once)
    for chosen in ([0], [0, 1], [0, 1, 2, 3], [3, 3]):
        got = repairs.refits(weight, masks[chosen], hessian)
        torch.testing.assert_close(got, torch.stack([exact[index] for index in chosen]), atol=1e-9, rtol=1e-9)


def slow_refit(weight: Tensor, kept: Tensor, hessian: Tensor) -> Tensor:
    """Solve row by row."""
    matrix, result = damped(hessian), torch.zeros_like(weight)
    for row, mask in enumerate(kept):
        if bool(mask.any()):
            change = torch.linalg.solve(matrix[mask][:, mask], matrix[mask][:, ~mask] @ weight[row, ~mask])
            result[row, mask] = weight[row, mask] + change
    return result


def test_systems_of_any_number_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(5)
    whole = repairs.refit(weight, uneven(5), hessian)
    monkeypatch.setattr(repairs, "AT_ONCE", 1)
    torch.testing.assert_close(repairs.refit(weight, uneven(5), hessian), whole, atol=1e-9, rtol=1e-9)


def test_float32_is_near_and_keeps_its_dtype() -> None:
    weight, hessian = layer(6)
    exact = repairs.refit(weight, uneven(6), hessian)
    got = repairs.refit(weight.float(), uneven(6), hessian.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_systems_are_solved_with_any_number_of_threads(threads: int) -> None:
    """Many systems of 180 unknowns and more: where a batched LU of two threads hangs or returns nonsense."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = torch.randn(1600, 400, generator=torch.Generator().manual_seed(0))
        hessian, weight = 2 * inputs.T @ inputs / len(inputs), torch.randn(24, 400, generator=torch.Generator().manual_seed(1))
        kept = torch.rand(24, 400, generator=torch.Generator().manual_seed(2)) < 0.5
        found, exact = repairs.refit(weight, kept, hessian), repairs.refit(weight.double(), kept, hessian.double())
    finally:
        torch.set_num_threads(before)
    assert int(kept.sum(1).min()) > 170
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_feature_that_is_always_zero_keeps_its_weights() -> None:
    weight, hessian = layer(7)
    hessian[:, 2] = hessian[2] = 0.0
    kept = uneven(7)
    kept[0, 2] = True
    got = repairs.refit(weight, kept, hessian, damping=0.0)
    assert got[0, 2] == weight[0, 2]


def test_a_hessian_that_is_not_definite_is_refused() -> None:
    weight, hessian = layer()
    with pytest.raises(InputError, match="the Hessian of q must be positive definite after damping"):
        repairs.refit(weight, uneven(), -torch.eye(WIDTH).double(), name="q")
    weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="weights of q must be finite, got 1"):
        repairs.refit(weight, uneven(), hessian, name="q")


# --- swaps ---------------------------------------------------------------------------------------------------------------


def row_error(weight: Tensor, kept: Tensor, hessian: Tensor) -> float:
    gone = torch.where(kept, 0.0, weight)
    return float(gone @ hessian @ gone)


def best_swap(weight: Tensor, kept: Tensor, hessian: Tensor, size: int) -> tuple[float, Tensor]:
    """Try every pair of a row inside its groups: the lowest error and the mask that has it."""
    best = row_error(weight, kept, hessian), kept
    for remove, restore in product(range(len(weight)), repeat=2):
        if remove // size == restore // size and bool(kept[remove]) and not bool(kept[restore]):
            other = kept.clone()
            other[remove], other[restore] = False, True
            best = min(best, (row_error(weight, other, hessian), other), key=lambda pair: pair[0])
    return best


@pytest.mark.parametrize(("pattern", "size"), [("unstructured", WIDTH), ("2:4", 4), ("4:8", 8)])
def test_each_swap_is_the_best_of_all(pattern: str, size: int) -> None:
    weight, hessian = layer(1)
    kept = halved(weight, hessian, pattern=pattern)
    for _ in range(3):
        got = repairs.swap(weight, kept, hessian, swaps=1, pattern=pattern, exhaustive=True)
        for row in range(ROWS):
            assert torch.equal(got[row], best_swap(weight[row], kept[row], hessian, size)[1])
        kept = got


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_swaps_end_where_no_pair_helps(pattern: str) -> None:
    weight, hessian = layer(2)
    kept = halved(weight, hessian, pattern=pattern)
    got = repairs.swap(weight, kept, hessian, pattern=pattern, exhaustive=True)
    for row in range(ROWS):
        now = row_error(weight[row], got[row], hessian)
        assert best_swap(weight[row], got[row], hessian, 4 if pattern == "2:4" else WIDTH)[0] > now * (1 - 1e-5)
        assert now <= row_error(weight[row], kept[row], hessian)
    gone = [torch.where(mask, 0.0, weight) for mask in (got, kept)]
    assert loss(gone[0] * 0, gone[0], hessian) < 0.9 * loss(gone[1] * 0, gone[1], hessian)
    assert torch.equal(got.sum(1), kept.sum(1))
    if pattern == "2:4":
        assert bool((got.view(ROWS, -1, 4).sum(-1) == 2).all())


@pytest.mark.parametrize("seed", range(4))
def test_the_quick_search_never_raises_a_row_and_comes_near_the_exhaustive_one(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = layer(seed, rows=12)
    kept = halved(weight, hessian)
    before = kept
    quick = [before := repairs.swap(weight, before, hessian, swaps=1) for _ in range(8)]
    errors = [[row_error(weight[row], mask[row], hessian) for row in range(12)] for mask in (kept, *quick)]
    assert all(after <= last * (1 + 1e-9) for a, b in pairwise(errors) for last, after in zip(a, b, strict=True))
    assert torch.equal(repairs.swap(weight, kept, hessian, swaps=8), quick[-1])  # pulls are carried along exactly
    monkeypatch.setattr(repairs, "IN_CACHE", 1)
    assert torch.equal(repairs.swap(weight, kept, hessian, swaps=8), quick[-1])  # rows one by one
    monkeypatch.undo()
    full, short = (
        sum(row_error(weight[row], mask[row], hessian) for row in range(12))
        for mask in (repairs.swap(weight, kept, hessian, exhaustive=True), repairs.swap(weight, kept, hessian))
    )
    assert short < full * 1.25 < sum(errors[0])


def test_rows_that_keep_all_or_nothing_have_no_swap() -> None:
    weight, hessian = layer(3)
    kept = uneven(3)
    got = repairs.swap(weight, kept, hessian)
    assert torch.equal(got[[1, 3]], kept[[1, 3]]) and torch.equal(got.sum(1), kept.sum(1))
    assert torch.equal(repairs.swap(weight, kept, hessian, swaps=0), kept)


# --- ALPS ----------------------------------------------------------------------------------------------------------------


def slow_alps(weight: Tensor, hessian: Tensor, *, count: int, groups: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """ALPS in its published order, with an inverse for the step, masks from lists, and lstsq at the end."""

    def project(values: Tensor) -> Tensor:
        if groups is None:
            return slow.keep_by_layer(values.abs(), values.numel() - count)
        return slow.keep_by_group(values.abs(), *groups)

    matrix = damped(hessian)
    scale = matrix.diagonal().sqrt()
    matrix, work = matrix / scale / scale[:, None], weight * scale
    rho, raised, last = 0.1, False, project(work)
    sparse, dual, free = work * last, torch.zeros_like(work), work
    for iteration in range(1, 301):
        free = torch.linalg.solve(matrix + rho * torch.eye(len(matrix)).double(), (work @ matrix - dual + rho * sparse).T).T
        mask = project(free + dual / rho)
        sparse = (free + dual / rho) * mask
        dual = dual + rho * (free - sparse)
        if iteration % 3:
            continue
        changed, last = int((mask != last).sum()), mask
        share = changed / count
        if (changed == 0 and raised) or (iteration >= 30 and share < 3e-4):
            break
        if share > 0.1:
            rho, raised = rho * 1.3, True
        elif share > 0.005:
            rho, raised = rho * 1.2, True
        elif raised:
            rho *= 1.1
        else:
            rho, last = rho / 5, project(work)
            sparse, dual = work * last, torch.zeros_like(work)
    mask = project(free)
    values = torch.zeros_like(work)
    for row, kept in enumerate(mask):
        if bool(kept.any()):
            values[row, kept] = torch.linalg.solve(matrix[kept][:, kept], (work[row] @ matrix)[kept])
    return values / scale, mask


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("seed", range(3))
def test_alps_finds_the_mask_of_the_loop_and_comes_near_its_weights(
    seed: int, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = layer(seed, rows=12)
    groups = (2, 4) if pattern == "2:4" else None
    expected, mask = slow_alps(weight, hessian, count=weight.numel() // 2, groups=groups)
    got, kept = alps.alps(weight, hessian, sparsity=0.5, pattern=pattern)
    assert torch.equal(kept, mask)
    assert int((~kept).sum()) == weight.numel() // 2 and not bool(got[~kept].any())
    errors = [loss(weight, each, damped(hessian)) for each in (got, expected)]
    assert errors[1] <= errors[0] < errors[1] * 1.1  # ten iterations are not all the way
    monkeypatch.setattr(alps, "GRADIENTS", 400)
    torch.testing.assert_close(alps.alps(weight, hessian, sparsity=0.5, pattern=pattern)[0], expected, atol=1e-6, rtol=1e-6)
    refitted = repairs.refit(weight, kept, hessian)
    torch.testing.assert_close(refitted, expected, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_alps_is_better_than_what_it_is_compared_with(pattern: str) -> None:
    weight, hessian = layer(8, rows=24)
    errors = {
        "ALPS": loss(weight, alps.alps(weight, hessian, sparsity=0.5, pattern=pattern)[0], hessian),
        "Wanda, refit": loss(weight, repairs.refit(weight, halved(weight, hessian, pattern=pattern), hessian), hessian),
        "SparseGPT": loss(weight, sparsegpt(weight, hessian, sparsity=0.5, pattern=pattern)[0], hessian),
    }
    assert errors["ALPS"] < min(errors["Wanda, refit"], errors["SparseGPT"])


def test_alps_removes_exact_numbers_and_refuses_what_it_cannot_do() -> None:
    weight, hessian = layer(9)
    assert int((~alps.alps(weight, hessian, sparsity=0.5, removed=37)[1]).sum()) == 37
    got, kept = alps.alps(weight, hessian, sparsity=0.0)
    torch.testing.assert_close(got, weight)
    assert bool(kept.all())
    with pytest.raises(InputError, match="the Hessian of q must be positive definite"):
        alps.alps(weight, hessian - 2 * hessian.diagonal().diag(), sparsity=0.5, name="q")
    with pytest.raises(InputError, match="removed weights must be in"):
        alps.alps(weight, hessian, sparsity=0.5, removed=weight.numel())


def test_conjugate_gradients_end_at_the_refit() -> None:
    weight, hessian = layer(10)
    kept = uneven(10)
    exact = repairs.refit(weight, kept, hessian, damping=0.1)
    got = alps.conjugate_gradients(weight, torch.where(kept, weight, 0.0), kept, damped(hessian, 0.1), iterations=2000)
    torch.testing.assert_close(got, exact, atol=1e-7, rtol=1e-6)


# --- by name, in a model -------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("model"), causal=False)


MASKS = {
    "Wanda": METHODS["Wanda"],
    "sink-weighted": METHODS["sink-aware (Wanda)"],
    "magnitude": METHODS["magnitude per row"],
    "SparseGPT": METHODS["SparseGPT"],
}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_repair_runs_on_every_mask_by_name(model: LanguageModel, mask: str, pattern: str) -> None:
    windows, found = tiny.ids(3, 16), {}
    for name in REPAIRS:
        if MASKS[mask].updates and name == "swaps":
            continue
        with pruner.restored(model):
            pruner.prune_(model, repaired(MASKS[mask], name), Target(0.5, pattern), windows=windows)
            found[name] = [layer.module.weight.clone() for layer in model.layers]
            assert pruner.measured_sparsity(model) == pytest.approx(0.5, abs=1e-6)
    masks = {name: [each != 0 for each in weights] for name, weights in found.items()}
    assert all(torch.equal(a, b) for a, b in zip(masks["mask alone"][:3], masks["refit"][:3], strict=True))  # q, k, v of block 0
    assert not torch.equal(masks["swaps, refit"][0], masks["refit"][0])
    if "swaps" in found:
        assert all(torch.equal(a, b) for a, b in zip(masks["swaps"][:3], masks["swaps, refit"][:3], strict=True))
        kept = masks["swaps"][0]
        assert torch.equal(found["swaps"][0][kept], model.layers[0].module.weight[kept])  # swaps change no weight that stays


@pytest.mark.parametrize("name", STRONGER)
def test_stronger_methods_give_the_same_whatever_is_kept_in_memory(model: LanguageModel, name: str) -> None:
    weights = []
    for by_role in (False, True):
        with pruner.restored(model):
            pruner.prune_(model, STRONGER[name], HALF, windows=tiny.ids(3, 16), by_role=by_role)
            weights.append([layer.module.weight.clone() for layer in model.layers])
            assert pruner.measured_sparsity(model) == pytest.approx(0.5, abs=0.01)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_mask_can_be_repaired_with_the_errors_of_another_calibration(model: LanguageModel) -> None:
    """The mask is that of the first statistics, the repair that of the second."""
    method = replace(METHODS["sink-aware (Wanda)"], repair="refit")
    windows = tiny.ids(4, 16)
    own = one_shot.dense_statistics(
        model, sets.build(model, windows, inputs=method.inputs, weighting=method.weighting, seed=0), hessian=True
    )
    others = one_shot.dense_statistics(model, sets.build(model, windows, seed=0), hessian=True)
    layer_ = model.layers[0]
    weight = layer_.module.weight.detach().clone()
    with pruner.restored(model):
        pruner.prune_with_(model, method, HALF, own, errors_of=others)
        got = layer_.module.weight.detach().clone()
    kept = importances.keep_mask(matrices.importance(weight, method, own[0]["q"]), sparsity=0.5)
    assert torch.equal(got, repairs.refit(weight, kept, others[0]["q"].hessian()))
    assert not torch.equal(got, repairs.refit(weight, kept, own[0]["q"].hessian()))


# --- the order of columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["largest first", "random"])
def test_an_order_of_columns_is_sparsegpt_on_permuted_columns(model: LanguageModel, columns: str) -> None:
    method = Method("sparsegpt", sequential=False, columns=columns)  # type: ignore[arg-type]
    found = one_shot.dense_statistics(model, sets.build(model, tiny.ids(4, 16), seed=0), hessian=True)[0]["q"]
    weight, hessian = model.layers[0].module.weight.detach(), found.hessian()
    order = matrices.column_order(hessian, method, seed=3, name="q")
    assert order is not None and sorted(order.tolist()) == list(range(len(hessian)))
    if columns == "largest first":
        assert bool((hessian.diagonal()[order].diff() <= 0).all())
    got, kept = matrices.pruned(weight, method, HALF, found, seed=3, name="q")
    expected = sparsegpt(weight[:, order], hessian[order][:, order], sparsity=0.5)
    assert torch.equal(got[:, order], expected[0]) and torch.equal(kept[:, order], expected[1])
    assert not torch.equal(kept, sparsegpt(weight, hessian, sparsity=0.5)[1])
    again = matrices.column_order(hessian, method, seed=4, name="q")
    assert again is not None and torch.equal(again, order) == (columns == "largest first")
    with pytest.raises(InputError, match="an order of columns must go with unstructured sparsity, got 2:4"):
        matrices.pruned(weight, method, Target(0.5, "2:4"), found, name="q")


def test_options_that_contradict_are_refused() -> None:
    for options, message in (
        ({"importance": "wanda", "columns": "random"}, "an order of columns must go with SparseGPT, got wanda"),
        ({"importance": "sparsegpt", "swaps": 3}, "swaps must not be negative, and go with a refit"),
        ({"importance": "wanda", "swaps": -1}, "swaps must not be negative"),
    ):
        with pytest.raises(InputError, match=message):
            Method(**options)  # type: ignore[arg-type]


def test_a_random_mask_with_a_refit_is_that_of_its_seed(tmp_path: Path) -> None:
    """Whatever else drew numbers before."""
    model, method, found = tiny.model(tmp_path, causal=False), Method("random", repair="refit"), []
    for before, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(before)
        with pruner.restored(model):
            pruner.prune_(model, method, HALF, windows=tiny.ids(4, 12), seed=seed)
            found.append([layer.module.weight.clone() for layer in model.layers])
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(one != 0, other != 0) for one, other in zip(found[1], found[2], strict=True))


def test_a_random_mask_is_the_same_with_and_without_a_repair(tmp_path: Path) -> None:
    """So that the repair is the only difference; and each matrix has numbers of its own."""
    model, found = tiny.model(tmp_path, causal=False), dict[str, list[torch.Tensor]]()
    target = pruner.exact_target(model, 0.5)
    for name in REPAIRS:
        if not REPAIRS[name]["swaps"]:  # swaps change a mask
            with pruner.restored(model):
                pruner.prune_(model, repaired(Method("random"), name), target, windows=tiny.ids(4, 12), seed=3)
                found[name] = [layer.module.weight.clone() for layer in model.layers]
    alone, refitted = found["mask alone"], found["refit"]
    assert all(torch.equal(one != 0, other != 0) for one, other in zip(alone, refitted, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(alone, refitted, strict=True))
    like_first = [one != 0 for one in alone if one.shape == alone[0].shape]
    assert len(like_first) > 1 and not torch.equal(like_first[0], like_first[1])
