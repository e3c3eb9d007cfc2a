"""Does rounding gain from scales or rotations, and are sinks what the scales owe: recipes on rewritten models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import pandas as pd

from lib.attention import masses
from lib.calibration.reads import statistics_of
from lib.calibration.sets import CLEAN, Inputs
from lib.calibration.token_weights import Weighting
from lib.core.errors import refusal, require_known
from lib.core.runtime import generator, progress
from lib.models.language_model import LanguageModel
from lib.pruning.methods import Method
from lib.quantization import folding
from lib.quantization.rounding import Grid
from lib.studies.joint import runs
from lib.studies.joint.runs import Measured, Recipe
from lib.studies.pruning.runs import Calibrations
from lib.timing.effort import watched

NONE, AWQ, ROTATED = "as it is", "AWQ", "rotated"
# what the mean sizes leave out: nothing, sink tokens, or as many others
SCALED: Mapping[str, Weighting | None] = MappingProxyType({
    AWQ: None,
    "AWQ, without sink tokens": Weighting(alpha=None),
    "AWQ, without as many random tokens": Weighting("random", alpha=None),
})  # fmt: skip
FOLDINGS = (NONE, *SCALED, ROTATED)


def possible(model: LanguageModel, rewritings: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return which rewritings a model can take, and why it cannot take others.

    Raises:
        InputError: a rewriting that there is not.
    """
    require_known(rewritings, FOLDINGS, "a rewriting")
    checks = {**dict.fromkeys(SCALED, folding.check_dense), ROTATED: folding.check_rotates}
    reasons = {name: refusal(partial(checks[name], model)) for name in rewritings if name in checks}
    why_not = {name: reason for name, reason in reasons.items() if reason}
    return [name for name in rewritings if name not in why_not], why_not


def scales(found: Calibrations, name: str, grid: Grid, *, inputs: Inputs = CLEAN) -> folding.Scales:
    """Search AWQ's scales on a calibration of the dense model, for every group of matrices.

    Args:
        found: calibrations of a model that is dense now.
        name: of `SCALED`.
        grid: the format that will be rounded to.
        inputs: what the calibration reads; errors count all of its tokens alike, whatever the mean sizes leave out.
    """
    model = found.bench.model
    read = found.set_of(Method("wanda", inputs, SCALED[name]))
    sizes = folding.mean_sizes(model, read, batch_size=found.bench.batch_size)
    hessians, results = found.hessians_of(inputs), {}
    for (block, role), size in sizes.items():
        if role in folding.scalable(model):
            group = folding.GROUPS[role]
            weights = [layer.module.weight.detach() for layer in model.layers if layer.block == block and layer.role in group]
            hessian = statistics_of(hessians[block], role).hessian()
            results[block, role] = folding.best_scales(weights, size, hessian, grid=grid)[0]
    return results


def measured(found: Calibrations, name: str, recipe: Recipe, *, rewriting: str, inputs: Inputs = CLEAN) -> Measured:
    """Rewrite, compress, measure and restore one model.

    Args:
        found: calibrations of a model.
        name: of the recipe, for tables.
        recipe: how the rewritten model is compressed.
        rewriting: of `FOLDINGS`; the dense function stays the same.
        inputs: what AWQ's calibration reads.

    Raises:
        InputError: another rewriting, or what rotations refuse.
    """
    require_known([rewriting], FOLDINGS, "a rewriting")
    found.set_of(recipe.method)  # token weights are those of the dense model
    if rewriting in SCALED:
        found.hessians_of(inputs)  # shared, as is the text
    with folding.folded(found.bench.model) as model:
        _, took = watched(partial(_rewrite_, found, rewriting, recipe.grid, inputs=inputs), device=model.device)
        result = runs.measured(found, name, recipe)
    return replace(result, name=name if rewriting == NONE else f"{name}, {rewriting}", effort=took.then(result.effort))


def _rewrite_(found: Calibrations, rewriting: str, grid: Grid, *, inputs: Inputs) -> None:
    """Rewrite the bench's model in place."""
    if rewriting in SCALED:
        folding.scale_(found.bench.model, scales(found, rewriting, grid, inputs=inputs))
    if rewriting == ROTATED:
        folding.rotate_(found.bench.model, generator=generator(found.seed, "rotation"))


def compare(
    found: Sequence[Calibrations], recipes: Mapping[str, Recipe], rewritings: Sequence[str] = FOLDINGS, *, inputs: Inputs = CLEAN
) -> list[Measured]:
    """Measure every recipe on every rewriting of the model with every calibration.

    A recipe that does not round has no scales to search for, and scales would change no mask: it is left out there.
    """
    pairs = [(name, each) for name in recipes for each in rewritings if recipes[name].grid.rounds or each not in SCALED]
    work = [(each, name, rewriting) for each in found for name, rewriting in pairs]
    return [
        measured(each, name, recipes[name], rewriting=rewriting, inputs=inputs)
        for each, name, rewriting in progress(work, desc=found[0].bench.model.name)
    ]


def outlier_table(found: Calibrations, *, inputs: Inputs = CLEAN) -> pd.DataFrame:
    """Tabulate outliers before and after the rotations: of channels, which they spread, and of tokens, which they cannot.

    Args:
        found: calibrations of a model.
        inputs: what is read.

    Returns:
        `largest channel / median`: of the mean sizes that `q`, `k`, `v` and `gate`, `up` read, mean over blocks; `largest sink
        mass`: of a token of each window, mean over windows and layers, in units of the mean mass.
    """
    rows, read = [], found.set_of(Method("wanda", inputs))
    for name in (NONE, ROTATED):
        with folding.folded(found.bench.model) as model:
            if name == ROTATED:
                folding.rotate_(model, generator=generator(found.seed, "rotation"))
            sizes = folding.mean_sizes(model, read, batch_size=found.bench.batch_size)
            channels = [float(size.max() / size.median()) for (_, role), size in sizes.items() if role in ("q", "gate")]
            mass = masses.sink_mass(model, read.input_ids.to(model.device)).mean(2).amax(-1)
        rows.append({
            "model": model.name, "rewriting": name, "largest channel / median": sum(channels) / len(channels),
            "largest sink mass": float(mass.mean()),
        })  # fmt: skip
    return pd.DataFrame(rows)
