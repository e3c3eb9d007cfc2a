"""Remove whole experts: those that the router gives least to go, with their rows of the router; as many are chosen a token."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.calibration.routes import routed_mass
from lib.calibration.statistics import CalibrationSet
from lib.core.errors import InputError, require
from lib.models.experts import choices
from lib.models.language_model import LanguageModel
from lib.pruning import shrink
from lib.pruning.methods import Method
from lib.pruning.structured import kept_units

COUNTS = ("n_routed_experts", "num_experts")  # where configurations say how many experts there are
ROUTER = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
LEAST_OF_GROUP = 2  # a group of experts is ranked by its two best


def by_routed_mass(
    model: LanguageModel, method: Method, calibration: CalibrationSet, *, sparsity: float, batch_size: int = 4
) -> LanguageModel:
    """Return a model without the experts that get least of what a method reads, tokens weighted as it says.

    Args:
        model: the dense model, left as it is.
        method: one-shot Wanda, with the weights of sinks or without.
        calibration: its text and token weights.
        sparsity: share of the experts to remove, see `choose`.
        batch_size: samples at one time.

    Raises:
        InputError: another method, or what `choose` refuses.
    """
    _check_method(method)
    mass = routed_mass(model, calibration, batch_size=batch_size)
    return without_experts(model, choose(model, mass, sparsity=sparsity))


def refusal(model: LanguageModel, method: Method, *, sparsity: float) -> str | None:
    """Say why a method cannot remove whole experts of a model; None where it can, or where there are none.

    Args:
        model: the dense model.
        method: how its experts would be ranked.
        sparsity: share of them to remove.
    """
    if not model.has_experts:
        return None
    config = model.network.config
    experts = int(next(getattr(config, name) for name in COUNTS if hasattr(config, name)))
    try:
        _check_method(method)
        choose(model, {block: torch.zeros(experts) for block in _mixtures(model)}, sparsity=sparsity)
    except InputError as error:
        return str(error)
    return None


def _check_method(method: Method) -> None:
    fits = method.importance == "wanda" and not (method.sequential or method.repairs or method.is_structured)
    order = "sequential" if method.sequential else "one-shot"
    rule = "experts must be ranked by what a one-shot Wanda method reads"
    got = f"{order} {method.importance}{' with a repair' if method.repairs or method.bias else ''}"
    require(fits, rule, got, "use one of these")


def _mixtures(model: LanguageModel) -> list[int]:
    """Return the blocks that have experts."""
    return [block for block in sorted(model.by_block) if model.has_experts_in(block)]


def choose(
    model: LanguageModel, mass: Mapping[int, Float[Tensor, "expert"]], *, sparsity: float
) -> dict[int, Int[Tensor, "kept"]]:
    """Choose the experts to keep in every block, as many in each: those with the largest mass.

    Args:
        model: the dense model.
        mass: what each expert gets, by block, see `routes.routed_mass`; with token weights that spare sinks it is the sink-aware
            choice.
        sparsity: share of the experts to remove, rounded down. Where the router chooses groups first, each loses as many.

    Returns:
        Kept experts by block, in rising order.

    Raises:
        InputError: bad sparsity, masses of other blocks, or fewer experts left than a token is given to.
    """
    config, chosen = model.network.config, choices(model.network)
    mixtures = _mixtures(model)
    require(sorted(mass) == mixtures, f"masses must be of blocks {mixtures}", str(sorted(mass)), "measure this model")
    groups, open_groups = int(getattr(config, "n_group", None) or 1), int(getattr(config, "topk_group", None) or 1)
    kept = {}
    for block, own in mass.items():
        by_group = own.unflatten(0, (groups, -1))
        left = torch.stack([kept_units(part, sparsity=sparsity) for part in by_group])
        room = left.shape[1] * open_groups
        rule = f"a token must find {chosen} experts in the {open_groups} of {groups} groups it may use"
        least = groups == 1 or left.shape[1] >= LEAST_OF_GROUP
        require(room >= chosen and least, rule, f"{left.shape[1]} left in each", "lower sparsity")
        kept[block] = (left + torch.arange(groups)[:, None] * by_group.shape[1]).flatten()
    return kept


@torch.no_grad()
def without_experts(model: LanguageModel, kept: Mapping[int, Int[Tensor, "_kept"]]) -> LanguageModel:
    """Return a new model with only the kept experts; its router cannot choose another.

    Args:
        model: the dense model, left as it is.
        kept: experts by block, as many in each, in rising order.

    Returns:
        The smaller model, which is written and read like any other: the weights of a router over all experts are shared among
        those that are left, as if the logits of the others were minus infinity.

    Raises:
        InputError: blocks that keep different numbers, which no configuration can express.
    """
    widths = sorted({len(each) for each in kept.values()})
    require(len(widths) == 1, "every block must keep as many experts", str(widths), "prune all blocks alike")
    config: Any = copy.deepcopy(model.network.config)
    setattr(config, next(name for name in COUNTS if hasattr(config, name)), widths[0])
    weights: dict[str, Tensor] = {}
    for name, value in model.network.state_dict().items():
        place = re.fullmatch(r"(model\.layers\.(\d+)\.)(mlp\.(?:experts\.(\d+)\.)?.*)", name)
        own = None if place is None else kept.get(int(place[2]))
        if place is None or own is None:
            weights[name] = value
        elif place[3] in ROUTER:
            weights[name] = value[own.to(value.device)]
        elif place[4] is None:
            weights[name] = value
        elif int(place[4]) in own.tolist():
            number = own.tolist().index(int(place[4]))
            weights[name.replace(f".experts.{place[4]}.", f".experts.{number}.")] = value
    return shrink.rebuilt(model, config, weights)
