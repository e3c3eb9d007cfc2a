"""Which of several recipes is compared with which."""

from collections.abc import Sequence

from lib.evaluation import paired
from lib.evaluation.paired import PairedDifference
from lib.pruning.methods import STRONGER
from lib.studies.joint import foldings
from lib.studies.joint.comparisons import BASELINES, baseline_name
from lib.studies.joint.runs import Measured
from lib.studies.joint.tables import stacked
from lib.studies.pruning.pairs import weakest
from lib.studies.pruning.runs import Outcome

# A hypothesis names its rivals, so that it is the same in every profile: a refit against what prunes without one.
REFITS = tuple(name for name in BASELINES if name in STRONGER)
WITHOUT = tuple(name for name in BASELINES if name not in STRONGER)


def outcomes_of(found: Sequence[Measured]) -> list[Outcome]:
    """Return measurements by the names of their recipes, for `pairs.pairs_table`."""
    return [
        Outcome(
            one.model,
            one.name,
            one.recipe.target.sparsity,
            one.recipe.target.pattern,
            one.seed,
            one.zeros,
            one.loss,
            one.fallbacks,
            one.effort,
        )
        for one in found
    ]


def against_each(
    found: Sequence[Measured], *, model: str, first: str, others: Sequence[str], worse: bool, seed: int
) -> PairedDifference | None:
    """Compare a recipe with each of some others: how much less it loses than any of them, or how much more.

    Args:
        found: recipes by name.
        model: its name.
        first: name of the recipe.
        others: names of the rivals.
        worse: False: the gain over every rival; True: the loss over every rival.
        seed: of the bootstrap.

    Returns:
        The weakest of the differences, see `pairs.weakest`; None where the recipe or a rival was not measured.
    """
    losses = {name: [one for one in found if (one.model, one.name) == (model, name)] for name in (first, *others)}
    if not all(losses.values()):
        return None
    own = stacked(losses[first])
    pairs = [(own, rival) if worse else (rival, own) for rival in (stacked(losses[name]) for name in others)]
    return weakest([paired.paired_difference(*pair, seed=seed) for pair in pairs])


def of_refit(found: Sequence[Measured], *, model: str, refit: str, bits: int, seed: int) -> PairedDifference | None:
    """Compare a mask whose weights are solved for anew, then rounded, with masks without that; in 2 bits, whether it is worse.

    Args:
        found: of `comparisons.baselines`.
        model: its name.
        refit: of `REFITS`.
        bits: of a weight.
        seed: of the bootstrap.
    """
    others = [baseline_name(name, bits) for name in WITHOUT]
    return against_each(found, model=model, first=baseline_name(refit, bits), others=others, worse=bits == 2, seed=seed)


def refit_claim(refit: str, bits: int) -> tuple[str, str]:
    """Return the key and the statement of what `of_refit` asks.

    >>> refit_claim("Wanda, refit", 2)
    ('wanda-refit-worst-at-2-bits', 'Wanda, refit, then GPTQ loses more than SparseGPT and than Wanda, then GPTQ, 50 %, 2 bits')
    """
    place, word = ("worst", "more") if bits == 2 else ("best", "less")
    key = f"{refit.lower().replace(', ', '-')}-{place}-at-{bits}-bits"
    return key, f"{refit}, then GPTQ loses {word} than {' and than '.join(WITHOUT)}, then GPTQ, 50 %, {bits} bits"


def owed_to_sinks(found: Sequence[Measured], *, model: str, recipe: str, seed: int) -> tuple[PairedDifference, bool] | None:
    """Ask whether sink tokens are what AWQ's scales gain by.

    Args:
        found: of `foldings.compare`.
        model: its name.
        recipe: of the rewritten models.
        seed: of the bootstrap.

    Returns:
        The weaker of two gains over the scales without sink tokens, that of AWQ and that of the scales without as many random
        tokens; and whether AWQ gains at all over the model as it is: if not, nothing is owed. None where one was not measured.
    """
    awq, without, control = (f"{recipe}, {name}" for name in foldings.SCALED)
    given = {"model": model, "worse": False, "seed": seed}
    gains = [against_each(found, first=first, others=[without], **given) for first in (awq, control)]
    at_all = against_each(found, first=awq, others=[recipe], **given)
    if at_all is None or gains[0] is None or gains[1] is None:
        return None
    return weakest([gain for gain in gains if gain is not None]), at_all.interval[0] > 0
