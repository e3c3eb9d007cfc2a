"""How long linear layers and whole models take in each weight format, against dense in the same rounds and the roofline.

A layer that is called again at once finds its weights in the caches, unless they are larger than these, so at few rows it can be
faster than its floor; in a model its turn comes after all others. Times of whole models say what is left of that.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from lib.attention import masses
from lib.core.errors import require
from lib.core.runtime import generator
from lib.models.language_model import LanguageModel
from lib.pruning import shrink
from lib.timing import linear_formats, roofline
from lib.timing.call_times import Timing, attempt, machine, median_interval, time_calls, willing
from lib.timing.clock import interleaved, speed_up
from lib.timing.format_support import LayerShape
from lib.timing.linear_formats import DENSE, Format
from lib.timing.roofline import LinearCase, Peaks

__all__ = ["integer_peaks", "latency_table", "machine", "measure_layers", "measure_models"]

ROWS = (1, 64, 512, 4096)
TIMES = ("seconds", "seconds_q1", "seconds_q3", "speed_up", "speed_up_q1", "speed_up_q3", "speed_up_low", "speed_up_high")
MEASURED = (*TIMES, "peak_memory", "inner")
COUNTED = ("weight_bytes", "bytes", "operations", "share", "floor_seconds", "binds", "achieved")
LAYER_COLUMNS = ("layer", "out_features", "in_features", "rows", "format", *MEASURED, *COUNTED, "repeats", "not_run")
RATES = ("tokens_per_second", "tokens_per_second_q1", "tokens_per_second_q3", "weight_bytes")
MODEL_COLUMNS = ("model", "batch", "length", *MEASURED, *RATES, "repeats", "not_run")


def measure_layers(
    shapes: Mapping[str, LayerShape],
    formats: Sequence[Format],
    *,
    rows: Sequence[int] = ROWS,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    peaks: Peaks,
    integer_peaks: Peaks | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Time linear layers in every format, in rounds that include the dense layer.

    Args:
        shapes: by the name of a role or layer.
        formats: what to time; dense is timed with them anyway, and is a row of the table where it is among them.
        rows: tokens at once.
        repeats: timed rounds, at least 3.
        device: where.
        dtype: of activations and dense weights.
        peaks: of the device in this dtype.
        integer_peaks: of formats that multiply integers, see `integer_peaks`; None leaves them without a floor.
        seed: of weights and activations.

    Returns:
        One row for each shape, number of rows and format: times of one call in seconds with their quartiles, speed-up over
        dense, bytes and operations, the roofline's floor, which side of it binds, and the floor's share of the median. A format
        that cannot run has its reason in `not_run` and NaN for numbers.

    Raises:
        InputError: nothing to measure, bad rows or repeats.
    """
    sound = bool(shapes) and bool(formats) and bool(rows) and min(rows) >= 1
    got = f"{len(shapes)} shapes, {len(formats)} formats and rows {list(rows)}"
    require(sound, "layers to time must have shapes, formats and positive rows", got, "give some of each")
    records = []
    for name, shape in shapes.items():
        modules, reasons = _built(shape, formats, device=device, dtype=dtype, seed=seed)
        for count in rows:
            times, refused = _timed(shape, modules, count, repeats=repeats, device=device, dtype=dtype, seed=seed)
            for form in formats:
                head = {"layer": name, "out_features": shape.out_features, "in_features": shape.in_features}
                head |= {"rows": count, "format": form.name, "repeats": repeats}
                if form.name not in times:
                    records.append({**head, "not_run": {**reasons, **refused}[form.name]})
                    continue
                ceiling = integer_peaks if form.integers else peaks
                numbers = _counted(form, shape, count, dtype=dtype, peaks=ceiling, seconds=times[form.name].median)
                records.append({**head, **_measured(times[form.name], times[DENSE.name]), **numbers, "not_run": ""})
    return pd.DataFrame(records, columns=list(LAYER_COLUMNS))


def measure_models(
    models: Mapping[str, LanguageModel | str], *, batch: int, length: int, repeats: int, baseline: str = "dense", seed: int = 0
) -> pd.DataFrame:
    """Time forward passes of whole models, logits at every position included and attention recording never.

    Args:
        models: by name, such as those of `linear_formats.convert_all`; a text is the reason why one cannot run.
        batch: texts at once.
        length: tokens of each.
        repeats: timed rounds, at least 3.
        baseline: name of the model that the others are compared with.
        seed: of the tokens, which are the same for all.

    Returns:
        One row for each model: times of one pass in seconds, speed-up over the baseline (median with quartiles, and the 95 %
        interval of the median, `speed_up_low` to `speed_up_high`), tokens a second, bytes of all weights,
        embeddings included. A model that cannot run has its reason in `not_run` and NaN for numbers.

    Raises:
        InputError: no baseline, models on several devices, or one whose attention is being recorded.
    """
    loaded = {name: model for name, model in models.items() if not isinstance(model, str)}
    _check_models(loaded, baseline, batch=batch, length=length)
    device, vocabulary = loaded[baseline].device, min(model.network.config.vocab_size for model in loaded.values())
    ids = torch.randint(vocabulary, (batch, length), generator=generator(seed, "latency", "tokens")).to(device)
    calls, refused = willing({name: _forward(model, ids) for name, model in loaded.items()}, baseline)
    times = time_calls(calls, repeats=repeats, device=device)
    records: list[dict[str, object]] = []
    for name, model in models.items():
        head = {"model": name, "batch": batch, "length": length, "repeats": repeats}
        if isinstance(model, str) or name in refused:
            records.append({**head, "not_run": refused.get(name, model)})
            continue
        row = _measured(times[name], times[baseline])
        rates = [batch * length / cast(float, row[column]) for column in ("seconds", "seconds_q3", "seconds_q1")]
        numbers = dict(zip(RATES, (*rates, float(linear_formats.stored_bytes(model.network))), strict=True))
        records.append({**head, **row, **numbers, "not_run": ""})
    return pd.DataFrame(records, columns=list(MODEL_COLUMNS))


def latency_table(
    model: LanguageModel, formats: Sequence[Format], *, rows: int, repeats: int, seed: int = 0
) -> dict[tuple[str, str], float]:
    """Measure what `search` chooses from: each distinct shape once, in the model's dtype and on its device.

    Args:
        model: whose layers.
        formats: what they can become.
        rows: tokens at once.
        repeats: timed rounds, at least 3.
        seed: of weights and activations.

    Returns:
        Median seconds by name of the layer and of the format; a format that cannot run for a layer is left out.
    """
    require(bool(formats) and rows >= 1, "formats and rows must be given", f"{len(formats)} and {rows}", "give some")
    heads, options = shrink.head_shape(model), {"device": model.device, "dtype": model.network.dtype, "seed": seed}
    shapes = {layer.name: linear_formats.layer_shape(layer, heads) for layer in model.layers}
    found = {}
    for shape in dict.fromkeys(shapes.values()):
        modules, _ = _built(shape, formats, **options)
        found[shape], _ = _timed(shape, modules, rows, repeats=repeats, **options)
    names = [form.name for form in formats]
    return {(layer, name): found[shape][name].median for layer, shape in shapes.items() for name in names if name in found[shape]}


def integer_peaks(peaks: Peaks, *, size: int = 2048, repeats: int = 10, seed: int = 0) -> Peaks | None:
    """Return the peaks of a CPU for products of 8-bit integers: operations a second of a large one, rounding of inputs included.

    Args:
        peaks: of the CPU, whose bandwidth is kept.
        size: rows, inputs and outputs.
        repeats: timed rounds.
        seed: of the numbers.

    Returns:
        The peaks; None where torch has no such product.
    """
    form, device = linear_formats.by_name("int8 dynamic"), torch.device("cpu")
    if form.unavailable(device) is not None:
        return None
    draw = generator(seed, "latency", "integers")
    module, inputs = form.build(torch.randn(size, size, generator=draw)), torch.randn(size, size, generator=draw)
    fastest = float(interleaved({"product": lambda: module(inputs)}, repeats=repeats)["product"].min())
    return Peaks(operations=2.0 * size**3 / fastest, bandwidth=peaks.bandwidth)


def _built(
    shape: LayerShape, formats: Sequence[Format], *, device: torch.device, dtype: torch.dtype, seed: int
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Build dense and the formats that can run around one weight, and say why the others cannot."""
    draw = generator(seed, "latency", shape.out_features, shape.in_features)
    weight = torch.randn(shape.out_features, shape.in_features, generator=draw).div(shape.in_features**0.5).to(device, dtype)
    modules, reasons = {DENSE.name: DENSE.build(weight, shape)}, {}
    for form in formats:
        reason = form.unavailable(device, dtype=dtype, shape=shape)
        if reason is None and form.name != DENSE.name:
            built = attempt(functools.partial(form.build, weight, shape))
            if isinstance(built, nn.Module):
                modules[form.name] = built
            else:
                reason = str(built)
        if reason is not None:
            reasons[form.name] = reason
    return modules, reasons


def _timed(
    shape: LayerShape,
    modules: Mapping[str, nn.Module],
    rows: int,
    *,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time one shape at one number of rows; narrower formats read the first of the inputs."""
    draw = generator(seed, "latency", "inputs", rows, shape.in_features)
    inputs, calls = torch.randn(rows, shape.in_features, generator=draw).to(device, dtype), {}
    for name, module in modules.items():
        width = linear_formats.by_name(name).left(shape).in_features
        calls[name] = functools.partial(module, inputs[:, :width].contiguous())
    able, refused = willing(calls, DENSE.name)
    return time_calls(able, repeats=repeats, device=device), refused


def _forward(model: LanguageModel, ids: Tensor) -> Callable[[], object]:
    network = cast(Any, model.network)
    return lambda: network(input_ids=ids, use_cache=False).logits


def _check_models(models: Mapping[str, LanguageModel], baseline: str, *, batch: int, length: int) -> None:
    """Refuse what would make times that cannot be compared."""
    require(baseline in models, f"models must include {baseline} to compare with", ", ".join(models) or "none", "add it")
    require(min(batch, length) >= 1, "batch and length must be positive", f"{batch} and {length}", "give some")
    devices = {str(model.device) for model in models.values()}
    require(len(devices) == 1, "models must be on one device", ", ".join(sorted(devices)), "move them")
    recorded = [name for name, model in models.items() if model.network.config._attn_implementation == masses.NAME]
    require(not recorded, "attention must not be recorded while timing", ", ".join(recorded), "leave `attention.recorded` first")


def _measured(timing: Timing, dense: Timing) -> dict[str, float]:
    """Return the columns that a clock gives."""
    low, high = (float(timing.seconds.quantile(share)) for share in (0.25, 0.75))
    faster = (*speed_up(dense.seconds, timing.seconds), *median_interval(dense.seconds / timing.seconds))
    return dict(zip(MEASURED, (timing.median, low, high, *faster, timing.peak_memory, timing.inner), strict=True))


def _counted(
    form: Format, shape: LayerShape, rows: int, *, dtype: torch.dtype, peaks: Peaks | None, seconds: float
) -> dict[str, float | str]:
    """Return the columns that follow from the shape, and the roofline's."""
    left, weight = form.left(shape), form.weight_bytes(shape, dtype=dtype)
    case = LinearCase(rows, left.in_features, left.out_features, weight, dtype.itemsize, kept=form.multiplications)
    floor = None if peaks is None else roofline.floor_of(case, peaks)
    least = (math.nan, "", math.nan) if floor is None else (floor.seconds, floor.binds, roofline.achieved_share(seconds, floor))
    return dict(zip(COUNTED, (weight, case.bytes, case.operations, form.share(shape), *least), strict=True))
