"""Prune a model in place with a method: from clean windows, on a calibration set, or with statistics of the dense model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lib.calibration import measured_weights, one_shot, sets
from lib.calibration import statistics as calibration
from lib.calibration.hidden_states import HiddenStates, States, check_states, waiting
from lib.calibration.reads import fell_back, ready, statistics_of
from lib.calibration.statistics import CalibrationSet
from lib.calibration.sums import InputStatistics
from lib.core.errors import InputError
from lib.core.runtime import generator as stream
from lib.models.language_model import LanguageModel, LinearLayer, Role
from lib.pruning import importances, matrices
from lib.pruning.methods import SINKS, Method, Target


def prune_(
    model: LanguageModel,
    method: Method,
    target: Target,
    *,
    windows: Int[Tensor, "window position"] | None = None,
    seed: int = 0,
    batch_size: int = 4,
    memory_budget: int | None = None,
    states: States = "device",
    by_role: bool = False,
    scratch: Path | str | None = None,
) -> tuple[str, ...]:
    """Prune every linear layer of a model in place, from clean calibration windows.

    The defaults are the fastest where memory allows; `states` and `by_role` save memory, and give the same weights bit for bit.
    Methods that read nothing, and those of one pass over the dense model, keep no states and no Hessian.

    Args:
        model: the dense model, streamed or not; its weights change.
        method: how.
        target: how much.
        windows: clean token windows, for Wanda and SparseGPT.
        seed: of noise, sampling and random choices.
        batch_size: samples at one time.
        memory_budget: bytes of layer inputs that one forward pass may keep, see `one_shot.one_shot_statistics`.
        states: where hidden states wait between blocks; elsewhere than on the device, one batch of them is there at a time.
        by_role: collect SparseGPT's Hessians one after another, each with a pass through the part of the block before it,
            instead of a block's four together.
        scratch: where to make a folder for states on disk, as many bytes as all of them and one batch (twice as many by role for
            a method that is not sequential); that of the system when None. It is removed at the end, also after an error.

    Returns:
        Names of the matrices of experts that used the statistics of their layer, because too few tokens went to the expert: none
        for norms, fewer than the matrix has input features for a Hessian.

    Raises:
        InputError: a target that does not fit, weights or activations that are not finite, calibration missing or too short,
            another place for states, or a scratch folder that is not there.
    """
    check_states(states)
    check(model, target)
    _check_unstructured(method)
    if not method.needs_calibration:
        for layer in model.layers:
            given = {"random": _random(layer, seed), "name": layer.name}
            _write_(layer, matrices.pruned(layer.module.weight.detach(), method, target, None, **given)[0])
        return ()
    if windows is None:
        raise InputError(f"{method.importance} must be given calibration windows, got none: pass windows")
    sets.check_windows(model, windows)
    if _is_one_pass(method):
        ids = sets.read(model, windows, method.inputs, seed=seed).flatten(0, 1)
        weigh = measured_weights.weigher(method.weighting or SINKS)
        found = one_shot.one_shot_statistics(model, ids, weigh, batch_size=batch_size, memory_budget=memory_budget)
        return prune_with_(model, method, target, found)
    given: dict[str, Any] = {"inputs": method.inputs, "weighting": method.weighting, "seed": seed, "batch_size": batch_size}
    with waiting(states, model.device, scratch) as place:  # before hours of work, should it be impossible
        built = sets.build(model, windows, **given)
        return prune_on_(model, method, target, built, batch_size=batch_size, states=place, by_role=by_role, seed=seed)


def _is_one_pass(method: Method) -> bool:
    """Tell whether token weights and weighted norms come from the same forward passes of the dense model."""
    weighting = method.weighting
    if weighting is None or weighting.over_levels or weighting.kind not in ("sinks_down", "sinks_up"):
        return False
    return method.importance == "wanda" and not method.sequential and not method.needs_hessian


def prune_on_(
    model: LanguageModel,
    method: Method,
    target: Target,
    calibration_set: CalibrationSet,
    *,
    batch_size: int = 4,
    states: HiddenStates | None = None,
    by_role: bool = False,
    seed: int = 0,
) -> tuple[str, ...]:
    """Prune in place with a calibration set that is already noised and weighted as the method says.

    Args:
        model: the dense model; its weights change.
        method: how.
        target: how much.
        calibration_set: what is read, and the token weights.
        batch_size: samples at one time.
        states: where hidden states wait between blocks; on the device when None.
        by_role: one Hessian at a time, see `prune_`.
        seed: of random choices.

    Returns:
        Names of the matrices that used the statistics of their layer, see `prune_`.

    Raises:
        InputError: as `prune_`; or a set whose token weights contradict the method.
    """
    check(model, target)
    _check_reads(method)
    if (method.weighting is None) != (calibration_set.token_weight is None):
        wanted, got = ("no", "some") if method.weighting is None else ("some", "none")
        raise InputError(
            f"the calibration set must have {wanted} token weights for this method, got {got}: build it for the method"
        )
    fallen: list[str] = []
    calibration.stream(
        model,
        calibration_set,
        lambda block, found: fallen.extend(prune_block_(model, block, method, target, found, seed=seed)),
        hessian=method.needs_hessian,
        sequential=method.sequential,
        batch_size=batch_size,
        states=states,
        by_role=by_role,
    )
    return tuple(fallen)


def prune_with_(
    model: LanguageModel,
    method: Method,
    target: Target,
    found: Sequence[Mapping[Role, InputStatistics]],
    *,
    errors_of: Sequence[Mapping[Role, InputStatistics]] | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """Prune in place with statistics of the dense model, by block; they serve any number of targets.

    Args:
        model: the dense model; its weights change.
        method: how.
        target: how much.
        found: statistics by block.
        errors_of: others, with Hessians, that swaps and refit measure errors with, see `matrices.pruned`.
        seed: of random choices.

    Returns:
        Names of the matrices that used the statistics of their layer, see `prune_`.

    Raises:
        InputError: as `prune_`; or a sequential method, whose statistics change with the target.
    """
    check(model, target)
    _check_reads(method)
    blocks = 1 + model.layers[-1].block
    if len(found) != blocks:
        raise InputError(f"statistics must be those of all {blocks} blocks, got {len(found)}: collect them on this model")
    if method.sequential:
        raise InputError("statistics of the dense model must go with a one-shot method, got a sequential one: use prune_on_")
    fallen: list[str] = []
    for block, statistics in enumerate(found):
        others = None if errors_of is None else errors_of[block]
        fallen += prune_block_(model, block, method, target, statistics, errors_of=others, seed=seed)
    return tuple(fallen)


def exact_target(model: LanguageModel, sparsity: float) -> Target:
    """Return the target that removes round(sparsity x size) weights of every matrix, also where rows cannot lose equally many."""
    importances.check_sparsity(sparsity)
    return Target(sparsity, removed={layer.name: round(sparsity * layer.module.weight.numel()) for layer in model.layers})


def _check_unstructured(method: Method) -> None:
    if method.is_structured:
        raise InputError(f"a method of structured pruning must go with shrink, got {method.importance}: change it")


def _check_reads(method: Method) -> None:
    _check_unstructured(method)
    if not method.needs_calibration:
        raise InputError(f"a method given a calibration must be one that reads it, got {method.importance}: use prune_")


def check(model: LanguageModel, target: Target) -> None:
    """Refuse, before any work, what would fail in some layer.

    Raises:
        InputError: weights that are not finite, a pattern that does not divide a layer, or numbers for other layers.
    """
    if not model.layers:
        raise InputError(f"a model must have linear layers to prune, got none in {model.name}: check its layer table")
    for layer in model.layers:
        importances.parse_pattern(target.pattern, sparsity=target.sparsity, width=layer.module.in_features)
        importances.check_finite(layer.module.weight, name=layer.name, what="weights")
    if target.removed is None:
        return
    names = {layer.name for layer in model.layers}
    if set(target.removed) != names:
        raise InputError(
            f"exact numbers must name all {len(names)} layers, got {len(set(target.removed) & names)}: complete them"
        )
    for layer in model.layers:
        importances.check_removed(target.removed[layer.name], layer.module.weight.numel(), name=layer.name)


@contextmanager
def restored(model: LanguageModel) -> Iterator[LanguageModel]:
    """Lend a model whose weights may change, and put the old ones back at the end."""
    before = [layer.module.weight.detach().clone() for layer in model.layers]
    try:
        yield model
    finally:
        for layer, weight in zip(model.layers, before, strict=True):
            _write_(layer, weight)


def measured_sparsity(model: LanguageModel) -> float:
    """Return the share of exact zeros in all linear layers together."""
    zeros = sum(int((layer.module.weight == 0).sum()) for layer in model.layers)
    return zeros / sum(layer.module.weight.numel() for layer in model.layers)


def prune_block_(
    model: LanguageModel,
    block: int,
    method: Method,
    target: Target,
    found: Mapping[Role, InputStatistics],
    *,
    errors_of: Mapping[Role, InputStatistics] | None = None,
    seed: int = 0,
) -> list[str]:
    """Prune in place the layers of a block whose statistics are there: some methods need a Hessian, others norms.

    Args:
        model: whose block.
        block: its index.
        method: how.
        target: how much.
        found: the block's statistics by reading role, all or some of them.
        errors_of: others, with Hessians, that swaps and refit measure errors with.
        seed: of random choices.

    Returns:
        Names of the matrices pruned now that used the statistics of their layer, see `prune_`.

    Raises:
        InputError: inputs that are not finite, also of a layer that waits for its Hessian; or what a method refuses.
    """
    layers = ready(model, block, found)
    for layer in layers:
        importances.check_finite(statistics_of(found, layer.role, layer.expert).squares, name=layer.name, what="inputs")
    with_hessian = ready(model, block, found, hessian=True)
    chosen = with_hessian if method.needs_hessian and with_hessian else layers  # norms alone are refused by `hessian`
    used = [found] if errors_of is None or not method.repairs else [found, errors_of]
    fallen = [layer.name for layer in chosen if any(fell_back(each, layer) for each in used)]
    for layer in chosen:
        own, *others = [statistics_of(each, layer.role, layer.expert) for each in used]
        given = {"errors_of": others[0] if others else None, "random": _random(layer, seed), "seed": seed}
        _write_(layer, matrices.pruned(layer.module.weight.detach(), method, target, own, **given, name=layer.name)[0])
    return fallen


def _random(layer: LinearLayer, seed: int) -> torch.Generator:
    """Return a matrix's own stream, so that its random mask is the same whatever is read or done for it."""
    return stream(seed, "pruning", layer.name)


@torch.no_grad()
def _write_(layer: LinearLayer, weight: Tensor) -> None:
    layer.module.weight.copy_(weight)
