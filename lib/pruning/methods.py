"""Pruning methods by name: which importance, which calibration inputs, which token weights, in which order."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from lib.calibration.sets import CLEAN, NOISED, Inputs
from lib.calibration.sums import Aggregate
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.pruning import importances
from lib.pruning.importances import UNSTRUCTURED, Granularity
from lib.pruning.repairs import SWAPS
from lib.pruning.sparsegpt import DAMPING

Importance = Literal["random", "magnitude", "wanda", "sparsegpt", "alps", "fluctuation"]
Repair = Literal["none", "refit"]
Columns = Literal["given", "largest first", "random"]


@dataclass(frozen=True)
class Method:
    """One way to prune, each choice named.

    Attributes:
        importance: what ranks the weights; `"fluctuation"` (FLAP) ranks heads and channels, and goes with structured pruning.
        inputs: what the calibration reads: clean text, noised text, or trajectories.
        weighting: how much calibration tokens count; None counts all alike.
        sequential: a block's statistics are taken behind the already pruned ones; False = all from the dense model.
        aggregate: how input norms are summed over samples.
        granularity: whether weights compete inside their row or their matrix.
        inclusive: remove the weight at the threshold too, as the release's magnitude and SparseGPT do.
        damping: share of the mean diagonal added to the Hessian's, for SparseGPT, ALPS and refit.
        repair: `"refit"` solves anew for the weights that stay, see `repairs.refit`.
        swaps: exchanges of kept and removed weights in every row at most, before the repair, see `repairs.swap`.
        columns: the order in which SparseGPT takes them: as they come, by falling diagonal of the Hessian (GPTQ's "act order"),
            or its control, any order.
        bias: structured pruning only: a bias makes up for the mean output that goes with heads and channels.
    """

    importance: Importance
    inputs: Inputs = CLEAN
    weighting: Weighting | None = None
    sequential: bool = True
    aggregate: Aggregate = "root_mean_square"
    granularity: Granularity = "row"
    inclusive: bool = False
    damping: float = DAMPING
    repair: Repair = "none"
    swaps: int = 0
    columns: Columns = "given"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.inclusive and not (
            self.importance == "sparsegpt" or (self.importance == "magnitude" and self.granularity == "layer")
        ):
            raise InputError(
                f"inclusive must go with SparseGPT or magnitude per layer, got {self.importance} per {self.granularity}: drop it"
            )
        if not self.needs_calibration and (self.weighting or self.inputs != CLEAN):
            raise InputError(f"token weights and inputs must go with a method that reads, got {self.importance}: drop them")
        if self.columns != "given" and self.importance != "sparsegpt":
            raise InputError(f"an order of columns must go with SparseGPT, got {self.importance}: drop it")
        if self.importance == "fluctuation" and self.weighting:
            raise InputError("fluctuation must count all tokens alike, got token weights: drop them")
        if self.swaps < 0 or (self.swaps and self.updates and self.repair == "none"):
            rule = "swaps must not be negative, and go with a refit where a method changes the weights that stay"
            raise InputError(f"{rule}, got {self.swaps} with {self.importance}: set repair to refit")

    @property
    def updates(self) -> bool:
        """Tell whether mask and new weights come together, from a Hessian."""
        return self.importance in ("sparsegpt", "alps")

    @property
    def repairs(self) -> bool:
        """Tell whether anything is done for the mask once it is there."""
        return self.repair != "none" or self.swaps > 0

    @property
    def is_structured(self) -> bool:
        """Tell whether the method is for whole heads and channels alone."""
        return self.importance == "fluctuation" or self.bias

    @property
    def needs_hessian(self) -> bool:
        """Tell whether outer products of what layers read are collected."""
        return self.updates or self.repairs

    @property
    def needs_calibration(self) -> bool:
        """Tell whether the method reads text."""
        return self.importance in ("wanda", "fluctuation") or self.needs_hessian or self.bias

    @property
    def changes_values(self) -> bool:
        """Tell whether weights that stay may differ from the dense ones."""
        return self.updates or self.repair != "none"


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
    "magnitude per row": Method("magnitude"),
    "Wanda": Method("wanda"),
    "SparseGPT": Method("sparsegpt"),
    "AR sink-preserve": Method("wanda", weighting=Weighting("sinks_up")),  # stands for the habit of keeping sinks
    "sink-aware (Wanda)": RELEASE["sink_wanda"],
    "sink-aware (SparseGPT)": Method("sparsegpt", weighting=Weighting(averaged=True)),
    "DWANDA": Method("wanda", Inputs("noised", times="uniform", levels=8)),  # Wanda on noised text, arXiv 2605.06366
})  # fmt: skip
# What can be done for the mask of any method, by name.
REPAIRS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "mask alone": {"repair": "none", "swaps": 0},
    "swaps": {"repair": "none", "swaps": SWAPS},
    "refit": {"repair": "refit", "swaps": 0},
    "swaps, refit": {"repair": "refit", "swaps": SWAPS},
})  # fmt: skip
# Baselines that find mask and weights together, and the order of SparseGPT's columns with its control.
STRONGER = MappingProxyType({
    "ALPS": Method("alps"),
    "Wanda, refit": Method("wanda", repair="refit"),
    "Wanda, swaps, refit": Method("wanda", repair="refit", swaps=SWAPS),
    "SparseGPT, refit": Method("sparsegpt", repair="refit"),
    "SparseGPT, largest first": Method("sparsegpt", columns="largest first"),
    "SparseGPT, random order": Method("sparsegpt", columns="random"),
})  # fmt: skip
# Whole heads and channels: what ranks them, and what is done for the matrices that read them.
STRUCTURES = MappingProxyType({
    "Wanda-sp": Method("wanda", sequential=False),
    "Wanda-sp, refit": Method("wanda", sequential=False, repair="refit"),
    "FLAP's score alone": Method("fluctuation"),
    "FLAP": Method("fluctuation", bias=True),
    "FLAP, refit": Method("fluctuation", bias=True, repair="refit"),
})  # fmt: skip


def repaired(method: Method, name: str) -> Method:
    """Return a method with one of `REPAIRS` behind its mask.

    >>> repaired(METHODS["Wanda"], "swaps, refit").repair
    'refit'
    """
    return replace(method, **REPAIRS[name])


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
        importances.check_sparsity(self.sparsity)
        importances.parse_pattern(self.pattern, sparsity=self.sparsity)
        if self.removed is not None and self.pattern != UNSTRUCTURED:
            raise InputError(f"exact numbers must go with unstructured sparsity, got {self.pattern}: drop one of them")


def pattern_target(pattern: str) -> Target:
    """Return the target of an N:M pattern, whose sparsity is 1 - N / M.

    >>> pattern_target("1:4").sparsity
    0.75
    """
    groups = importances.parse_pattern(pattern)
    return Target(0.0) if groups is None else Target(1.0 - groups[0] / groups[1], pattern)
