"""Where sink weights change a mask: overlap by layer and role, and the channels whose energy sits on sinks."""

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd
from jaxtyping import Bool
from scipy.stats import spearmanr
from torch import Tensor

from lib.calibration import one_shot
from lib.calibration.reads import statistics_of
from lib.calibration.statistics import CalibrationSet
from lib.core.errors import InputError
from lib.models.language_model import LinearLayer
from lib.pruning import pruner
from lib.pruning.methods import Method, Target
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Calibrations

Masks = Mapping[str, Bool[Tensor, "_out _in"]]


def keep_masks(found: Calibrations, method: Method, target: Target) -> dict[str, Bool[Tensor, "_out _in"]]:
    """Return the mask of every matrix that a method leaves, True = kept; the model stays as it is."""
    with pruner.restored(found.bench.model) as model:
        runs.prune_(found, method, target)
        return {layer.name: layer.module.weight != 0 for layer in model.layers}


def removed_overlap(first: Bool[Tensor, "out in"], second: Bool[Tensor, "out in"]) -> float:
    """Return the Jaccard overlap of what two masks remove: weights removed by both over weights removed by either.

    >>> import torch
    >>> removed_overlap(torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]]))
    0.5
    """
    either = int((~first | ~second).sum())
    return int((~first & ~second).sum()) / either if either else 1.0


def expected_overlap(sparsity: float) -> float:
    """Return the overlap of two unrelated masks of equal sparsity, s / (2 - s).

    >>> round(expected_overlap(0.5), 3)
    0.333
    """
    return sparsity / (2.0 - sparsity)


def overlap_table(found: Calibrations, first: Masks, second: Masks) -> pd.DataFrame:
    """Tabulate the overlap of two sets of masks by layer and role."""
    return pd.DataFrame([
        {**_place(layer), "jaccard": removed_overlap(first[layer.name], second[layer.name])}
        for layer in found.bench.model.layers
    ])  # fmt: skip


def channel_table(found: Calibrations, method: Method, target: Target) -> pd.DataFrame:
    """Tabulate what a sink weighting does to each input channel of each matrix.

    Args:
        found: calibrations of a model.
        method: a one-shot Wanda method with sink weights; its baseline is the same method without them.
        target: how much to remove.

    Returns:
        One row a (layer, role, channel): `share` of the channel's energy on sink tokens, in [0, 1]; `gone` and `back`, the
        weights of the channel that the weighting removes or brings back against the baseline, and `net` = gone - back, in per
        cent of the channel.

    Raises:
        InputError: a method without sink weights, or a sequential one.

    Source: a row only compares its own weights, so weights act only through channels whose energy is concentrated on sinks.
    """
    if method.weighting is None or method.weighting.kind != "sinks_down" or method.sequential:
        raise InputError("channels must be compared for a one-shot method with sink weights, got another: use the released one")
    plain = replace(method, weighting=None)
    weighted, kept = keep_masks(found, method, target), keep_masks(found, plain, target)
    everything = found.set_of(plain)
    on_sinks = 1.0 - _aggregate(found, method)
    energy = one_shot.dense_statistics(found.bench.model, everything)
    # a set must weigh something: without any sink everything is measured, and the share is 0
    some = bool((on_sinks > 0.5).any())
    counted = CalibrationSet(everything.input_ids, (on_sinks > 0.5).float() if some else None)
    sink_energy = one_shot.dense_statistics(found.bench.model, counted)
    rows = []
    for layer in found.bench.model.layers:
        total = statistics_of(energy[layer.block], layer.role, layer.expert).squares[0]
        share = statistics_of(sink_energy[layer.block], layer.role, layer.expert).squares[0] / total.clamp(min=1e-30) * some
        gone = (kept[layer.name] & ~weighted[layer.name]).float().mean(0)
        back = (~kept[layer.name] & weighted[layer.name]).float().mean(0)
        rows.append(pd.DataFrame({
            **_place(layer), "channel": range(len(share)), "share": share.tolist(),
            "gone": (100 * gone).tolist(), "back": (100 * back).tolist(), "net": (100 * (gone - back)).tolist(),
        }))  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def _place(layer: LinearLayer) -> dict[str, object]:
    """Return the columns that say which matrix it is; a model without experts has none of these."""
    own = {} if layer.expert is None else {"expert": layer.expert}
    return {"layer": layer.block, "role": layer.role, **own}


def _aggregate(found: Calibrations, method: Method) -> Tensor:
    """Return the weight of each token, averaged over layers and heads where they have their own."""
    weight = found.set_of(method).token_weight
    assert weight is not None
    return weight if weight.dim() == 2 else weight.mean(0) if weight.dim() == 3 else weight.mean((0, 2))


def rank_correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's correlation of a channel's energy on sinks with its net loss of weights, by model and role."""
    rows = []
    for model in table["model"].unique():
        for role in table["role"].unique():
            part = table[(table["model"] == model) & (table["role"] == role)]
            found = spearmanr(part["share"], part["net"])
            rows.append({"model": model, "role": role, "rank correlation": float(found.statistic)})  # type: ignore[attr-defined]
    return pd.DataFrame(rows, columns=pd.Index(["model", "role", "rank correlation"]))
