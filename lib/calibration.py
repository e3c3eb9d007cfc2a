"""Statistics of what linear layers read, one decoder block at a time, and pruning with them.

Only the statistics of one block exist at a time; between blocks there are the hidden states of the calibration samples.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib import attention
from lib.config import InputError
from lib.models import LanguageModel, LinearLayer, Role, network_body

Aggregate = Literal["root_mean_square", "sum_of_norms"]
MEMORY_BUDGET = 2**31  # bytes of kept inputs; 4 windows of 2048 tokens of LLaDA-8B in bfloat16 would take 6 times as much
# layers that read the same tensor share their statistics
READS: dict[Role, Role] = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows, clean or noised, and how much each token counts.

    `token_weight` is omega of the paper's Eq. 12, 1 everywhere when None; it multiplies the input of every linear layer.
    """

    input_ids: Int[Tensor, "sample position"]
    token_weight: Float[Tensor, "sample position"] | None = None

    def __post_init__(self) -> None:
        weight, shape = self.token_weight, tuple(self.input_ids.shape)
        if weight is None:
            return
        if tuple(weight.shape) != shape:
            raise InputError(
                f"token weights must have the shape of the ids, {shape}, got {tuple(weight.shape)}: give one per token"
            )
        if not bool((weight.isfinite() & (weight >= 0)).all()) or not bool((weight > 0).any()):
            raise InputError("token weights must be finite, not negative and not all 0, got others: check the sink scores")


class InputStatistics:
    """Sums over calibration tokens of one linear layer's input, in float32.

    Attributes:
        squares: sum of (omega x)^2 by feature.
        norms: sum over samples of the sample's L2 norm by feature.
        samples: samples seen.
        products: sum of (omega x)(omega x)^T, when asked for.
    """

    def __init__(self, features: int, *, hessian: bool, device: torch.device) -> None:
        self.squares = torch.zeros(features, device=device)
        self.norms = torch.zeros(features, device=device)
        self.samples = 0
        self.products = torch.zeros(features, features, device=device) if hessian else None

    def add(self, inputs: Float[Tensor, "sample position feature"], weight: Float[Tensor, "sample position"] | None) -> None:
        """Add a batch."""
        values = inputs.float() if weight is None else inputs.float() * weight.to(inputs.device)[..., None]
        squares = (values * values).sum(1)
        self.squares += squares.sum(0)
        self.norms += squares.sqrt().sum(0)
        self.samples += len(values)
        if self.products is not None:
            flat = values.flatten(0, 1)
            self.products += flat.T @ flat

    def input_norm(self, aggregate: Aggregate) -> Float[Tensor, "feature"]:
        """Return the norm of each feature: over all tokens (up to a common factor), or summed over samples.

        Source: Wanda's root mean square over samples; the sum of norms of the authors' sink variant.
        """
        return (self.squares / self.samples).sqrt() if aggregate == "root_mean_square" else self.norms

    def hessian(self) -> Float[Tensor, "feature feature"]:
        """Return 2 / samples times the sum of outer products.

        Raises:
            InputError: outer products were not asked for.
        """
        if self.products is None:
            raise InputError("a Hessian must be collected, got norms only: ask for hessian=True")
        return self.products * (2.0 / self.samples)


Visit = Callable[[int, dict[Role, InputStatistics]], None]


@torch.no_grad()
def stream(
    model: LanguageModel,
    calibration: CalibrationSet,
    visit: Visit,
    *,
    hessian: bool = False,
    sequential: bool = True,
    batch_size: int = 4,
) -> None:
    """Walk through the blocks: collect the statistics of one, let `visit` use them, go on to the next.

    Args:
        model: any loaded model; `visit` may change its weights.
        calibration: what it reads.
        visit: called with the block's index and its statistics by the role that reads them (see `READS`).
        hessian: collect outer products too.
        sequential: True computes the next block's input with the block as `visit` left it, False with the block as it was.
        batch_size: samples at one time; changes memory, and the result only by rounding.

    Raises:
        InputError: the calibration set is empty.

    Source: the layer-by-layer scheme of SparseGPT and Wanda; `sequential=False` is the one-shot order of the sink variant.
    """
    if not len(calibration.input_ids):
        raise InputError("a calibration set must hold samples, got none: give at least one window")
    blocks = cast(Any, model.network.get_decoder()).layers
    hidden, options = _first_inputs(model, calibration.input_ids, batch_size)
    weights = [None] * len(hidden) if calibration.token_weight is None else list(calibration.token_weight.split(batch_size))
    for index, block in enumerate(blocks):
        found = _new_statistics(model, index, hessian=hessian)
        outputs = []
        for inputs, weight in zip(hidden, weights, strict=True):
            with _collecting(model, index, found, weight):
                outputs.append(block(inputs, **options))
        visit(index, found)
        del found  # before the next block's exist
        again = sequential and index + 1 < len(blocks)
        hidden = [block(inputs, **options) for inputs in hidden] if again else outputs


def _layers(model: LanguageModel, block: int) -> dict[Role, LinearLayer]:
    return {layer.role: layer for layer in model.layers if layer.block == block}


def _new_statistics(model: LanguageModel, block: int, *, hessian: bool) -> dict[Role, InputStatistics]:
    layers = _layers(model, block)
    return {
        role: InputStatistics(layers[role].module.in_features, hessian=hessian, device=layers[role].module.weight.device)
        for role in dict.fromkeys(READS.values())
    }


@contextmanager
def _collecting(model: LanguageModel, block: int, found: dict[Role, InputStatistics], weight: Tensor | None) -> Iterator[None]:
    """Add what the block's linear layers read inside the context."""
    layers = _layers(model, block)

    def hook(role: Role) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: found[role].add(inputs[0], weight)

    handles = [layers[role].module.register_forward_pre_hook(hook(role)) for role in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ReachedError(Exception):
    """Raised to stop a forward pass once the first block has been reached."""


def _first_inputs(model: LanguageModel, ids: Tensor, batch_size: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what the first block reads, a tensor a batch, and the other arguments, which are the same for all batches."""
    kept: list[Tensor] = []
    options: dict[str, Any] = {}

    def stop(_: torch.nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        kept.append(arguments[0])
        options.update(named)
        raise _ReachedError

    first = cast(Any, model.network.get_decoder()).layers[0]
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in ids.split(batch_size):
            with suppress(_ReachedError):
                network_body(model)(input_ids=batch.to(model.device), use_cache=False)
    finally:
        handle.remove()
    return kept, options


def input_bytes(model: LanguageModel, *, samples: int, positions: int) -> int:
    """Return how much memory the inputs of all linear layers of one batch take, in bytes."""
    width = sum(layer.module.in_features for layer in model.layers if READS[layer.role] == layer.role)
    return width * samples * positions * model.layers[0].module.weight.element_size()


@torch.no_grad()
def one_shot_statistics(
    model: LanguageModel,
    input_ids: Int[Tensor, "sample position"],
    weigh: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 4,
    memory_budget: int = MEMORY_BUDGET,
) -> list[dict[Role, InputStatistics]]:
    """Collect the statistics of every block of the dense model with token weights that its own attention masses decide.

    The weights of a batch are known only after its last layer, so what the linear layers read is kept until then: one forward
    pass a batch. When that takes more memory than allowed, a second pass adds up the statistics; both give the same numbers.

    Args:
        model: the dense model.
        input_ids: calibration samples, clean or noised.
        weigh: masses `[layer, sample, head, position]` to token weights `[sample, position]`.
        batch_size: samples at one time.
        memory_budget: bytes that may be kept.

    Returns:
        Statistics by block and reading role; norms only.

    Source: the authors' release makes two passes for each (window, noise level).
    """
    blocks = range(1 + max(layer.block for layer in model.layers))
    found = [_new_statistics(model, block, hessian=False) for block in blocks]
    for batch in input_ids.split(batch_size):
        fits = input_bytes(model, samples=len(batch), positions=batch.shape[1]) <= memory_budget
        kept: list[tuple[InputStatistics, Tensor]] = []
        with attention.record(model) as recorder, _reading(model, found, kept.append if fits else None):
            network_body(model)(input_ids=batch.to(model.device), use_cache=False)
            weight = weigh(recorder.pop()[:, :, :, 0])
        if not fits:
            with _reading(model, found, lambda pair, weight=weight: pair[0].add(pair[1], weight)):
                network_body(model)(input_ids=batch.to(model.device), use_cache=False)
        for statistics, inputs in kept:
            statistics.add(inputs, weight)
    return found


@contextmanager
def _reading(
    model: LanguageModel,
    found: list[dict[Role, InputStatistics]],
    use: Callable[[tuple[InputStatistics, Tensor]], None] | None,
) -> Iterator[None]:
    """Hand (statistics, input) of every reading layer to `use` during the passes inside the context."""
    handles = []
    for layer in model.layers:
        if use is not None and READS[layer.role] == layer.role:
            statistics = found[layer.block][layer.role]
            handles.append(
                layer.module.register_forward_pre_hook(lambda _, inputs, statistics=statistics: use((statistics, inputs[0])))
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
