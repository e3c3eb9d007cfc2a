"""Extensions, measured: masks by phase of denoising at an equal mean, and sparsity by layer at an equal total."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lib.attention import masses as attention
from lib.calibration import sets
from lib.calibration.reads import statistics_of
from lib.calibration.sets import GRID_STEPS, NOISED
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.models.language_model import LanguageModel
from lib.pruning import allocation, matrices, phases, pruner
from lib.pruning.methods import Method, Target
from lib.pruning.phases import GentleAt, StoredBytes
from lib.studies.pruning import runs
from lib.studies.pruning.runs import Bench, Calibrations, Outcome
from lib.studies.variance.sink_effect import text_loss
from lib.timing.effort import watched

BYTES_PER_WEIGHT = 2.0  # bfloat16, the type of the released checkpoints
POLICIES = ("uniform", "early is sparser", "late is sparser", "OWL", "sink variance", "sink variance, reversed")
# Comparators: two by a score, one by a ramp and one by levels that are searched with measured losses.
COMPARATORS = ("DSA", "DSA, reversed", "ATP", "EvoPress")
LEVELS = 4  # of the search, above and below the mean: as far as `spread`


@dataclass(frozen=True)
class PhasePlan:
    """One way to spread a mean sparsity over phases of denoising.

    Attributes:
        name: for tables.
        borders: falling mask ratios between the phases.
        spread: half of the distance between the gentlest and the most aggressive phase.
        gentle_at: where less is removed.
    """

    name: str
    borders: tuple[float, ...]
    spread: float
    gentle_at: GentleAt


def phase_outcomes(
    bench: Bench, method: Method, plans: Sequence[PhasePlan], *, sparsity: float, seeds: Sequence[int]
) -> tuple[list[Outcome], dict[str, StoredBytes]]:
    """Measure models whose mask depends on the mask ratio.

    Args:
        bench: a diffusion model, calibration pool, held-out windows.
        method: a method that keeps the values of the weights (magnitude or one-shot or sequential Wanda).
        plans: how the sparsity is spread; a spread of 0 is one mask for all.
        sparsity: mean over uniform mask ratios.
        seeds: calibration seeds.

    Returns:
        Outcomes, and by plan what keeping its masks costs (of the first seed, in bfloat16).

    Raises:
        InputError: a method that changes values, which phases could not share.
    """
    if method.changes_values:
        got = f"{method.importance} with repair {method.repair}"
        raise InputError(f"phases must share the dense values, got {got}, which changes them: use Wanda or magnitude")
    outcomes, cost = [], {}
    for seed in seeds:
        found = Calibrations(bench, seed)
        for plan in plans:
            wanted = phases.phase_sparsities(sparsity, spread=plan.spread, borders=plan.borders, gentle_at=plan.gentle_at)
            alike = [torch.full((1 + bench.model.layers[-1].block,), each, dtype=torch.float64) for each in wanted]
            exact = [exact_target(bench.model, one, sparsity=each) for one, each in zip(alike, wanted, strict=True)]
            networks = [runs.pruned_copy(found, method, target) for target in exact]
            masks = [{layer.name: (layer.module.weight != 0).cpu() for layer in each.layers} for each in networks]
            stored = phases.stored_bytes(masks, borders=plan.borders, bytes_per_weight=BYTES_PER_WEIGHT)
            cost.setdefault(plan.name, stored)
            joined = phases.phased(bench.model, networks, borders=plan.borders)
            loss = runs.loss(found.bench, joined)
            del joined, networks, masks  # before the next plan's copies exist
            gone = stored.mean_sparsity
            outcomes.append(Outcome(bench.model.name, plan.name, sparsity, "unstructured", seed, gone, loss))
    return outcomes, cost


def allocation_outcomes(
    bench: Bench,
    method: Method,
    policies: Sequence[str],
    *,
    sparsity: float,
    seeds: Sequence[int],
    spread: float,
    levels: int = GRID_STEPS,
    generations: int = 20,
) -> tuple[list[Outcome], dict[str, Float[Tensor, "block"]]]:
    """Measure models whose blocks have different sparsities but lose exactly as many weights in all as with a uniform one.

    Args:
        bench: model, calibration pool, held-out windows.
        method: importance of the weights inside each matrix.
        policies: of `POLICIES` and `COMPARATORS`; those by sink variance need a diffusion model.
        sparsity: share of all weights to remove.
        seeds: calibration seeds.
        spread: largest distance of a block's sparsity from the mean, before the exact total is restored.
        levels: noise levels that the variance of sinks is taken over.
        generations: of the search of EvoPress.

    Returns:
        Outcomes, and the sparsity of each block by policy (of the first seed).
    """
    outcomes, shown = [], {}
    for seed in seeds:
        found = Calibrations(bench, seed)
        found.share(method)
        for policy in policies:
            given: dict[str, Any] = {"sparsity": sparsity, "spread": spread}
            if policy in ("ATP", "EvoPress"):
                choose = partial(searched, found, method, policy, generations=generations, **given)
            else:
                choose = partial(block_sparsities, found, policy, levels=levels, **given)
            by_block, took = watched(choose, device=bench.model.device)
            shown.setdefault(policy, by_block)
            outcome = runs.measured(found, policy, method, exact_target(bench.model, by_block, sparsity=sparsity))
            outcomes.append(replace(outcome, effort=took.then(outcome.effort)))
    return outcomes, shown


def exact_target(model: LanguageModel, by_block: Float[Tensor, "block"], *, sparsity: float) -> Target:
    """Turn sparsities of blocks into exact numbers for each matrix that add up to round(sparsity x all weights)."""
    sizes = [layer.module.weight.numel() for layer in model.layers]
    total = round(sparsity * sum(sizes))
    by_layer = torch.stack([by_block[layer.block] for layer in model.layers]) - sparsity
    counts = allocation.removed_counts(allocation.with_total(by_layer, sizes, sparsity=total / sum(sizes)), sizes, total=total)
    return Target(sparsity, removed={layer.name: count for layer, count in zip(model.layers, counts, strict=True)})


def block_sparsities(
    found: Calibrations, policy: str, *, sparsity: float, spread: float, levels: int = GRID_STEPS
) -> Float[Tensor, "block"]:
    """Return the sparsity of each block under a policy, its mean weighted by size the one asked for.

    Raises:
        InputError: an unknown policy.

    Source: EIS and DIS of Layer Collapse in DLMs (arXiv 2605.06366); OWL (arXiv 2310.05175); by sink variance: ours.
    """
    sizes = block_sizes(found.bench.model)
    blocks = len(sizes)
    if policy == "uniform":
        wanted = torch.zeros(blocks, dtype=torch.float64)
    elif policy in ("early is sparser", "late is sparser"):
        wanted = allocation.early_is_sparser(blocks, epsilon=spread if policy.startswith("early") else -spread)
    elif policy == "OWL":
        wanted = allocation.from_scores(outlier_scores(found), spread=spread)
    elif policy in ("DSA", "DSA, reversed"):
        sign = -1 if policy.endswith("reversed") else 1
        wanted = allocation.from_scores(sign * block_scores(found, allocation.log_variance), spread=spread)
    elif policy in ("sink variance", "sink variance, reversed"):
        sign = 1 if policy.endswith("reversed") else -1  # the highest score is protected: stable sinks, or unstable ones
        wanted = allocation.from_scores(sign * layer_variance(found, levels=levels), spread=spread)
    else:
        raise InputError(f"a policy must be one of {', '.join((*POLICIES, *COMPARATORS))}, got {policy!r}: choose one of them")
    return allocation.with_total(wanted, sizes, sparsity=sparsity)


def block_sizes(model: LanguageModel) -> list[int]:
    """Return how many weights each block has that can go."""
    return [sum(layer.module.weight.numel() for layer in layers) for layers in model.by_block.values()]


def outlier_scores(found: Calibrations) -> Float[Tensor, "block"]:
    """Return the share of outliers among all Wanda importances of each block on clean text, the score of OWL.

    Source: OWL (arXiv 2310.05175): an outlier exceeds a multiple of the mean over the whole block, all its matrices together.
    """
    return block_scores(found, allocation.outlier_share)


def block_scores(found: Calibrations, score: Callable[[Tensor], float]) -> Float[Tensor, "block"]:
    """Return a score of all Wanda importances of each block on clean text, all its matrices together."""
    method = Method("wanda", sequential=False)
    scores = []
    for block, statistics in enumerate(found.statistics_of(method)):
        layers = [layer for layer in found.bench.model.layers if layer.block == block]
        parts = [
            matrices.importance(layer.module.weight, method, statistics_of(statistics, layer.role, layer.expert))
            for layer in layers
        ]
        scores.append(score(torch.cat([part.flatten() for part in parts])[None]))
    return torch.tensor(scores, dtype=torch.float64)


def searched(
    found: Calibrations, method: Method, policy: str, *, sparsity: float, spread: float, generations: int
) -> Float[Tensor, "block"]:
    """Return the sparsity of each block that a search by measured loss on the calibration's own windows finds.

    Args:
        found: calibrations of a model.
        method: a one-shot method, whose blocks are pruned once at each sparsity and then put together.
        policy: `"ATP"`: the best even ramp; `"EvoPress"`: the best levels.
        sparsity: mean over blocks.
        spread: largest distance from it.
        generations: of EvoPress.
    """
    bench, sizes = found.bench, block_sizes(found.bench.model)
    pruned = BlockDatabase(found, method)

    def loss(offsets: Tensor, stage: int) -> float:
        """Measure on a quarter of the windows first, then on all; each time exactly as many weights are gone."""
        windows = found.windows[: max(1, len(found.windows) // 4)] if stage == 0 else found.windows
        with pruner.restored(bench.model) as model:
            pruned.write_(exact_target(model, sparsity + offsets, sparsity=sparsity))
            return float(text_loss(model, windows, draws=bench.draws, seed=found.seed).mean())

    if policy == "ATP":
        offsets = allocation.best_ramp(lambda offsets: loss(offsets, 1), len(sizes), steepest=spread)[0]
        return allocation.with_total(offsets, sizes, sparsity=sparsity)
    step = spread / LEVELS

    def of_levels(levels: tuple[int, ...], stage: int) -> float:
        """Measure levels."""
        return loss(step * torch.tensor(levels, dtype=torch.float64), stage)

    kinds = sizes if len(set(sizes)) < len(sizes) else None  # blocks of one size trade levels; all of them where no two are equal
    given = {"generator": generator(found.seed, "evolution"), "generations": generations, "kinds": kinds}
    best = allocation.evolve(of_levels, len(sizes), most=LEVELS, **given)
    return allocation.with_total(step * torch.tensor(best.levels, dtype=torch.float64), sizes, sparsity=sparsity)


class BlockDatabase:
    """Every matrix as a one-shot method prunes it, made when a number of weights is first asked for.

    Attributes:
        found: calibrations of a model, which must be dense now.
        method: one-shot.

    Raises:
        InputError: a sequential method, whose blocks depend on those before.
    """

    def __init__(self, found: Calibrations, method: Method) -> None:
        if method.needs_calibration and method.sequential:
            raise InputError("a search must prune with a one-shot method, got a sequential one: set sequential to False")
        self.found, self.method = found, method
        self._dense = [layer.module.weight.detach().clone() for layer in found.bench.model.layers]
        self._statistics = found.statistics_for(method)
        self._pruned: dict[tuple[str, int], Tensor] = {}

    def write_(self, target: Target) -> None:
        """Put matrices without these numbers of weights into the model."""
        removed = target.removed
        assert removed is not None
        for layer, dense in zip(self.found.bench.model.layers, self._dense, strict=True):
            key = (layer.name, removed[layer.name])
            if key not in self._pruned:
                found = None if self._statistics is None else self._statistics[layer.block]
                own = None if found is None else statistics_of(found, layer.role, layer.expert)
                given = {"random": generator(self.found.seed, "pruning", layer.name), "seed": self.found.seed, "name": layer.name}
                self._pruned[key] = matrices.pruned(dense, self.method, target, own, **given)[0]
            layer.module.weight.data.copy_(self._pruned[key])


@torch.inference_mode()
def layer_variance(found: Calibrations, *, levels: int = GRID_STEPS) -> Float[Tensor, "block"]:
    """Return how much the attention mass of a token varies over noise levels, by block, averaged over tokens and windows.

    Args:
        found: calibrations of a diffusion model.
        levels: noise levels per window.

    Source: the variance over t of m_t(i), taken in each layer (the paper sums over layers, section 3.1).
    """
    model = found.bench.model
    noised = sets.read(model, found.windows, replace(NOISED, levels=levels), seed=found.seed)
    masses = [attention.sink_mass(model, batch.to(model.device)).mean(2).cpu() for batch in noised.flatten(0, 1).split(16)]
    mass = torch.cat(masses, dim=1).unflatten(1, noised.shape[:2])
    return mass.var(2, correction=0).mean((1, 2)).double()
