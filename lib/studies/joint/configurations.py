"""Formats for layers: made once from one calibration of the dense model, put into it in any combination, and taken out again.

A format is a module in the place of a linear layer. The dense modules are never written to, so they come back as they were.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lib.calibration import statistics as calibration
from lib.calibration.reads import ready, statistics_of
from lib.calibration.sums import InputStatistics
from lib.core.errors import require, require_known
from lib.models.language_model import LanguageModel, Role
from lib.pruning import importances, pruner, shrink
from lib.pruning.importances import UNSTRUCTURED
from lib.pruning.methods import Importance, Method, Target
from lib.quantization.rounding import Grid
from lib.studies.joint import runs
from lib.studies.joint.runs import Recipe
from lib.studies.joint.search import Unit
from lib.studies.pruning.runs import Calibrations

Kind = Literal["dense", "dynamic", "packed", "structured"]
Modules = dict[tuple[str, str], torch.nn.Module]
DENSE = "dense"
ONE_SHOT = Method("sparsegpt", sequential=False)
LARGEST_GROUP, SMALLEST_GROUP = 64, 8  # below 8, scales of 16 bits take more than 2 bits a weight
PRUNERS: tuple[tuple[str, Importance], ...] = (("Wanda", "wanda"), ("SparseGPT", "sparsegpt"), ("ALPS", "alps"))
PARTS: dict[str, tuple[Role, ...]] = {"attention": ("q", "k", "v", "o"), "MLP": ("gate", "up", "down")}
SCALE_BYTES = 4  # of the one float32 scale that a dynamically quantized matrix has


@dataclass(frozen=True)
class Format:
    """What can be done to a matrix, or to all matrices of a block's attention or MLP together.

    Attributes:
        name: for tables.
        what: what it does, in words.
        kind: `"dense"`; `"dynamic"`: int8 weights and, at each call, int8 inputs; `"packed"`: rounded and stored in few bits,
            unpacked before use, so that it computes as long as dense; `"structured"`: smaller dense matrices.
        bits: of packed weights.
        sparsity: share of packed weights, of key-value groups, or of MLP channels that goes.
        pattern: of packed weights.
        importance: what prunes packed weights; SparseGPT prunes and rounds in one sweep, others prune first.
    """

    name: str
    what: str
    kind: Kind = "packed"
    bits: int = 16
    sparsity: float = 0.0
    pattern: str = UNSTRUCTURED
    importance: Importance = "sparsegpt"

    @property
    def whole_unit(self) -> bool:
        """Whether all matrices of a block's attention (q, k, v, o) or MLP (gate, up, down) take it together."""
        return self.kind == "structured"

    def recipe(self, width: int, method: Method = ONE_SHOT, *, name: str = "a layer") -> Recipe:
        """Return how matrices with `width` input features are packed: groups of 64 columns, or of the largest divisor below.

        Raises:
            InputError: no group from 8 to 64 columns divides the width, or none that the pattern divides.

        >>> FORMATS["int4"].recipe(96).grid.group_size, FORMATS["2:4 + int4"].recipe(100).grid.group_size
        (48, 20)
        """
        unit = (importances.parse_pattern(self.pattern) or (1, 1))[1]
        sizes = [size for size in range(SMALLEST_GROUP, LARGEST_GROUP + 1) if width % size == 0 and size % unit == 0]
        rule = f"a group of {SMALLEST_GROUP} to {LARGEST_GROUP} columns" + (f" in multiples of {unit}" if unit > 1 else "")
        got = f"{width} in {name}"
        require(bool(sizes), f"{rule} must divide the input features", got, f"leave out {self.name} for this model")
        own = replace(method, importance=self.importance)
        order = "joint" if self.importance == "sparsegpt" else "prune, quantize"
        return Recipe(Grid(self.bits, sizes[-1], "search"), Target(self.sparsity, self.pattern), own, order)


FORMATS = {
    each.name: each
    for each in (
        Format(DENSE, "as it is, stored in bfloat16", "dense"),
        Format("int8 dynamic", "int8 weights, one scale a matrix; inputs rounded to int8 at each call", "dynamic", bits=8),
        Format("int4", "GPTQ in 4 bits, computed dense", bits=4),
        Format("int3", "GPTQ in 3 bits, computed dense", bits=3),
        Format("2:4 + int4", "pruned and rounded in one sweep, computed dense", bits=4, sparsity=0.5, pattern="2:4"),
        *(
            Format(f"50 % by {name} + int4", "pruned, then rounded by GPTQ; computed dense", bits=4, sparsity=0.5, importance=own)
            for name, own in PRUNERS
        ),
        Format("structured 30 %", "30 % of key-value groups, or of MLP channels, cut out", "structured", sparsity=0.3),
        Format("structured 50 %", "half of the key-value groups, or of the MLP channels, cut out", "structured", sparsity=0.5),
    )
}


def named(names: Sequence[str]) -> list[Format]:
    """Return formats by name, dense first.

    Raises:
        InputError: a format that there is not.
    """
    require_known(names, FORMATS, "a format")
    return [FORMATS[name] for name in dict.fromkeys((DENSE, *names))]


@dataclass(frozen=True)
class Prepared:
    """A model's layers in all formats.

    Attributes:
        found: the calibrations they come from, with the bench and its model.
        formats: those that are offered, by name, dense first.
        modules: what stands for a layer, by its name and the format's; dense ones are the model's own.
        missing: why a format is not offered, by its name, or by its name and the part of a block.
        method: what the calibration read.
    """

    found: Calibrations
    formats: Mapping[str, Format]
    modules: Modules = field(repr=False)
    missing: Mapping[str, str]
    method: Method

    @property
    def model(self) -> LanguageModel:
        """The dense model."""
        return self.found.bench.model

    def offers(self) -> list[tuple[Unit, str]]:
        """Return (layers, format) of everything that can be chosen: single layers first, then whole units."""
        single = [
            ((layer.name,), name)
            for layer in self.model.layers
            for name, each in self.formats.items()
            if not each.whole_unit and (layer.name, name) in self.modules
        ]
        whole = [
            (unit, name)
            for unit in units(self.model)
            for name, each in self.formats.items()
            if each.whole_unit and all((layer, name) in self.modules for layer in unit)
        ]
        return single + whole


def units(model: LanguageModel) -> dict[Unit, tuple[int, str]]:
    """Return the block and part, `"attention"` or `"MLP"`, of all layers that a structured format changes together."""
    return {
        tuple(layer.name for layer in layers if layer.role in roles): (block, part)
        for block, layers in model.by_block.items()
        for part, roles in PARTS.items()
    }


def unavailable(form: Format, model: LanguageModel) -> str | None:
    """Return why a model cannot take a format on this machine; None where it can."""
    if form.kind == "structured":
        return shrink.refusal(model)
    if form.kind != "dynamic":
        return None
    if model.device.type != "cpu" or model.network.dtype != torch.float32:
        dtype = str(model.network.dtype).removeprefix("torch.")
        return f"torch's dynamic int8 needs float32 on a CPU, this model is {dtype} on {model.device.type}"
    try:
        _dynamic(torch.nn.Linear(8, 8))(torch.zeros(1, 8))
    except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch's dynamic int8 does not run here: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def prepare(found: Calibrations, formats: Sequence[Format] = tuple(FORMATS.values()), *, method: Method = ONE_SHOT) -> Prepared:
    """Make every layer in every format, with one pass of calibration text through the dense model.

    Args:
        found: calibrations of a model.
        formats: what to offer; dense is always offered.
        method: a one-shot SparseGPT method: its text and token weights are those of every format.

    Returns:
        The modules, and why some formats are not offered. All of them are held in memory, in the model's dtype.

    Raises:
        InputError: names that are not distinct, another method, a width that no group divides, or numbers that are not finite.
    """
    model = found.bench.model
    fits = method.importance == "sparsegpt" and not method.sequential
    order = "sequential" if method.sequential else "one-shot"
    require(fits, "formats must share a one-shot SparseGPT calibration", f"{order} {method.importance}", "use ONE_SHOT")
    listed = (FORMATS[DENSE], *(each for each in formats if each.kind != "dense"))
    names = [each.name for each in listed]
    require(len(set(names)) == len(names), "formats must have distinct names", str(names), "rename one")
    pruner.check(model, Target(0.0))
    missing = {each.name: reason for each in listed if (reason := unavailable(each, model))}
    offered = {each.name: each for each in listed if each.name not in missing}
    recipes = {
        (layer.name, each.name): each.recipe(layer.module.in_features, method, name=layer.name)
        for layer in model.layers
        for each in offered.values()
        if each.kind == "packed"
    }
    packed, norms = _calibrated(found, recipes, method)
    modules: Modules = {(layer.name, DENSE): layer.module for layer in model.layers} | packed
    for each in offered.values():
        if each.kind == "dynamic":
            modules |= {(layer.name, each.name): _dynamic(layer.module) for layer in model.layers}
        if each.kind == "structured":
            modules |= _smaller(model, each, norms, missing)
    return Prepared(found, offered, modules, missing, method)


def _calibrated(
    found: Calibrations, recipes: Mapping[tuple[str, str], Recipe], method: Method
) -> tuple[Modules, dict[tuple[int, str], Tensor]]:
    """Return the packed matrices as modules, and the norms that heads and channels are chosen by."""
    model, modules, norms, forms = found.bench.model, {}, {}, dict.fromkeys(form for _, form in recipes)

    def visit(block: int, statistics: Mapping[Role, InputStatistics]) -> None:
        """Compress the layers of one block; they stay out of the model."""
        for layer in ready(model, block, statistics, hessian=bool(recipes)):
            own = statistics_of(statistics, layer.role, layer.expert)
            importances.check_finite(own.squares, name=layer.name, what="inputs")
            if layer.role in ("o", "down"):
                norms[block, layer.role] = own.input_norm(method.aggregate)[0]
            for form in forms:
                recipe = recipes[layer.name, form]
                weight = runs.compress_matrix(layer.module.weight.detach(), recipe, own, name=layer.name).weight
                modules[layer.name, form] = _linear(weight, layer.module)

    options = {"hessian": bool(recipes), "sequential": False, "batch_size": found.bench.batch_size}
    calibration.stream(model, found.set_of(method), visit, **options)
    return modules, norms


def _linear(weight: Tensor, dense: torch.nn.Linear) -> torch.nn.Linear:
    """Return a layer with other weights and the same bias."""
    made = torch.nn.Linear(dense.in_features, dense.out_features, bias=False, device="meta")
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    made.bias = dense.bias
    return made.eval()


def _dynamic(dense: torch.nn.Linear) -> torch.nn.Module:
    """Return torch's own int8 layer, whose announced end (torch 2.10) has not come yet; warnings of it are no news."""
    from torch.ao.quantization import quantize_dynamic  # here, as it may be gone, which `unavailable` answers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = quantize_dynamic(torch.nn.Sequential(dense), {torch.nn.Linear}, dtype=torch.qint8)
    return made.eval()[0]


def _smaller(model: LanguageModel, form: Format, norms: Mapping[tuple[int, str], Tensor], missing: dict[str, str]) -> Modules:
    """Return what is left of every layer; a part of which nothing goes is not offered, and why is added to `missing`."""
    small = shrink.shrunk(model, *shrink.choose(model, sparsity=form.sparsity, input_norms=norms))
    pairs = list(zip(model.layers, small.layers, strict=True))
    modules: Modules = {}
    for part, roles in PARTS.items():
        own = {(dense.name, form.name): cut.module for dense, cut in pairs if dense.role in roles}
        if any(dense.module.weight.shape != cut.module.weight.shape for dense, cut in pairs if dense.role in roles):
            modules |= own
        else:
            missing[f"{form.name}, {part}"] = f"{form.sparsity:.0%} of so few groups or channels is none"
    return modules


@contextmanager
def configured(prepared: Prepared, formats: Mapping[str, str]) -> Iterator[LanguageModel]:
    """Lend the bench's model with its layers in other formats; the dense ones come back at the end, also after an error.

    Args:
        prepared: the formats.
        formats: name of the format by layer name; layers without one stay dense.

    Yields:
        The model. It names no layers, as a table of them holds dense ones only.

    Raises:
        InputError: unknown layers, formats that are not offered, or a structured format for some layers of a unit only.
    """
    _check(prepared, formats)
    model = prepared.model
    try:
        for name, form in formats.items():
            _put_(model, name, prepared.modules[name, form])
        yield replace(model, layers=())
    finally:
        for layer in model.layers:
            _put_(model, layer.name, layer.module)


def variant(prepared: Prepared, formats: Mapping[str, str]) -> LanguageModel:
    """Return a model of its own in these formats, for timing in turn with others; all tensors are shared.

    Arguments and errors are those of `configured`.
    """
    with configured(prepared, formats) as model:
        shared = {id(module): module for module in model.network.modules() if not list(module.children())}
        return replace(model, network=copy.deepcopy(model.network, shared), fingerprint="")


def _check(prepared: Prepared, formats: Mapping[str, str]) -> None:
    """Raise `InputError` for formats that cannot be put in."""
    for name, form in formats.items():
        offered = [other for layer, other in prepared.modules if layer == name]
        rule = f"the format of {name} must be among {', '.join(offered) or 'none: it is no layer of this model'}"
        require(form in offered, rule, repr(form), "choose one that is offered")
    for unit in units(prepared.model):
        chosen = [formats.get(name, DENSE) for name in unit]
        torn = [form for form in chosen if prepared.formats[form].whole_unit and set(chosen) != {form}]
        rule = f"all layers of a unit must take a structured format together, here {', '.join(unit)}"
        require(not torn, rule, ", ".join(chosen), "give it to all of them or to none")


def _put_(model: LanguageModel, name: str, module: torch.nn.Module) -> None:
    model.network.set_submodule(name.removesuffix(".weight"), module)
