"""Compressed models: each order against its own steps, bytes against a count by hand, nothing left behind."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.calibration import statistics as calibration
from lib.calibration.reads import statistics_of
from lib.calibration.sums import InputStatistics
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel, LinearLayer, logits_at
from lib.pruning import importances, matrices, sparsegpt
from lib.pruning.methods import Method, Target, pattern_target
from lib.quantization import joint, planes
from lib.quantization.rounding import Grid, round_to_nearest
from lib.studies.joint import runs
from lib.studies.joint.runs import Recipe
from lib.studies.pruning import runs as pruning_runs
from lib.studies.pruning.runs import Bench, Calibrations
from tests import tiny

LENGTH, HALF = 16, Target(0.5)
INT3 = Grid(3, group_size=8)
NEAREST = Recipe(INT3, HALF, Method("magnitude"), "prune, quantize", "nearest")
EVERY = {
    "dense": Recipe(),
    "gptq": Recipe(INT3),
    "nearest": Recipe(INT3, rounding="nearest"),
    "weighted": Recipe(replace(INT3, scale_rule="search"), weighted=True),
    "pruned": Recipe(target=HALF),
    "2:4": Recipe(target=pattern_target("2:4"), method=Method("wanda")),
    "joint": Recipe(INT3, HALF),
    "prune, quantize": Recipe(INT3, HALF, Method("wanda"), "prune, quantize"),
    "quantize, prune": Recipe(INT3, HALF, Method("sparsegpt"), "quantize, prune"),
    "random": Recipe(INT3, HALF, Method("random"), "quantize, prune", "nearest"),
    "magnitude": NEAREST,
    "planes": Recipe(Grid(2), rounding="planes"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("joint"), causal=False)


@pytest.fixture
def found(model: LanguageModel) -> Iterator[Calibrations]:
    before = [layer.module.weight.clone() for layer in model.layers]
    yield Calibrations(Bench(model, tiny.ids(8, LENGTH, seed=3), tiny.ids(3, LENGTH, seed=4), 4, 2, 5), seed=1)
    assert all(torch.equal(old, layer.module.weight) for old, layer in zip(before, model.layers, strict=True))


@pytest.fixture(scope="module")
def statistics() -> InputStatistics:
    read = InputStatistics(16, hessian=True, device=torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    read.add(torch.randn(4, 12, 16, generator=random) @ torch.randn(16, 16, generator=random), None)
    return read


def matrix(seed: int = 1) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


def test_pruning_first_rounds_what_is_left(statistics: InputStatistics) -> None:
    weight, hessian = matrix(), statistics.hessian()
    pruned, kept = sparsegpt.sparsegpt(weight, hessian, sparsity=0.5)
    wanted = joint.gptq(pruned, hessian, grid=INT3, kept=kept)
    found = runs.compress_matrix(weight, replace(EVERY["joint"], order="prune, quantize"), statistics)
    assert torch.equal(found.weight, wanted.weight) and torch.equal(found.kept, kept)
    assert not torch.equal(found.weight, runs.compress_matrix(weight, EVERY["joint"], statistics).weight)


def test_rounding_first_leaves_what_stays_on_its_grid(statistics: InputStatistics) -> None:
    weight, hessian = matrix(), statistics.hessian()
    rounded = joint.gptq(weight, hessian, grid=INT3)
    kept = sparsegpt.sparsegpt(rounded.weight, hessian, sparsity=0.5)[1]
    found = runs.compress_matrix(weight, EVERY["quantize, prune"], statistics)
    assert torch.equal(found.kept, kept) and torch.equal(found.weight, torch.where(kept, rounded.weight, 0.0))
    assert found.quantized is not None and torch.equal(found.quantized.dequantize(), found.weight)


def test_the_joint_sweep_is_that_of_its_module(statistics: InputStatistics) -> None:
    weight = matrix()
    wanted = joint.joint(weight, statistics.hessian(), grid=INT3, sparsity=0.5, pattern="2:4")
    found = runs.compress_matrix(weight, Recipe(INT3, pattern_target("2:4")), statistics)
    assert torch.equal(found.weight, wanted.weight)


def test_wanda_prunes_by_its_norms_and_gptq_rounds_with_the_same_text(statistics: InputStatistics) -> None:
    weight = matrix()
    scores = importances.wanda_importance(weight, statistics.input_norm("root_mean_square"))
    kept = importances.keep_mask(scores, sparsity=0.5)
    wanted = joint.gptq(importances.prune(weight, kept), statistics.hessian(), grid=INT3, kept=kept)
    found = runs.compress_matrix(weight, EVERY["prune, quantize"], statistics)
    assert torch.equal(found.weight, wanted.weight)


@pytest.mark.parametrize("name", [name for name, recipe in EVERY.items() if recipe.prunes])
def test_every_order_removes_what_was_asked_and_keeps_zeros(name: str, statistics: InputStatistics) -> None:
    recipe = EVERY[name]
    found = runs.compress_matrix(matrix(), recipe, statistics, random=torch.Generator().manual_seed(0))
    assert int((~found.kept).sum()) == 64 and not found.weight[~found.kept].any()
    assert (found.quantized is not None) == recipe.grid.rounds
    if found.quantized is not None:
        assert torch.equal(found.quantized.dequantize(), found.weight)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_measured_model_is_the_compressed_one_and_the_old_one_comes_back(name: str, found: Calibrations) -> None:
    result = runs.measured(found, name, EVERY[name])
    assert torch.isfinite(result.loss).all() and len(result.loss) == 3
    assert result.zeros == pytest.approx(0.5, abs=0.25) if EVERY[name].prunes else result.zeros < 0.5
    assert torch.equal(result.loss, pruning_runs.loss(found.bench)) == (name == "dense")


def test_blocks_are_measured_behind_compressed_ones(found: Calibrations) -> None:
    """The second block's Hessian is that of the network whose first block is already rounded."""
    model, recipe = found.bench.model, EVERY["gptq"]
    last = next(layer for layer in model.layers if layer.block == 1 and layer.role == "q")
    before = [layer.module.weight.clone() for layer in model.layers]
    sequential = runs.compress_(found, recipe)[last.name].weight.clone()
    restore(model, before)
    one_shot = runs.compress_(found, replace(recipe, method=Method("sparsegpt", sequential=False)))[last.name].weight.clone()
    restore(model, before)
    statistics: dict[int, Tensor] = {}

    def visit(block: int, read: dict) -> None:  # type: ignore[type-arg]
        statistics[block] = statistics_of(read, "q").hessian()
        for layer in model.layers:
            if layer.block == 0 == block:
                hessian = statistics_of(read, layer.role).hessian()
                own = joint.gptq(layer.module.weight.detach(), hessian, grid=INT3)
                layer.module.weight.data.copy_(own.weight)

    calibration.stream(model, found.set_of(recipe.method), visit, hessian=True, batch_size=16)
    restore(model, before)
    wanted = joint.gptq(last.module.weight.detach(), statistics[1], grid=INT3).weight
    assert torch.equal(sequential, wanted) and not torch.equal(sequential, one_shot)


def restore(model: LanguageModel, before: list[Tensor]) -> None:
    for old, layer in zip(before, model.layers, strict=True):
        layer.module.weight.data.copy_(old)


def test_layers_may_have_recipes_of_their_own(found: Calibrations) -> None:
    model = found.bench.model
    before = [layer.module.weight.clone() for layer in model.layers]
    rounding = Recipe(INT3, rounding="nearest")

    def choose(layer: LinearLayer) -> Recipe | None:
        return rounding if layer.role == "up" else None

    compressed = runs.compress_(found, rounding, choose=choose)
    for old, layer in zip(before, model.layers, strict=True):
        wanted = round_to_nearest(old, INT3).dequantize() if layer.role == "up" else old
        assert torch.equal(layer.module.weight, wanted)
    assert sorted(compressed) == sorted(layer.name for layer in model.layers if layer.role == "up")
    restore(model, before)


def test_bytes_are_those_of_the_packed_matrices_and_the_rest(found: Calibrations) -> None:
    model = found.bench.model
    sizes = [layer.module.weight.numel() for layer in model.layers]
    rest = 2 * (model.num_parameters - sum(sizes))
    at = {name: runs.measured(found, name, EVERY[name]).bytes for name in ("dense", "nearest", "pruned", "magnitude", "2:4")}
    scales = [2 * size // 8 for size in sizes]  # one bfloat16 a group of 8
    assert at["dense"] == rest + 2 * sum(sizes)
    assert at["nearest"] == rest + sum(3 * size // 8 for size in sizes) + sum(scales)
    assert at["pruned"] == rest + sum(size + size // 8 for size in sizes)  # half of the weights in 16 bits, and a mask
    assert at["magnitude"] == rest + sum((3 * size // 2) // 8 + size // 8 for size in sizes) + sum(scales)
    assert at["2:4"] == at["pruned"]


def test_a_random_mask_is_that_of_pruning_alone(found: Calibrations) -> None:
    """Whether anything is rounded or not, so that the rounding is the only difference."""
    method, masks = Method("random"), []
    for recipe in (Recipe(target=HALF, method=method), EVERY["random"]):
        with pruning_runs.pruner.restored(found.bench.model):
            masks.append([each.kept for each in runs.compress_(found, recipe).values()])
    with pruning_runs.pruner.restored(found.bench.model) as model:
        pruning_runs.pruner.prune_(model, method, HALF, seed=found.seed)
        masks.append([layer.module.weight != 0 for layer in model.layers])
    for other in masks[1:]:
        assert all(torch.equal(one, own) for one, own in zip(masks[0], other, strict=True))


def test_a_compressed_model_says_what_it_took(found: Calibrations) -> None:
    took = runs.measured(found, "GPTQ", EVERY["gptq"]).effort
    assert 0 < took.seconds < 60 and took.peak >= 0


def test_one_calibration_is_enough_for_what_reads_and_draws_nothing(found: Calibrations) -> None:
    other = Calibrations(found.bench, seed=2)
    results = runs.compare([found, other], [(name, EVERY[name]) for name in ("magnitude", "random", "gptq", "dense")])
    assert [(r.seed, r.name) for r in results] == [
        (1, "magnitude"), (1, "random"), (1, "gptq"), (1, "dense"), (2, "random"), (2, "gptq"),
    ]  # fmt: skip


def test_the_loss_by_noise_is_the_mean_over_the_masked_tokens(model: LanguageModel) -> None:
    windows = tiny.ids(3, LENGTH, seed=4)
    found = runs.loss_by_noise(model, windows, ratios=[0.25, 1.0], seed=0)
    assert found.shape == (2, 3)
    masked = torch.full_like(windows, tiny.MASK)
    logits = model.network(input_ids=masked).logits.log_softmax(-1)
    assert model.logit_shift == 0
    wanted = -logits.gather(2, windows[:, :, None])[:, :, 0].double().mean(1)
    torch.testing.assert_close(found[1], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, runs.loss_by_noise(model, windows, ratios=[0.25, 1.0], seed=0, batch_size=2))
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize(("attention", "shift"), [("block-causal", 0), ("block-causal", 1), ("context-causal", 0)])
def test_the_loss_by_noise_of_a_block_is_read_behind_clean_ones(attention: Any, shift: int) -> None:
    """As it is when it is written: neither masks of earlier blocks nor anything of later ones is there."""
    blocks: Any = {"attention": attention, "block_length": 4, "block_origin": "start", "logit_shift": shift}
    model = tiny.of_network(tiny.network(causal=False), **blocks)
    windows = tiny.ids(2, 12, seed=4)
    found = runs.loss_by_noise(model, windows, ratios=[0.5, 1.0], seed=0)
    by_hand = torch.zeros(2, 3, dtype=torch.float64)
    for part, start in enumerate(range(0, 12, 4)):
        ids = windows[:, : start + 4].clone()
        ids[:, start:] = tiny.MASK
        where = ids == tiny.MASK
        nats = torch.nn.functional.cross_entropy(logits_at(model, ids, where), windows[:, : start + 4][where], reduction="none")
        by_hand[:, part] = nats.view(2, 4).double().mean(1)
    torch.testing.assert_close(found[1], by_hand.mean(1), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], found[1])


def test_something_else_is_measured_under_the_recipe(found: Calibrations) -> None:
    recipes = {"dense": Recipe(), "half": NEAREST}
    zeros = runs.while_compressed(
        found, recipes, lambda model: sum(int((layer.module.weight == 0).sum()) for layer in model.layers)
    )
    assert zeros["half"] > zeros["dense"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": Method("wanda")}, "one joint sweep must be of SparseGPT and GPTQ, got wanda and gptq"),
        ({"rounding": "nearest"}, "one joint sweep must be of SparseGPT and GPTQ, got sparsegpt and nearest"),
        ({"target": Target(0.5, removed={"a": 1})}, "must name a sparsity, got numbers by layer"),
        ({"target": Target(0.0), "rounding": "nearest", "weighted": True}, "must go with a method that collects one, got none"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(EVERY["joint"], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(Grid(4, group_size=12)), "group_size must divide the input features, got 12"),
        (Recipe(INT3, pattern_target("3:6")), "the pattern 3:6 must divide"),
    ],
)
def test_formats_that_do_not_fit_are_refused_before_any_work(recipe: Recipe, message: str, found: Calibrations) -> None:
    with pytest.raises(InputError, match=message):
        runs.compress_(found, recipe)


# --- aiming at the dense stream, and stronger pruners before rounding ----------------------------------------------------


def test_a_shifted_recipe_aims_at_the_dense_outputs(found: Calibrations) -> None:
    """The first block is rounded coarsely; the second only makes up for that, where it may."""
    model, ids = found.bench.model, found.windows
    behind = next(layer for layer in model.layers if layer.block == 1 and layer.role == "q")
    reference, dense, errors = outputs_of(model, behind.module, ids), behind.module.weight.clone(), {}
    coarse = Recipe(Grid(2, group_size=8), rounding="nearest")
    for shifted in (False, True):
        recipe = Recipe(shifted=shifted)
        with pruning_runs.pruner.restored(model):
            results = runs.compress_(found, recipe, choose=lambda layer, own=recipe: own if layer.block else coarse)
            errors[shifted] = float((outputs_of(model, behind.module, ids) - reference).square().mean())
            assert torch.equal(results[behind.name].weight, behind.module.weight)
            assert torch.equal(behind.module.weight, dense) == (not shifted)
    assert errors[True] < 0.8 * errors[False]
    with pruning_runs.pruner.restored(model):  # nothing drifts before the first block
        first = runs.compress_(found, Recipe(shifted=True))[model.layers[0].name]
        torch.testing.assert_close(first.weight, model.layers[0].module.weight)
    with pytest.raises(InputError, match="a shifted target must go with a sequential method"):
        Recipe(INT3, method=Method("sparsegpt", sequential=False), shifted=True)


def outputs_of(model: LanguageModel, module: torch.nn.Module, ids: Tensor) -> Tensor:
    got: list[Tensor] = []
    handle = module.register_forward_hook(lambda *given: got.append(given[2].detach().double()))
    with torch.no_grad():
        model.network(input_ids=ids, use_cache=False)
    handle.remove()
    return got[0]


@pytest.mark.parametrize("method", [Method("alps"), Method("wanda", repair="refit"), Method("wanda", repair="refit", swaps=5)])
def test_masked_gptq_rounds_what_a_stronger_pruner_leaves(statistics: InputStatistics, method: Method) -> None:
    weight = matrix()
    pruned, kept = matrices.pruned(weight, method, HALF, statistics)
    wanted = joint.gptq(pruned, statistics.hessian(), grid=INT3, kept=kept)
    got = runs.compress_matrix(weight, Recipe(INT3, HALF, method, "prune, quantize"), statistics)
    assert torch.equal(got.weight, wanted.weight) and torch.equal(got.kept, kept)
    assert not bool(got.weight[~kept].any())
    with pytest.raises(InputError, match="one joint sweep must be"):
        Recipe(INT3, HALF, Method("sparsegpt", repair="refit"))


def test_planes_are_those_of_the_hessian_and_store_their_own_scales(found: Calibrations, statistics: InputStatistics) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(Grid(2), rounding="planes")
    got = runs.compress_matrix(weight, recipe, statistics)
    assert torch.equal(got.weight, planes.planed(weight, statistics.hessian(), planes=2)[0]) and bool(got.kept.all())
    model = found.bench.model
    linear = [(layer.module.out_features, layer.module.in_features) for layer in model.layers]
    rest = 2 * (model.num_parameters - sum(rows * width for rows, width in linear))
    assert runs.measured(found, "planes", recipe).bytes == rest + sum(planes.stored_bytes(shape, planes=2) for shape in linear)
    with pytest.raises(InputError, match="planes of signs must be of all weights, got sparsity"):
        Recipe(Grid(2), HALF, Method("wanda"), "prune, quantize", "planes")
