"""Tables of times: how calls are repeated and compared, what is counted and what is not run; no test looks at a clock."""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from torch import Tensor

from lib.attention import masses
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel
from lib.pruning import shrink
from lib.timing import call_times, latency, linear_formats
from lib.timing.format_support import LayerShape
from lib.timing.linear_formats import DENSE, FORMATS, Format, by_name
from lib.timing.roofline import Peaks
from tests import tiny

CPU = torch.device("cpu")
PEAKS = Peaks(operations=1000.0, bandwidth=10.0)
SHAPES = {"down": LayerShape(16, 24, "inputs"), "q": LayerShape(16, 8, "outputs", 4)}
CALLED = ("dense", "masked 50 %", "structured 50 %")
SOME = [by_name(name) for name in CALLED]


def measured(shapes: Mapping[str, LayerShape] = SHAPES, formats: list[Format] | None = None, **options: Any) -> pd.DataFrame:
    given: dict[str, Any] = {"rows": (1, 5), "repeats": 3, "device": CPU, "dtype": torch.float32, "peaks": PEAKS, **options}
    return latency.measure_layers(shapes, SOME if formats is None else formats, **given)


def empty(table: Any, columns: list[str]) -> bool:
    return bool(pd.isna(table[columns]).to_numpy().all())


class Clock:
    """Stands for `timing.interleaved`: runs the calls in turn and answers with given seconds, by name and round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, int], list[float]]) -> None:
        self.seconds, self.rounds = seconds, []
        monkeypatch.setattr(call_times, "interleaved", self)

    def __call__(self, calls: Mapping[str, Callable[[], object]], **options: Any) -> dict[str, Tensor]:
        for call in calls.values():
            call()
        self.rounds.append((list(calls), options))
        repeats = options["repeats"]
        return {name: torch.tensor(self.seconds(name, repeats), dtype=torch.float64) for name in calls}


# --- calls ---------------------------------------------------------------------------------------------------------------


def test_short_calls_are_repeated_inside_a_round_and_reported_singly(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.3 ms is repeated 4 times; the round then takes 1.2, 1.6 and 2 ms. 5 ms is called once."""
    counts = {"short": 0, "long": 0}

    def count(name: str) -> Callable[[], None]:
        return lambda: counts.update({name: counts[name] + 1})

    def seconds(name: str, repeats: int) -> list[float]:
        first = {"short": [0.0003, 0.0009], "long": [0.005, 0.006]}  # the faster counts: the other was disturbed
        then = {"short": [0.0012, 0.0016, 0.002], "long": [0.005, 0.007, 0.006]}
        return (first if repeats == 2 else then)[name]

    clock = Clock(monkeypatch, seconds)
    found = call_times.time_calls({name: count(name) for name in counts}, repeats=3, device=CPU)
    assert {name: timing.inner for name, timing in found.items()} == {"short": 4, "long": 1}
    torch.testing.assert_close(found["short"].seconds, torch.tensor([0.0003, 0.0004, 0.0005], dtype=torch.float64))
    assert found["short"].median == pytest.approx(0.0004) and found["long"].median == pytest.approx(0.006)
    assert counts == {"short": 1 + 1 + 4, "long": 1 + 1 + 1}  # to choose how often, for the peak of memory, for the times
    assert [names for names, _ in clock.rounds] == [["short", "long"]] * 2  # both in the same rounds
    assert all(options["device"] == CPU for _, options in clock.rounds)
    assert found["short"].peak_memory == 0.0


def test_peak_memory_is_the_largest_sum_of_what_is_kept_at_once() -> None:
    """Of three vectors of 4 MB two are kept at one time, and one was there before."""
    before = torch.zeros(1_000_000)

    def call() -> Tensor:
        second = before + 1
        third = second * 2
        del second
        return third - 1

    assert call_times.time_calls({"call": call}, repeats=3, device=CPU)["call"].peak_memory == pytest.approx(8e6, rel=0.01)


@pytest.mark.parametrize("count", [6, 7, 12, 20, 41])
def test_the_interval_of_a_median_is_the_narrowest_that_covers(count: int) -> None:
    """How often the true median lies between two order statistics follows from counting coin tosses."""
    low, high = call_times.median_interval(torch.arange(count, 0.0, -1.0))

    def covered(left_out: int) -> float:
        return sum(math.comb(count, heads) for heads in range(left_out, count - left_out + 1)) / 2**count

    assert low + high == count + 1 and covered(int(low)) >= 0.95 > covered(int(low) + 1)


def test_five_values_give_no_interval_of_a_median() -> None:
    assert call_times.median_interval(torch.arange(5.0)) == (-math.inf, math.inf)


@pytest.mark.parametrize(("seconds", "expected"), [(1e-6, 1000), (0.9e-3, 2), (1e-3, 1), (3.0, 1), (0.0, 1_000_000)])
def test_inner_calls_fill_a_millisecond(seconds: float, expected: int) -> None:
    assert call_times.inner_calls(seconds) == expected


def test_what_fails_is_left_out_with_its_reason_and_bad_input_is_not_hidden() -> None:
    def fail(error: Exception) -> Callable[[], object]:
        def call() -> object:
            raise error

        return call

    calls = {"good": lambda: 1, "odd": fail(RuntimeError("no kernel for 7 rows\nat line 3")), "mute": fail(AssertionError())}
    able, refused = call_times.willing(calls, "good")
    assert list(able) == ["good"]
    assert refused == {"odd": "refused by its kernel: no kernel for 7 rows", "mute": "refused by its kernel: AssertionError"}
    with pytest.raises(InputError, match="mine"):
        call_times.willing({"good": lambda: 1, "bad": fail(InputError("mine"))}, "good")
    with pytest.raises(RuntimeError, match="no kernel"):  # nothing can be compared without the baseline
        call_times.willing(calls, "odd")


def test_a_machine_is_named() -> None:
    found = call_times.machine(CPU)
    assert found == {**found, "device": "CPU", "threads": torch.get_num_threads(), "torch": torch.__version__}
    assert set(found) == {"device", "cpu", "threads", "torch"} and found["cpu"]


# --- layers --------------------------------------------------------------------------------------------------------------


def test_one_row_for_each_shape_number_of_rows_and_format() -> None:
    table = measured(formats=list(FORMATS.values()), integer_peaks=PEAKS)
    assert list(table.columns) == list(latency.LAYER_COLUMNS)
    keys = [(name, rows, form) for name in SHAPES for rows in (1, 5) for form in FORMATS]
    assert list(zip(table["layer"], table["rows"], table["format"], strict=True)) == keys
    assert set(table["repeats"]) == {3}
    ran = table[table["not_run"] == ""]
    numbers = ran.drop(columns=["layer", "format", "binds", "not_run"]).to_numpy(float)
    finite = ran.drop(columns=["layer", "format", "binds", "not_run", "speed_up_low", "speed_up_high"]).to_numpy(float)
    assert bool((numbers != 0).all()) and bool((finite > 0).all())
    assert {"dense", "masked 50 %", "CSR 50 %", "structured 30 %", "structured 50 %"} <= set(ran["format"])
    assert all(set(ran.loc[ran["format"] == "dense", column]) == {1.0} for column in latency.TIMES[3:6])
    assert set(ran["speed_up_low"]) == {-math.inf}, "three rounds give no interval of a median"
    ordered = ["seconds_q1", "seconds", "seconds_q3"], ["speed_up_q1", "speed_up", "speed_up_q3"]
    assert all((ran[low] <= ran[middle]).all() and (ran[middle] <= ran[high]).all() for low, middle, high in ordered)


def test_what_is_not_run_has_its_reason_and_no_numbers() -> None:
    table = measured(formats=[by_name("2:4"), DENSE, by_name("int4 weights")])
    left_out = table[table["format"] != "dense"]
    assert set(left_out["not_run"]) == {"needs CUDA"} and len(left_out) == 2 * 2 * 2
    assert empty(left_out, [*latency.MEASURED, *latency.COUNTED])
    assert set(table[table["format"] == "dense"]["not_run"]) == {""}


def test_dense_is_timed_in_the_same_rounds_though_nobody_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds say 2, 2 and 0.5; the ratio of the medians would be 1.67."""
    dense, masked = [0.02, 0.06, 0.05], [0.01, 0.03, 0.1]
    clock = Clock(monkeypatch, lambda name, repeats: (dense if name == "dense" else masked)[:repeats])
    table = measured({"q": SHAPES["q"]}, [by_name("masked 50 %")], rows=(4,))
    assert [names for names, _ in clock.rounds] == [["dense", "masked 50 %"]] * 2
    row = table.iloc[0]
    assert len(table) == 1 and row["speed_up"] == pytest.approx(2.0)
    assert (row["speed_up_q1"], row["speed_up_q3"]) == pytest.approx((1.25, 2.0))
    assert (row["seconds"], row["seconds_q1"], row["seconds_q3"]) == pytest.approx((0.03, 0.02, 0.065))


def test_counts_and_floors_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """down is 16 x 24. 5 rows dense: 3840 operations; 1536 + 4 x 5 x 40 = 2336 bytes; at 10 bytes a second 233.6 s."""
    Clock(monkeypatch, lambda name, repeats: [500.0] * repeats)
    formats = [DENSE, by_name("masked 50 %"), by_name("CSR 50 %"), by_name("structured 50 %")]
    table = measured({"down": SHAPES["down"]}, formats, rows=(5,)).set_index("format")
    expected = {
        "dense": (1536, 2336, 3840, 1.0, 233.6),
        "masked 50 %": (1536, 2336, 3840, 1.0, 233.6),  # its zeros are moved and multiplied
        "CSR 50 %": (192 * 8 + 17 * 4, 2404, 1920, 0.5, 240.4),  # half the operations, and more bytes
        "structured 50 %": (768, 768 + 4 * 5 * 28, 1920, 0.5, 132.8),  # 12 of 24 inputs: narrower activations too
    }
    for name, (weight, moved, operations, share, floor) in expected.items():
        row = table.loc[name]
        found = row["weight_bytes"], row["bytes"], row["operations"], row["share"], row["floor_seconds"], row["achieved"]
        assert found == pytest.approx((weight, moved, operations, share, floor, floor / 500)) and row["binds"] == "memory"
    fast = measured({"down": SHAPES["down"]}, formats, rows=(5,), peaks=Peaks(10.0, 1000.0)).set_index("format")
    assert set(fast["binds"]) == {"compute"} and fast.loc["dense", "floor_seconds"] == pytest.approx(384.0)


def test_integers_have_a_peak_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    form = by_name("int8 dynamic")
    if reason := form.unavailable(CPU):
        pytest.skip(reason)
    Clock(monkeypatch, lambda name, repeats: [500.0] * repeats)
    case: dict[str, Any] = {"shapes": {"down": SHAPES["down"]}, "formats": [DENSE, form], "rows": (5,)}
    dense, rounded = measured(**case, integer_peaks=Peaks(8.0, 10.0))["floor_seconds"]
    assert (dense, rounded) == pytest.approx((233.6, 480.0))  # 3840 operations, 8 a second
    without = measured(**case).iloc[1]
    assert math.isnan(without["floor_seconds"]) and without["binds"] == "" and without["operations"] == 3840


def test_narrow_formats_read_narrow_activations_and_all_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def times(calls: Mapping[str, Any], **options: Any) -> dict[str, call_times.Timing]:
        seen.update({name: (call.args[0], call()) for name, call in calls.items()})
        return {name: call_times.Timing(torch.ones(3, dtype=torch.float64), 1, math.nan) for name in calls}

    monkeypatch.setattr(latency, "time_calls", times)
    measured({"down": SHAPES["down"]}, rows=(5,))
    assert seen["dense"][0].shape == (5, 24) and torch.equal(seen["dense"][0], seen["masked 50 %"][0])
    assert torch.equal(seen["structured 50 %"][0], seen["dense"][0][:, :12]) and seen["structured 50 %"][1].shape == (5, 16)
    measured({"q": SHAPES["q"]}, rows=(5,))
    assert seen["structured 50 %"][0].shape == (5, 8) and seen["structured 50 %"][1].shape == (5, 8)


def test_a_kernel_that_fails_does_not_end_the_measurement() -> None:
    class OneRow(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if len(input) > 1:
                raise RuntimeError("only one row")
            return super().forward(input)

    name = "masked 50 %"
    form = Format(name, lambda linear: OneRow(linear.in_features, linear.out_features), DENSE.size)
    table = measured({"q": SHAPES["q"]}, [DENSE, form]).set_index(["rows", "format"])
    assert table.loc[(1, name), "not_run"] == "" and table.loc[(5, name), "not_run"] == "refused by its kernel: only one row"
    broken = Format(name, lambda linear: cast(Any, [])[0], DENSE.size)
    table = measured({"q": SHAPES["q"]}, [DENSE, broken])
    assert list(table["not_run"]) == ["", "refused by its kernel: list index out of range"] * 2


def test_peaks_of_integers_are_those_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := by_name("int8 dynamic").unavailable(CPU):
        pytest.skip(reason)
    monkeypatch.setattr(latency, "interleaved", lambda calls, **_: {"product": torch.tensor([4.0, 2.0, 8.0])})
    assert latency.integer_peaks(PEAKS, size=8, repeats=3) == Peaks(operations=1024 / 2.0, bandwidth=10.0)
    monkeypatch.setattr(Format, "unavailable", lambda *_, **__: "absent")
    assert latency.integer_peaks(PEAKS) is None


# --- models --------------------------------------------------------------------------------------------------------------


def test_models_are_timed_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of 2 x 9 tokens takes 0.01, 0.02 and 0.04 s: 900 tokens a second at the median, 1200 and 600 at the quartiles."""
    model = tiny.model(tmp_path, causal=False)
    models = linear_formats.convert_all(model, [DENSE, by_name("2:4"), by_name("structured 50 %")])
    times = {"dense": [0.02, 0.02, 0.08], "structured 50 %": [0.01, 0.02, 0.04]}
    clock = Clock(monkeypatch, lambda name, repeats: times[name][:repeats])
    table = latency.measure_models(models, batch=2, length=9, repeats=3).set_index("model")
    assert [names for names, _ in clock.rounds] == [["dense", "structured 50 %"]] * 2
    assert list(table.reset_index().columns) == list(latency.MODEL_COLUMNS) and list(table.index) == list(models)
    row = table.loc["structured 50 %"]
    assert row["speed_up"] == 2.0 and table.loc["dense", "speed_up"] == 1.0  # rounds say 2, 1 and 2
    assert tuple(row[list(latency.RATES[:3])]) == pytest.approx((900.0, 18 / 0.03, 18 / 0.015))
    assert row["weight_bytes"] == linear_formats.stored_bytes(cast(LanguageModel, models["structured 50 %"]).network)
    assert row["weight_bytes"] < table.loc["dense", "weight_bytes"] == model.num_parameters * 4
    left_out = table.loc["2:4"]
    assert left_out["not_run"] == "needs CUDA" and empty(left_out, [*latency.MEASURED, *latency.RATES])


def test_models_read_the_same_tokens_and_give_all_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny.model(tmp_path, causal=False), []
    found = model.network.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        outputs = found(*arguments, **options)
        assert outputs.logits.shape == (2, 9, tiny.VOCAB)
        return outputs

    monkeypatch.setattr(model.network, "forward", forward)
    latency.measure_models({"dense": model, "again": model}, batch=2, length=9, repeats=3)
    assert len(seen) > 6 and all(torch.equal(options["input_ids"], seen[0]["input_ids"]) for options in seen)
    assert all(options["use_cache"] is False and "output_attentions" not in options for options in seen)


def test_models_are_not_timed_while_attention_is_recorded(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=False)
    model.network.set_attn_implementation(masses.NAME)
    with pytest.raises(InputError, match="attention must not be recorded while timing, got dense"):
        latency.measure_models({"dense": model}, batch=1, length=4, repeats=3)


# --- the table for the search --------------------------------------------------------------------------------------------


def test_equal_shapes_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many key-value heads as heads q, k and v are alike; o is cut at its inputs; gate and up are alike."""
    model = tiny.model(tmp_path, causal=False, kv_heads=4)
    count = itertools.count(1)
    clock = Clock(monkeypatch, lambda name, repeats: [float(next(count))] * repeats)
    table = latency.latency_table(model, [*SOME, by_name("2:4")], rows=7, repeats=3)
    assert len(clock.rounds) == 2 * 4
    assert set(table) == {(layer.name, name) for layer in model.layers for name in CALLED}
    by_role = {(layer.block, layer.role): table[layer.name, "masked 50 %"] for layer in model.layers}
    for block in (0, 1):
        same = [{by_role[block, role] for role in roles} for roles in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))]
        assert [len(times) for times in same] == [1, 1, 1, 1] and len(set.union(*same)) == 4
    assert all(by_role[0, role] == by_role[1, role] for _, role in by_role)


def test_a_table_of_times_holds_medians_of_single_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(tmp_path, causal=False)
    Clock(monkeypatch, lambda name, repeats: [0.0005] * 2 if repeats == 2 else [0.006, 0.002, 0.1])
    table = latency.latency_table(model, [DENSE], rows=7, repeats=3)
    assert set(table.values()) == {0.003}  # 6 ms for 2 calls
    assert len({linear_formats.layer_shape(layer, shrink.head_shape(model)) for layer in model.layers}) == 5


# --- what cannot be used -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: measured({}), "must have shapes, formats and positive rows, got 0 shapes"),
        (lambda model: measured(formats=[]), "got 2 shapes, 0 formats"),
        (lambda model: measured(rows=()), r"rows \[\]"),
        (lambda model: measured(rows=(1, 0)), r"rows \[1, 0\]"),
        (lambda model: measured(repeats=2), "repeats must be at least 3, got 2"),
        (lambda model: latency.latency_table(model, [], rows=1, repeats=3), "formats and rows must be given, got 0 and 1"),
        (lambda model: latency.latency_table(model, SOME, rows=0, repeats=3), "got 3 and 0"),
        (lambda model: latency.measure_models({"a": model}, batch=1, length=2, repeats=3), "must include dense .*, got a"),
        (lambda model: latency.measure_models({"dense": "gone"}, batch=1, length=2, repeats=3), "include dense .*, got none"),
        (lambda model: latency.measure_models({"dense": model}, batch=0, length=2, repeats=3), "positive, got 0 and 2"),
        (lambda model: latency.measure_models({"dense": model}, batch=1, length=2, repeats=1), "repeats must be at least 3"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, call: Callable[[LanguageModel], object], words: str) -> None:
    model = tiny.model(tmp_path, causal=False)
    with pytest.raises(InputError, match=words):
        call(model)
