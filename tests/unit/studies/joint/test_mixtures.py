"""Quantization, formats, written files and streaming of mixtures of experts."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.calibration.reads import READS
from lib.core.errors import InputError
from lib.models import containers, export, streaming
from lib.models.language_model import LanguageModel
from lib.models.weight_store import StreamedLinear
from lib.pruning import pruner
from lib.pruning.methods import METHODS, Method, Target, pattern_target, repaired
from lib.quantization import joint
from lib.quantization.rounding import Grid, round_to_nearest
from lib.studies.joint import configurations, exported, foldings, measured_formats, runs
from lib.studies.joint.configurations import FORMATS
from lib.studies.joint.runs import Recipe
from lib.studies.pruning import adaptive_runs, repairs
from lib.studies.pruning import runs as pruning_runs
from lib.studies.pruning.runs import Bench, Calibrations
from lib.timing import linear_formats
from tests import tiny
from tests.unit import slow_experts
from tests.unit.models.test_experts import logits

LENGTH = 24
INT4 = Grid(4, group_size=8)
RECIPES = {
    "nearest": Recipe(INT4, rounding="nearest"),
    "gptq": Recipe(INT4, method=Method("sparsegpt", sequential=False)),
    "joint": Recipe(INT4, Target(0.5)),
    "joint 2:4": Recipe(INT4, pattern_target("2:4")),
    "prune, quantize": Recipe(INT4, Target(0.5), Method("wanda"), "prune, quantize"),
    "quantize, prune": Recipe(INT4, Target(0.5), Method("sparsegpt"), "quantize, prune"),
    "pruned": Recipe(target=Target(0.5), method=Method("wanda")),
}


@pytest.fixture(params=tiny.MIXTURES)
def found(request: pytest.FixtureRequest) -> Calibrations:
    model = tiny.mixture(request.param)
    return Calibrations(Bench(model, tiny.ids(8, LENGTH, seed=3), tiny.ids(3, LENGTH, seed=4), 4, 2, 5), seed=1)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_compresses_every_matrix_and_nothing_else(found: Calibrations, name: str) -> None:
    model, recipe = found.bench.model, RECIPES[name]
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    fallen: list[str] = []
    compressed = runs.compress_(found, recipe, fallen=fallen)
    assert compressed.keys() == {layer.name for layer in model.layers}
    for layer in model.layers:
        each = compressed[layer.name]
        assert torch.equal(layer.module.weight, each.weight)
        size = each.kept.numel()
        assert int((~each.kept).sum()) == (size // 2 if recipe.prunes else 0)
        assert not layer.module.weight[~each.kept].any()
        if each.quantized is not None:
            assert torch.equal(each.quantized.dequantize(), layer.module.weight)
    for key, value in model.network.state_dict().items():
        assert key in compressed or torch.equal(value, before[key])
    assert len(set(fallen)) == len(fallen)
    assert bool(fallen) or not recipe.needs_hessian
    assert logits(model.network, tiny.ids(2, 10)).isfinite().all()


def test_gptq_rounds_an_expert_with_its_own_hessian(found: Calibrations) -> None:
    model, recipe = found.bench.model, RECIPES["gptq"]
    dense = copy.deepcopy(model.network)
    compressed = runs.compress_(found, recipe)
    ids = found.set_of(recipe.method).input_ids
    wanted = slow_experts.statistics(tiny.of_network(dense), ids)
    checked = 0
    for layer, old in zip(model.layers, tiny.of_network(dense).layers, strict=True):
        own = None if layer.expert is None else wanted.get((layer.block, READS[layer.role], layer.expert))
        if own is None or own["tokens"] < 2 * layer.module.in_features:
            continue
        hessian = (2.0 * own["products"] * LENGTH / own["rows"]).float()
        again = joint.gptq(old.module.weight, hessian, grid=INT4)
        assert (compressed[layer.name].weight == again.weight).double().mean() > 0.99
        nearest = round_to_nearest(old.module.weight, INT4).dequantize()
        assert (compressed[layer.name].weight != nearest).double().mean() > 0.01
        checked += 1
    assert checked


def test_outcomes_count_what_fell_back_and_structured_ones_lose_experts(found: Calibrations) -> None:
    model, bench = found.bench.model, found.bench
    measured = runs.measured(found, "joint", RECIPES["joint"])
    assert measured.fallbacks > 0
    outcome = pruning_runs.measured(found, "SparseGPT", METHODS["SparseGPT"], Target(0.5))
    assert outcome.fallbacks > 0 and outcome.measured_sparsity == 0.5
    assert pruning_runs.measured(found, "magnitude", METHODS["magnitude"], Target(0.5)).fallbacks == 0
    if model.network.config.model_type == "qwen3_moe":
        chosen = {"no sink weights": Method("wanda", METHODS["DWANDA"].inputs, sequential=False),
                  "sink-aware (Wanda)": METHODS["sink-aware (Wanda)"]}  # fmt: skip
        for result in pruning_runs.structured(bench, chosen, [0.5], seeds=[1]):
            experts = sum(layer.module.weight.numel() for layer in model.layers if layer.expert is not None)
            whole = sum(layer.module.weight.numel() for layer in model.layers)
            assert result.measured_sparsity == pytest.approx(0.5 * experts / whole)


def test_masks_and_repairs_use_the_statistics_of_experts(found: Calibrations) -> None:
    bench, target, few = found.bench, Target(0.5), METHODS["DWANDA"].inputs
    mask, ways = repairs.masks(bench.model, noised=few)[repairs.RIVAL], ("mask alone", "refit", "swaps")
    outcomes = {each.method: each for each in repairs.measure(bench, target, seeds=[1], noised=few, repairs=ways)}
    ranked, errors_of = found.statistics_of(mask), found.hessians_of(few)
    (weights,) = repairs.repaired(bench.model, [mask], target, [ranked], errors_of, repairs=ways)
    for way in ways:
        with pruner.restored(bench.model) as model:
            fallen = pruner.prune_with_(model, repaired(mask, way), target, ranked, errors_of=errors_of)
            for layer, own in zip(model.layers, weights[way], strict=True):  # refits are solved together: equal but for rounding
                torch.testing.assert_close(layer.module.weight.detach(), own, atol=1e-5, rtol=1e-4)
        assert outcomes[repairs.name_of(repairs.RIVAL, way)].fallbacks == len(fallen)
        assert bool(fallen) or way == "mask alone"


@pytest.mark.parametrize("method", [Method("wanda", sequential=False), Method("sparsegpt", sequential=False)])
def test_blocks_of_a_search_are_pruned_as_the_model_is(found: Calibrations, method: Method) -> None:
    model = found.bench.model
    blocks, target = len(model.by_block), pruner.exact_target(model, 0.5)
    with pruner.restored(model):
        adaptive_runs.BlockDatabase(found, method).write_(target)
        got = [layer.module.weight.clone() for layer in model.layers]
    with pruner.restored(model):
        pruner.prune_with_(model, method, target, found.statistics_for(method) or [])
        assert all(torch.equal(layer.module.weight, own) for layer, own in zip(model.layers, got, strict=True))
    assert len(adaptive_runs.block_sparsities(found, "DSA", sparsity=0.5, spread=0.1)) == blocks


def test_what_would_need_the_same_experts_is_refused(found: Calibrations) -> None:
    before = {key: value.clone() for key, value in found.bench.model.network.state_dict().items()}
    with pytest.raises(InputError, match="two streams must pass the same matrices"):
        runs.compress_(found, Recipe(INT4, Target(0.5), shifted=True))
    for rewriting in (foldings.AWQ, foldings.ROTATED):
        with pytest.raises(InputError, match="a rewritten model must have dense blocks"):
            foldings.measured(found, "RTN", RECIPES["nearest"], rewriting=rewriting)
    assert foldings.measured(found, "GPTQ", RECIPES["gptq"], rewriting=foldings.NONE).fallbacks > 0
    assert all(torch.equal(value, before[key]) for key, value in found.bench.model.network.state_dict().items())


def test_formats_are_offered_for_experts_and_whole_units_say_why_not(found: Calibrations) -> None:
    chosen = [FORMATS[name] for name in ("dense", "int4", "2:4 + int4", "structured 50 %")]
    prepared = configurations.prepare(found, chosen)
    model = found.bench.model
    assert "mixture of experts" in prepared.missing["structured 50 %"]
    before = logits(model.network, tiny.ids(2, 10))
    formats = {layer.name: "int4" for layer in model.layers if layer.expert is not None}
    with configurations.configured(prepared, formats):
        assert not torch.equal(logits(model.network, tiny.ids(2, 10)), before)
    assert torch.equal(logits(model.network, tiny.ids(2, 10)), before)
    copied = configurations.variant(prepared, formats)
    assert not torch.equal(logits(copied.network, tiny.ids(2, 10)), before)
    for name, form in linear_formats.FORMATS.items():
        if form.removed:
            assert "mixture of experts" in str(linear_formats.model_refusal(model, form)), name


def test_experts_are_timed_with_their_share_of_the_tokens(found: Calibrations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight experts a token: 40 tokens are 10 for each."""
    prepared = configurations.prepare(found, [FORMATS["dense"]])
    seen: dict[int, set[int]] = {}

    def interleaved(calls: dict[str, Any], *, repeats: int, device: torch.device) -> dict[str, torch.Tensor]:
        for call in calls.values():
            modules, inputs = call.args
            for module in modules:
                seen.setdefault(id(module), set()).add(len(inputs))
        return {name: torch.ones(repeats) for name in calls}

    monkeypatch.setattr(measured_formats.clock, "interleaved", interleaved)
    measured_formats.latency(prepared, rows=40, repeats=2)
    for layer in found.bench.model.layers:
        assert seen[id(layer.module)] == {10 if isinstance(layer.expert, int) else 40}


@pytest.mark.parametrize("rows", [40, 2])
def test_the_energy_of_an_expert_is_that_of_the_tokens_it_reads(found: Calibrations, rows: int) -> None:
    """Two of eight experts a token: 40 tokens are 10 for each; 2 tokens read half of the experts, one each."""
    prepared, model = configurations.prepare(found, [FORMATS["dense"], FORMATS["int4"]]), found.bench.model
    expected = 0.0
    for layer in model.layers:
        inside, outside = layer.module.in_features, layer.module.out_features
        routed = isinstance(layer.expert, int)
        tokens, read = (rows / 4, {40: 1.0, 2: 0.5}[rows]) if routed else (rows, 1.0)
        bits = read * 8 * measured_formats.weight_bytes(prepared, layer, "int4") + 32 * tokens * (inside + outside)
        expected += bits * 20e-12 + tokens * inside * outside * 4.6e-12
    formats = {layer.name: "int4" for layer in model.layers}
    assert measured_formats.energy(prepared, formats, rows=rows) == pytest.approx(expected)


def test_layers_are_timed_once_a_shape_whichever_block_has_it() -> None:
    """GLM's first block is dense, so it alone has no experts; a shared one is as narrow as the others."""
    shapes = linear_formats.distinct_shapes(tiny.mixture("glm4_moe"))
    assert list(shapes) == ["down, expert", "gate, expert", "down", "gate", "o", "k", "q"]
    assert [(shape.out_features, shape.in_features) for shape in shapes.values()][:4] == [(32, 16), (16, 32), (32, 40), (40, 32)]
    dense = linear_formats.distinct_shapes(tiny.of_network(tiny.network(causal=False)))
    assert list(dense) == ["down", "gate", "o", "k", "q"]
    mixed = linear_formats.distinct_shapes(tiny.mixture("qwen3_moe"))
    assert {"gate, expert", "down, expert", "gate", "down"} <= set(mixed)


# Files


def test_compressed_mixtures_are_written_and_read_back(found: Calibrations, tmp_path: Path) -> None:
    ready = exported.exportable(found, RECIPES["joint"], dtype=torch.float32)
    wanted = logits(ready.model.network, tiny.ids(2, 10))
    export.save_plain(ready.model, tmp_path / "plain")
    containers.save_sparse(ready.model, tmp_path / "sparse", quantized=ready.quantized)
    containers.unpack_sparse(tmp_path / "sparse", tmp_path / "unpacked")
    for folder in ("plain", "unpacked"):
        network = cast(Any, AutoModelForCausalLM.from_pretrained(tmp_path / folder)).eval()
        assert torch.equal(logits(tiny.of_network(network).network, tiny.ids(2, 10)), wanted)
    with pytest.raises(InputError, match="packed checkpoint must be of a dense model"):  # random experts would be read
        export.save_packed(ready.model, tmp_path / "packed", quantized=ready.quantized)
    assert not (tmp_path / "packed").exists()


def test_what_transformers_reads_of_a_mixture_is_summed_as_here(found: Calibrations, tmp_path: Path) -> None:
    """In bfloat16, in which its own sums over experts are rounded on the way."""
    ready = exported.exportable(found, RECIPES["joint"], dtype=torch.bfloat16)
    export.save_plain(ready.model, tmp_path / "plain")
    assert exported.reloads(ready.model, tmp_path / "plain", tiny.ids(2, 10))
    ready.model.layers[-1].module.weight.data.mul_(2)
    assert not exported.reloads(ready.model, tmp_path / "plain", tiny.ids(2, 10))


# Streaming


def streamed(model: LanguageModel, folder: Path, **options: Any) -> LanguageModel:
    """The model written and streamed."""
    return streaming.load(export.save_plain(model, folder), **options)


@pytest.mark.parametrize("family", tiny.MIXTURES)
@pytest.mark.parametrize("name", ["magnitude", "Wanda", "sink-aware (Wanda)", "SparseGPT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_mixture_is_pruned_to_the_same_weights(family: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.mixture(family)
    other = streamed(model, tmp_path / "dense", budget=4096, dtype=dtype, scratch=tmp_path)
    for parameter in model.network.parameters():
        parameter.data = parameter.data.to(dtype)
    assert all(isinstance(layer.module, StreamedLinear) for layer in other.layers)
    assert [layer.name for layer in other.layers] == [layer.name for layer in model.layers]
    for name_of, buffer in model.network.named_buffers():
        assert torch.equal(other.network.get_buffer(name_of), buffer)  # a bias of the router stays in float32
    ids = tiny.ids(2, 10)
    assert torch.equal(logits(other.network, ids), logits(model.network, ids))
    options: dict[str, Any] = {"windows": tiny.ids(5, LENGTH), "batch_size": 2}
    fallen = pruner.prune_(model, METHODS[name], Target(0.5), **options)
    assert pruner.prune_(other, METHODS[name], Target(0.5), **options) == fallen
    for one, two in zip(model.layers, other.layers, strict=True):
        assert torch.equal(one.module.weight, two.module.weight)
    streaming.save(other, tmp_path / "pruned", max_shard_bytes=2**14)
    again = cast(Any, AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")).eval()
    assert torch.equal(logits(tiny.of_network(again).network, ids), logits(model.network, ids))
