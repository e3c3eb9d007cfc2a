"""Every format multiplies with the matrix that it stands for, and takes the bytes that it says."""

import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib.core.errors import InputError
from lib.pruning import shrink
from lib.pruning.structured import HeadShape
from lib.timing import format_support, linear_formats
from lib.timing.format_support import LayerShape
from lib.timing.linear_formats import DENSE, FORMATS, Format, by_name
from tests import tiny

CPU = torch.device("cpu")
ATOL = 1e-5  # float32 sums of up to 128 products of size 1 in another order
OUT, IN = 48, 128
NEEDS_CUDA = ("2:4", "int8 weights", "int4 weights")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def halved(weight: Tensor, group: int) -> Tensor:
    """Zero the smaller half of every group of neighbours, one group at a time."""
    made = weight.clone()
    for row in made:
        for start in range(0, len(row), group):
            part = row[start : start + group]
            for index in sorted(range(group), key=lambda at: abs(float(part[at])))[: group // 2]:
                part[index] = 0.0
    return made


def largest(norms: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(norms)), key=norms.__getitem__)[len(norms) - count :])


# --- what a format multiplies with ---------------------------------------------------------------------------------------


def test_names_are_those_of_the_tables() -> None:
    names = "dense|masked 50 %|CSR 50 %|2:4|structured 30 %|structured 50 %|int8 dynamic|int8 weights|int4 weights"
    assert list(FORMATS) == names.split("|") == [form.name for form in FORMATS.values()]


@pytest.mark.parametrize("name", ["dense", "masked 50 %", "CSR 50 %"])
def test_unstructured_formats_compute_what_the_masked_matrix_does(name: str) -> None:
    weight, inputs = drawn(OUT, IN), drawn(2, 3, IN, seed=1)
    expected = inputs @ (weight if name == "dense" else halved(weight, IN)).T
    before = weight.clone()
    with torch.inference_mode():
        outputs = by_name(name).build(weight)(inputs)
    torch.testing.assert_close(outputs, expected, atol=ATOL, rtol=0)
    assert torch.equal(weight, before)


def test_two_of_four_zeros_the_smaller_two_of_every_four() -> None:
    """The mask that a GPU then compresses."""
    made = linear_formats._masked(linear_formats._linear(drawn(OUT, IN)), pattern="2:4")
    assert torch.equal(made.weight, halved(drawn(OUT, IN), 4))


@pytest.mark.parametrize(("name", "kept_units"), [("structured 30 %", 3), ("structured 50 %", 2)])
@pytest.mark.parametrize("unit", [1, 12])
def test_structured_formats_keep_the_units_with_the_largest_norms(name: str, kept_units: int, unit: int) -> None:
    """Of 4 units of 12, 1.2 and 2 go; of 48 single channels, 14 and 24."""
    weight, form = drawn(OUT, IN), by_name(name)
    count = kept_units if unit == 12 else {"structured 30 %": 34, "structured 50 %": 24}[name]
    for cut, matrix in (("outputs", weight), ("inputs", weight.T.contiguous())):
        rows = matrix if cut == "outputs" else matrix.T
        units = largest([float(rows[start : start + unit].norm()) for start in range(0, OUT, unit)], count)
        kept = [index * unit + offset for index in units for offset in range(unit)]
        shape = LayerShape(*matrix.shape, cut, unit)  # type: ignore[arg-type]
        smaller = matrix[kept] if cut == "outputs" else matrix[:, kept]
        inputs = drawn(5, smaller.shape[1], seed=1)
        torch.testing.assert_close(form.build(matrix, shape)(inputs), inputs @ smaller.T, atol=ATOL, rtol=0)
        left = form.left(shape)
        assert (left.out_features, left.in_features) == tuple(smaller.shape)
        assert form.share(shape) == pytest.approx(count * unit / OUT)


def needs_int8() -> Format:
    form = by_name("int8 dynamic")
    if reason := form.unavailable(CPU):
        pytest.skip(reason)
    return form


def test_int8_dynamic_computes_with_both_sides_rounded() -> None:
    """Weights on 255 points; inputs on 128 (on x86, where sums of pairs would overflow) or 256, with their own zero point."""
    form, weight, inputs = needs_int8(), drawn(OUT, IN), drawn(2, 3, IN, seed=1)
    module: Any = form.build(weight)
    rounded = module.weight().dequantize()
    step = float(module.weight().q_scale())
    assert float((rounded - weight).abs().max()) <= step / 2 + 1e-6 and step < float(weight.abs().max()) / 120
    low, high = float(inputs.min()), float(inputs.max())
    distances = []
    for points in (127, 255):
        scale = (high - low) / points
        zero = round(-low / scale)
        seen = ((inputs / scale).round() + zero).clamp(0, points).sub(zero) * scale
        distances.append(float((module(inputs) - seen @ rounded.T).abs().max()))
    assert min(distances) < 1e-3  # a step less or more in one input moves an output by up to 0.1
    exact = float((module(inputs) - inputs @ rounded.T).abs().max())
    assert exact > 0.05  # the inputs were rounded


def test_int8_dynamic_is_silent_though_torch_calls_it_deprecated() -> None:
    form = needs_int8()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        form.build(drawn(OUT, IN))(drawn(1, IN))
        by_name("CSR 50 %").build(drawn(OUT, IN))(drawn(1, IN))


def test_torchao_rounds_rows_to_eight_bits_and_counts_as_said() -> None:
    pytest.importorskip("torchao")
    form, weight, inputs = by_name("int8 weights"), drawn(OUT, IN).bfloat16(), drawn(3, IN, seed=1).bfloat16()
    module: Any = form.build(weight)
    assert linear_formats.stored_bytes(module) == form.weight_bytes(LayerShape(OUT, IN), dtype=torch.bfloat16)
    rounded = module.weight.dequantize().float()
    step = weight.float().abs().amax(1, keepdim=True) / 127
    assert bool(((rounded - weight.float()).abs() <= 1.01 * step).all()) and not torch.equal(rounded, weight.float())
    close = (module(inputs).float() - inputs.float() @ rounded.T).norm() / module(inputs).float().norm()
    assert close < 0.01  # bfloat16 keeps 8 bits


# --- bytes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("dense", torch.float32, 24_576),  # 6144 numbers
        ("dense", torch.bfloat16, 12_288),
        ("masked 50 %", torch.float32, 24_576),  # zeros are numbers
        ("CSR 50 %", torch.float32, 24_772),  # 3072 values and columns of 4 bytes each, and 49 places: more than dense
        ("CSR 50 %", torch.bfloat16, 18_628),
        ("2:4", torch.bfloat16, 6912),  # 3072 numbers of 16 + 2 bits
        ("structured 30 %", torch.float32, 18_432),  # one of 4 units of 12 outputs goes
        ("structured 50 %", torch.float32, 12_288),
        ("int8 dynamic", torch.float32, 6152),
        ("int8 weights", torch.bfloat16, 6384),  # 5 bytes for each of 48 rows
        ("int4 weights", torch.bfloat16, 26_112),  # padded to 48 x 1024: 24 576, and 8 groups a row of 4 bytes
    ],
)
def test_bytes_by_hand_and_as_counted(name: str, dtype: torch.dtype, expected: int) -> None:
    form, shape = by_name(name), LayerShape(OUT, IN, "outputs", 12)
    assert form.weight_bytes(shape, dtype=dtype) == expected
    if form.unavailable(CPU, dtype=dtype, shape=shape) is None:
        module = form.build(drawn(OUT, IN).to(dtype), shape)
        assert linear_formats.stored_bytes(module) == expected


def test_stored_bytes_count_biases_and_tied_weights_once() -> None:
    first, second = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
    second.weight = first.weight
    assert linear_formats.stored_bytes(nn.Sequential(first, second)) == 4 * (12 + 3)
    form = needs_int8()
    assert linear_formats.stored_bytes(nn.Sequential(form.make(first), second)) == (12 + 8 + 4 * 3) + 4 * 12


def test_the_share_of_multiplications_is_what_kernels_skip() -> None:
    shares = {name: form.share(LayerShape(10, 6)) for name, form in FORMATS.items()}
    half = {"CSR 50 %", "2:4", "structured 50 %"}
    assert shares == {name: 0.5 if name in half else 0.7 if name == "structured 30 %" else 1.0 for name in FORMATS}
    assert {name for name, form in FORMATS.items() if form.integers} == {"int8 dynamic"}


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 30), st.sampled_from(["outputs", "inputs"]))
def test_what_is_left_are_whole_units(units: int, unit: int, other: int, cut: Any) -> None:
    sizes = (units * unit, other) if cut == "outputs" else (other, units * unit)
    for removed in (0.3, 0.5):
        left = by_name(f"structured {removed * 100:.0f} %").left(LayerShape(*sizes, cut, unit))
        assert left.cut_features == (units - int(units * removed + 1e-9)) * unit
        assert (left.in_features if cut == "outputs" else left.out_features) == other


# --- where a format cannot run -------------------------------------------------------------------------------------------


def test_what_needs_a_gpu_says_so_on_a_cpu() -> None:
    for name, form in FORMATS.items():
        reason = form.unavailable(CPU, dtype=torch.float32)
        assert (reason == "needs CUDA") == (name in NEEDS_CUDA)
        if name not in (*NEEDS_CUDA, "int8 dynamic"):
            assert reason is None


def on_gpu(monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (9, 0)) -> torch.device:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("2:4", (64, 128), torch.bfloat16, None),
        ("2:4", (64, 128), torch.float32, "needs float16 or bfloat16, got float32"),
        ("2:4", (40, 128), torch.bfloat16, "needs multiples of 32 outputs and 64 inputs, got 40 x 128"),
        ("2:4", (128, 40), torch.float16, "needs multiples of 32 outputs and 64 inputs, got 128 x 40"),
        ("2:4", (128, 32), torch.float16, "needs multiples of 32 outputs and 64 inputs, got 128 x 32"),
        ("int4 weights", (64, 128), torch.bfloat16, None),
        ("int4 weights", (128, 64), torch.bfloat16, "needs a multiple of 128 inputs, got 64"),
        ("int4 weights", (128, 128), torch.float16, "needs bfloat16, got float16"),
        ("int8 weights", (128, 100), torch.float32, None),
        ("int8 dynamic", (128, 128), torch.float32, "needs a CPU"),
        ("CSR 50 %", (128, 128), torch.bfloat16, None),
    ],
)
def test_gpu_formats_name_what_they_need(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, int], dtype: torch.dtype, reason: str | None
) -> None:
    device = on_gpu(monkeypatch)
    monkeypatch.setattr(format_support.importlib.util, "find_spec", lambda package: package)
    assert by_name(name).unavailable(device, dtype=dtype, shape=LayerShape(*shape)) == reason


def test_old_gpus_and_absent_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = on_gpu(monkeypatch, capability=(7, 5))
    for name in NEEDS_CUDA:
        assert by_name(name).unavailable(device, dtype=torch.bfloat16) == "needs compute capability 8.0, got 7.5"
    on_gpu(monkeypatch)
    monkeypatch.setattr(format_support.importlib.util, "find_spec", lambda package: None)
    assert by_name("int8 weights").unavailable(device) == "torchao is not installed"
    assert by_name("2:4").unavailable(device, dtype=torch.bfloat16) is None


def test_cpu_formats_name_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    form = by_name("int8 dynamic")
    assert by_name("CSR 50 %").unavailable(CPU, dtype=torch.bfloat16) == "needs float32 or float64 on a CPU, got bfloat16"
    if form.unavailable(CPU) is None:
        assert form.unavailable(CPU, dtype=torch.float64) == "needs float32 activations, got float64"
    monkeypatch.delattr(torch.ao.quantization, "quantize_dynamic")
    assert form.unavailable(CPU) == "torch.ao.quantization.quantize_dynamic is missing"


# --- whole models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_converted_models_compute_what_their_matrices_do(tmp_path: Path, family: str) -> None:
    model, ids = tiny.model(tmp_path, family=family, causal=False, dtype=torch.float32), tiny.ids(2, 9)
    for parameter in model.network.parameters():  # fresh biases are 0 and would hide that they were lost
        if parameter.dim() == 1:
            parameter.data += 0.3 * drawn(*parameter.shape)
    dense = model.network(input_ids=ids).logits
    masked, sparse = (linear_formats.convert(model, by_name(name)) for name in ("masked 50 %", "CSR 50 %"))
    torch.testing.assert_close(linear_formats.convert(model, DENSE).network(input_ids=ids).logits, dense, atol=ATOL, rtol=0)
    for layer, source in zip(masked.layers, model.layers, strict=True):
        assert torch.equal(layer.module.weight, halved(source.module.weight, source.module.in_features))
    expected = masked.network(input_ids=ids).logits
    assert float((expected - dense).abs().max()) > 0.1
    with torch.inference_mode():
        torch.testing.assert_close(sparse.network(input_ids=ids).logits, expected, atol=10 * ATOL, rtol=0)
    assert sparse.layers == () and sparse.fingerprint == masked.fingerprint == ""
    torch.testing.assert_close(model.network(input_ids=ids).logits, dense, atol=0, rtol=0)  # left as it is
    small = linear_formats.convert(model, by_name("structured 50 %"))
    wanted = shrink.shrunk(model, *shrink.choose(model, sparsity=0.5))
    assert torch.equal(small.network(input_ids=ids).logits, wanted.network(input_ids=ids).logits)


def test_int8_dynamic_models_compute_with_rounded_matrices(tmp_path: Path) -> None:
    form, model, ids = needs_int8(), tiny.model(tmp_path, causal=False), tiny.ids(2, 9)
    made = linear_formats.convert(model, form)
    dense, rounded = (each.network(input_ids=ids).logits for each in (model, made))
    assert 0 < float((rounded - dense).norm() / dense.norm()) < 0.15  # two blocks of layers with 1.5 % error each
    assert made.layers == ()
    block = 2 * 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 40 * 32)  # q and o, k and v, the MLP; two blocks of float32
    saved = linear_formats.stored_bytes(model.network) - linear_formats.stored_bytes(made.network)
    assert saved == block * 3 // 4 - 14 * 8


def test_shapes_of_a_model_are_cut_as_shrink_cuts_it(tmp_path: Path) -> None:
    """4 query heads of 8 on 2 key-value heads: a group is 16 wide in q and o, and 8 in k and v."""
    model = tiny.model(tmp_path, causal=False)
    heads, form = shrink.head_shape(model), by_name("structured 50 %")
    assert heads == HeadShape(4, 2, 8)
    small = linear_formats.convert(model, form)
    for layer, smaller in zip(model.layers, small.layers, strict=True):
        shape = linear_formats.layer_shape(layer, heads)
        assert shape.unit == {"q": 16, "o": 16, "k": 8, "v": 8}.get(layer.role, 1)
        left = form.left(shape)
        assert (left.out_features, left.in_features) == tuple(smaller.module.weight.shape)


def test_models_that_cannot_be_converted_carry_the_reason(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=False)
    made = linear_formats.convert_all(model, [DENSE, by_name("2:4"), by_name("masked 50 %")])
    assert made["2:4"] == "needs CUDA" and not isinstance(made["dense"], str) and list(made) == ["dense", "2:4", "masked 50 %"]
    with pytest.raises(InputError, match=r"2:4 must be able to run for .*, got needs CUDA: record it as not run"):
        linear_formats.convert(model, by_name("2:4"))


def test_the_first_layer_that_does_not_fit_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths 32 and 40: gate and up have 40 outputs, down 40 inputs."""
    model = tiny.model(tmp_path, causal=False)
    refuse = lambda shape, device, dtype: f"got {shape.out_features}" if shape.out_features == 40 else None  # noqa: E731
    form = Format("odd", DENSE.make, DENSE.size, refuse)
    assert linear_formats.model_refusal(model, form) == "got 40" and linear_formats.model_refusal(model, DENSE) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: by_name("int2"), "a format must be among dense, .*, got 'int2'"),
        (lambda: LayerShape(0, 4), "features must be positive"),
        (lambda: LayerShape(10, 4, unit=4), "unit divide those that are cut, got .*unit=4"),
        (lambda: LayerShape(8, 6, "inputs", 4), "unit divide"),
        (lambda: DENSE.build(torch.ones(3, 4), LayerShape(4, 3)), r"the weight's \(3, 4\), got \(4, 3\)"),
    ],
)
def test_what_cannot_be_used_is_refused(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        cast(Any, call)()
