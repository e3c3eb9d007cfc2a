"""Is it the mask or the repair that counts, and do sinks matter to either: four masks, each with four repairs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lib.calibration.reads import fell_back, statistics_of
from lib.calibration.sets import CLEAN, NOISED, Inputs
from lib.calibration.sums import InputStatistics
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.core.runtime import progress
from lib.evaluation.paired import PairedDifference
from lib.models.language_model import LanguageModel, Role
from lib.pruning import importances, matrices, pruner
from lib.pruning import repairs as ways
from lib.pruning.methods import REPAIRS, SINKS, Method, Target, without_noise
from lib.studies.pruning import pairs, runs
from lib.studies.pruning.runs import Bench, Calibrations, Outcome
from lib.studies.pruning.tables import Weights, loss_columns
from lib.timing.effort import watched

ALONE = "mask alone"
SINK, RIVAL, CONTROL, WANDA = "sink-weighted Wanda", "noised Wanda", "random-position-weighted Wanda", "Wanda"
CLEAN_RIVAL = "Wanda, sum of norms"  # the rival of an autoregressive model, which reads clean text
MASKS = (WANDA, RIVAL, CLEAN_RIVAL, SINK, CONTROL)
ALPS = "ALPS"  # finds mask and weights together: one row without a repair
ITS_OWN = "its own"
Statistics = Sequence[Mapping[Role, InputStatistics]]


def masks(model: LanguageModel, *, noised: Inputs = NOISED) -> dict[str, Method]:
    """Return the four masks: what ranks the weights, all one-shot, so that one pass over the dense model serves every repair.

    Args:
        model: whose text is clean when it is autoregressive; then there is no noised one.
        noised: how text is noised; it is the same for the three that read it, which differ in their token weights alone.
    """
    plain = Method("wanda", noised, sequential=False, aggregate="sum_of_norms")
    found = {
        WANDA: Method("wanda", sequential=False),
        RIVAL: plain,
        SINK: replace(plain, weighting=SINKS),
        CONTROL: replace(plain, weighting=Weighting("random")),
    }
    if not model.is_causal:
        return found
    del found[WANDA]  # without noise it is the rival but for how norms are added up
    return {CLEAN_RIVAL if name == RIVAL else name: without_noise(method) for name, method in found.items()}


def name_of(mask: str, repair: str) -> str:
    """Return the name of a mask with a repair.

    >>> name_of("Wanda", "swaps, refit"), name_of("Wanda", "mask alone")
    ('Wanda + swaps, refit', 'Wanda')
    """
    return mask if repair == ALONE else f"{mask} + {repair}"


def measure(
    bench: Bench,
    target: Target,
    *,
    seeds: Sequence[int],
    noised: Inputs = NOISED,
    repairs: Sequence[str] = tuple(REPAIRS),
    swaps: int = ways.SWAPS,
) -> list[Outcome]:
    """Measure every mask with every repair, with every calibration seed.

    All masks are repaired alike: errors are those of the same text without token weights (noised for a diffusion model), so that
    a mask's token weights act on which weights go and on nothing else.

    Args:
        bench: model, calibration pool, held-out windows.
        target: what is removed, the same for all.
        seeds: calibration seeds; a seed draws the same windows and the same noise for every mask.
        noised: how text is noised where it is.
        repairs: names of `methods.REPAIRS`.
        swaps: of every row at most.

    Returns:
        Outcomes named by `name_of`; their peak memory is that of all cells together.

    Raises:
        InputError: another repair, or a target that does not fit.
    """
    unknown = sorted(set(repairs) - REPAIRS.keys())
    if unknown:
        raise InputError(f"repairs must be of {', '.join(REPAIRS)}, got {', '.join(unknown)}: choose among them")
    pruner.check(bench.model, target)
    chosen, outcomes = masks(bench.model, noised=noised), []
    for seed in seeds:
        found = Calibrations(bench, seed)
        found.prepare(chosen.values())
        errors_of = found.hessians_of(CLEAN if bench.model.is_causal else noised)
        ranked, spent = [found.statistics_of(method) for method in chosen.values()], dict[tuple[int, str], float]()
        given: dict[str, Any] = {"repairs": repairs, "swaps": swaps, "spent": spent}
        work = partial(repaired, bench.model, list(chosen.values()), target, ranked, errors_of, **given)
        weights, together = watched(work, device=bench.model.device)
        cells = [(index, repair) for index in range(len(chosen)) for repair in repairs]
        for index, repair in progress(cells, desc=f"{bench.model.name}, repairs"):
            with pruner.restored(bench.model) as model:
                for layer, weight in zip(model.layers, weights[index][repair], strict=True):
                    layer.module.weight.data.copy_(weight)
                measured = runs.outcome(found.bench, name_of(list(chosen)[index], repair), target, seed=seed)
                used = (ranked[index],) if repair == ALONE else (ranked[index], errors_of)
                took = replace(together, seconds=spent[index, repair])
                outcomes.append(replace(measured, fallbacks=_fallbacks(model, used), effort=took))
    return outcomes


def repaired(
    model: LanguageModel,
    ranking: Sequence[Method],
    target: Target,
    found: Sequence[Statistics],
    errors_of: Statistics,
    *,
    repairs: Sequence[str] = tuple(REPAIRS),
    swaps: int = ways.SWAPS,
    spent: dict[tuple[int, str], float] | None = None,
) -> list[dict[str, list[Tensor]]]:
    """Return the weights of every layer, by method and repair; what they share is done once.

    Args:
        model: the dense model, left as it is.
        ranking: what ranks the weights, methods without a repair of their own.
        target: how much goes.
        found: statistics that each method ranks with.
        errors_of: statistics with Hessians that repairs measure errors with.
        repairs: names of `methods.REPAIRS`.
        swaps: of every row at most.
        spent: gets the seconds of every method and repair; what several share counts for each, refits in equal parts.
    """
    results: list[dict[str, list[Tensor]]] = [{repair: [] for repair in repairs} for _ in ranking]
    spent = {} if spent is None else spent
    for layer in model.layers:
        weight = layer.module.weight.detach()
        hessian = statistics_of(errors_of[layer.block], layer.role, layer.expert).hessian()
        masks: dict[tuple[int, bool], Tensor] = {}
        seconds: dict[tuple[int, bool], float] = {}
        for index, (method, ranked) in enumerate(zip(ranking, found, strict=True)):
            own, began = statistics_of(ranked[layer.block], layer.role, layer.expert), time.perf_counter()
            masks[index, False] = matrices.pruned(weight, method, target, own, name=layer.name)[1]
            seconds[index, False] = time.perf_counter() - began
            if any(REPAIRS[repair]["swaps"] for repair in repairs):
                masks[index, True] = ways.swap(weight, masks[index, False], hessian, swaps=swaps, pattern=target.pattern)
                seconds[index, True] = time.perf_counter() - began
        wanted = {bool(REPAIRS[repair]["swaps"]) for repair in repairs if REPAIRS[repair]["repair"] == "refit"}
        keys, began = [key for key in masks if key[1] in wanted], time.perf_counter()
        stacked = torch.stack([masks[key] for key in keys]) if keys else None
        solved = {} if stacked is None else dict(zip(keys, ways.refits(weight, stacked, hessian, name=layer.name), strict=True))
        share = (time.perf_counter() - began) / max(1, len(keys))
        for index, repair in product(range(len(ranking)), repairs):
            key, refits = (index, bool(REPAIRS[repair]["swaps"])), REPAIRS[repair]["repair"] == "refit"
            results[index][repair].append(solved[key] if refits else importances.prune(weight, masks[key]))
            spent[index, repair] = spent.get((index, repair), 0.0) + seconds[key] + share * refits
    return results


def _fallbacks(model: LanguageModel, used: Sequence[Statistics]) -> int:
    """Count the matrices of experts that used the statistics of their layer, to rank weights or to repair."""
    return sum(any(fell_back(each[layer.block], layer) for each in used) for layer in model.layers)


def loss_table(outcomes: Sequence[Outcome], *, seed: int, weights: Weights | None = None) -> pd.DataFrame:
    """Tabulate the increase of the loss over the dense model, with its interval, of every mask and repair.

    Args:
        outcomes: from `measure`, and the dense model's.
        seed: of the bootstrap.
        weights: as `tables.loss_table` takes them.
    """
    rows = []
    for model, mask, repair, sparsity, pattern in _cells(outcomes):
        condition = (model, mask if mask == ALPS else name_of(mask, repair), pattern, sparsity)
        rows.append({
            "model": model, "sparsity": sparsity, "pattern": pattern, "mask": mask, "repair": repair,
            **loss_columns(outcomes, condition, seed=seed, weights=weights),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=None if rows else pd.Index(["model", "mask", "repair"]))


def gain_table(outcomes: Sequence[Outcome], *, seed: int) -> pd.DataFrame:
    """Tabulate by how much sink weights lower the loss behind each repair: against no weights, and against random positions.

    The nearest rival is the same mask without token weights; the control takes as many positions out, but others. If sinks say
    which weights matter, both are beaten behind some repair.

    Args:
        outcomes: from `measure`.
        seed: of the bootstrap.

    Returns:
        One row a model, target, repair and rival: the gain in nats per token (positive when sink weights are better), its
        interval, and p-values adjusted over all rows.
    """
    others = [(other, repair) for repair in REPAIRS for other in (RIVAL, CLEAN_RIVAL, CONTROL, WANDA)]
    named = [(name_of(SINK, repair), name_of(other, repair)) for other, repair in others]
    controls = [name_of(CONTROL, repair) for repair in REPAIRS]
    return pairs.pairs_table(outcomes, named, seed=seed, controls=controls)


def repair_table(outcomes: Sequence[Outcome], *, seed: int) -> pd.DataFrame:
    """Tabulate by how much every repair lowers the loss of each mask, over the mask alone; and ALPS, over all of both repairs."""
    named = [(name_of(mask, repair), mask) for mask in MASKS for repair in REPAIRS if repair != ALONE]
    named += [(ALPS, name_of(mask, "swaps, refit")) for mask in MASKS]
    return pairs.pairs_table(outcomes, named, seed=seed, controls=MASKS)


def weaker_gain(outcomes: Sequence[Outcome], *, model: str, repair: str, seed: int) -> PairedDifference:
    """Return the weaker of the two gains of sink weights behind a repair: over no weights, and over random positions.

    Both must be positive for sinks to say which weights matter, so the larger of both p-values is the p-value.

    Args:
        outcomes: from `measure`, of one target.
        model: its name.
        repair: of `methods.REPAIRS`.
        seed: of the bootstrap.
    """
    own = [found for found in outcomes if found.model == model]
    named = [(name_of(SINK, repair), name_of(other, repair)) for other in (RIVAL, CLEAN_RIVAL, CONTROL)]
    return pairs.weakest([found.result for found in pairs.compared(own, named, seed=seed)])


def _cells(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str, float, str]]:
    """List (model, mask, repair, sparsity, pattern) of what was measured, once each."""
    named = {name_of(mask, repair): (mask, repair) for mask in MASKS for repair in REPAIRS}
    named[ALPS] = (ALPS, ITS_OWN)
    measured = [found for found in outcomes if found.method in named]
    return list(dict.fromkeys((found.model, *named[found.method], found.sparsity, found.pattern) for found in measured))
