"""What notebook 05 compares: families of pruning and rounding at every sparsity, bit width and order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType

from lib.calibration.sets import NOISED
from lib.core.errors import require
from lib.pruning.importances import UNSTRUCTURED
from lib.pruning.methods import METHODS, SINKS, Method, Target, without_noise
from lib.quantization.rounding import DENSE_BITS, Grid
from lib.studies.joint.runs import PLAIN, Order, Recipe, Rounding

ORDERS: tuple[Order, ...] = ("prune, quantize", "quantize, prune", "joint")
ONE_STEP = "one step"  # where nothing is pruned, or nothing rounded, there is no order


@dataclass(frozen=True)
class Family:
    """A pruning method with a way of rounding.

    Attributes:
        method: what prunes; its calibration is read by the rounding too.
        rounding: GPTQ, or to the nearest point.
        scale_rule: of the grid.
        orders: that are defined for the two.
    """

    method: Method
    rounding: Rounding
    scale_rule: str
    orders: tuple[Order, ...] = ORDERS


SPARSEGPT, SINK_AWARE, WANDA = "SparseGPT + GPTQ", "sink-aware SparseGPT + GPTQ", "Wanda + nearest"
FAMILIES: Mapping[str, Family] = MappingProxyType({
    SPARSEGPT: Family(METHODS["SparseGPT"], "gptq", "search"),
    SINK_AWARE: Family(METHODS["sink-aware (SparseGPT)"], "gptq", "search"),
    WANDA: Family(METHODS["Wanda"], "nearest", "search", ORDERS[:2]),
})  # fmt: skip
# What the Hessian of quantization alone reads and how it weighs tokens: one thing changes from a row to its neighbour.
HESSIANS: Mapping[str, Method] = MappingProxyType({
    "GPTQ, clean text": PLAIN,
    "GPTQ, clean text, sink weights": METHODS["sink-aware (SparseGPT)"],
    "GPTQ, noised text": Method("sparsegpt", NOISED),
    "GPTQ, noised text, sink weights": Method("sparsegpt", NOISED, SINKS),
})  # fmt: skip
WAYS: Mapping[str, tuple[Rounding, str, bool]] = MappingProxyType({
    "nearest, absmax": ("nearest", "absmax", False),
    "nearest, search": ("nearest", "search", False),
    "GPTQ, absmax": ("gptq", "absmax", False),
    "GPTQ, search": ("gptq", "search", False),
    "GPTQ, weighted search": ("gptq", "search", True),
})  # fmt: skip


def _known(table: Mapping[str, object], names: Iterable[str], setting: str) -> list[str]:
    """Return the names, refusing one that the table does not have."""
    listed = list(names)
    for name in listed:
        require(name in table, f"joint_quantization.{setting} must be among {', '.join(table)}", repr(name), "choose one of them")
    return listed


def target_label(target: Target) -> str:
    """Name a target in tables.

    >>> target_label(Target(0.25)), target_label(Target(0.5, "2:4")), target_label(Target(0.0))
    ('25 %', '2:4', '0 %')
    """
    return f"{100 * target.sparsity:g} %" if target.pattern == UNSTRUCTURED else target.pattern


def order_label(recipe: Recipe) -> str:
    """Name the order of a recipe, or say that there is one step only."""
    return recipe.order if recipe.prunes and recipe.grid.rounds else ONE_STEP


def grid(
    names: Iterable[str],
    targets: Iterable[Target],
    bits: Sequence[int],
    *,
    rounded: Iterable[int],
    group_size: int | None,
    causal: bool,
) -> list[tuple[str, Recipe]]:
    """List sparsity x bits x order for some families: pruning alone and rounding alone once each, both in every order.

    Args:
        names: of `FAMILIES`.
        targets: what is removed, without the empty target.
        bits: of a weight, without 16, with and without pruning.
        rounded: bits without pruning only: rivals of equal size.
        group_size: neighbours that share a scale; None for a row.
        causal: True to read clean text, as an autoregressive model must.

    Returns:
        (family, recipe), without the dense model.

    Raises:
        InputError: a family that there is not.
    """
    found, targets = [], list(targets)
    pairs = [(Target(0.0), width) for width in dict.fromkeys([*bits, *rounded])] + list(product(targets, [DENSE_BITS, *bits]))
    for name, (target, width) in product(_known(FAMILIES, names, "families"), pairs):
        own = FAMILIES[name]
        method = without_noise(own.method) if causal else own.method
        form = Grid(width) if width == DENSE_BITS else Grid(width, group_size, own.scale_rule)
        orders = own.orders if width < DENSE_BITS and target.sparsity else own.orders[:1]
        found += [(name, Recipe(form, target, method, order, own.rounding)) for order in orders]
    return found


def quantization(ways: Iterable[str], bits: Iterable[int], group_sizes: Iterable[int | None]) -> list[tuple[str, Recipe]]:
    """List ways of rounding x bits x group sizes, nothing pruned, clean text.

    Raises:
        InputError: a way that there is not.
    """
    found = []
    for way, width, group in product(_known(WAYS, ways, "ways"), bits, group_sizes):
        rounding, rule, weighted = WAYS[way]
        found.append((way, Recipe(Grid(width, group, rule), rounding=rounding, weighted=weighted)))
    return found


def hessians(bits: Iterable[int], *, group_size: int | None, levels: int, causal: bool) -> list[tuple[str, Recipe]]:
    """List GPTQ with every Hessian of `HESSIANS`; an autoregressive model reads clean text only.

    Args:
        bits: of a weight.
        group_size: neighbours that share a scale.
        levels: noise levels of the noised text.
        causal: whether the model is autoregressive.
    """
    found = []
    for width, (name, method) in product(bits, HESSIANS.items()):
        if causal and method.inputs.kind == "noised":
            continue
        own = without_noise(method) if causal else method
        own = own if own.inputs.kind == "clean" else replace(own, inputs=replace(own.inputs, levels=levels))
        found.append((name, Recipe(Grid(width, group_size, "search"), method=own)))
    return found
