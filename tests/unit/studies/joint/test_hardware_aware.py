"""Hardware-aware allocation: tables against single measurements, predictions against sums, budgets that cannot be met."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.pruning import pruner
from lib.studies.joint import configurations, hardware_aware, measured_formats, search, tables
from lib.studies.joint.configurations import Prepared
from lib.studies.joint.hardware_aware import Budget
from lib.studies.joint.measured_formats import Sensitivity
from lib.studies.joint.search import Choice, Unit
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Bench, Calibrations
from lib.timing import clock as timing
from tests import tiny

LENGTH = 16
Offer = tuple[Unit, str]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    model = tiny.model(tmp_path_factory.mktemp("hardware"), family="qwen2", causal=False)
    bench = Bench(model, tiny.ids(8, LENGTH, seed=3), tiny.ids(3, LENGTH, seed=4), 4, 2, 5)
    return configurations.prepare(Calibrations(bench, seed=1))


@pytest.fixture(scope="module")
def sensitivities(prepared: Prepared) -> list[Sensitivity]:
    return measured_formats.sensitivity(prepared, tiny.ids(4, LENGTH, seed=8), seed=7)


@pytest.fixture
def seconds(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> dict[Offer, float]:
    monkeypatch.setattr(timing, "interleaved", clock)
    return measured_formats.latency(prepared, rows=4, repeats=3)


def clock(calls: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device) -> dict[str, Tensor]:
    """Pretend: a layer takes a second a weight, and half of that in int8; forward passes take 7 s."""
    taken = {}
    for name, call in calls.items():
        call()
        modules = getattr(call, "args", ((),))[:1]
        total = 7.0 if not modules else sum(cost(module) for module in modules[0])
        taken[name] = torch.full((repeats,), total, dtype=torch.float64)
    return taken


def cost(module: torch.nn.Module) -> float:
    share = 1.0 if isinstance(module, torch.nn.Linear) else 0.5
    return share * int(module.out_features) * int(module.in_features)  # type: ignore[arg-type]


def options_of(prepared: Prepared, sensitivities: list[Sensitivity], seconds: dict[Offer, float]) -> list[Choice]:
    return measured_formats.choices(sensitivities, seconds, measured_formats.sizes(prepared))


# --- the three tables ----------------------------------------------------------------------------------------------------


def test_sensitivity_is_the_loss_with_one_matrix_replaced(prepared: Prepared, sensitivities: list[Sensitivity]) -> None:
    assert [(row.layers, row.format) for row in sensitivities] == prepared.offers()
    bench = replace(prepared.found.bench, windows=tiny.ids(4, LENGTH, seed=8), seed=7)
    dense = runs.loss(bench)
    for layer, form in ((prepared.model.layers[3], "int3"), (prepared.model.layers[11], "2:4 + int4")):
        own = next(row for row in sensitivities if row.layers == (layer.name,) and row.format == form)
        with pruner.restored(prepared.model):
            layer.module.weight.data.copy_(prepared.modules[layer.name, form].weight)  # type: ignore[arg-type]
            expected = runs.loss(bench) - dense
        assert torch.equal(own.increase, expected) and own.increase.any()
        assert own.mean == pytest.approx(expected.mean().item())
        spread = math.sqrt(sum((value - own.mean) ** 2 for value in expected.tolist()) / 3)  # of 4 windows
        assert own.standard_error == pytest.approx(spread / math.sqrt(4))
    assert not any(row.increase.any() for row in sensitivities if row.format == "dense")
    assert all(row.increase.any() for row in sensitivities if row.format.startswith("structured"))


def test_equal_shapes_are_timed_once_and_all_in_one_go(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def listen(calls: Mapping[str, Callable[[], object]], **options: object) -> dict[str, Tensor]:
        asked.append([call.args[0] for call in calls.values()])  # type: ignore[attr-defined]
        return clock(calls, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(timing, "interleaved", listen)
    measured_formats.latency(prepared, rows=4, repeats=3)
    assert len(asked) == 1
    kinds = [{(type(module), module.out_features, module.in_features, has_bias(module)) for module in each} for each in asked[0]]
    assert all(len(kind) == 1 for kind in kinds) and len({next(iter(kind)) for kind in kinds}) == len(kinds)
    # In the two blocks. Dense: q, k = v = the half of q, o, gate = up, down; int8 the same without that half; half: k = v, o,
    # gate = up, down; 30 %: gate = up, down.
    assert sorted(len(each) for each in asked[0]) == sorted([2, 6, 2, 4, 2, 2, 4, 2, 4, 2, 4, 2, 4, 2, 4, 2])
    ids = [id(module) for each in asked[0] for module in each]
    assert len(set(ids)) == len(ids)


def has_bias(module: torch.nn.Module) -> bool:
    return (module.bias if isinstance(module, torch.nn.Linear) else module.bias()) is not None  # type: ignore[operator]


def test_seconds_are_of_one_layer_and_packed_formats_compute_as_dense(prepared: Prepared, seconds: dict[Offer, float]) -> None:
    assert set(seconds) == set(prepared.offers())
    for layer in prepared.model.layers:
        weights = layer.module.weight.numel()
        assert [seconds[(layer.name,), form] for form in ("dense", "int4", "int3", "2:4 + int4")] == [weights] * 4
        assert seconds[(layer.name,), "int8 dynamic"] == weights / 2
    for unit, (_, part) in configurations.units(prepared.model).items():
        expected = 32 * (16 + 8 + 8 + 16) if part == "attention" else 3 * 20 * 32
        assert seconds[unit, "structured 50 %"] == expected


def test_real_times_are_positive(prepared: Prepared) -> None:
    seconds = measured_formats.latency(prepared, rows=4, repeats=2)
    assert set(seconds) == set(prepared.offers()) and all(0 < value < 10 for value in seconds.values())
    with pytest.raises(InputError, match="rows must be positive, got 0: give"):
        measured_formats.latency(prepared, rows=0, repeats=2)
    with pytest.raises(InputError, match=r"repeats >= 1, got \d+ and 0"):
        measured_formats.latency(prepared, rows=4, repeats=0)


def test_tables_of_different_units_are_not_joined(
    prepared: Prepared, sensitivities: list[Sensitivity], seconds: dict[Offer, float]
) -> None:
    with pytest.raises(InputError, match="must be of the same units and formats, got 117, 118 and 118 of them"):
        measured_formats.choices(sensitivities[1:], seconds, measured_formats.sizes(prepared))


def test_the_table_has_a_row_a_unit_and_format(
    prepared: Prepared, sensitivities: list[Sensitivity], seconds: dict[Offer, float]
) -> None:
    sizes = measured_formats.sizes(prepared)
    table = tables.sensitivity_table(prepared, sensitivities, seconds, sizes)
    assert list(table) == ["model", "layer", "role", "format", "increase", "se", "seconds", "bytes"]
    assert len(table) == len(prepared.offers()) and set(table["layer"]) == {0, 1}
    row = table[(table["layer"] == 1) & (table["role"] == "MLP") & (table["format"] == "structured 30 %")].iloc[0]
    own = next(each for each in sensitivities if len(each.layers) == 3 and ".1." in each.layers[0] and "30" in each.format)
    assert row["increase"] == own.mean and row["se"] == own.standard_error
    assert row["seconds"] == 3 * 28 * 32 and row["bytes"] == 2 * 3 * 28 * 32


# --- budgets -------------------------------------------------------------------------------------------------------------

BUDGETS = (Budget(seconds=0.6), Budget(bytes=0.3), Budget(seconds=0.7, bytes=0.5), Budget(seconds=0.01))


@pytest.fixture
def tried(
    prepared: Prepared, sensitivities: list[Sensitivity], seconds: dict[Offer, float]
) -> tuple[list[Choice], list[hardware_aware.Tried]]:
    options = options_of(prepared, sensitivities, seconds)
    return options, hardware_aware.compare_allocations(prepared, options, BUDGETS, draws=3, repeats=3)


def test_every_budget_is_met_and_predictions_add_up(
    tried: tuple[list[Choice], list[hardware_aware.Tried]], prepared: Prepared
) -> None:
    options, results = tried
    by_key = {(choice.layers, choice.format): choice for choice in options}
    weights = sum(layer.module.weight.numel() for layer in prepared.model.layers)
    stored = 2 * sum(p.numel() for layer in prepared.model.layers for p in layer.module.parameters())
    for row in (row for row in results if row.allocation):
        found, limits = row.allocation, row.budget
        assert found is not None
        parts = [by_key[each.layers, each.format] for each in found.chosen]
        assert sorted(name for each in parts for name in each.layers) == sorted(x.name for x in prepared.model.layers)
        assert found.seconds == pytest.approx(sum(each.seconds for each in parts))
        assert found.bytes == sum(each.bytes for each in parts)
        assert row.as_measured == pytest.approx(sum(each.loss for each in parts))
        assert found.loss == pytest.approx(sum(max(0.0, each.loss) for each in parts))
        assert found.seconds <= (limits.seconds or 1) * weights * (1 + 1e-9) and found.bytes <= (limits.bytes or 1) * stored
        assert (row.dense.seconds, row.dense.bytes, row.dense.loss) == (weights, stored, 0.0)


def test_nothing_is_predicted_better_than_the_optimum(tried: tuple[list[Choice], list[hardware_aware.Tried]]) -> None:
    _, results = tried
    for budget in BUDGETS[:3]:
        losses = {row.strategy: row.allocation.loss for row in results if row.budget == budget and row.allocation}
        assert {"optimum", "random 1", "random 2", "random 3"} <= losses.keys()
        assert all(losses["optimum"] <= loss + 1e-9 for loss in losses.values())
        assert losses["optimum"] < max(losses.values())


def test_what_is_measured_is_the_model_in_these_formats(
    tried: tuple[list[Choice], list[hardware_aware.Tried]], prepared: Prepared
) -> None:
    _, results = tried
    dense = runs.loss(prepared.found.bench)
    for row in results[:6]:
        if row.allocation and row.increase:
            variant = configurations.variant(prepared, row.allocation.formats)
            increase = runs.loss(prepared.found.bench, variant) - dense
            assert row.increase.estimate == pytest.approx(increase.double().mean().item())
            assert row.increase.interval[0] <= row.increase.estimate <= row.increase.interval[1]


def test_budgets_that_cannot_be_met_are_rows_with_the_reason(tried: tuple[list[Choice], list[hardware_aware.Tried]]) -> None:
    _, results = tried
    rows = [row for row in results if row.budget == BUDGETS[-1]]
    assert [row.strategy for row in rows] == ["optimum", "uniform", "greedy", "random"]
    assert all(row.allocation is None and row.increase is None and row.forward is None for row in rows)
    assert all("seconds must be at least" in row.reason for row in rows if row.strategy != "uniform")
    assert "one format must fit seconds <=" in rows[1].reason
    table = tables.allocation_table(results)
    last = table.iloc[-1]
    assert last["reason"] == rows[-1].reason and last["formats"] == "" and math.isnan(last["measured"])


def test_some_random_allocations_are_timed_and_equal_ones_are_measured_once(
    prepared: Prepared, sensitivities: list[Sensitivity], seconds: dict[Offer, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, measured = options_of(prepared, sensitivities, seconds), []

    def loss_in(own: Prepared, formats: Mapping[str, str]) -> Tensor:
        measured.append(tuple(sorted(formats.items())))
        return torch.tensor([1.0, 2.0, 3.0])

    monkeypatch.setattr(hardware_aware, "loss_in", loss_in)
    budgets = [Budget(bytes=0.3), Budget(bytes=0.3)]
    results = hardware_aware.compare_allocations(prepared, options, budgets, draws=3, repeats=2, timed_draws=2)
    assert len(set(measured)) == len(measured) < len(results)
    timed = {row.strategy for row in results if row.forward is not None}
    assert timed == {"optimum", "uniform", "greedy", "random 1", "random 2"}
    assert all(row.dense_forward is not None and row.dense_forward.tolist() == [7.0, 7.0] for row in results)
    untimed = hardware_aware.compare_allocations(prepared, options, budgets[:1], draws=0, repeats=0)
    assert [row.strategy for row in untimed] == ["optimum", "uniform", "greedy"] and not any(row.forward for row in untimed)


def test_whole_models_are_timed_with_their_own_formats(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = next(unit for unit, (_, part) in configurations.units(prepared.model).items() if part == "MLP")
    rest = [layer.name for layer in prepared.model.layers if layer.name not in cut]
    parts = [Choice(cut, "structured 50 %", 0.0, 1.0, 1), *(Choice((name,), "dense", 0.0, 1.0, 1) for name in rest)]
    allocation = search.optimise(parts)
    ids, seen = tiny.ids(2, LENGTH, seed=9), {}

    def listen(calls: Mapping[str, Callable[..., object]], **_: object) -> dict[str, Tensor]:
        seen.update({name: call().logits for name, call in calls.items()})  # type: ignore[attr-defined]
        return {name: torch.ones(2, dtype=torch.float64) for name in calls}

    monkeypatch.setattr(timing, "interleaved", listen)
    found = hardware_aware.forward_seconds(prepared, [allocation], ids, repeats=2)
    assert len(found) == 2 and () in found
    with configurations.configured(prepared, dict.fromkeys(cut, "structured 50 %")) as lent:
        expected = lent.network(input_ids=ids, use_cache=False).logits
    dense = prepared.model.network(input_ids=ids, use_cache=False).logits
    assert torch.equal(seen["()"], dense) and torch.equal(next(v for k, v in seen.items() if k != "()"), expected)


def test_negative_losses_are_floored_in_searches_only(
    prepared: Prepared, sensitivities: list[Sensitivity], seconds: dict[Offer, float]
) -> None:
    """Half of the time means int8 everywhere, of which one matrix seems to help; that must not pay for the 13 others."""
    options = [choice for choice in options_of(prepared, sensitivities, seconds) if choice.format in ("dense", "int8 dynamic")]
    options = [replace(choice, loss=0.0 if choice.format == "dense" else 1.0) for choice in options]
    index = next(i for i, choice in enumerate(options) if choice.format == "int8 dynamic")
    options[index] = replace(options[index], loss=-100.0)
    rows = hardware_aware.compare_allocations(prepared, options, [Budget(seconds=0.5)], draws=1, repeats=0)
    assert len(rows) == 4
    assert all(row.allocation is not None and (row.allocation.loss, row.as_measured) == (13.0, -87.0) for row in rows)


def test_the_table_of_allocations(tried: tuple[list[Choice], list[hardware_aware.Tried]]) -> None:
    _, results = tried
    table = tables.allocation_table(results)
    assert len(table) == len(results) and list(table["budget"].unique()) == [each.name for each in BUDGETS]
    row, own = table.iloc[0], results[0]
    assert own.allocation is not None and own.increase is not None
    assert row["predicted"] == own.allocation.loss and row["measured"] == own.increase.estimate
    assert row["share of seconds"] == own.allocation.seconds / own.dense.seconds <= 0.6 + 1e-9
    assert row["forward"] == 7.0 and row["speed-up"] == 1.0
    assert row["forward, predicted"] == pytest.approx(7.0 + own.allocation.seconds - own.dense.seconds)
    counted = sum(int(part.split(" ", 1)[0]) for part in row["formats"].split(", "))
    assert counted == 14


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({}, "a budget must limit seconds or bytes, got neither"),
        ({"seconds": 0.0}, r"shares of dense in \(0, 1\], got {'seconds': 0.0}: use fractions"),
        ({"bytes": -0.5}, "got {'bytes': -0.5}"),
        ({"seconds": 0.5, "bytes": 50.0}, "not per cent"),
        ({"seconds": math.nan}, "got {'seconds': nan}"),
    ],
)
def test_budgets_that_are_none_are_refused(shares: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**shares)


def test_options_that_cannot_be_used_are_errors_and_not_rows(prepared: Prepared) -> None:
    with pytest.raises(InputError, match="budgets must be shares of dense, got options without it"):
        hardware_aware.compare_allocations(
            prepared, [Choice(("a",), "int4", 0.1, 1.0, 1)], [Budget(bytes=0.5)], draws=0, repeats=0
        )
    with pytest.raises(InputError, match="finite loss"):
        hardware_aware.compare_allocations(
            prepared, [Choice(("a",), "dense", math.nan, 1.0, 1)], [Budget(bytes=0.5)], draws=0, repeats=0
        )
