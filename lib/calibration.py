"""Statistics of what linear layers read, one decoder block at a time, and pruning with them.

Only the statistics of one block exist at a time; between blocks there are the hidden states of the calibration samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
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


Weights = Float[Tensor, "sample position"] | Float[Tensor, "layer sample position"] | Float[Tensor, "layer sample head position"]


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows, clean or noised, and how much each token counts.

    `token_weight` is omega of the paper's Eq. 12, 1 everywhere when None; it multiplies the input of every linear layer. It may
    differ by layer, and by attention head where heads can be told apart: the input of `o` and the rows of `v`.
    """

    input_ids: Int[Tensor, "sample position"]
    token_weight: Weights | None = None

    def __post_init__(self) -> None:
        weight, shape = self.token_weight, tuple(self.input_ids.shape)
        if weight is None:
            return
        got = tuple(weight.shape)
        fits = got == shape or (weight.dim() == 3 and got[1:] == shape) or (weight.dim() == 4 and (got[1], got[3]) == shape)
        if not fits:
            raise InputError(
                f"token weights must have the shape of the ids, {shape}, or one more by layer, got {got}: give one a token"
            )
        if not bool((weight.isfinite() & (weight >= 0)).all()) or not bool((weight > 0).any()):
            raise InputError("token weights must be finite, not negative and not all 0, got others: check the sink scores")

    @property
    def by_head(self) -> bool:
        """Tell whether each head has its own weights."""
        return self.token_weight is not None and self.token_weight.dim() == 4


class InputStatistics:
    """Sums over calibration tokens of one linear layer's input, in float32.

    Attributes:
        squares: sum of (omega x)^2 by group and feature; one group, or one for each key-value head.
        norms: sum over samples of the sample's L2 norm by group and feature.
        samples: samples seen.
        products: sum of (omega x)(omega x)^T, when asked for.
    """

    def __init__(self, features: int, *, hessian: bool, device: torch.device, groups: int = 1) -> None:
        self.squares = torch.zeros(groups, features, device=device)
        self.norms = torch.zeros(groups, features, device=device)
        self.samples = 0
        self.products = torch.zeros(features, features, device=device) if hessian else None

    def add(self, inputs: Float[Tensor, "sample position feature"], weight: Tensor | None) -> None:
        """Add a batch.

        Args:
            inputs: what the layer read.
            weight: `[sample, position]`; or `[sample, head, position]`: for a layer of several groups its heads in equal parts,
                for a layer of one the heads whose outputs its input features are.
        """
        self.samples += len(inputs)
        if weight is not None and weight.dim() == 3 and len(self.squares) > 1:
            by_group = weight.unflatten(1, (len(self.squares), -1)).mean(2)
            for group in range(len(self.squares)):
                self._add(group, inputs.float() * by_group[:, group, :, None].to(inputs.device))
        elif weight is None:
            self._add(0, inputs.float())
        else:
            self._add(0, inputs.float() * spread(weight, inputs.shape[-1]).to(inputs.device))

    def _add(self, group: int, values: Tensor) -> None:
        squares = (values * values).sum(1)
        self.squares[group] += squares.sum(0)
        self.norms[group] += squares.sqrt().sum(0)
        if self.products is not None:
            flat = values.flatten(0, 1)
            self.products += flat.T @ flat

    def input_norm(self, aggregate: Aggregate) -> Float[Tensor, "group feature"]:
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


def spread(weight: Tensor, features: int) -> Float[Tensor, "sample position feature_or_one"]:
    """Bring token weights to the shape of a layer's input: alike for all features, or its heads one after another."""
    return (
        weight[..., None] if weight.dim() == 2 else weight.transpose(1, 2).repeat_interleave(features // weight.shape[1], dim=2)
    )


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
    if hessian and calibration.by_head:
        raise InputError("token weights by head must go with norms, got a Hessian: use weights by layer with SparseGPT")
    blocks = cast(Any, model.network.get_decoder()).layers
    hidden, options = _first_inputs(model, calibration.input_ids, batch_size)
    for index, block in enumerate(blocks):
        found = _new_statistics(model, index, hessian=hessian, by_head=calibration.by_head)
        weight = of_layer(calibration.token_weight, index)
        parts = [None] * len(hidden) if weight is None else weight.split(batch_size)
        outputs = []
        for inputs, part in zip(hidden, parts, strict=True):
            with _reading(model, [index], lambda read, part=part, found=found: add_weighted(found, *read[1:], part)):
                outputs.append(block(inputs, **options))
        visit(index, found)
        del found  # before the next block's exist
        again = sequential and index + 1 < len(blocks)
        hidden = [block(inputs, **options) for inputs in hidden] if again else outputs


def of_layer(weight: Tensor | None, index: int) -> Tensor | None:
    """Return one layer's token weights, `[sample, position]` or `[sample, head, position]`."""
    return weight if weight is None or weight.dim() == 2 else weight[index]


def add_weighted(found: dict[Role, InputStatistics], role: Role, inputs: Tensor, weight: Tensor | None) -> None:
    """Add a batch to the statistics of the layer that read it; weights by head reach `o` and `v`, their mean the others."""
    if role not in found:
        return
    by_head = weight is not None and weight.dim() == 3
    found[role].add(inputs, weight.mean(1) if by_head and role not in ("o", "v") else weight)  # type: ignore[union-attr]


def statistics_of(found: Mapping[Role, InputStatistics], role: Role) -> InputStatistics:
    """Return the statistics of a layer's input, which layers that read the same tensor share."""
    return found[role] if role in found else found[READS[role]]


def _layers(model: LanguageModel, block: int) -> dict[Role, LinearLayer]:
    return {layer.role: layer for layer in model.layers if layer.block == block}


def _new_statistics(model: LanguageModel, block: int, *, hessian: bool, by_head: bool = False) -> dict[Role, InputStatistics]:
    """Make empty statistics for each tensor that is read; with weights by head, `v` has its own, a group a key-value head."""
    layers = _layers(model, block)
    found: dict[Role, InputStatistics] = {}
    own: tuple[Role, ...] = ("v",) if by_head else ()
    for role in (*dict.fromkeys(READS.values()), *own):
        linear = layers[role].module
        groups = model.network.config.num_key_value_heads if role == "v" else 1
        found[role] = InputStatistics(linear.in_features, hessian=hessian, device=linear.weight.device, groups=groups)
    return found


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
    # `v` reads the same tensor as `q`: it is kept twice by name, not in memory
    width = sum(layer.module.in_features for layer in model.layers if READS[layer.role] == layer.role)
    return width * samples * positions * model.layers[0].module.weight.element_size()


@torch.no_grad()
def dense_statistics(
    model: LanguageModel, calibration: CalibrationSet, *, hessian: bool = False, batch_size: int = 4
) -> list[dict[Role, InputStatistics]]:
    """Collect the statistics of every block of a model that does not change meanwhile.

    Args:
        model: the dense model.
        calibration: what it reads, and the token weights.
        hessian: collect outer products too, of all blocks at the same time.
        batch_size: samples at one time.

    Returns:
        Statistics by block and reading role.
    """
    collected: list[dict[Role, InputStatistics]] = []
    stream(model, calibration, lambda _, found: collected.append(found), hessian=hessian, sequential=False, batch_size=batch_size)
    return collected


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
        weigh: masses `[layer, sample, head, position]` to token weights as a `CalibrationSet` holds them.
        batch_size: samples at one time.
        memory_budget: bytes that may be kept.

    Returns:
        Statistics by block and reading role; norms only.

    Source: the authors' release makes two passes for each (window, noise level).
    """
    blocks = range(1 + max(layer.block for layer in model.layers))
    found: list[dict[Role, InputStatistics]] = []
    for batch in input_ids.split(batch_size):
        fits = input_bytes(model, samples=len(batch), positions=batch.shape[1]) <= memory_budget
        kept: list[tuple[int, Role, Tensor]] = []
        with attention.record(model) as recorder, _reading(model, blocks if fits else (), kept.append):
            network_body(model)(input_ids=batch.to(model.device), use_cache=False)
            weight = weigh(recorder.pop()[:, :, :, 0])
        found = found or [_new_statistics(model, block, hessian=False, by_head=weight.dim() == 4) for block in blocks]
        add = partial(_add_read, found, weight)
        if not fits:
            with _reading(model, blocks, add):
                network_body(model)(input_ids=batch.to(model.device), use_cache=False)
        for read in kept:
            add(read)
    return found


def _use_input(
    use: Callable[[tuple[int, Role, Tensor]], None], block: int, role: Role, _: torch.nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    use((block, role, inputs[0]))


def _add_read(found: Sequence[dict[Role, InputStatistics]], weight: Tensor, read: tuple[int, Role, Tensor]) -> None:
    """Add what one layer read, weighted, to its statistics."""
    block, role, inputs = read
    add_weighted(found[block], role, inputs, of_layer(weight, block))


@contextmanager
def _reading(model: LanguageModel, blocks: Iterable[int], use: Callable[[tuple[int, Role, Tensor]], None]) -> Iterator[None]:
    """Hand (block, role, input) of every linear layer of some blocks to `use` during the passes inside the context.

    Layers that read the same tensor hand it over once, but `v` always, which may have weights by head.
    """
    chosen, handles = set(blocks), []
    for layer in model.layers:
        if layer.block in chosen and (READS[layer.role] == layer.role or layer.role == "v"):
            handles.append(layer.module.register_forward_pre_hook(partial(_use_input, use, layer.block, layer.role)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
