"""What notebook 05 compares: families of pruning and rounding at every sparsity, bit width and order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import MappingProxyType

from lib.calibration import two_streams
from lib.calibration.sets import NOISED, Inputs
from lib.core.errors import refusal, require_known
from lib.models.language_model import LanguageModel
from lib.pruning.importances import UNSTRUCTURED
from lib.pruning.methods import METHODS, SINKS, STRONGER, Method, Target, without_noise
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

# What prunes before GPTQ rounds the weights that stay; with a refit or ALPS these stay larger.
BASELINES: Mapping[str, Method] = MappingProxyType({
    **{name: METHODS[name] for name in ("SparseGPT", "Wanda")},
    **{name: STRONGER[name] for name in ("Wanda, refit", "ALPS")},
})  # fmt: skip
HALF = Target(0.5)
CLEAN_SHARE = 0.25  # of Quant-dLLM's masked text


def target_label(target: Target) -> str:
    """Name a target in tables.

    >>> target_label(Target(0.25)), target_label(Target(0.5, "2:4")), target_label(Target(0.0))
    ('25 %', '2:4', '0 %')
    """
    return f"{100 * target.sparsity:g} %" if target.pattern == UNSTRUCTURED else target.pattern


def order_label(recipe: Recipe) -> str:
    """Name the order of a recipe, or say that there is one step only."""
    return recipe.order if recipe.prunes and recipe.grid.rounds else ONE_STEP


def _read_by(method: Method, *, levels: int, causal: bool) -> Method:
    """Return a method that reads as many noise levels as the profile says, or clean text where a model reads nothing else."""
    if causal:
        return without_noise(method)
    inputs, weighting = method.inputs, method.weighting
    return replace(
        method,
        inputs=inputs if inputs.kind == "clean" else replace(inputs, levels=levels),
        weighting=weighting if weighting is None else replace(weighting, levels=levels),
    )


def grid(
    names: Iterable[str],
    targets: Iterable[Target],
    bits: Sequence[int],
    *,
    rounded: Iterable[int],
    group_size: int | None,
    levels: int,
    causal: bool,
) -> list[tuple[str, Recipe]]:
    """List sparsity x bits x order for some families: pruning alone and rounding alone once each, both in every order.

    Args:
        names: of `FAMILIES`.
        targets: what is removed, without the empty target.
        bits: of a weight, without 16, with and without pruning.
        rounded: bits without pruning only: rivals of equal size.
        group_size: neighbours that share a scale; None for a row.
        levels: noise levels of the noised text.
        causal: True to read clean text, as an autoregressive model must.

    Returns:
        (family, recipe), without the dense model.

    Raises:
        InputError: a family that there is not.
    """
    found, targets, names = [], list(targets), list(names)
    require_known(names, FAMILIES, "joint_quantization.families")
    pairs = [(Target(0.0), width) for width in dict.fromkeys([*bits, *rounded])] + list(product(targets, [DENSE_BITS, *bits]))
    for name, (target, width) in product(names, pairs):
        own = FAMILIES[name]
        method = _read_by(own.method, levels=levels, causal=causal)
        form = Grid(width) if width == DENSE_BITS else Grid(width, group_size, own.scale_rule)
        orders = own.orders if width < DENSE_BITS and target.sparsity else own.orders[:1]
        found += [(name, Recipe(form, target, method, order, own.rounding)) for order in orders]
    return found


def quantization(ways: Iterable[str], bits: Iterable[int], group_sizes: Iterable[int | None]) -> list[tuple[str, Recipe]]:
    """List ways of rounding x bits x group sizes, nothing pruned, clean text.

    Raises:
        InputError: a way that there is not.
    """
    found, ways = [], list(ways)
    require_known(ways, WAYS, "joint_quantization.ways")
    for way, width, group in product(ways, bits, group_sizes):
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
        own = _read_by(method, levels=levels, causal=causal)
        found.append((name, Recipe(Grid(width, group_size, "search"), method=own)))
    return found


def baselines(names: Iterable[str], bits: Iterable[int], *, group_size: int | None, causal: bool) -> list[tuple[str, Recipe]]:
    """List what prunes half of the weights before GPTQ rounds the others.

    Args:
        names: of `BASELINES`.
        bits: of a weight.
        group_size: neighbours that share a scale.
        causal: whether the model is autoregressive.

    Raises:
        InputError: a baseline that there is not.
    """
    found, names = [], list(names)
    require_known(names, BASELINES, "joint_quantization.baselines")
    for width, name in product(bits, names):
        method = without_noise(BASELINES[name]) if causal else BASELINES[name]
        recipe = Recipe(Grid(width, group_size, "search"), HALF, method, "prune, quantize")
        found.append((baseline_name(name, width), recipe))
    return found


def baseline_name(name: str, bits: int) -> str:
    """Name a baseline at a width.

    >>> baseline_name("ALPS", 4)
    'ALPS + GPTQ, 4 bits'
    """
    return f"{name} + GPTQ, {bits} bits"


def shifts(*, group_size: int | None) -> list[tuple[str, Recipe]]:
    """List GPTQ and SparseGPT with the target of the dense matrix and with that of the dense model (shifted)."""
    three = Recipe(Grid(3, group_size, "search"))
    half = Recipe(target=HALF)
    found = [("GPTQ, 3 bits", three), ("SparseGPT, 50 %", half)]
    return [*found, *((f"{name}, shifted", replace(recipe, shifted=True)) for name, recipe in found)]


def two_bits(*, group_size: int | None, levels: int) -> list[tuple[str, Recipe]]:
    """List GPTQ in 2 bits and two planes of signs, on clean text and on text masked as Quant-dLLM's (arXiv 2510.03274)."""
    masked = Method("sparsegpt", Inputs("noised", times="uniform", levels=levels, clean_share=CLEAN_SHARE))
    found = []
    for text, method in (("clean text", PLAIN), ("masked text", masked)):
        found.append((f"GPTQ, 2 bits, {text}", Recipe(Grid(2, group_size, "search"), method=method)))
        found.append((f"planes, 2 bits, {text}", Recipe(Grid(2), method=method, rounding="planes")))
    return found


def further(
    model: LanguageModel, names: Iterable[str], *, group_size: int | None, levels: int
) -> tuple[list[tuple[str, Recipe]], dict[str, str]]:
    """List what a setting names of `shifts` and `two_bits`, and why a model cannot take others of them.

    Args:
        model: it is asked before any work.
        names: of recipes; those of `rewritten` may be among them.
        group_size: neighbours that share a scale.
        levels: noise levels of masked text.

    Raises:
        InputError: a recipe that there is not.
    """
    names = list(names)
    every = [*shifts(group_size=group_size), *two_bits(group_size=group_size, levels=levels)]
    require_known(names, [name for name, _ in every] + list(rewritten(group_size=group_size)), "joint_quantization.further")
    why_not = {}
    for name, recipe in ((name, recipe) for name, recipe in every if name in names):
        reason = refusal(partial(two_streams.check_dense, model)) if recipe.shifted else None
        if model.is_causal and recipe.method.inputs.kind != "clean":
            reason = "an autoregressive model reads clean text only"
        why_not |= {name: reason} if reason else {}
    return [(name, recipe) for name, recipe in every if name in names and name not in why_not], why_not


def rewritten(*, group_size: int | None) -> dict[str, Recipe]:
    """List what is done to rewritten models: rounding to the nearest point, whose errors scales and rotations change; Wanda."""
    return {
        "nearest, 3 bits": Recipe(Grid(3, group_size, "search"), rounding="nearest"),
        "Wanda, 50 %": Recipe(target=HALF, method=METHODS["Wanda"]),
    }
