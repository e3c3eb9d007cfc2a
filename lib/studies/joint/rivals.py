"""Which of several recipes is compared with which."""

from collections.abc import Sequence

from lib.evaluation import paired
from lib.evaluation.paired import PairedDifference
from lib.studies.joint.runs import Measured
from lib.studies.joint.tables import stacked
from lib.studies.pruning.runs import Outcome


def outcomes_of(found: Sequence[Measured]) -> list[Outcome]:
    """Return measurements by the names of their recipes, for `gain_tables.pairs_table`."""
    targets = [one.recipe.target for one in found]
    return [
        Outcome(one.model, one.name, at.sparsity, at.pattern, one.seed, one.zeros, one.loss, one.fallbacks)
        for one, at in zip(found, targets, strict=True)
    ]


def against_others(found: Sequence[Measured], *, model: str, first: str, worst: bool, seed: int) -> PairedDifference:
    """Compare a recipe with the best of the others by name, or ask whether it is worse than the worst of them.

    Args:
        found: recipes of one number of bits or several; others have the same bits.
        model: its name.
        first: name of the recipe.
        worst: False: how much less it loses than the best of the others; True: how much more than the worst of them.
        seed: of the bootstrap.
    """
    names: dict[str, list[Measured]] = {}
    for one in found:
        names.setdefault(one.name, []).extend([one] if one.model == model else [])
    bits = names[first][0].recipe.grid.bits
    rivals = {name: stacked(own) for name, own in names.items() if name != first and own and own[0].recipe.grid.bits == bits}
    chosen = (max if worst else min)(rivals.values(), key=lambda losses: float(losses.mean()))
    pair = (stacked(names[first]), chosen) if worst else (chosen, stacked(names[first]))
    return paired.paired_difference(*pair, seed=seed)
