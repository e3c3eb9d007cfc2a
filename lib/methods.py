"""Pruning methods by name: which importance, which calibration inputs, which token weights, in which order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from lib import calibration, calibration_sets, measured_weights, pruning
from lib.calibration import Aggregate, CalibrationSet, InputStatistics, statistics_of
from lib.calibration_sets import CLEAN, NOISED, Inputs
from lib.config import InputError
from lib.models import LanguageModel, LinearLayer, Role
from lib.pruning import UNSTRUCTURED, Granularity
from lib.runtime import generator as stream
from lib.sparsegpt import sparsegpt
from lib.token_weights import CONTROLS, Weighting

Importance = Literal["random", "magnitude", "wanda", "sparsegpt"]


@dataclass(frozen=True)
class Method:
    """One way to prune, each choice named.

    Attributes:
        importance: what ranks the weights.
        inputs: what the calibration reads: clean text, noised text, or trajectories.
        weighting: how much calibration tokens count; None counts all alike.
        sequential: a block's statistics are taken behind the already pruned ones; False = all from the dense model.
        aggregate: how input norms are summed over samples.
        granularity: whether weights compete inside their row or their matrix.
        inclusive: remove the weight at the threshold too, as the release's magnitude and SparseGPT do.
    """

    importance: Importance
    inputs: Inputs = CLEAN
    weighting: Weighting | None = None
    sequential: bool = True
    aggregate: Aggregate = "root_mean_square"
    granularity: Granularity = "row"
    inclusive: bool = False

    def __post_init__(self) -> None:
        if self.inclusive and not (
            self.importance == "sparsegpt" or (self.importance == "magnitude" and self.granularity == "layer")
        ):
            raise InputError(
                f"inclusive must go with SparseGPT or magnitude per layer, got {self.importance} per {self.granularity}: drop it"
            )
        if not self.needs_calibration and (self.weighting or self.inputs != CLEAN):
            raise InputError(f"token weights and inputs must go with Wanda or SparseGPT, got {self.importance}: drop them")

    @property
    def needs_calibration(self) -> bool:
        """Tell whether the method reads text."""
        return self.importance in ("wanda", "sparsegpt")


SINKS = Weighting()
# Each as the authors' release runs it; `sink_wanda` differs from `wanda` in four choices at once.
RELEASE = MappingProxyType({
    "magnitude": Method("magnitude", granularity="layer", inclusive=True),
    "wanda": Method("wanda"),
    "sparsegpt": Method("sparsegpt", inclusive=True),
    "sink_wanda": Method("wanda", NOISED, SINKS, sequential=False, aggregate="sum_of_norms"),
    "sink_sparsegpt": Method("sparsegpt", weighting=Weighting(averaged=True), inclusive=True),
})  # fmt: skip
# What the notebooks compare, by the name that tables and figures show; exact counts throughout.
METHODS = MappingProxyType({
    "random": Method("random"),
    "magnitude": Method("magnitude", granularity="layer"),
    "Wanda": Method("wanda"),
    "SparseGPT": Method("sparsegpt"),
    "AR sink-preserve": Method("wanda", weighting=Weighting("sinks_up")),  # stands for the habit of keeping sinks
    "sink-aware (Wanda)": RELEASE["sink_wanda"],
    "sink-aware (SparseGPT)": Method("sparsegpt", weighting=Weighting(averaged=True)),
    "DWANDA": Method("wanda", Inputs("noised", times="uniform", levels=8)),  # Wanda on noised text, arXiv 2605.06366
})  # fmt: skip


def without_noise(method: Method) -> Method:
    """Return a method as an autoregressive model can run it: on clean text, sinks measured on the same text."""
    weighting = None if method.weighting is None else replace(method.weighting, averaged=False)
    return replace(method, inputs=CLEAN, weighting=weighting)


@dataclass(frozen=True)
class Target:
    """How much to remove.

    Attributes:
        sparsity: fraction of every matrix, in [0, 1).
        pattern: `"unstructured"` or `"N:M"`.
        removed: exact number of weights by layer name, instead of the fraction; unstructured only.
    """

    sparsity: float
    pattern: str = UNSTRUCTURED
    removed: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        pruning.check_sparsity(self.sparsity)
        pruning.parse_pattern(self.pattern, sparsity=self.sparsity)
        if self.removed is not None and self.pattern != UNSTRUCTURED:
            raise InputError(f"exact numbers must go with unstructured sparsity, got {self.pattern}: drop one of them")


def pattern_target(pattern: str) -> Target:
    """Return the target of an N:M pattern, whose sparsity is 1 - N / M.

    >>> pattern_target("1:4").sparsity
    0.75
    """
    groups = pruning.parse_pattern(pattern)
    return Target(0.0) if groups is None else Target(1.0 - groups[0] / groups[1], pattern)


def prune_(
    model: LanguageModel,
    method: Method,
    target: Target,
    *,
    windows: Int[Tensor, "window position"] | None = None,
    seed: int = 0,
    batch_size: int = 4,
    memory_budget: int = calibration.MEMORY_BUDGET,
) -> None:
    """Prune every linear layer of a model in place, from clean calibration windows.

    Args:
        model: the dense model; its weights change.
        method: how.
        target: how much.
        windows: clean token windows, for Wanda and SparseGPT.
        seed: of noise, sampling and random choices.
        batch_size: samples at one time.
        memory_budget: bytes of layer inputs that one forward pass may keep, see `calibration.one_shot_statistics`.

    Raises:
        InputError: a target that does not fit, weights or activations that are not finite, or calibration missing or too short.
    """
    check(model, target)
    if not method.needs_calibration:
        _prune_layers_(model.layers, method, target, None, random=stream(seed, "pruning"))
        return
    if windows is None:
        raise InputError(f"{method.importance} must be given calibration windows, got none: pass windows")
    if _one_pass(method):
        ids = calibration_sets.read(model, windows, method.inputs, seed=seed).flatten(0, 1)
        weigh = measured_weights.weigher(method.weighting or SINKS)
        found = calibration.one_shot_statistics(model, ids, weigh, batch_size=batch_size, memory_budget=memory_budget)
        prune_with_(model, method, target, found)
        return
    built = calibration_sets.build(
        model, windows, inputs=method.inputs, weighting=method.weighting, seed=seed, batch_size=batch_size
    )
    prune_on_(model, method, target, built, batch_size=batch_size)


def _one_pass(method: Method) -> bool:
    """Tell whether token weights and weighted norms come from the same forward passes of the dense model."""
    weighting = method.weighting
    if weighting is None or weighting.over_levels or weighting.kind in CONTROLS:
        return False
    return method.importance == "wanda" and not method.sequential


def prune_on_(
    model: LanguageModel, method: Method, target: Target, calibration_set: CalibrationSet, *, batch_size: int = 4
) -> None:
    """Prune in place with a calibration set that is already noised and weighted as the method says.

    Raises:
        InputError: as `prune_`; or a set whose token weights contradict the method.
    """
    check(model, target)
    if (method.weighting is None) != (calibration_set.token_weight is None):
        wanted, got = ("no", "some") if method.weighting is None else ("some", "none")
        raise InputError(
            f"the calibration set must have {wanted} token weights for this method, got {got}: build it for the method"
        )

    def visit(block: int, found: dict[Role, InputStatistics]) -> None:
        """Prune one block with its statistics."""
        _prune_layers_([layer for layer in model.layers if layer.block == block], method, target, found)

    calibration.stream(
        model,
        calibration_set,
        visit,
        hessian=method.importance == "sparsegpt",
        sequential=method.sequential,
        batch_size=batch_size,
    )


def prune_with_(model: LanguageModel, method: Method, target: Target, found: Sequence[Mapping[Role, InputStatistics]]) -> None:
    """Prune in place with statistics of the dense model, by block; they serve any number of targets.

    Raises:
        InputError: as `prune_`; or a sequential method, whose statistics change with the target.
    """
    check(model, target)
    if method.sequential:
        raise InputError("statistics of the dense model must go with a one-shot method, got a sequential one: use prune_on_")
    for block, statistics in enumerate(found):
        _prune_layers_([layer for layer in model.layers if layer.block == block], method, target, statistics)


def check(model: LanguageModel, target: Target) -> None:
    """Refuse, before any work, what would fail in some layer.

    Raises:
        InputError: weights that are not finite, a pattern that does not divide a layer, or numbers for other layers.
    """
    if not model.layers:
        raise InputError(f"a model must have linear layers to prune, got none in {model.name}: check its layer table")
    for layer in model.layers:
        pruning.parse_pattern(target.pattern, sparsity=target.sparsity, width=layer.module.in_features)
        pruning.check_finite(layer.module.weight, name=layer.name, what="weights")
    names = {layer.name for layer in model.layers}
    if target.removed is not None and set(target.removed) != names:
        raise InputError(
            f"exact numbers must name all {len(names)} layers, got {len(set(target.removed) & names)}: complete them"
        )


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


def _prune_layers_(
    layers: Sequence[LinearLayer],
    method: Method,
    target: Target,
    found: Mapping[Role, InputStatistics] | None,
    *,
    random: torch.Generator | None = None,
) -> None:
    """Prune some layers, with the statistics of their block."""
    for layer in layers:
        statistics = None if found is None else statistics_of(found, layer.role)
        if statistics is not None:
            pruning.check_finite(statistics.squares, name=layer.name, what="inputs")
        _write_(layer, _pruned(layer, method, target, statistics, random=random))


def _pruned(
    layer: LinearLayer,
    method: Method,
    target: Target,
    statistics: InputStatistics | None,
    *,
    random: torch.Generator | None,
) -> Tensor:
    """Return the new weights of one matrix."""
    weight = layer.module.weight.detach()
    removed = None if target.removed is None else target.removed[layer.name]
    if method.importance == "sparsegpt" and statistics is not None:
        return sparsegpt(
            weight,
            statistics.hessian(),
            sparsity=target.sparsity,
            pattern=target.pattern,
            removed=removed,
            inclusive=method.inclusive and removed is None,
            name=layer.name,
        )[0]
    if method.inclusive and target.pattern == UNSTRUCTURED and removed is None:
        return pruning.prune(weight, pruning.release_magnitude_mask(weight, sparsity=target.sparsity))
    scores = importance(weight, method, statistics, random=random)
    if removed is not None:
        return pruning.prune(weight, pruning.keep_mask_by_count(scores, removed=removed))
    mask = pruning.keep_mask(scores, sparsity=target.sparsity, pattern=target.pattern, granularity=method.granularity)
    return pruning.prune(weight, mask)


def importance(
    weight: Tensor, method: Method, statistics: InputStatistics | None, *, random: torch.Generator | None = None
) -> Tensor:
    """Return the importance of every weight of a matrix, for methods that do not update weights."""
    rank: dict[Importance, Callable[[], Tensor]] = {
        "random": lambda: pruning.random_importance(weight, generator=random),  # type: ignore[arg-type]
        "magnitude": lambda: pruning.magnitude_importance(weight.float()),
        "wanda": lambda: pruning.wanda_importance(weight.float(), statistics.input_norm(method.aggregate)),  # type: ignore[union-attr]
    }
    return rank[method.importance]()


@torch.no_grad()
def _write_(layer: LinearLayer, weight: Tensor) -> None:
    layer.module.weight.copy_(weight)
