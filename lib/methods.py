"""Pruning methods by name: which importance, which calibration inputs, which token weights, in which order."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib import attention, calibration, pruning, sinks
from lib.calibration import READS, Aggregate, CalibrationSet, InputStatistics
from lib.config import InputError
from lib.models import LanguageModel, LinearLayer, Role
from lib.pruning import UNSTRUCTURED, Granularity
from lib.sparsegpt import sparsegpt

Importance = Literal["random", "magnitude", "wanda", "sparsegpt"]


@dataclass(frozen=True)
class Method:
    """One way to prune, each choice named.

    Attributes:
        importance: what ranks the weights.
        noised: calibrate on masked text instead of clean text.
        sink_weights: multiply what sinks contribute to the statistics by 1 - sink score.
        sequential: a block's statistics are taken behind the already pruned ones; False = all from the dense model.
        aggregate: how input norms are summed over samples.
        granularity: whether weights compete inside their row or their matrix.
        inclusive: remove the weight at the threshold too, as the release's magnitude and SparseGPT do.
    """

    importance: Importance
    noised: bool = False
    sink_weights: bool = False
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

    @property
    def needs_calibration(self) -> bool:
        """Tell whether the method reads text."""
        return self.importance in ("wanda", "sparsegpt")


# Each as the authors' release runs it; `sink_wanda` differs from `wanda` in four choices at once.
RELEASE = MappingProxyType({
    "magnitude": Method("magnitude", granularity="layer", inclusive=True),
    "wanda": Method("wanda"),
    "sparsegpt": Method("sparsegpt", inclusive=True),
    "sink_wanda": Method("wanda", noised=True, sink_weights=True, sequential=False, aggregate="sum_of_norms"),
    "sink_sparsegpt": Method("sparsegpt", sink_weights=True, inclusive=True),
})  # fmt: skip


@torch.inference_mode()
def sink_weights(
    model: LanguageModel,
    input_ids: Int[Tensor, "sample position"],
    *,
    num_std: float = sinks.RELEASE_STD,
    alpha: float = sinks.RELEASE_ALPHA,
    batch_size: int = 4,
) -> Float[Tensor, "sample position"]:
    """Return omega = 1 - sigmoid(alpha (m - mean - num_std std)) of each token, m summed over layers and heads.

    Args:
        model: the dense model.
        input_ids: clean or noised windows.
        num_std: standard deviations above the mean at which the score is one half.
        alpha: steepness, on summed masses in effect a step.
        batch_size: samples at one time.

    Source: the authors' release.
    """
    weigh = release_weigher(num_std=num_std, alpha=alpha)
    return torch.cat([weigh(attention.sink_mass(model, batch.to(model.device))).cpu() for batch in input_ids.split(batch_size)])


def release_weigher(*, num_std: float = sinks.RELEASE_STD, alpha: float = sinks.RELEASE_ALPHA) -> Callable[[Tensor], Tensor]:
    """Return the function from masses `[layer, sample, head, position]` to token weights that `sink_weights` applies."""

    def weigh(mass: Tensor) -> Tensor:
        """Sum over layers and heads, score, and take one minus it."""
        total = mass.sum((0, 2))
        return sinks.token_weight(sinks.soft_score(total, sinks.mean_std_threshold(total, num_std=num_std), alpha=alpha))

    return weigh


def prune_model_(
    model: LanguageModel,
    method: Method,
    *,
    sparsity: float,
    pattern: str = UNSTRUCTURED,
    calibration_set: CalibrationSet | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 4,
) -> None:
    """Prune every linear layer of a model in place.

    Args:
        model: the dense model; its weights change.
        method: how.
        sparsity: fraction removed from every matrix, in [0, 1).
        pattern: `"unstructured"` or `"N:M"`.
        calibration_set: what Wanda and SparseGPT read.
        generator: CPU generator, for random pruning.
        batch_size: samples at one time.

    Raises:
        InputError: bad sparsity or pattern, weights or activations that are not finite, calibration or generator missing.
    """
    pruning.check_sparsity(sparsity)
    for layer in model.layers:
        pruning.parse_pattern(pattern, sparsity=sparsity, width=layer.module.in_features)
        pruning.check_finite(layer.module.weight, name=layer.name, what="weights")
    if method.needs_calibration and calibration_set is None:
        raise InputError(f"{method.importance} must be given a calibration set, got none: pass calibration_set")
    if method.importance == "random" and generator is None:
        raise InputError("random pruning must be given a generator, got None: pass runtime.generator(seed, 'pruning')")
    if not method.needs_calibration or calibration_set is None:
        for layer in model.layers:
            _write_(layer, _pruned(layer, method, None, sparsity=sparsity, pattern=pattern, generator=generator))
        return

    def visit(block: int, found: dict[Role, InputStatistics]) -> None:
        """Prune one block with its statistics."""
        for layer in [layer for layer in model.layers if layer.block == block]:
            statistics = found[READS[layer.role]]
            pruning.check_finite(statistics.squares, name=layer.name, what="inputs")
            _write_(layer, _pruned(layer, method, statistics, sparsity=sparsity, pattern=pattern, generator=generator))

    calibration.stream(
        model,
        calibration_set,
        visit,
        hessian=method.importance == "sparsegpt",
        sequential=method.sequential,
        batch_size=batch_size,
    )


def _pruned(
    layer: LinearLayer,
    method: Method,
    statistics: InputStatistics | None,
    *,
    sparsity: float,
    pattern: str,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the new weights of one matrix."""
    weight = layer.module.weight.detach()
    if method.importance == "sparsegpt" and statistics is not None:
        options = {"sparsity": sparsity, "pattern": pattern, "inclusive": method.inclusive, "name": layer.name}
        return sparsegpt(weight, statistics.hessian(), **options)[0]  # type: ignore[arg-type]
    if method.inclusive and pattern == UNSTRUCTURED:
        return pruning.prune(weight, pruning.release_magnitude_mask(weight, sparsity=sparsity))
    rank: dict[Importance, Callable[[], Tensor]] = {
        "random": lambda: pruning.random_importance(weight, generator=generator),  # type: ignore[arg-type]
        "magnitude": lambda: pruning.magnitude_importance(weight.float()),
        "wanda": lambda: pruning.wanda_importance(weight.float(), statistics.input_norm(method.aggregate)),  # type: ignore[union-attr]
    }
    mask = pruning.keep_mask(rank[method.importance](), sparsity=sparsity, pattern=pattern, granularity=method.granularity)
    return pruning.prune(weight, mask)


@torch.no_grad()
def _write_(layer: LinearLayer, weight: Tensor) -> None:
    layer.module.weight.copy_(weight)
