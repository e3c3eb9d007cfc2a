"""Tables of hardware-aware allocation: one row a unit and format, and one row a budget and strategy."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.studies.joint import configurations
from lib.studies.joint.configurations import Prepared
from lib.studies.joint.hardware_aware import Tried
from lib.studies.joint.measured_formats import Offer, Sensitivity
from lib.timing import clock

QUARTILES = (0.25, 0.5, 0.75)
NOTHING = (math.nan,) * 3


def sensitivity_table(
    prepared: Prepared, sensitivities: Sequence[Sensitivity], seconds: Mapping[Offer, float], sizes: Mapping[Offer, int]
) -> pd.DataFrame:
    """Tabulate what every unit costs and loses in every format.

    Args:
        prepared: a model's layers in all formats.
        sensitivities: increases of the loss.
        seconds: of the same units and formats.
        sizes: of the same, in bytes.

    Returns:
        Columns `model`, `layer` (the block's number), `role` (`attention` or `MLP` for a whole unit), `format`, `increase` in
        nats per token, its paired standard error `se`, `seconds` and `bytes`.
    """
    model = prepared.model
    places = {(layer.name,): (layer.block, layer.role) for layer in model.layers} | configurations.units(model)
    return pd.DataFrame([
        {
            "model": model.name, "layer": places[row.layers][0], "role": places[row.layers][1], "format": row.format,
            "increase": row.mean, "se": row.standard_error, "seconds": seconds[row.layers, row.format],
            "bytes": sizes[row.layers, row.format],
        }
        for row in sensitivities
    ])  # fmt: skip


def allocation_table(tried: Sequence[Tried]) -> pd.DataFrame:
    """Tabulate predictions and measurements of every budget and strategy.

    Args:
        tried: of `compare_allocations`.

    Returns:
        `predicted` and `measured` increases of the loss in nats per token (the latter with its paired 95 % interval `low`,
        `high`; `predicted, unfloored` counts negative losses as they are); predicted `seconds` and `bytes` of the linear layers
        and their shares of dense; `forward` of the whole model in seconds, with quartiles, `forward, predicted` (dense plus the
        predicted difference), and the speed-up over dense in the same rounds; how many layers have which format; the reason
        where nothing fits. NaN where nothing was measured.
    """
    return pd.DataFrame([_row(each) for each in tried])


def _row(tried: Tried) -> dict[str, object]:
    """Return one row; its keys are the same for all."""
    found, dense = tried.allocation, tried.dense
    seconds, size = (found.seconds, found.bytes) if found else (math.nan, math.nan)
    low, middle, high = NOTHING if tried.forward is None else _quartiles(tried.forward)
    base = math.nan if tried.dense_forward is None else _quartiles(tried.dense_forward)[1]
    gain, slowest, fastest = NOTHING
    if tried.forward is not None and tried.dense_forward is not None:
        gain, slowest, fastest = clock.speed_up(tried.dense_forward, tried.forward)
    interval = tried.increase.interval if tried.increase else NOTHING[:2]
    counts = Counter(found.formats.values()) if found else Counter()
    return {
        "model": tried.model, "budget": tried.budget.name, "strategy": tried.strategy,
        "predicted": found.loss if found else math.nan, "predicted, unfloored": tried.as_measured,
        "measured": tried.increase.estimate if tried.increase else math.nan, "low": interval[0], "high": interval[1],
        "seconds": seconds, "share of seconds": seconds / dense.seconds if dense.seconds else math.nan,
        "bytes": size, "share of bytes": size / dense.bytes,
        "forward": middle, "forward, first quartile": low, "forward, third quartile": high,
        "forward, predicted": base + seconds - dense.seconds,
        "speed-up": gain, "speed-up, first quartile": slowest, "speed-up, third quartile": fastest,
        "formats": ", ".join(f"{count} {name}" for name, count in counts.most_common()), "reason": tried.reason,
    }  # fmt: skip


def _quartiles(seconds: Float[Tensor, "repeat"]) -> tuple[float, float, float]:
    low, middle, high = torch.quantile(seconds, torch.tensor(QUARTILES, dtype=seconds.dtype)).tolist()
    return low, middle, high
