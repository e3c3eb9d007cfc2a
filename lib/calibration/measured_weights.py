"""How much calibration tokens count, measured on the dense model: by its sinks, by as many other tokens, or by instability."""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.attention import masses as attention
from lib.attention import sinks
from lib.calibration import token_weights
from lib.calibration.statistics import check_masses
from lib.calibration.token_weights import CONTROLS, INSTABILITY, Weighting
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.models.language_model import LanguageModel, network_body


@torch.inference_mode()
def measure(
    model: LanguageModel, input_ids: Int[Tensor, "sample position"], weighting: Weighting, *, seed: int = 0, batch_size: int = 4
) -> Tensor:
    """Return the weight of each token from the dense model's own attention on the same input.

    Args:
        model: the dense model.
        input_ids: clean or noised samples.
        weighting: which; not one over levels.
        seed: of random controls.
        batch_size: samples at one time; does not change the result.

    Returns:
        `[sample, position]`, with a layer and a head dimension when the weighting is by layer or head.

    Raises:
        InputError: activations that are not finite, or a kind of instability.
    """
    if weighting.kind in INSTABILITY:
        raise InputError(f"instability must be measured over noise levels, got {weighting.kind}: use measure_over_levels")
    score, norms = [], []
    for part in input_ids.split(batch_size):
        batch = part.to(model.device)
        mass = attention.sink_mass(model, batch)
        check_masses(model, mass)
        score.append(token_weights.sink_score(mass, weighting).cpu())
        norms += [activation_norms(model, batch).cpu()] if weighting.kind == "norm" else []
    scores = torch.cat(score, dim={"aggregate": 0, "layer": 1, "head": 1}[weighting.level])
    if weighting.kind not in CONTROLS:
        return _weight(scores, weighting)
    return token_weights.control_down(
        scores,
        weighting.kind,
        input_ids=input_ids.cpu(),
        mask_token_id=model.mask_token_id,
        activation_norm=torch.cat(norms) if norms else None,
        generator=generator(seed, "control", weighting.kind),
    )


def weigher(weighting: Weighting) -> Callable[[Tensor], Tensor]:
    """Return the function from masses `[layer, sample, head, position]` to token weights of a sink weighting.

    Raises:
        InputError: a control or an instability, which need more than the masses of one pass.
    """
    if weighting.kind not in ("sinks_down", "sinks_up"):
        raise InputError(f"weights of one pass must be those of sinks, got {weighting.kind}: build a calibration set")
    return lambda mass: _weight(token_weights.sink_score(mass, weighting), weighting)


def _weight(score: Tensor, weighting: Weighting) -> Tensor:
    if weighting.kind == "sinks_up":
        return token_weights.sinks_up(score, boost=weighting.boost)
    return token_weights.sinks_down(score)


@torch.inference_mode()
def measure_over_levels(
    model: LanguageModel,
    noised: Int[Tensor, "window level position"],
    weighting: Weighting,
    *,
    seed: int = 0,
    batch_size: int = 4,
) -> Float[Tensor, "window position"]:
    """Return one weight a token of each window from all its noise levels: averaged, or by instability.

    Args:
        model: the dense model.
        noised: each window at several noise levels.
        weighting: `averaged`, or of a kind of instability.
        seed: of random controls.
        batch_size: samples at one time; does not change the result.

    Raises:
        InputError: a weighting by layer or head, or a single level for instability.
    """
    if weighting.level != "aggregate":
        raise InputError(f"weights over noise levels must be those of the aggregate, got level {weighting.level}: use aggregate")
    samples = noised.flatten(0, 1)
    if weighting.averaged:
        weight = measure(model, samples, weighting, seed=seed, batch_size=batch_size)
        return token_weights.average_over_levels(weight.view(noised.shape))
    masses = [attention.sink_mass(model, part.to(model.device)).cpu() for part in samples.split(batch_size)]
    check_masses(model, torch.cat(masses, dim=1))
    mass = sinks.aggregate(torch.cat(masses, dim=1)).view(noised.shape)
    score = token_weights.instability_score(mass, kind=cast(Any, weighting.kind), margin=weighting.margin)
    return token_weights.sinks_down(score)


@torch.inference_mode()
def activation_norms(model: LanguageModel, input_ids: Int[Tensor, "sample position"]) -> Float[Tensor, "sample position"]:
    """Return the L2 norm of each token's hidden state over the mean of its sample, averaged over the inputs of all blocks."""
    norms: list[Tensor] = []

    def hook(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        norm = arguments[0].float().norm(dim=-1)
        norms.append(norm / norm.mean(-1, keepdim=True))

    handles = [block.register_forward_pre_hook(hook) for block in cast(Any, model.network.get_decoder()).layers]
    try:
        network_body(model)(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(norms).mean(0)
