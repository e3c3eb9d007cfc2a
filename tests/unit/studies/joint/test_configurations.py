"""Formats in a model: the expected matrices and smaller networks while they are in, the dense model bit for bit afterwards."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.calibration import statistics
from lib.calibration.reads import statistics_of
from lib.core.errors import InputError
from lib.models import language_model, loading
from lib.models.language_model import LanguageModel
from lib.pruning import matrices, shrink
from lib.pruning.methods import Method
from lib.quantization import joint
from lib.quantization.rounding import Grid
from lib.studies.joint import configurations, measured_formats
from lib.studies.joint.configurations import FORMATS, ONE_SHOT, Format, Prepared
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Bench, Calibrations
from tests import tiny

LENGTH = 16
ATOL = 1e-5  # smaller matrices are summed in another order
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


def made(path: Path, family: str) -> Prepared:
    """Prepare a tiny model whose biases are not 0."""
    model = tiny.model(path, family=family, causal=False)
    random = torch.Generator().manual_seed(0)
    for parameter in model.network.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.rand(parameter.shape, generator=random)
    bench = Bench(model, tiny.ids(8, LENGTH, seed=3), tiny.ids(3, LENGTH, seed=4), 4, 2, 5)
    return configurations.prepare(Calibrations(bench, seed=1))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return made(tmp_path_factory.mktemp("formats"), request.param)


@pytest.fixture
def prepared(shared: Prepared) -> Iterator[Prepared]:
    network = shared.model.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    places = dict(network.named_modules())
    yield shared
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    now = dict(network.named_modules())
    assert places.keys() == now.keys() and all(now[name] is module for name, module in places.items())


def logits(model: LanguageModel) -> Tensor:
    return model.network(input_ids=tiny.ids(2, LENGTH, seed=9), use_cache=False).logits


def names(model: LanguageModel, block: int, roles: tuple[str, ...]) -> list[str]:
    return [layer.name for layer in model.layers if layer.block == block and layer.role in roles]


def dense_statistics(prepared: Prepared) -> tuple[dict[str, Tensor], dict[tuple[int, str], Tensor]]:
    """Hessians by layer and norms by block and role, of the dense model."""
    model, hessians, norms = prepared.model, {}, {}

    def visit(block: int, read: dict) -> None:  # type: ignore[type-arg]
        for layer in model.layers:
            if layer.block == block:
                own = statistics_of(read, layer.role)
                hessians[layer.name] = own.hessian()
                norms[block, layer.role] = own.input_norm("root_mean_square")[0]

    own = prepared.found.set_of(ONE_SHOT)
    statistics.stream(model, own, visit, hessian=True, sequential=False, batch_size=prepared.found.bench.batch_size)
    return hessians, norms


def test_packed_matrices_are_those_of_one_dense_calibration(prepared: Prepared) -> None:
    hessians, _ = dense_statistics(prepared)
    for layer in prepared.model.layers:
        weight, hessian, width = layer.module.weight, hessians[layer.name], layer.module.in_features
        grids = {bits: Grid(bits, width, "search") for bits in (3, 4)}  # widths of 32 and 40 are one group
        expected = {
            "dense": weight,
            "int4": joint.gptq(weight, hessian, grid=grids[4]).weight,
            "int3": joint.gptq(weight, hessian, grid=grids[3]).weight,
            "2:4 + int4": joint.joint(weight, hessian, grid=grids[4], sparsity=0.5, pattern="2:4").weight,
        }
        for form, matrix in expected.items():
            found = prepared.modules[layer.name, form]
            assert torch.equal(found.weight, matrix)  # type: ignore[arg-type]
            assert found.bias is layer.module.bias


def test_a_configured_model_computes_with_the_matrices_of_its_formats(prepared: Prepared) -> None:
    model = prepared.model
    mixed = {layer.name: ("int3", "dense", "2:4 + int4", "int4")[index % 4] for index, layer in enumerate(model.layers)}
    dense = logits(model)
    with configurations.configured(prepared, mixed) as lent:
        found = logits(lent)
        for name, form in mixed.items():
            assert model.network.get_parameter(name) is prepared.modules[name, form].weight
        assert lent.layers == ()
    expected = tiny_copy(model)
    for layer in expected.layers:
        layer.module.weight.data.copy_(prepared.modules[layer.name, mixed[layer.name]].weight)  # type: ignore[arg-type]
    assert torch.equal(found, logits(expected)) and not torch.equal(found, dense)


def tiny_copy(model: LanguageModel) -> LanguageModel:
    network = type(model.network)(model.network.config).eval()
    network.load_state_dict(model.network.state_dict())
    return replace(model, network=network, layers=language_model.linear_layers(network))


def test_the_dense_model_comes_back_after_an_error(prepared: Prepared) -> None:
    model = prepared.model
    dense, names = logits(model), [layer.name for layer in model.layers]
    with pytest.raises(KeyError), configurations.configured(prepared, dict.fromkeys(names, "structured 50 %")):
        raise KeyError
    assert torch.equal(logits(model), dense)


def test_int8_is_the_layer_of_torch(prepared: Prepared) -> None:
    with configurations.configured(prepared, {prepared.model.layers[1].name: "int8 dynamic"}):
        path = prepared.model.layers[1].name.removesuffix(".weight")
        inside = prepared.model.network.get_submodule(path)
        assert type(inside).__module__.startswith("torch.ao.nn.quantized.dynamic")
        assert not isinstance(inside, torch.nn.Linear)
    for layer in prepared.model.layers:
        found, dense = prepared.modules[layer.name, "int8 dynamic"], layer.module
        weight, step = found.weight().dequantize(), found.weight().q_scale()  # type: ignore[operator]
        assert torch.allclose(weight, dense.weight, atol=0.51 * step)
        inputs = torch.randn(5, dense.in_features, generator=torch.Generator().manual_seed(0))
        # Inputs are rounded too: with at least 7 bits, half a step of their range each.
        bound = inputs.abs().max() / 127 * weight.abs().sum(1).max()
        exact = torch.nn.functional.linear(inputs, weight, dense.bias)
        assert (found(inputs) - exact).abs().max() < bound and not torch.equal(found(inputs), exact)


def test_blocks_cut_alike_are_the_shrunk_network(prepared: Prepared) -> None:
    model = prepared.model
    _, norms = dense_statistics(prepared)
    small = shrink.shrunk(model, *shrink.choose(model, sparsity=0.5, input_norms=norms))
    with configurations.configured(prepared, {layer.name: "structured 50 %" for layer in model.layers}) as lent:
        assert torch.equal(logits(lent), logits(small))
    by_method = runs.shrunk(prepared.found, Method("wanda", sequential=False), sparsity=0.5)
    assert torch.equal(logits(by_method), logits(small))


def test_blocks_of_different_widths_compute_what_the_silenced_network_does(prepared: Prepared) -> None:
    """Attention of the first block and MLPs of both, at different shares; all else is whole."""
    model = prepared.model
    _, norms = dense_statistics(prepared)
    groups, half = shrink.choose(model, sparsity=0.5, input_norms=norms)
    third = shrink.choose(model, sparsity=0.3, input_norms=norms)[1]
    formats = dict.fromkeys(names(model, 0, ATTENTION) + names(model, 1, MLP), "structured 50 %")
    formats |= dict.fromkeys(names(model, 0, MLP), "structured 30 %")
    expected = tiny_copy(model)
    for layer in expected.layers:
        keep = torch.ones(layer.module.in_features, dtype=torch.bool)
        if layer.role == "o" and layer.block == 0:
            keep[:] = False
            for group in groups[0].tolist():
                keep[16 * group : 16 * group + 16] = True  # 2 of 4 heads of 8 features
        if layer.role == "down":
            keep[:] = False
            keep[(third, half)[layer.block][layer.block]] = True
        layer.module.weight.data[:, ~keep] = 0
    with configurations.configured(prepared, formats) as lent:
        torch.testing.assert_close(logits(lent), logits(expected), atol=ATOL, rtol=0)
        assert model.network.get_parameter(names(model, 0, ("gate",))[0]).shape == (28, 32)
        assert model.network.get_parameter(names(model, 1, ("gate",))[0]).shape == (20, 32)


def test_variants_live_beside_each_other_and_share_their_tensors(prepared: Prepared) -> None:
    model = prepared.model
    cut = dict.fromkeys(names(model, 1, ATTENTION), "structured 50 %") | {names(model, 0, ("up",))[0]: "int8 dynamic"}
    packed = {layer.name: "int3" for layer in model.layers}
    variants, expected = [], []
    for formats in (cut, packed, {}):
        variants.append(configurations.variant(prepared, formats))
        with configurations.configured(prepared, formats) as lent:
            expected.append(logits(lent))
    assert all(torch.equal(logits(each), wanted) for each, wanted in zip(variants, expected, strict=True))
    assert not torch.equal(expected[0], expected[2]) and not torch.equal(expected[1], expected[2])
    own = {parameter.data_ptr() for parameter in model.network.parameters()}
    assert {parameter.data_ptr() for parameter in variants[2].network.parameters()} == own


def test_offers_are_of_layers_or_of_whole_units(prepared: Prepared) -> None:
    """Of two groups 30 % is none, so that attention has no such format, and the reason says so."""
    offers = prepared.offers()
    assert len(set(offers)) == len(offers) == 14 * 8 + 2 * 3
    by_method = {f"50 % by {name} + int4" for name in ("Wanda", "SparseGPT", "ALPS")}
    single = {form for layers, form in offers if len(layers) == 1}
    assert single == {"dense", "int8 dynamic", "int4", "int3", "2:4 + int4"} | by_method
    whole = [(tuple(layer.split(".")[-2][0] for layer in layers), form) for layers, form in offers if len(layers) > 1]
    assert sorted(whole[:3]) == [
        (("g", "u", "d"), "structured 30 %"), (("g", "u", "d"), "structured 50 %"), (("q", "k", "v", "o"), "structured 50 %"),
    ]  # fmt: skip
    assert prepared.missing == {"structured 30 %, attention": "30% of so few groups or channels is none"}


def test_bytes_by_hand(prepared: Prepared) -> None:
    by_role = {layer.role: layer for layer in prepared.model.layers if layer.block == 0}
    biased = by_role["q"].module.bias is not None

    def size(role: str, form: str) -> int:
        return measured_formats.weight_bytes(prepared, by_role[role], form)

    assert [size("down", form) for form in ("dense", "int8 dynamic", "int4", "int3", "2:4 + int4")] == [
        2 * 32 * 40, 32 * 40 + 4, 32 * 40 // 2 + 64, 32 * 40 * 3 // 8 + 64, 32 * 40 // 4 + 32 * 40 // 8 + 64,
    ]  # fmt: skip
    assert [size("gate", form) for form in ("structured 30 %", "structured 50 %")] == [2 * 28 * 32, 2 * 20 * 32]
    assert size("q", "dense") == 2 * 32 * 32 + 2 * 32 * biased
    assert size("q", "structured 50 %") == 2 * 16 * 32 + 2 * 16 * biased
    assert size("k", "int4") == 16 * 32 // 2 + 2 * 16 + 2 * 16 * biased
    assert size("o", "structured 50 %") == 2 * 32 * 16


@pytest.mark.parametrize(
    ("role", "form", "message"),
    [
        ("q", "structured 50 %", "all layers of a unit must take a structured format together, .*got structured 50 %, dense"),
        ("q", "int5", "must be among dense, int4, .*got 'int5': choose one"),
        ("q", "structured 30 %", "must be among .*got 'structured 30 %'"),
    ],
)
def test_formats_that_cannot_be_put_in_are_refused(role: str, form: str, message: str, prepared: Prepared) -> None:
    with (
        pytest.raises(InputError, match=message),
        configurations.configured(prepared, {names(prepared.model, 0, (role,))[0]: form}),
    ):
        raise AssertionError


def test_units_are_not_torn_and_layers_must_exist(prepared: Prepared) -> None:
    torn = dict.fromkeys(names(prepared.model, 0, MLP), "structured 50 %") | {names(prepared.model, 0, ("up",))[0]: "int4"}
    with pytest.raises(InputError, match="got structured 50 %, int4, structured 50 %"):
        configurations.variant(prepared, torn)
    with pytest.raises(InputError, match="must be among none: it is no layer of this model, got 'int4'"):
        configurations.variant(prepared, {"lm_head.weight": "int4"})


def bench_of(path: Path, **options: object) -> Bench:
    return Bench(tiny.model(path, causal=False, **options), tiny.ids(8, LENGTH), tiny.ids(3, LENGTH), 4, 2, 5)  # type: ignore[arg-type]


def test_machines_without_dynamic_int8_do_not_offer_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)
    found = configurations.prepare(Calibrations(bench, 0), [FORMATS["int8 dynamic"]])
    assert list(found.formats) == ["dense"] and {form for _, form in found.offers()} == {"dense"}
    assert found.missing["int8 dynamic"].startswith("torch's dynamic int8 does not run here: import of torch.ao.quantization")
    half = loading.load(tmp_path, dtype=torch.bfloat16)
    assert configurations.unavailable(FORMATS["int8 dynamic"], half) == (
        "torch's dynamic int8 needs float32 on a CPU, this model is bfloat16 on cpu"
    )


@pytest.mark.parametrize(
    ("width", "form", "message"),
    [
        (131, "int4", "a group of 8 to 64 columns must divide the input features, got 131 in .*down.*: leave out int4"),
        (
            34,
            "2:4 + int4",
            "a group of 8 to 64 columns in multiples of 4 must divide the input features, got 34 in .*: leave out",
        ),
    ],
)
def test_widths_that_no_group_divides_are_refused(width: int, form: str, message: str, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, intermediate_size=width)
    with pytest.raises(InputError, match=message):
        configurations.prepare(Calibrations(bench, 0), [FORMATS[form]])


def test_groups_are_the_largest_that_fit() -> None:
    assert [FORMATS["int3"].recipe(width).grid.group_size for width in (256, 768, 40, 34, 70, 67 * 9)] == [64, 64, 40, 34, 35, 9]
    assert FORMATS["2:4 + int4"].recipe(72).grid.group_size == 36


def test_only_a_one_shot_calibration_serves_all_formats(tmp_path: Path) -> None:
    found = Calibrations(bench_of(tmp_path), 0)
    for method in (Method("wanda", sequential=False), Method("sparsegpt")):
        with pytest.raises(InputError, match="formats must share a one-shot SparseGPT calibration, got"):
            configurations.prepare(found, method=method)
    with pytest.raises(InputError, match="formats must have distinct names"):
        configurations.prepare(found, [FORMATS["int4"], Format("int4", "again", bits=8)])


def test_formats_by_method_prune_by_it_and_round_what_stays(prepared: Prepared) -> None:
    """Each against its own steps on the same Hessian; the method is one more choice of a layer, at equal bytes."""
    found, layer = prepared.found, prepared.model.layers[0]
    own = statistics_of(found.statistics_for(ONE_SHOT)[layer.block], layer.role)  # type: ignore[index]
    weights, sizes = [], set()
    for name, importance in configurations.PRUNERS:
        form = f"50 % by {name} + int4"
        recipe = FORMATS[form].recipe(layer.module.in_features)
        assert recipe.method.importance == importance and recipe.order == ("joint" if name == "SparseGPT" else "prune, quantize")
        got = prepared.modules[layer.name, form].weight
        assert isinstance(got, Tensor)
        pruned, kept = matrices.pruned(layer.module.weight.detach(), recipe.method, recipe.target, own, name=layer.name)
        if name != "SparseGPT":
            torch.testing.assert_close(got, joint.gptq(pruned, own.hessian(), grid=recipe.grid, kept=kept).weight)
        assert float((got == 0).double().mean()) >= 0.5
        weights.append(got)
        sizes.add(measured_formats.weight_bytes(prepared, layer, form))
    assert len(sizes) == 1 and not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_energy_by_hand(prepared: Prepared) -> None:
    """Bits of weights and activations, and products by their kind; packed formats move fewer bits, int8 multiplies cheaper."""
    model, rows = prepared.model, 5
    shapes = {layer.name: (layer.module.in_features, layer.module.out_features) for layer in model.layers}
    biases = sum(2 * layer.module.out_features for layer in model.layers if layer.module.bias is not None)

    def expected(weight_bytes: float, product: float) -> float:
        bits = 8 * weight_bytes + 32 * rows * sum(sum(pair) for pair in shapes.values())
        return bits * 20e-12 + product * rows * sum(inside * outside for inside, outside in shapes.values())

    weights = sum(inside * outside for inside, outside in shapes.values())
    assert measured_formats.energy(prepared, {}, rows=rows) == pytest.approx(expected(2 * weights + biases, 4.6e-12))
    dynamic = dict.fromkeys(shapes, "int8 dynamic")
    got = measured_formats.energy(prepared, dynamic, rows=rows)
    assert got == pytest.approx(expected(weights + 4 * len(shapes) + biases, 0.23e-12))
    few, many = (
        {
            form: measured_formats.energy(prepared, dict.fromkeys(shapes, form), rows=count)
            for form in ("int4", "int8 dynamic", "dense")
        }
        for count in (5, 1000)
    )
    assert few["int4"] < few["int8 dynamic"] < few["dense"]  # memory decides
    assert many["int8 dynamic"] < many["int4"] < many["dense"]  # products do
