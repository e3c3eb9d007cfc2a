"""How much calibration tokens count, measured on the dense model: by its sinks, by as many other tokens, or by instability."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.attention import masses as attention
from lib.calibration import token_weights
from lib.calibration.statistics import check_masses
from lib.calibration.token_weights import CONTROLS, DECODING, INSTABILITY, Level, Unit, Weighting
from lib.core.errors import InputError, require
from lib.core.runtime import generator
from lib.models.language_model import LanguageModel, logits_at, network_body
from lib.models.layers.anatomy import blocks_in

SAMPLES: dict[Level, int] = {"aggregate": 0, "layer": 1, "head": 1}  # the dimension of samples in masses reduced to a level


class Masses:
    """The dense model's attention masses, and more, of some samples, reduced to what weightings compare; each is measured once.

    Attributes:
        model: the dense model.
        input_ids: clean or noised samples.
        batch_size: samples at one time; does not change the result.
    """

    def __init__(self, model: LanguageModel, input_ids: Int[Tensor, "sample position"], *, batch_size: int = 4) -> None:
        self.model, self.input_ids, self.batch_size = model, input_ids, batch_size
        self._reduced: dict[tuple[Level, Unit], Tensor] = {}
        self._norms: Tensor | None = None
        self._confidence: Tensor | None = None

    def reduced(self, level: Level, unit: Unit) -> Tensor:
        """Return the masses reduced to a level, see `token_weights.reduced`, on the CPU.

        Raises:
            InputError: activations that are not finite.
        """
        if (level, unit) not in self._reduced:
            units: tuple[Unit, ...] = get_args(Unit)
            levels: set[Level] = {level, "aggregate"}  # the latter is small, and wanted mostly
            parts: dict[tuple[Level, Unit], list[Tensor]] = {key: [] for key in product(levels, units)}
            for batch in self._batches():
                mass = attention.sink_mass(self.model, batch)
                check_masses(self.model, mass)
                for key, found in parts.items():
                    found.append(token_weights.reduced(mass, level=key[0], unit=key[1]).cpu())
            self._reduced |= {key: torch.cat(found, dim=SAMPLES[key[0]]) for key, found in parts.items()}
        return self._reduced[level, unit]

    def norms(self) -> Float[Tensor, "sample position"]:
        """Return the activation norms, see `activation_norms`, on the CPU."""
        if self._norms is None:
            self._norms = torch.cat([activation_norms(self.model, batch).cpu() for batch in self._batches()])
        return self._norms

    def confidence(self) -> Float[Tensor, "sample position"]:
        """Return the highest probability at every masked position, 0 elsewhere, on the CPU.

        Raises:
            InputError: a model without masks.
        """
        mask = self.model.mask_token_id
        if mask is None:
            raise InputError(f"confidence in masked tokens must be of a diffusion model, got {self.model.name}: weigh by sinks")
        if self._confidence is None:
            parts = []
            for batch in self._batches():
                where = batch == mask
                found = torch.zeros(batch.shape, device=batch.device)
                found[where] = logits_at(self.model, batch, where).softmax(-1).amax(-1)
                parts.append(found.cpu())
            self._confidence = torch.cat(parts)
        return self._confidence

    def _batches(self) -> Iterator[Tensor]:
        return (part.to(self.model.device) for part in self.input_ids.split(self.batch_size))


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
    return weights(Masses(model, input_ids, batch_size=batch_size), weighting, seed=seed)


@torch.inference_mode()
def weights(masses: Masses, weighting: Weighting, *, seed: int = 0) -> Tensor:
    """Return the weight of each token, as `measure` does, from masses that other weightings share."""
    if weighting.kind == "mask":
        rule, got = "the control 'mask' must have mask tokens to weigh down", f"none with {masses.model.name}"
        require(masses.model.mask_token_id is not None, rule, got, "use random or first")
    if weighting.kind in INSTABILITY:
        raise InputError(f"instability must be measured over noise levels, got {weighting.kind}: use measure_over_levels")
    if weighting.kind in DECODING:
        confidence = masses.confidence()
        return token_weights.decoding_weight(
            confidence, masses.input_ids.cpu() == masses.model.mask_token_id, kind=weighting.kind
        )
    scores = token_weights.score_of(masses.reduced(weighting.level, weighting.unit), weighting)
    if weighting.kind not in CONTROLS:
        return _weight(scores, weighting)
    return token_weights.control_down(
        scores,
        weighting.kind,
        input_ids=masses.input_ids.cpu(),
        mask_token_id=masses.model.mask_token_id,
        activation_norm=masses.norms() if weighting.kind == "norm" else None,
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
    masses = Masses(model, noised.flatten(0, 1), batch_size=batch_size)
    return weights_over_levels(masses, weighting, levels=noised.shape[1], seed=seed)


@torch.inference_mode()
def weights_over_levels(masses: Masses, weighting: Weighting, *, levels: int, seed: int = 0) -> Float[Tensor, "window position"]:
    """Return one weight a token of each window, as `measure_over_levels` does, from masses that other weightings share."""
    if weighting.level != "aggregate":
        raise InputError(f"weights over noise levels must be those of the aggregate, got level {weighting.level}: use aggregate")
    if weighting.averaged:
        return token_weights.average_over_levels(weights(masses, weighting, seed=seed).unflatten(0, (-1, levels)))
    mass = masses.reduced("aggregate", "mean_one").unflatten(0, (-1, levels))
    score = token_weights.instability_score(mass, kind=cast(Any, weighting.kind), margin=weighting.margin)
    return token_weights.sinks_down(score)


@torch.inference_mode()
def activation_norms(model: LanguageModel, input_ids: Int[Tensor, "sample position"]) -> Float[Tensor, "sample position"]:
    """Return the L2 norm of each token's hidden state over the mean of its sample, averaged over the inputs of all blocks."""
    norms: list[Tensor] = []

    def hook(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        norm = arguments[0].float().norm(dim=-1)
        norms.append(norm / norm.mean(-1, keepdim=True))

    handles = [block.register_forward_pre_hook(hook) for block in blocks_in(model.network)]
    try:
        network_body(model)(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(norms).mean(0)
