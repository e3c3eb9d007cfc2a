"""Prune, measure, restore: the loss of many compressed models on the same windows and the same masks."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.core.runtime import progress
from lib.models.language_model import LanguageModel, linear_layers, network_body
from lib.pruning import expert_removal, pruner, shrink
from lib.pruning.importances import UNSTRUCTURED
from lib.pruning.methods import Method, Target
from lib.studies.pruning.bench import READERS, Bench, Calibrations, uses_dense_statistics
from lib.studies.variance.sink_effect import text_loss
from lib.timing import clock
from lib.timing.effort import Effort, watched

DENSE, STRUCTURED = "dense", "structured"
TIMED_WINDOWS = 4
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Outcome:
    """One compressed model, measured.

    Attributes:
        model: its name.
        method: what was done.
        sparsity: asked for.
        pattern: `"unstructured"`, `"N:M"` or `"structured"`.
        seed: of the calibration.
        measured_sparsity: share of the linear layers' weights that are gone.
        loss: NELBO, or exact negative log-likelihood, of each held-out window in nats per token.
        fallbacks: matrices of experts that used the statistics of their layer, see `pruner.prune_`.
        effort: of pruning, without what methods share: text, token weights, and passes over the dense model; but see
            `with_token_weights`.
    """

    model: str
    method: str
    sparsity: float
    pattern: str
    seed: int
    measured_sparsity: float
    loss: Float[Tensor, "window"] = field(repr=False)
    fallbacks: int = 0
    effort: Effort = Effort()  # noqa: RUF009 - frozen


def held_out(windows: Int[Tensor, "held_out position"], *, count: int) -> Int[Tensor, "window position"]:
    """Return the first held-out windows.

    Raises:
        InputError: there are fewer than asked for.
    """
    if not 2 <= count <= len(windows):
        raise InputError(f"held-out windows must be in [2, {len(windows)}] (those there are), got {count}: lower windows")
    return windows[:count]


def loss(bench: Bench, model: LanguageModel | None = None) -> Float[Tensor, "window"]:
    """Return the loss of a variant of the model (the dense one when None) on the held-out windows, in nats per token."""
    return text_loss(model or bench.model, bench.windows, draws=bench.draws, seed=bench.seed)


def dense(bench: Bench) -> Outcome:
    """Measure the model as it is."""
    return Outcome(bench.model.name, DENSE, 0.0, UNSTRUCTURED, 0, 0.0, loss(bench))


def dense_of(bench: Bench, seeds: Sequence[int]) -> list[Outcome]:
    """Measure the model as it is under the masks of every calibration; once where all have the same."""
    return [replace(dense(bench.of_calibration(seed)), seed=seed) for seed in (seeds if bench.masks_differ else seeds[:1])]


def prune_(found: Calibrations, method: Method, target: Target) -> tuple[str, ...]:
    """Prune the bench's model in place, with calibrations that other methods share; the result is that of `pruner.prune_`."""
    model, batch = found.bench.model, found.bench.batch_size
    if not method.needs_calibration:
        return pruner.prune_(model, method, target, seed=found.seed)
    if uses_dense_statistics(method):
        return pruner.prune_with_(model, method, target, found.statistics_of(method))
    return pruner.prune_on_(model, method, target, found.set_of(method), batch_size=batch, seed=found.seed)


def seeds_that_matter(method: Method, seeds: Sequence[int], *, masks_differ: bool = False) -> Sequence[int]:
    """Return the seeds of a method: one for magnitude alone, which draws nothing, where all are measured under the same masks."""
    draws_nothing = method.importance == "magnitude" and not method.needs_calibration
    return seeds[:1] if draws_nothing and not masks_differ else seeds


def compare(
    bench: Bench,
    chosen: Mapping[str, Method],
    targets: Sequence[Target],
    *,
    seeds: Sequence[int],
) -> list[Outcome]:
    """Measure every method at every target with every calibration seed.

    Args:
        bench: model, calibration pool, held-out windows.
        chosen: methods by the name that tables show.
        targets: sparsities and patterns.
        seeds: calibration seeds; each draws other windows, other noise and other random choices.

    Returns:
        Outcomes, one a (seed, method, target).
    """
    outcomes = []
    of_each = {name: seeds_that_matter(method, seeds, masks_differ=bench.masks_differ) for name, method in chosen.items()}
    work = [(seed, name) for seed in seeds for name in chosen if seed in of_each[name]]
    calibrations: dict[int, Calibrations] = {}
    for seed, name in progress(work, desc=bench.model.name):
        if seed not in calibrations:
            calibrations = {seed: Calibrations(bench, seed)}  # of one seed at a time
            calibrations[seed].prepare(chosen.values())
        found = calibrations[seed]
        for target in targets:
            outcomes.append(measured(found, name, chosen[name], target))
    return outcomes


def with_token_weights(bench: Bench, outcomes: Sequence[Outcome], chosen: Mapping[str, Method]) -> list[Outcome]:
    """Count in the effort of outcomes what their token weights take, which is where methods that differ in these alone differ.

    Args:
        bench: of the outcomes; its model must be dense.
        outcomes: of methods that read text.
        chosen: those methods by name.

    Returns:
        The outcomes, their effort preceded by that of making text and token weights, which nothing is shared with.
    """
    found = []
    for each in progress(outcomes, desc=f"{bench.model.name}, token weights"):
        work = partial(Calibrations(bench, each.seed).set_of, chosen[each.method])
        _, took = watched(work, device=bench.model.device)
        found.append(replace(each, effort=took.then(each.effort)))
    return found


def measured(found: Calibrations, name: str, method: Method, target: Target) -> Outcome:
    """Prune, measure and restore one model with calibrations that are already there."""
    found.share(method)
    with pruner.restored(found.bench.model) as model:
        fallen, took = watched(partial(prune_, found, method, target), device=model.device)
        return replace(outcome(found.bench, name, target, seed=found.seed), fallbacks=len(fallen), effort=took)


def outcome(bench: Bench, name: str, target: Target, *, seed: int) -> Outcome:
    """Measure the bench's model as it now is."""
    gone = pruner.measured_sparsity(bench.model)
    return Outcome(bench.model.name, name, target.sparsity, target.pattern, seed, gone, loss(bench))


def while_pruned(
    bench: Bench,
    conditions: Mapping[tuple[str, float], Method | None],
    measure: Callable[[LanguageModel], Measured],
    *,
    seed: int,
    target: Callable[[float], Target] = Target,
) -> dict[tuple[str, float], Measured]:
    """Measure something else than the loss, such as answers to tasks, under some conditions.

    Args:
        bench: model and calibration pool.
        conditions: methods by (name, sparsity); None leaves the model as it is.
        measure: called with the pruned model.
        seed: of the calibration.
        target: what a sparsity removes; of every row the whole part of it by default, so that methods which compare inside rows
            remove a little less than others, see `pruner.exact_target`.

    Returns:
        What was measured, by (name, sparsity).
    """
    found, results = Calibrations(bench, seed), {}
    found.prepare(method for method in conditions.values() if method is not None)
    for (name, sparsity), method in progress(conditions.items(), desc=f"{bench.model.name}, tasks"):
        with pruner.restored(bench.model):
            if method is not None:
                prune_(found, method, target(sparsity))
            results[name, sparsity] = measure(bench.model)
    return results


def pruned_copy(found: Calibrations, method: Method, target: Target) -> LanguageModel:
    """Return a pruned copy of the bench's model; the tensors outside of the pruned matrices are shared."""
    with pruner.restored(found.bench.model) as model:
        prune_(found, method, target)
        own = {id(layer.module.weight) for layer in model.layers}
        shared = {id(tensor): tensor for tensor in model.network.parameters() if id(tensor) not in own}
        network = copy.deepcopy(model.network, shared)
    return replace(model, network=network, layers=linear_layers(network), fingerprint="")


def structured(bench: Bench, chosen: Mapping[str, Method], sparsities: Sequence[float], *, seeds: Sequence[int]) -> list[Outcome]:
    """Measure models from which whole key-value groups and MLP channels were cut out.

    Args:
        bench: model, calibration pool, held-out windows.
        chosen: Wanda methods (their inputs and token weights weigh the norms) or magnitude, by the name that tables show.
        sparsities: shares of groups and channels to remove.
        seeds: calibration seeds.

    Returns:
        Outcomes with pattern `"structured"`, without those that `refusals` names.
    """
    outcomes, left_out = [], refusals(bench.model, chosen, sparsities)
    for seed in seeds:
        found = Calibrations(bench, seed)
        for name, method in chosen.items():
            asked = sparsities if seed in seeds_that_matter(method, seeds, masks_differ=bench.masks_differ) else ()
            for sparsity in (each for each in asked if (name, each) not in left_out):
                found.share(method)
                if method.repair == "refit":
                    found.hessians_of(method.inputs)
                small, took = watched(partial(shrunk, found, method, sparsity=sparsity), device=bench.model.device)
                gone = 1.0 - _weights(small) / _weights(bench.model)
                lost = loss(found.bench, small)
                outcomes.append(Outcome(bench.model.name, name, sparsity, STRUCTURED, seed, gone, lost, effort=took))
    return outcomes


def refusals(model: LanguageModel, chosen: Mapping[str, Method], sparsities: Sequence[float]) -> dict[tuple[str, float], str]:
    """Return why methods cannot cut a model, by name and share; those that can are not there."""
    found = {}
    for name, method in chosen.items():
        for sparsity in sparsities:
            why_not = expert_removal.refusal(model, method, sparsity=sparsity)
            why_not = why_not or (None if model.has_experts else shrink.refusal(model))
            why_not = why_not or (shrink.bias_refusal(model.network.config) if method.bias else None)
            found |= {(name, sparsity): why_not} if why_not else {}
    return found


def shrunk(found: Calibrations, method: Method, *, sparsity: float) -> LanguageModel:
    """Return the smaller model that a method leaves, of a mixture without whole experts; the bench's model stays as it is.

    Args:
        found: calibrations of a model.
        method: by magnitude, one-shot Wanda or fluctuation. A refit solves for `o` and `down` anew, with the Hessian of the
            method's text without token weights, about the mean where there is a bias, which makes up for the mean that is lost.
        sparsity: share of groups and channels to remove.

    Raises:
        InputError: a method whose ranking of groups and channels is not defined here, or swaps.
    """
    known = method.importance in ("magnitude", "fluctuation") or (method.importance == "wanda" and not method.sequential)
    if not known or method.swaps:
        order = "sequential" if method.sequential else "one-shot"
        got = f"{order} {method.importance} with {method.swaps} swaps" if method.swaps else f"{order} {method.importance}"
        raise InputError(f"structured pruning must be by magnitude or one-shot Wanda, got {got}: change it")
    model, norms, moments = found.bench.model, None, {}
    if model.has_experts:
        return expert_removal.by_routed_mass(model, method, found.set_of(method), sparsity=sparsity)
    if method.importance == "fluctuation" or method.bias:
        moments = found.moments_of(method.inputs)
    if method.importance == "fluctuation":
        norms = {place: each.deviation.float() for place, each in moments.items()}
    elif method.importance == "wanda":
        statistics = found.statistics_of(method)
        norms = {
            (block, role): of_block[role].input_norm(method.aggregate)[0]
            for block, of_block in enumerate(statistics)
            for role in READERS
        }
    chosen = shrink.choose(model, sparsity=sparsity, input_norms=norms)
    means = {place: each.mean for place, each in moments.items()} if method.bias else None
    hessians = found.reader_hessians(method.inputs, means) if method.repair == "refit" else None
    if means is None and hessians is None:
        return shrink.shrunk(model, *chosen)
    replaced = shrink.compensated(model, *chosen, hessians=hessians, means=means, damping=method.damping)
    return shrink.shrunk(model, *chosen, replaced=replaced)


def _weights(model: LanguageModel) -> int:
    return sum(layer.module.weight.numel() for layer in model.layers)


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors of equal shape, refusing to stack none.

    Raises:
        InputError: nothing was measured under the wanted condition.
    """
    require(bool(parts), "a comparison must have outcomes on both sides", "none", "measure the condition first")
    return torch.stack(list(parts))


def speed_ups(
    found: Calibrations, method: Method, *, sparsities: Sequence[float], repeats: int
) -> dict[tuple[str, float], tuple[float, float, float]]:
    """Time forward passes of pruned models in turn with the dense one.

    Args:
        found: calibrations of a model.
        method: for both patterns.
        sparsities: shares of weights (zeros in dense matrices), and of groups and channels (smaller matrices).
        repeats: timed rounds.

    Returns:
        Median, first and third quartile of the speed-up by (pattern, sparsity), where the model can be cut so.
    """
    model = found.bench.model
    exact = {sparsity: pruner.exact_target(model, sparsity) for sparsity in sparsities}
    variants = {(UNSTRUCTURED, sparsity): pruned_copy(found, method, target) for sparsity, target in exact.items()}
    cut = [each for each in sparsities if not refusals(model, {"": method}, [each])]
    variants |= {(STRUCTURED, sparsity): shrunk(found, method, sparsity=sparsity) for sparsity in cut}
    ids = found.bench.windows[:TIMED_WINDOWS].to(model.device)
    calls = {"dense": partial(network_body(model), input_ids=ids, use_cache=False)}
    calls |= {str(key): partial(network_body(variant), input_ids=ids, use_cache=False) for key, variant in variants.items()}
    seconds = clock.interleaved(calls, repeats=repeats, device=model.device)
    return {key: clock.speed_up(seconds["dense"], seconds[str(key)]) for key in variants}
