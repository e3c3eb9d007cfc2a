"""Tables of what blocking keys does: paired increases of the loss, right answers with their intervals."""

from collections.abc import Sequence

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from lib.evaluation import sums
from lib.studies.variance.sink_effect import NOTHING, Effect
from lib.studies.variance.tables import interval_of


def increase(effects: Sequence[Effect], effect: Effect) -> Float[Tensor, "text"]:
    """Return by how much the loss of each text rises against the same model with nothing blocked."""
    dense = next(other for other in effects if other.model == effect.model and other.blocked == NOTHING)
    return effect.loss - dense.loss


def pick(effects: Sequence[Effect], *, model: str, blocked: str, amount: float) -> Effect:
    """Return the effect of one condition."""
    return next(e for e in effects if (e.model, e.blocked, e.amount) == (model, blocked, amount))


def effects_table(effects: Sequence[Effect], *, seed: int, amount_name: str = "keys asked") -> pd.DataFrame:
    """Tabulate the loss of every condition and its increase, paired by text.

    Args:
        effects: of one or several models, each with its `nothing` row.
        seed: of the bootstrap over texts.
        amount_name: what `Effect.amount` is.

    Returns:
        One row a condition. `increase` is the mean over texts with its 95 % interval; `attention removed` is what the blocked
        keys would have received.
    """
    rows = []
    for effect in effects:
        shown = interval_of(increase(effects, effect), seed=seed, stream=(effect.model, effect.blocked, str(effect.amount)))
        rows.append({
            "model": effect.model,
            "blocked": effect.blocked,
            amount_name: effect.amount,
            "keys per head": effect.keys_per_head,
            "attention removed, %": 100.0 * effect.removed_share,
            "loss": float(effect.loss.mean()),
            "increase": shown["mean"],
            "low": shown["low"],
            "high": shown["high"],
            "n": shown["n"],
        })  # fmt: skip
    return pd.DataFrame(rows)


def answers_table(effects: Sequence[Effect], *, seed: int) -> pd.DataFrame:
    """Tabulate exact answers (Wilson interval) beside the likelihood of the right answer.

    Args:
        effects: from `sink_effect.sum_effects`.
        seed: of the bootstrap over questions.
    """
    table = effects_table(effects, seed=seed)
    shares = []
    for effect in effects:
        low, high = sums.share_interval(sum(effect.correct), len(effect.correct))
        share = 100.0 * sum(effect.correct) / len(effect.correct)
        shares.append({"exact, %": share, "exact, low": 100.0 * low, "exact, high": 100.0 * high})
    joined = pd.concat([table.drop(columns=["loss"]), pd.DataFrame(shares)], axis=1)
    names = {"increase": "answer loss increase, nats", "low": "increase, low", "high": "increase, high"}
    return joined.rename(columns=names)
