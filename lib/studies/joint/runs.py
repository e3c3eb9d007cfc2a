"""Prune and round whole models: in which order, with which Hessian, at what loss, in how many bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.calibration import statistics as calibration
from lib.calibration import two_streams
from lib.calibration.reads import READS, fell_back, ready, statistics_of
from lib.calibration.sums import InputStatistics
from lib.core.errors import InputError
from lib.core.runtime import generator, progress
from lib.diffusion.block_reader import block_logits
from lib.diffusion.noise import process_of
from lib.models.language_model import LanguageModel, LinearLayer, Role, logits_at, may_be_noised, require_diffusion
from lib.pruning import importances, matrices, pruner
from lib.pruning.methods import Method, Target
from lib.quantization import joint, planes
from lib.quantization.joint import Compressed
from lib.quantization.rounding import DENSE_BITS, Grid, round_to_nearest, stored_bytes
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Calibrations
from lib.timing.effort import Effort, watched

Order = Literal["prune, quantize", "quantize, prune", "joint"]
Rounding = Literal["gptq", "nearest", "planes"]
Name = TypeVar("Name")
Result = TypeVar("Result")
PLAIN, DENSE = Method("sparsegpt"), Grid(DENSE_BITS)


@dataclass(frozen=True)
class Recipe:
    """How a model is compressed.

    Attributes:
        grid: format of the weights that stay; 16 bits does not round.
        target: what is removed; a sparsity of 0 prunes nothing.
        method: what prunes, and what the calibration of both steps reads and how it weighs tokens.
        order: of pruning and rounding; `"joint"` is one sweep that does both and needs SparseGPT and GPTQ.
        rounding: GPTQ, to the nearest point, or planes of signs (see `planes`), which keep no zeros, so nothing is pruned.
        weighted: whether the search for scales weighs errors with the Hessian's diagonal.
        shifted: aim at the outputs of the dense model instead of those of the dense matrix, see `joint.shifted`.
    """

    grid: Grid = DENSE
    target: Target = Target(0.0)  # noqa: RUF009 - frozen
    method: Method = PLAIN
    order: Order = "joint"
    rounding: Rounding = "gptq"
    weighted: bool = False
    shifted: bool = False

    def __post_init__(self) -> None:
        both = self.prunes and self.grid.rounds
        if self.order == "joint" and both and (self.method.importance, self.rounding) != ("sparsegpt", "gptq"):
            got = f"{self.method.importance} and {self.rounding}"
            raise InputError(f"one joint sweep must be of SparseGPT and GPTQ, got {got}: choose another order")
        if self.order == "joint" and both and (self.method.repairs or self.method.columns != "given"):
            raise InputError("one joint sweep must be without repair and in the given order, got others: choose another order")
        if self.prunes and self.rounding == "planes":
            raise InputError(f"planes of signs must be of all weights, got sparsity {self.target.sparsity:g}: drop it")
        if self.target.removed is not None:
            raise InputError("a recipe must name a sparsity, got numbers by layer: give a Target without removed")
        if self.shifted and not self.method.sequential:
            raise InputError("a shifted target must go with a sequential method, got a one-shot one: set sequential to True")
        if self.weighted and not self.needs_hessian:
            raise InputError("scales weighted by the Hessian must go with a method that collects one, got none: drop weighted")

    @property
    def prunes(self) -> bool:
        """Whether weights are removed."""
        return self.target.sparsity > 0

    @property
    def needs_hessian(self) -> bool:
        """Whether outer products of the inputs are collected."""
        return self.shifted or (self.grid.rounds and self.rounding != "nearest") or (self.prunes and self.method.needs_hessian)

    @property
    def needs_calibration(self) -> bool:
        """Whether any text is read."""
        return self.needs_hessian or (self.prunes and self.method.needs_calibration)


@dataclass(frozen=True)
class Measured:
    """One compressed model, measured.

    Attributes:
        model: its name.
        name: of the recipe, for tables.
        recipe: what was done.
        seed: of the calibration.
        zeros: share of exact zeros in the linear layers, rounded to 0 or removed.
        bytes: of the whole model as stored.
        loss: of each held-out window, in nats per token.
        fallbacks: matrices of experts that used the statistics of their layer, see `pruner.prune_`.
        effort: of compressing, without the text and the token weights, which recipes share.
    """

    model: str
    name: str
    recipe: Recipe
    seed: int
    zeros: float
    bytes: int
    loss: Float[Tensor, "window"] = field(repr=False)
    fallbacks: int = 0
    effort: Effort = Effort()  # noqa: RUF009 - frozen


def compress_matrix(
    weight: Float[Tensor, "out in"],
    recipe: Recipe,
    statistics: InputStatistics | None,
    *,
    random: torch.Generator | None = None,
    seed: int = 0,
    name: str = "a layer",
) -> Compressed:
    """Compress one matrix.

    Args:
        weight: matrix of a linear layer.
        recipe: how.
        statistics: of its input, with a Hessian where the recipe needs one.
        random: stream of random pruning.
        seed: of a random order of columns.
        name: of the layer, for errors.

    Returns:
        The matrix, its mask, and its codes and scales.
    """
    everything = torch.ones_like(weight, dtype=torch.bool)
    if not recipe.prunes:
        return _rounded(weight, everything, recipe, statistics, name=name)
    if recipe.order == "joint" and recipe.grid.rounds:
        assert statistics is not None
        options = {"sparsity": recipe.target.sparsity, "pattern": recipe.target.pattern, "damping": recipe.method.damping}
        return joint.joint(weight, statistics.hessian(), grid=recipe.grid, weighted=recipe.weighted, name=name, **options)
    given = {"random": random, "seed": seed, "name": name, "statistics": statistics}
    prune = partial(matrices.pruned, method=recipe.method, target=recipe.target, **given)
    if recipe.order != "quantize, prune":
        pruned, kept = prune(weight)
        return _rounded(pruned, kept, recipe, statistics, name=name)
    found = _rounded(weight, everything, recipe, statistics, name=name)
    # what stays must stay on its grid, so SparseGPT gives its mask and not its updates here
    kept = prune(found.weight)[1]
    codes = None if found.quantized is None else found.quantized.masked(kept)
    return Compressed(importances.prune(found.weight, kept), kept, codes)


def _rounded(weight: Tensor, kept: Tensor, recipe: Recipe, statistics: InputStatistics | None, *, name: str) -> Compressed:
    """Round what is kept."""
    if not recipe.grid.rounds:
        return Compressed(weight, kept, None)
    if recipe.rounding != "nearest":
        assert statistics is not None
        hessian, given = statistics.hessian(), {"damping": recipe.method.damping, "name": name}
        if recipe.rounding == "planes":
            return Compressed(planes.planed(weight, hessian, planes=recipe.grid.bits, **given)[0], kept, None)
        return joint.gptq(weight, hessian, grid=recipe.grid, kept=kept, weighted=recipe.weighted, **given)
    importance = statistics.hessian().diagonal() if recipe.weighted and statistics is not None else None
    found = round_to_nearest(weight, recipe.grid, importance=importance, name=name)
    return Compressed(found.dequantize(dtype=weight.dtype), kept, found)


def check(model: LanguageModel, recipe: Recipe) -> None:
    """Raise `InputError`, before any work, for a group or pattern that divides no width, weights that are not finite, or a
    mixture whose target is shifted.
    """
    pruner.check(model, recipe.target)
    if recipe.shifted:
        two_streams.check_dense(model)
    for layer in model.layers:
        recipe.grid.columns(layer.module.in_features, name=layer.name)


def compress_(
    found: Calibrations,
    recipe: Recipe,
    *,
    choose: Callable[[LinearLayer], Recipe | None] | None = None,
    fallen: list[str] | None = None,
) -> dict[str, Compressed]:
    """Compress the bench's model in place, block by block.

    Args:
        found: calibrations of a model, shared with other recipes.
        recipe: how; it says what the calibration reads.
        choose: another recipe for single layers, None to leave one as it is; all read what `recipe` reads, shifted where it is.
        fallen: gets the names of the matrices of experts that used the statistics of their layer, see `pruner.prune_`.

    Returns:
        Every compressed matrix by its layer's name.

    Raises:
        InputError: what `check` refuses.
    """
    model, results = found.bench.model, {}
    recipes = {layer.name: recipe if choose is None else choose(layer) for layer in model.layers}
    for own in {id(own): own for own in recipes.values() if own is not None}.values():
        check(model, own)
    needed = [own for own in recipes.values() if own is not None]
    hessian = any(own.needs_hessian for own in needed)

    def visit(block: int, statistics: Mapping[Role, InputStatistics] | None, crosses: two_streams.Crosses | None = None) -> None:
        """Compress the layers of one block."""
        served = model.by_block[block] if statistics is None else ready(model, block, statistics, hessian=hessian)
        for layer in served:
            own = recipes[layer.name]
            if own is None:
                continue
            of_layer = None if statistics is None else statistics_of(statistics, layer.role, layer.expert)
            if statistics is not None and fallen is not None:
                fallen.extend([layer.name] * fell_back(statistics, layer))
            if of_layer is not None:
                importances.check_finite(of_layer.squares, name=layer.name, what="inputs")
            options = {"random": generator(found.seed, "pruning", layer.name), "seed": found.seed, "name": layer.name}
            weight = layer.module.weight.detach()
            if crosses is not None and of_layer is not None:
                given = {"damping": own.method.damping, "name": layer.name}
                weight = joint.shifted(weight, of_layer.hessian(), crosses[READS[layer.role]], **given)
            results[layer.name] = compress_matrix(weight, own, of_layer, **options)
            layer.module.weight.data.copy_(results[layer.name].weight)

    if not any(own.needs_calibration for own in needed):
        for block in range(1 + model.layers[-1].block):
            visit(block, None)
        return results
    read, batch = found.set_of(recipe.method), found.bench.batch_size
    if recipe.shifted:
        two_streams.stream(model, read, visit, batch_size=batch)
    else:
        calibration.stream(model, read, visit, hessian=hessian, sequential=recipe.method.sequential, batch_size=batch)
    return results


def model_bytes(model: LanguageModel, compressed: Mapping[str, Compressed], recipes: Mapping[str, Recipe]) -> int:
    """Count the bytes of a model: compressed matrices as `stored_bytes` packs them, everything else in bfloat16.

    Args:
        model: its shapes.
        compressed: matrices by layer name; others are dense.
        recipes: of the same layers.
    """
    total = 2 * (model.num_parameters - sum(layer.module.weight.numel() for layer in model.layers))
    for layer in model.layers:
        shape = (layer.module.out_features, layer.module.in_features)
        found = compressed.get(layer.name)
        if found is None:
            total += stored_bytes(shape, grid=DENSE)
            continue
        recipe = recipes[layer.name]
        options = {"sparsity": recipe.target.sparsity, "pattern": recipe.target.pattern, "kept": int(found.kept.sum())}
        own = stored_bytes(shape, grid=recipe.grid, **options)
        total += planes.stored_bytes(shape, planes=recipe.grid.bits) if recipe.rounding == "planes" else own
    return total


def measured(found: Calibrations, name: str, recipe: Recipe) -> Measured:
    """Compress, measure and restore one model."""
    model = found.bench.model
    if recipe.needs_calibration:
        found.set_of(recipe.method)
    with pruner.restored(model):
        fallen: list[str] = []
        compressed, took = watched(partial(compress_, found, recipe, fallen=fallen), device=model.device)
        size = model_bytes(model, compressed, dict.fromkeys(compressed, recipe))
        zeros = pruner.measured_sparsity(model)
        return Measured(model.name, name, recipe, found.seed, zeros, size, runs.loss(found.bench), len(fallen), took)


def compare(found: Sequence[Calibrations], recipes: Sequence[tuple[str, Recipe]]) -> list[Measured]:
    """Measure every (name, recipe) with every calibration; recipes that read nothing and draw nothing once only."""
    results = []
    work = [(index, name, recipe) for index in range(len(found)) for name, recipe in recipes]
    for index, name, recipe in progress(work, desc=found[0].bench.model.name):
        if recipe.needs_calibration or recipe.method.importance == "random" or index == 0:
            results.append(measured(found[index], name, recipe))
    return results


def while_compressed(
    found: Calibrations, recipes: Mapping[Name, Recipe], measure: Callable[[LanguageModel], Result]
) -> dict[Name, Result]:
    """Measure something else than the loss, such as answers to tasks, under some recipes, by their names."""
    results = {}
    for name, recipe in progress(recipes.items(), desc=f"{found.bench.model.name}, compressed"):
        with pruner.restored(found.bench.model) as model:
            compress_(found, recipe)
            results[name] = measure(model)
    return results


@torch.inference_mode()
def loss_by_noise(
    model: LanguageModel, windows: Int[Tensor, "window position"], *, ratios: Sequence[float], seed: int, batch_size: int = 32
) -> Float[Tensor, "ratio window"]:
    """Return the cross-entropy of masked tokens (of tokens drawn anew under other noise) at mask ratios, in nats per such token.

    Args:
        model: a diffusion model.
        windows: clean held-out windows; where attention goes by blocks, each block is read behind clean earlier ones.
        ratios: shares, in (0, 1], of the tokens that noise may hide, which are masked or drawn anew; at least one token is.
        seed: of the masks, which are those of every other model with this seed.
        batch_size: windows at one time.

    Raises:
        InputError: an autoregressive model.
    """
    require_diffusion(model, "a loss by mask ratio", instead="use lib.studies.pruning.runs.loss")
    rows, process, hideable = [], process_of(model), may_be_noised(model, windows.cpu())
    for ratio in ratios:
        stream = generator(seed, "loss by noise", f"{ratio:g}")
        order = torch.rand(windows.shape, generator=stream).masked_fill(~hideable, 2.0).argsort(1).argsort(1)
        counts = torch.tensor([max(1, round(ratio * tokens)) for tokens in hideable.sum(1).tolist()])
        where = order < counts[:, None]
        noisy = process.fill(windows, where, generator=stream)
        for ids, read, at in zip(*(part.to(model.device).split(batch_size) for part in (windows, noisy, where)), strict=True):
            logits = block_logits(model, ids, read, at) if model.goes_by_blocks else logits_at(model, read, at)
            losses = torch.nn.functional.cross_entropy(logits, ids[at], reduction="none")
            rows += [of_row.double().mean().cpu() for of_row in losses.split(at.sum(1).tolist())]
    return torch.stack(rows).view(len(ratios), len(windows))
