"""Rounding against torchao and against a loop over single weights, and stored bytes against bits that are really packed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lib.core.errors import InputError
from lib.quantization.rounding import SCALE_RULES, Grid, Quantized, group_scales, round_to_nearest, stored_bytes
from tests.unit.quantization.matrices import CODED, GROUPS, KINDS, MAPPINGS, matrix, relative_error

RECORDED = Path(__file__).parents[2] / "parity" / "torchao_records"
ERRORS = json.loads((RECORDED / "errors.json").read_text(encoding="utf-8"))


def slow_scale(values: list[float], bits: int, rule: str, importance: list[float]) -> float:
    """The scale of one group."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def stored(scale: float) -> float:
        return float(torch.tensor(scale, dtype=torch.float64).bfloat16()) or 1.0

    largest = max(abs(value) for value in values)
    if rule == "absmax":
        return stored(largest / (high + 0.5))
    if rule == "unclipped":
        return stored(max(max(value / high, value / low) for value in values))
    tried = [stored(largest * 0.95**step / (high + 0.5)) for step in range(24)]
    tried += [stored(largest / high), stored(largest / -low), stored(max(max(value / high, value / low) for value in values))]

    def error(scale: float) -> float:
        ends = [min(max(round(value / scale), low), high) * scale for value in values]
        return sum(weight * (value - end) ** 2 for weight, value, end in zip(importance, values, ends, strict=True))

    return min(tried, key=error)


def slow_rounding(weight: Tensor, bits: int, size: int, rule: str, importance: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales), one weight at a time."""
    rows, width = weight.shape
    codes, scales = torch.zeros(rows, width).to(torch.int8), torch.zeros(rows, width // size).double()
    for row in range(rows):
        for group in range(width // size):
            columns = range(group * size, (group + 1) * size)
            values = [float(weight[row, column]) for column in columns]
            scale = slow_scale(values, bits, rule, [float(importance[column]) for column in columns])
            scales[row, group] = scale
            for column, value in zip(columns, values, strict=True):
                codes[row, column] = min(max(round(value / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    return codes, scales


# --- against torchao -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", CODED)
def test_errors_are_those_of_torchao(bits: int, group_size: int | None, kind: str) -> None:
    """Its scales are in single precision and ours in bfloat16; its default mapping is our absmax."""
    weight = matrix(kind)
    found = {}
    for rule, mapping in MAPPINGS.items():
        ours = round_to_nearest(weight, Grid(bits, group_size, rule)).dequantize()
        found[rule] = relative_error(ours, weight)
        assert found[rule] == pytest.approx(ERRORS[f"{bits} {group_size} {kind} {mapping}"], rel=0.02)
        assert bool((ours[weight == 0] == 0).all())
    if bits < 4 and kind == "gaussian":  # so the test tells the two rules apart
        assert found["unclipped"] > 1.02 * found["absmax"]


@pytest.mark.parametrize("bits", CODED)
def test_codes_are_those_of_torchao_when_scales_are_the_same(bits: int) -> None:
    theirs = load_file(RECORDED / "codes.safetensors")[str(bits)]
    ours = round_to_nearest(matrix("heavy"), Grid(bits, 64)).codes
    assert float((theirs != ours).double().mean()) < 1e-4  # they multiply by 1 / scale


def test_the_records_are_those_of_the_installed_torchao() -> None:
    pytest.importorskip("torchao", reason="the recorded outputs are compared instead")
    from tests.parity.torchao_records import record

    for bits, mapping in ((3, "SYMMETRIC"), (4, "SYMMETRIC_NO_CLIPPING_ERR")):
        found = relative_error(record.rounded(matrix("heavy"), bits, 64, mapping), matrix("heavy"))
        assert found == pytest.approx(ERRORS[f"{bits} 64 heavy {mapping}"], rel=1e-5)


# --- against the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "pruned"])
@pytest.mark.parametrize(("rule", "size"), [("absmax", 6), ("unclipped", 6), ("search", 6), ("search", 24), ("absmax", 1)])
@pytest.mark.parametrize("bits", CODED)
def test_rounding_equals_the_loop(bits: int, rule: str, size: int, kind: str) -> None:
    weight = matrix(kind, rows=3, width=24, seed=bits).double()
    importance = torch.logspace(-2, 2, 24).double()
    group_size = None if size == 24 else size
    got = round_to_nearest(weight, Grid(bits, group_size, rule), importance=importance)
    codes, scales = slow_rounding(weight, bits, size, rule, importance)
    assert torch.equal(got.scales.double(), scales)
    assert torch.equal(got.codes, codes)


def test_a_group_by_hand() -> None:
    """Largest size 3 and 2 bits: the scale is 3 / 1.5 = 2. 3 / 2 is cut off to 1, -3 / 2 is -2, 1 / 2 goes to the even 0."""
    got = round_to_nearest(torch.tensor([[3.0, -3.0, 1.0, 1.25, -0.5]]), Grid(2))
    assert got.scales.tolist() == [[2.0]]
    assert got.codes.tolist() == [[1, -2, 0, 1, 0]]
    assert got.dequantize().tolist() == [[2.0, -4.0, 0.0, 2.0, 0.0]]
    # without clipping: max(3 / 2, 3 / 1) = 3
    assert group_scales(torch.tensor([[3.0, -3.0, 1.0]]), Grid(2, scale_rule="unclipped")).tolist() == [[3.0]]
    # an end that is below zero has one code more
    assert group_scales(torch.tensor([[1.0, -4.0, 1.0]]), Grid(3, scale_rule="unclipped")).tolist() == [[1.0]]


# --- what must hold ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from(CODED),
    rule=st.sampled_from(SCALE_RULES),
    size=st.sampled_from([1, 4, 8, None]),
    scale=st.sampled_from([1e-42, 1e-6, 1.0, 1e6]),
    seed=st.integers(0, 10**6),
)
def test_every_weight_is_on_its_grid(bits: int, rule: str, size: int | None, scale: float, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, generator=stream) * scale * (torch.rand(3, 8, generator=stream) < 0.7)
    weight[1] = 0.0
    grid = Grid(bits, size, rule)
    got = round_to_nearest(weight, grid)
    dense, spread = got.dequantize(), got.scales.float().repeat_interleave(grid.columns(8), dim=1)
    assert got.codes.dtype == torch.int8 and got.scales.dtype == torch.bfloat16
    assert bool((got.scales > 0).all())
    assert -(2 ** (bits - 1)) <= int(got.codes.min()) and int(got.codes.max()) < 2 ** (bits - 1)
    assert torch.equal(dense, got.codes.float() * spread)
    assert torch.equal(dense.double() / spread.double(), got.codes.double())
    assert bool((dense[weight == 0] == 0).all())
    # nearest: no further than half a step, unless it is at an end
    inner = (got.codes > grid.lowest) & (got.codes < grid.highest)
    assert bool(((dense - weight).abs() <= spread * 0.501)[inner].all())
    # rounding again on the same grid changes nothing
    assert torch.equal(round_to_nearest(dense, grid, scales=got.scales).dequantize(), dense)
    if rule != "absmax":
        assert torch.equal(round_to_nearest(dense, grid).dequantize(), dense)


def test_the_scale_of_absmax_moves_when_it_is_taken_again() -> None:
    """The largest code is 1 or 2, not 1.5: so what is already rounded has to be rounded with the scales it has."""
    weight = torch.tensor([[3.0, 1.0]])
    once = round_to_nearest(weight, Grid(2))
    assert once.scales.tolist() == [[2.0]] and once.dequantize().tolist() == [[2.0, 0.0]]
    assert round_to_nearest(once.dequantize(), Grid(2)).scales.item() == pytest.approx(2 / 1.5, rel=0.004)


@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_more_bits_and_smaller_groups_err_less(rule: str, kind: str) -> None:
    weight = matrix(kind)
    errors = [relative_error(round_to_nearest(weight, Grid(bits, 64, rule)).dequantize(), weight) for bits in CODED]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]
    sizes = [32, 64, 128, None]
    errors = [relative_error(round_to_nearest(weight, Grid(4, size, rule)).dequantize(), weight) for size in sizes]
    assert errors == sorted(errors)


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "pruned"])
@pytest.mark.parametrize("bits", CODED)
def test_the_search_is_the_best_in_every_group(bits: int, kind: str) -> None:
    weight = matrix(kind)
    errors = {}
    for rule in SCALE_RULES:
        rounded = round_to_nearest(weight, Grid(bits, 32, rule)).dequantize()
        errors[rule] = (rounded - weight).square().unflatten(1, (-1, 32)).sum(-1)
    for other in ("absmax", "unclipped"):
        assert bool((errors["search"] <= errors[other] * (1 + 1e-5)).all())
    if bits < 4:
        assert float(errors["search"].sum()) < 0.85 * float(errors["absmax"].sum())


def test_the_search_weighs_features() -> None:
    weight, importance = (
        matrix("gaussian"),
        torch.logspace(-2, 2, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(1))],
    )
    grid = Grid(3, 64, "search")
    plain, weighed = round_to_nearest(weight, grid), round_to_nearest(weight, grid, importance=importance)
    first, second = ((got.dequantize() - weight).square() for got in (plain, weighed))
    assert float((second * importance).sum()) < 0.95 * float((first * importance).sum())
    assert float(second.sum()) > float(first.sum())


def test_sixteen_bit_weights_are_divided_in_single_precision() -> None:
    weight = matrix("gaussian").bfloat16()
    for rule in SCALE_RULES:
        got, expected = (round_to_nearest(given, Grid(8, 64, rule)) for given in (weight, weight.float()))
        assert torch.equal(got.codes, expected.codes) and torch.equal(got.scales, expected.scales)
    half = got.dequantize(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, got.dequantize().bfloat16())


def test_pruning_after_rounding_leaves_the_others_where_they_are() -> None:
    weight = matrix("gaussian")
    got = round_to_nearest(weight, Grid(4, 64))
    kept = got.dequantize().abs() > 0.02
    pruned = got.masked(kept)
    assert torch.equal(pruned.dequantize(), torch.where(kept, got.dequantize(), 0.0))
    assert torch.equal(pruned.scales, got.scales) and bool((got.codes[~kept] != 0).any())


# --- bytes ---------------------------------------------------------------------------------------------------------------


def packed(quantized: Quantized, kept: Tensor | None) -> int:
    """Length of what is really written: bits of codes, mask and scales, each in whole bytes."""
    codes = quantized.codes if kept is None else quantized.codes[kept]
    bits = np.unpackbits(codes.flatten().numpy().view(np.uint8)[:, None], axis=1)[:, 8 - quantized.grid.bits :]
    total = len(np.packbits(bits)) + quantized.scales.nbytes
    return total if kept is None else total + len(np.packbits(kept.numpy()))


@pytest.mark.parametrize("group_size", [8, 40, None])
@pytest.mark.parametrize("bits", CODED)
def test_bytes_are_those_of_packed_bits(bits: int, group_size: int | None) -> None:
    weight = matrix("gaussian", rows=7, width=40)
    grid = Grid(bits, group_size)
    got = round_to_nearest(weight, grid)
    assert stored_bytes((7, 40), grid=grid) == packed(got, None)
    kept = weight.abs() > weight.abs().flatten().kthvalue(189).values  # 91 of 280 stay
    assert stored_bytes((7, 40), grid=grid, kept=91) == packed(got, kept)
    assert stored_bytes((7, 40), grid=grid, sparsity=189 / 280) == packed(got, kept)
    assert (
        stored_bytes((7, 40), grid=grid, sparsity=0.5, pattern="2:4")
        == packed(got, weight > weight.median())
        == packed(got, (torch.arange(280) % 2 == 0).view(7, 40))
    )


@pytest.mark.parametrize(
    ("bits", "sparsity", "pattern", "bits_per_weight"),
    [
        (16, 0.0, "unstructured", 16),
        (16, 0.5, "unstructured", 8 + 1),
        (16, 0.5, "2:4", 8 + 1),
        (8, 0.0, "unstructured", 8 + 0.25),
        (4, 0.0, "unstructured", 4 + 0.25),
        (4, 0.5, "unstructured", 2 + 1 + 0.25),
        (4, 0.5, "2:4", 2 + 2 * 0.5 + 0.25),
        (4, 0.5, "4:8", 2 + 1 + 0.25),  # indices of 3 bits would be 1.5
        (4, 0.75, "1:4", 1 + 2 * 0.25 + 0.25),  # an index is less than the mask
        (3, 0.0, "unstructured", 3 + 0.25),
        (2, 0.5, "unstructured", 2 + 0.25),  # 1 + 1: as much as dense
        (2, 0.25, "unstructured", 2 + 0.25),  # 1.5 + 1 would be more
        (4, 0.2, "unstructured", 4 + 0.25),
    ],
)
def test_bytes_by_hand(bits: int, sparsity: float, pattern: str, bits_per_weight: float) -> None:
    got = stored_bytes((160, 320), grid=Grid(bits, 64), sparsity=sparsity, pattern=pattern)
    assert got == 160 * 320 * bits_per_weight / 8


def test_scales_count_by_group() -> None:
    dense = 96 * 256 * 4 // 8
    found = {size: stored_bytes((96, 256), grid=Grid(4, size)) - dense for size in (32, 64, 128, None)}
    assert found == {32: 96 * 16, 64: 96 * 8, 128: 96 * 4, None: 96 * 2}


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_formats_that_are_not_offered_are_refused() -> None:
    with pytest.raises(InputError, match="weight_bits must be among 2, 3, 4, 8, 16, got 5: choose one"):
        Grid(5)
    with pytest.raises(InputError, match="group_size must be at least 1, got 0"):
        Grid(4, 0)
    with pytest.raises(InputError, match="scale_rule must be among absmax, unclipped, search, got 'mse'"):
        Grid(4, 64, "mse")


def test_a_group_that_does_not_divide_the_width_is_refused_by_name() -> None:
    weight = matrix("gaussian", width=96)
    with pytest.raises(InputError) as caught:
        round_to_nearest(weight, Grid(4, 64), name="model.layers.0.mlp.up_proj.weight")
    assert str(caught.value) == (
        "group_size must divide the input features, got 64 for 96 of model.layers.0.mlp.up_proj.weight: choose a divisor"
    )
    with pytest.raises(InputError, match="must divide the input features, got 64 for 96"):
        stored_bytes((4, 96), grid=Grid(4, 64))
    assert stored_bytes((4, 96), grid=Grid(16, 64)) == 4 * 96 * 2  # no scales, no groups


def test_what_cannot_be_rounded_is_refused() -> None:
    weight = matrix("gaussian")
    with pytest.raises(InputError, match="weight_bits must be below 16 to round a layer, got 16"):
        round_to_nearest(weight, Grid(16))
    weight[3, 4] = math.nan
    with pytest.raises(InputError, match="the weights of q_proj must be finite, got 1 that are not"):
        round_to_nearest(weight, Grid(4), name="q_proj")


def test_bytes_of_bad_sparsities_are_refused() -> None:
    grid = Grid(4, 64)
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 50"):
        stored_bytes((4, 64), grid=grid, sparsity=50.0)
    with pytest.raises(InputError, match=r"sparsity must be 0\.5 for the pattern 2:4, got 0"):
        stored_bytes((4, 64), grid=grid, pattern="2:4")
    for kept in (0, 257):
        with pytest.raises(InputError, match="removed weights must be in"):
            stored_bytes((4, 64), grid=grid, kept=kept)
