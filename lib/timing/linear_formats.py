"""Formats of a linear layer as kernels run them: masked, CSR, 2:4, narrower, and rounded to 8 or 4 bits, each with its size.

Weights are chosen by magnitude, because what a product costs does not depend on which of its weights are zero.
"""

import copy
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lib.core.errors import require
from lib.models.language_model import LanguageModel, LinearLayer, linear_layers
from lib.pruning import importances, shrink, structured
from lib.pruning.importances import UNSTRUCTURED
from lib.pruning.structured import HeadShape
from lib.timing import format_support
from lib.timing.format_support import GROUP_SIZE, ONE_SCALE, TILE_INPUTS, LayerShape

Refusal = Callable[[LayerShape, torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Format:
    """A way to store and multiply the weights of a linear layer.

    Attributes:
        name: in tables and figures.
        make: builds the module from a plain one, which stays as it is and shares no weights that change.
        size: bytes of the weights of a layer of a shape, places, scales and padding included, for a dtype of the dense weights.
        refusal: why a layer cannot run here; None = it can.
        multiplications: share of the matrix's multiplications that the kernel does; masked zeros are multiplied like the rest.
        removed: share of channels that structured pruning takes out before.
        integers: whether the products are of 8-bit integers, which have a peak of their own.
    """

    name: str
    make: Callable[[nn.Linear], nn.Module]
    size: Callable[[LayerShape, torch.dtype], float]
    refusal: Refusal = lambda shape, device, dtype: None
    multiplications: float = 1.0
    removed: float = 0.0
    integers: bool = False

    def left(self, shape: LayerShape) -> LayerShape:
        """Return the matrix that is multiplied: smaller for structured formats, where whole units go, rounded down.

        >>> by_name("structured 30 %").left(LayerShape(16, 8, unit=4)) # 1.2 of 4 units: one goes
        LayerShape(out_features=12, in_features=8, cut='outputs', unit=4)
        """
        gone = importances.removed_count(shape.cut_features // shape.unit, self.removed) * shape.unit
        if shape.cut == "outputs":
            return replace(shape, out_features=shape.out_features - gone)
        return replace(shape, in_features=shape.in_features - gone)

    def weight_bytes(self, shape: LayerShape, *, dtype: torch.dtype) -> float:
        """Return the bytes that the weights of a layer take when the dense ones have this dtype."""
        return self.size(self.left(shape), dtype)

    def share(self, shape: LayerShape) -> float:
        """Return the share of the dense matrix's multiplications that the layer needs.

        >>> by_name("structured 50 %").share(LayerShape(16, 8)), by_name("masked 50 %").share(LayerShape(16, 8))
        (0.5, 1.0)
        """
        return self.multiplications * self.left(shape).cut_features / shape.cut_features

    def unavailable(
        self, device: torch.device, *, dtype: torch.dtype = torch.float32, shape: LayerShape | None = None
    ) -> str | None:
        """Return why the format cannot run here, for *not run: ...*, or None.

        Args:
            device: where.
            dtype: of the dense weights and of the activations.
            shape: of the layer; None asks for shapes that suit the format.
        """
        fitting = LayerShape(TILE_INPUTS, TILE_INPUTS) if shape is None else self.left(shape)
        return self.refusal(fitting, device, dtype)

    def build(self, weight: Float[Tensor, "out_feature in_feature"], shape: LayerShape | None = None) -> nn.Module:
        """Return a module that multiplies activations with a weight in this format.

        Args:
            weight: of a linear layer without bias; it stays as it is.
            shape: its shape with the way it is cut; None cuts single outputs. A structured format that cuts inputs takes
                activations of the kept inputs only, as the layer before it then gives.

        Raises:
            InputError: the shape is not that of the weight.
        """
        shape = shape or LayerShape(len(weight), weight.shape[1])
        got = (shape.out_features, shape.in_features)
        require(got == tuple(weight.shape), f"a shape must be the weight's {tuple(weight.shape)}", str(got), "pass its own")
        return self.make(_linear(_cut(weight.detach(), shape, self.removed)))


def by_name(name: str) -> Format:
    """Return a format of `FORMATS`.

    Raises:
        InputError: no such format.
    """
    require(name in FORMATS, f"a format must be among {', '.join(FORMATS)}", repr(name), "choose one of them")
    return FORMATS[name]


def layer_shape(layer: LinearLayer, heads: HeadShape) -> LayerShape:
    """Return the shape of a model's layer, cut as `shrink` cuts its role.

    Args:
        layer: of the layer table.
        heads: of the model, see `shrink.head_shape`.
    """
    unit = {"q": heads.group_width, "o": heads.group_width, "k": heads.width, "v": heads.width}.get(layer.role, 1)
    cut = "inputs" if layer.role in ("o", "down") else "outputs"
    return LayerShape(layer.module.out_features, layer.module.in_features, cut, unit)


def distinct_shapes(model: LanguageModel) -> dict[str, LayerShape]:
    """Return every shape of a model's layers once, by the role of the first layer that has it; experts' are named apart.

    Args:
        model: any loaded model; blocks may differ, as where the first one has no experts.
    """
    heads, found = shrink.head_shape(model), dict[LayerShape, str]()
    for layer in model.layers:
        whose = "" if layer.expert is None else ", shared expert" if layer.expert == "shared" else ", expert"
        shape, name = layer_shape(layer, heads), f"{layer.role}{whose}"
        if shape not in found:
            found[shape] = name if name not in found.values() else f"{name}, block {layer.block}"
    return {name: shape for shape, name in reversed(found.items())}


def model_refusal(model: LanguageModel, form: Format) -> str | None:
    """Return why a model cannot be converted to a format: the reason of the first layer that has one, or None."""
    if form.removed and shrink.refusal(model) is not None:
        return shrink.refusal(model)
    heads, dtype = shrink.head_shape(model), model.network.dtype
    shapes = (layer_shape(layer, heads) for layer in model.layers)
    return next(filter(None, (form.unavailable(model.device, dtype=dtype, shape=shape) for shape in shapes)), None)


def convert(model: LanguageModel, form: Format) -> LanguageModel:
    """Return a copy of a model with every linear layer of its blocks in a format; embeddings and LM head stay.

    Args:
        model: the dense model, left as it is.
        form: the format; structured ones remove key-value groups and MLP channels by magnitude, see `shrink`.

    Returns:
        The copy, without fingerprint; and without a layer table where modules are no `nn.Linear` any more (CSR, int8 dynamic).

    Raises:
        InputError: the format cannot run here, see `model_refusal`.
    """
    reason = model_refusal(model, form)
    require(reason is None, f"{form.name} must be able to run for {model.name}", str(reason), "record it as not run")
    if form.removed:
        return shrink.shrunk(model, *shrink.choose(model, sparsity=form.removed))
    network = copy.deepcopy(model.network)
    made = [form.make(layer.module) for layer in model.layers]
    for layer, module in zip(model.layers, made, strict=True):
        network.set_submodule(layer.name.removesuffix(".weight"), module)
    plain = all(isinstance(module, nn.Linear) for module in made)
    return replace(model, network=network, layers=linear_layers(network) if plain else (), fingerprint="")


def convert_all(model: LanguageModel, formats: Sequence[Format]) -> dict[str, LanguageModel | str]:
    """Return copies of a model by name of their format, or the reason where there can be none."""
    return {form.name: model_refusal(model, form) or convert(model, form) for form in formats}


def stored_bytes(module: nn.Module) -> int:
    """Count the bytes of all weights and biases in a module, in whatever format; a tensor in two places counts once.

    >>> stored_bytes(nn.Linear(6, 4))  # 24 weights and 4 biases
    112
    """
    tensors: dict[int, Tensor] = {id(parameter): parameter for parameter in module.parameters()}
    total = 0
    for part in module.modules():
        if isinstance(part, CsrLinear):
            tensors[id(part.weight)] = part.weight
        elif not isinstance(part, nn.Linear) and callable(getattr(part, "weight", None)):
            weight, bias = cast(Tensor, part.weight()), part.bias()  # type: ignore[operator]  # int8 dynamic packs its weights
            total += weight.int_repr().nbytes + ONE_SCALE + (0 if bias is None else bias.nbytes)
    return total + sum(map(_bytes, tensors.values()))


class CsrLinear(nn.Module):
    """A linear layer whose zeros are left out: values, 32-bit columns, and where each row begins.

    A module, because it takes the place of one; 32-bit places, because they are smaller and faster than torch's usual 64 bits.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says with the first one that CSR is in beta
            found = linear.weight.detach().to_sparse_csr()
            places = found.crow_indices().int(), found.col_indices().int()
            sparse = torch.sparse_csr_tensor(*places, found.values(), size=found.shape, check_invariants=True)
        self.register_buffer("weight", sparse)
        self.bias = linear.bias

    def forward(self, inputs: Float[Tensor, "*row in_feature"]) -> Float[Tensor, "*row out_feature"]:
        """Multiply, sparse matrix first: torch knows no other order for these."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        outputs = (self.weight @ rows.T).T.reshape(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Make a plain layer around copies, without drawing weights that would be thrown away."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def _cut(weight: Tensor, shape: LayerShape, removed: float) -> Tensor:
    """Keep the units with the largest norms."""
    if not removed:
        return weight
    channels = weight.T if shape.cut == "outputs" else weight
    norms = structured.column_importance(channels).view(-1, shape.unit).square().sum(1)
    units = structured.kept_units(norms, sparsity=removed)
    kept = (units[:, None] * shape.unit + torch.arange(shape.unit, device=units.device)).flatten()
    return weight[kept] if shape.cut == "outputs" else weight[:, kept]


def _copied(linear: nn.Linear) -> nn.Linear:
    return _linear(linear.weight, linear.bias)


def _masked(linear: nn.Linear, *, pattern: str = UNSTRUCTURED) -> nn.Linear:
    """Zero half of every row, or of every group of an N:M pattern."""
    scores = importances.magnitude_importance(linear.weight.detach().float())
    mask = importances.keep_mask(scores, sparsity=0.5, pattern=pattern)
    return _linear(importances.prune(linear.weight.detach(), mask), linear.bias)


def _semi_structured(linear: nn.Linear) -> nn.Linear:
    made = _masked(linear, pattern="2:4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says with the first one that this is a prototype
        made.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(made.weight.detach()), requires_grad=False)
    return made


def _int8_dynamic(linear: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the function deprecated, see `format_support.dynamic_refusal`
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]


def _torchao(linear: nn.Linear, config: str, **options: object) -> nn.Module:
    api = importlib.import_module("torchao.quantization")
    made = nn.Sequential(_copied(linear))
    api.quantize_(made, getattr(api, config)(set_inductor_config=False, **options))
    return made[0]


def _bytes(tensor: Tensor) -> int:
    """Count a tensor's bytes: the parts of a compressed one, and all numbers of a plain one."""
    if tensor.layout == torch.sparse_csr:
        return sum(part.nbytes for part in (tensor.values(), tensor.crow_indices(), tensor.col_indices()))
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])
    return tensor.nbytes


def _formats() -> list[Format]:
    int4 = {"group_size": GROUP_SIZE, "int4_packing_format": "tile_packed_to_4d"}  # torchao's default needs a library more
    return [
        Format("dense", _copied, format_support.dense_bytes),
        Format("masked 50 %", _masked, format_support.dense_bytes),
        Format(
            "CSR 50 %",
            lambda linear: CsrLinear(_masked(linear)),
            format_support.csr_bytes,
            format_support.csr_refusal,
            multiplications=0.5,
        ),
        Format(
            "2:4",
            _semi_structured,
            format_support.semi_structured_bytes,
            format_support.semi_structured_refusal,
            multiplications=0.5,
        ),
        Format("structured 30 %", _copied, format_support.dense_bytes, removed=0.3),
        Format("structured 50 %", _copied, format_support.dense_bytes, removed=0.5),
        Format("int8 dynamic", _int8_dynamic, format_support.one_scale_bytes, format_support.dynamic_refusal, integers=True),
        Format(
            "int8 weights",
            lambda linear: _torchao(linear, "Int8WeightOnlyConfig"),
            format_support.int8_bytes,
            format_support.torchao_refusal,
        ),
        Format(
            "int4 weights",
            lambda linear: _torchao(linear, "Int4WeightOnlyConfig", **int4),
            format_support.int4_bytes,
            format_support.int4_refusal,
        ),
    ]


FORMATS = {form.name: form for form in _formats()}
DENSE = FORMATS["dense"]
