"""Rewritings of a model that leave its function as it is but suit rounding: AWQ's scales, QuaRot's two foldable rotations.

Both go into norms and neighbouring matrices, so that the layout stays the plain one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lib.calibration.reads import Read, reading
from lib.calibration.statistics import CalibrationSet, of_layer
from lib.core.errors import InputError, require
from lib.models.language_model import LanguageModel, Role, network_body
from lib.models.layers.anatomy import require_decoder
from lib.pruning import shrink
from lib.quantization.rounding import Grid, round_to_nearest

RATIOS = tuple(step / 20 for step in range(20))  # 0, 0.05, ..., 0.95
SMALLEST = 1e-4  # of a mean size, before it is raised to a power
# the matrices that share an input, by its first reader
GROUPS: Mapping[Role, tuple[Role, ...]] = {"q": ("q", "k", "v"), "gate": ("gate", "up"), "o": ("o",), "down": ("down",)}
Scales = dict[tuple[int, Role], Float[Tensor, "feature"]]


def check_dense(model: LanguageModel) -> None:
    """Raise `InputError` for a mixture of experts, whose router and experts read what is rewritten too, and for an encoder."""
    rule = "a rewritten model must have dense blocks"
    require(not model.has_experts, rule, f"the mixture {model.name}", "compress it as it is")
    require_decoder(model.network, "a rewritten model", name=model.name, instead="compress it as it is")


@contextmanager
def folded(model: LanguageModel) -> Iterator[LanguageModel]:
    """Lend a model whose parameters may all change, and put the old ones back at the end."""
    before = {name: tensor.detach().clone() for name, tensor in model.network.named_parameters()}
    try:
        yield model
    finally:
        for name, tensor in model.network.named_parameters():
            tensor.data.copy_(before[name])


@torch.no_grad()
def mean_sizes(model: LanguageModel, calibration: CalibrationSet, *, batch_size: int = 4) -> Scales:
    """Return the mean size of each input feature of every group of matrices, by (block, first reader).

    Args:
        model: the dense model.
        calibration: what it reads. Token weights, alike for all heads, count tokens in the mean: with those of sinks the scales
            are "without sink tokens".
        batch_size: samples at one time.

    Raises:
        InputError: token weights by head, or a mixture of experts.
    """
    check_dense(model)
    if calibration.by_head:
        raise InputError("scales must weigh tokens alike in all heads, got weights by head: use weights by layer")
    sums: Scales = {}
    weights: dict[int, Tensor] = {}
    rows = torch.arange(len(calibration.input_ids)).split(batch_size)
    for part in rows:

        def add(read: Read, part: Tensor = part) -> None:
            """Add the weighted sizes of what one layer read."""
            block, role, inputs = read.block, read.role, read.inputs
            if role not in GROUPS:
                return
            own = of_layer(calibration.token_weight, block)
            weight = torch.ones(inputs.shape[:2], dtype=torch.float64) if own is None else own[part].double()
            weight = weight.to(inputs.device)
            total = (inputs.double().abs() * weight[..., None]).sum((0, 1))
            sums[block, role] = sums[block, role] + total if (block, role) in sums else total
            if role == "q":
                weights[block] = weights.get(block, 0) + weight.sum()

        with reading(model, range(1 + model.layers[-1].block), add):
            network_body(model)(input_ids=calibration.input_ids[part].to(model.device), use_cache=False)
    return {(block, role): (total / weights[block]).float() for (block, role), total in sums.items()}


def best_scales(
    weights: Sequence[Float[Tensor, "_out in"]],
    sizes: Float[Tensor, "in"],
    hessian: Float[Tensor, "in in"],
    *,
    grid: Grid,
    ratios: Sequence[float] = RATIOS,
) -> tuple[Float[Tensor, "in"], float]:
    """Search the scales of one group of matrices: their inputs are divided, and their columns multiplied, before rounding.

    Args:
        weights: the matrices that share the input.
        sizes: mean size of each input feature.
        hessian: 2 X X^T / tokens of the input.
        grid: the format that is rounded to.
        ratios: powers of the sizes that are tried; 0 leaves everything as it is.

    Returns:
        The scales whose rounded matrices have the smallest squared error of outputs, and their power.

    Source: AWQ (arXiv 2306.00978), its search. There the error is that of the whole attention or MLP; here of the matrices' own
        outputs, which a Hessian gives exactly without running the model.

    >>> best_scales([torch.eye(2)], torch.tensor([4.0, 1.0]), torch.eye(2), grid=Grid(8), ratios=[0.5])
    (tensor([1.4142, 0.7071]), 0.5)
    """
    found: tuple[float, Tensor, float] | None = None
    for ratio in ratios:
        scales = sizes.float().clamp(min=SMALLEST) ** ratio
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for weight in weights:
            change = round_to_nearest(weight * scales, grid).dequantize() / scales - weight
            error += float(((change.to(hessian.dtype) @ hessian) * change).sum())
        if found is None or error < found[0]:
            found = error, scales, ratio
    assert found is not None
    return found[1], found[2]


def scalable(model: LanguageModel) -> tuple[Role, ...]:
    """Return the first readers whose inputs can be divided by scales: `o` only where every head has its own values."""
    config = model.network.config
    return tuple(role for role in GROUPS if role != "o" or config.num_attention_heads == config.num_key_value_heads)


@torch.no_grad()
def scale_(model: LanguageModel, scales: Mapping[tuple[int, Role], Float[Tensor, "_feature"]]) -> None:
    """Multiply columns by scales in place, and divide what makes their inputs: norms, the rows of v, the rows of up.

    Args:
        model: changed in place; what it computes stays the same.
        scales: larger than 0, by (block, first reader), for roles of `scalable`.

    Raises:
        InputError: scales of `o` with grouped values, some that are not positive, or a mixture of experts.
    """
    check_dense(model)
    for (index, role), scale in scales.items():
        require(role in scalable(model), "scales of o must have a value head for each query head", role, "leave o out")
        require(bool((scale > 0).all()), "scales must be positive", f"{float(scale.min()):g}", "search them with best_scales")
        block = cast(Any, model.network.get_decoder()).layers[index]
        makers = {"q": block.input_layernorm, "gate": block.post_attention_layernorm, "o": block.self_attn.v_proj}
        maker = makers.get(role, block.mlp.up_proj)
        for layer in model.layers:
            if layer.block == index and layer.role in GROUPS[role]:
                layer.module.weight.mul_(scale.to(layer.module.weight))
        divided = scale.to(maker.weight)
        maker.weight.div_(divided if maker.weight.dim() == 1 else divided[:, None])
        if getattr(maker, "bias", None) is not None:
            maker.bias.div_(divided)


def hadamard(width: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "width width"]:
    """Return an orthogonal matrix of entries of equal size, in float64, its rows with random signs when a stream is given.

    Raises:
        InputError: a width that is no power of two.

    >>> (hadamard(2) * 2**0.5).round().tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    _check_width(width)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / width**0.5
    if generator is None:
        return matrix
    return matrix * (2.0 * torch.randint(0, 2, (width, 1), generator=generator) - 1.0)


def check_rotates(model: LanguageModel) -> None:
    """Raise `InputError` for what `rotate_` refuses, before any work."""
    check_dense(model)
    tied = model.network.config.tie_word_embeddings
    require(not tied, "a rotated model must have a head of its own", "tied embeddings", "untie them first")
    for width in (model.network.config.hidden_size, shrink.head_shape(model).width):
        _check_width(width)


def _check_width(width: int) -> None:
    require(width > 0 and width & (width - 1) == 0, "a rotated width must be a power of two", str(width), "leave it as it is")


@torch.no_grad()
def rotate_(model: LanguageModel, *, generator: torch.Generator | None = None) -> None:
    """Rotate the residual stream, and the values of each head, in place; norms go into the matrices behind them.

    Args:
        model: changed in place; what it computes stays the same.
        generator: CPU generator of random signs; none when None.

    Raises:
        InputError: embeddings that are also the head, widths that are no power of two, or a mixture of experts.

    Source: QuaRot (arXiv 2404.00456), the two rotations that need nothing at run time; its names for them are R1 and R2.
    """
    check_rotates(model)
    network, config = model.network, model.network.config
    around = hadamard(config.hidden_size, generator=generator)
    inside = hadamard(shrink.head_shape(model).width, generator=generator)
    decoder, head = cast(Any, network.get_decoder()), cast(Any, network.get_output_embeddings())
    _times_(decoder.embed_tokens.weight, around)
    for index, block in enumerate(decoder.layers):
        modules = {layer.role: layer.module for layer in model.layers if layer.block == index}
        for norm, roles in ((block.input_layernorm, "qkv"), (block.post_attention_layernorm, ("gate", "up"))):
            for role in roles:
                _times_(modules[cast(Role, role)].weight, _behind(norm, around))
            norm.weight.fill_(1.0)
        for role in ("o", "down"):
            _rows_(modules[role], around.T)
        _rows_(modules["v"], torch.block_diag(*[inside.T] * config.num_key_value_heads))
        _times_(modules["o"].weight, torch.block_diag(*[inside] * config.num_attention_heads))
    _times_(head.weight, _behind(decoder.norm, around))
    decoder.norm.weight.fill_(1.0)


def _behind(norm: Any, around: Tensor) -> Tensor:
    """Return what a norm's weights and a rotation do together, where the norm lies."""
    return norm.weight.double().diag() @ around.to(norm.weight.device)


def _times_(weight: Tensor, matrix: Tensor) -> None:
    """Multiply the columns of a matrix, in float64."""
    weight.copy_(weight.double() @ matrix.to(weight.device))


def _rows_(module: torch.nn.Linear, matrix: Tensor) -> None:
    """Multiply the rows of a matrix, and its bias, in float64."""
    module.weight.copy_(matrix.to(module.weight.device) @ module.weight.double())
    if module.bias is not None:
        module.bias.copy_(matrix.to(module.bias.device) @ module.bias.double())
