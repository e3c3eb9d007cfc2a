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

from lib.calibration.hidden_states import HiddenStates, ReachedError, first_inputs
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel, Role

Aggregate = Literal["root_mean_square", "sum_of_norms"]
# layers that read the same tensor share their statistics
READS: dict[Role, Role] = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
# From the last tensor that a block reads to the first: what one of them holds does not depend on the matrices that read it or a
# later one, so those may be written at once, and all statistics are still those of the block as it was.
LAST_FIRST: tuple[Role, ...] = ("down", "gate", "o", "q")

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
        by_group: whether rows of the matrix come in groups (key-value heads) that weigh tokens differently.
        squares: sum of (omega x)^2 by group and feature; one group when not.
        norms: sum over samples of the sample's L2 norm by group and feature.
        samples: samples seen.
        products: sum of (omega x)(omega x)^T, when asked for.
    """

    def __init__(self, features: int, *, hessian: bool, device: torch.device, groups: int | None = None) -> None:
        self.by_group = groups is not None
        self.squares = torch.zeros(groups or 1, features, device=device)
        self.norms = torch.zeros(groups or 1, features, device=device)
        self.samples = 0
        self.products = torch.zeros(features, features, device=device) if hessian else None

    def add(self, inputs: Float[Tensor, "sample position feature"], weight: Tensor | None) -> None:
        """Add a batch.

        Args:
            inputs: what the layer read.
            weight: `[sample, position]`; or `[sample, head, position]`: by group its heads in equal parts, otherwise the heads
                whose outputs the input features are.
        """
        if self.products is None and (weight is None or weight.dim() == 2):
            add_shared([self], inputs, [weight])
            return
        self.samples += len(inputs)
        if weight is not None and weight.dim() == 3 and self.by_group:
            by_group = weight.unflatten(1, (len(self.squares), -1)).mean(2)
            for group in range(len(self.squares)):
                self._add(group, inputs.float() * by_group[:, group, :, None].to(inputs.device))
        elif weight is None:
            self._add(0, inputs.float())
        else:
            self._add(0, inputs.float() * spread(weight, inputs.shape[-1]).to(inputs.device))

    def _add(self, group: int, values: Tensor) -> None:
        self._add_squares(group, (values * values).sum(1))
        if self.products is not None:
            flat = values.flatten(0, 1)
            self.products.addmm_(flat.T, flat)

    def _add_squares(self, group: int, squares: Float[Tensor, "sample feature"]) -> None:
        self.squares[group] += squares.sum(0)
        self.norms[group] += squares.sqrt().sum(0)

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


class _OneHessian(InputStatistics):
    """Statistics whose Hessian takes the place of their outer products, and is given away to the last layer that reads it.

    SparseGPT works on a copy: the matrix itself is then gone while the copy is inverted, which is the peak of a block.
    """

    def __init__(self, features: int, *, device: torch.device, readers: int) -> None:
        super().__init__(features, hessian=True, device=device)
        self._readers, self._is_hessian = readers, False

    def hessian(self) -> Float[Tensor, "feature feature"]:
        """Return the Hessian, as often as there are readers; nothing may be added afterwards."""
        found = cast(Tensor, self.products)
        if not self._is_hessian:
            found.mul_(2.0 / self.samples)
            self._is_hessian = True
        self._readers -= 1
        if not self._readers:
            self.products = None
        return found


def add_shared(
    statistics: Sequence[InputStatistics],
    inputs: Float[Tensor, "sample position feature"],
    weights: Sequence[Float[Tensor, "sample position"] | None],
) -> None:
    """Add a batch to the norms of several statistics that weigh its tokens differently, squaring it once.

    Args:
        statistics: without outer products and without groups.
        inputs: what the layer read.
        weights: of its tokens, one for each of the statistics.
    """
    ones = torch.ones(inputs.shape[:2], device=inputs.device)
    of_each = [ones if weight is None else weight.to(inputs.device).float().square() for weight in weights]
    squares = torch.stack(of_each, 1) @ inputs.float().square()
    for number, found in enumerate(statistics):
        found.samples += len(inputs)
        found._add_squares(0, squares[:, number])


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
    states: HiddenStates | None = None,
    by_role: bool = False,
) -> None:
    """Walk through the blocks: collect the statistics of one, let `visit` use them, go on to the next.

    Args:
        model: any loaded model; `visit` may change its weights.
        calibration: what it reads.
        visit: called with the block's index and its statistics by the role that reads them (see `READS`).
        hessian: collect outer products too.
        sequential: True computes the next block's input with the block as `visit` left it, False with the block as it was.
        batch_size: samples at one time; changes memory, and the result only by rounding.
        states: where hidden states wait between blocks; on the device when None.
        by_role: collect one Hessian at a time, with a pass through the part of the block before it: `visit` is then called for
            each, in the order of `LAST_FIRST`, and may change what reads it. The first call brings the norms of all.

    Raises:
        InputError: the calibration set is empty.

    Source: the layer-by-layer scheme of SparseGPT and Wanda; `sequential=False` is the one-shot order of the sink variant.
    """
    if not len(calibration.input_ids):
        raise InputError("a calibration set must hold samples, got none: give at least one window")
    if hessian and calibration.by_head:
        raise InputError("token weights by head must go with norms, got a Hessian: use weights by layer with SparseGPT")
    check_weights(model, calibration.token_weight)
    blocks = cast(Any, model.network.get_decoder()).layers
    states = states or HiddenStates("device", model.device)
    options = first_inputs(model, calibration.input_ids, states, batch_size)
    batches = range(-(-len(calibration.input_ids) // batch_size))
    roles = LAST_FIRST if hessian and by_role else LAST_FIRST[:1]
    for index, block in enumerate(blocks):
        last, weight = index + 1 == len(blocks), of_layer(calibration.token_weight, index)
        parts = [None] * len(batches) if weight is None else weight.split(batch_size)
        for role in roles:
            if len(roles) == 1:
                found = new_statistics(model, index, hessian=hessian, by_head=calibration.by_head)
            else:
                found = _of_role(model, index, role)
            until = None if role == roles[0] and not (sequential or last) else role
            for batch, part in zip(batches, parts, strict=True):
                with suppress(ReachedError), reading(model, [index], partial(_add, found, part, until)):
                    states.put(index + 1, batch, block(states.get(index, batch), **options[batch]))
                    if len(roles) == 1:
                        states.drop(index, batch)
            visit(index, found)
            del found  # before the next ones exist
        for batch in batches:
            if sequential and not last:
                states.put(index + 1, batch, block(states.get(index, batch), **options[batch]))
            states.drop(index, batch)


def _of_role(model: LanguageModel, block: int, role: Role) -> dict[Role, InputStatistics]:
    """Make empty statistics of one Hessian; the first of a block comes with the norms of all tensors.

    Inputs that are not finite are then found in the order of the layers, and before any of them is changed.
    """
    found = new_statistics(model, block, hessian=False) if role == LAST_FIRST[0] else {}
    readers = [layer.module for layer in model.layers if layer.block == block and READS[layer.role] == role]
    found[role] = _OneHessian(readers[0].in_features, device=readers[0].weight.device, readers=len(readers))
    return found


def _add(found: dict[Role, InputStatistics], weight: Tensor | None, until: Role | None, read: tuple[int, Role, Tensor]) -> None:
    """Add what one layer read; behind the last one that is wanted, end the pass, which None lets go on to the next block."""
    _, role, inputs = read
    add_weighted(found, role, inputs, weight)
    if role == until:
        raise ReachedError


def check_weights(model: LanguageModel, weight: Tensor | None) -> None:
    """Raise `InputError` when token weights by layer or head are those of another model."""
    if weight is None or weight.dim() == 2:
        return
    wanted = (1 + model.layers[-1].block, model.network.config.num_attention_heads)
    got = (len(weight), weight.shape[2] if weight.dim() == 4 else wanted[1])
    if got != wanted:
        rule = f"token weights must be for {wanted[0]} layers of {wanted[1]} heads"
        raise InputError(f"{rule}, got {got[0]} and {got[1]}: measure them on this model")


def check_masses(model: LanguageModel, mass: Float[Tensor, "layer sample head position"]) -> None:
    """Raise `InputError`, naming the first layer, when attention masses are not finite: then its input was not."""
    finite = mass.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        name = next(layer.name for layer in model.layers if layer.block == bad)
        raise InputError(f"inputs of {name} must be finite, got some that are not: check the checkpoint and its dtype")


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


def new_statistics(model: LanguageModel, block: int, *, hessian: bool, by_head: bool = False) -> dict[Role, InputStatistics]:
    """Make empty statistics for each tensor that is read; with weights by head, `v` has its own, a group a key-value head."""
    modules = {layer.role: layer.module for layer in model.layers if layer.block == block}
    found: dict[Role, InputStatistics] = {}
    own: tuple[Role, ...] = ("v",) if by_head else ()
    for role in (*dict.fromkeys(READS.values()), *own):
        linear = modules[role]
        groups = model.network.config.num_key_value_heads if role == "v" else None
        found[role] = InputStatistics(linear.in_features, hessian=hessian, device=linear.weight.device, groups=groups)
    return found


def _use_input(
    use: Callable[[tuple[int, Role, Tensor]], None], block: int, role: Role, _: torch.nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    use((block, role, inputs[0]))


@contextmanager
def reading(model: LanguageModel, blocks: Iterable[int], use: Callable[[tuple[int, Role, Tensor]], None]) -> Iterator[None]:
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
