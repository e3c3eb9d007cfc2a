"""Tables of decoder runs: speed, agreement and text quality against the plain sampler, and whether speed-ups multiply."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.core.errors import require
from lib.decoding import late_steps
from lib.decoding.late_steps import LateExamples, Predictor
from lib.evaluation import paired
from lib.models.language_model import LanguageModel
from lib.studies.timing.runs import PLAIN, DecoderRun
from lib.timing.call_times import median_interval
from lib.timing.clock import quartiles, speed_up


def table(runs: Sequence[DecoderRun], *, seed: int) -> pd.DataFrame:
    """Compare every decoder with the plain sampler of the same runs.

    Args:
        runs: as `runs.compare` returns them.
        seed: of the bootstrap over prompts.

    Returns:
        One row a decoder: `forwards` and `computed tokens` of all prompts; `tokens/s` and `speed_up`, medians over the timed
        rounds with quartiles (`low` and `high`, `q1` and `q3`), and the 95 % interval of the median, `speed_up_low` to
        `speed_up_high`;
        `agreement`, the share of the plain sampler's text that has the same token in the same place; `nats`, per token under
        the judge (NaN without one); `distinct`, the share of distinct tokens of a text. The
        last three are means over prompts with 95 % paired bootstrap intervals: `agreement` of its own, `nats` and `distinct` of
        the `difference` to the plain sampler.

    Raises:
        InputError: no plain sampler among the runs, or more than one.
    """
    plain = _plain(runs)
    return pd.DataFrame([_row(run, plain, seed=seed) for run in runs])


def agreement(run: DecoderRun, plain: DecoderRun) -> Float[Tensor, "prompt"]:
    """Return the share of the plain sampler's text of each prompt that has the same token at the same place."""
    same = (run.new == plain.new) & plain.is_text
    return same.sum(1).double() / plain.is_text.sum(1)


def late_table(model: LanguageModel, held_out: LateExamples, steps: Mapping[str, Predictor | None], *, seed: int) -> pd.DataFrame:
    """Compare predictors of late tokens with leaving the same passes out.

    Args:
        model: that the examples come from.
        held_out: examples of prompts that nothing was fitted on.
        steps: predictors by name; None is the control, the best token of the last pass.
        seed: of the bootstrap over prompts.

    Returns:
        One row a predictor: `agreement`, the share of tokens that the full sampler wrote too, mean over prompts; `difference` to
        the control with its 95 % paired interval, `low` to `high`; `prompts`.
    """
    control, rows = late_steps.agreement(model, held_out, None), []
    for name, step in steps.items():
        share = late_steps.agreement(model, held_out, step)
        pair = paired.paired_difference(share, control, seed=seed)
        ends = dict(zip(("low", "high"), pair.interval, strict=True))
        found = {"predictor": name, "agreement": float(share.mean()), "difference": pair.estimate, **ends, "prompts": pair.n}
        rows.append(found)
    return pd.DataFrame(rows)


def composition(runs: Mapping[tuple[str, str], DecoderRun], *, dense: str) -> pd.DataFrame:
    """Tell whether the speed-up of a weight format times that of a decoder is the speed-up of both together.

    Args:
        runs: by (format, decoder), as `runs.grid` returns them: every format with every decoder.
        dense: the format that the others are compared with.

    Returns:
        One row a pair: `speed-up` over dense weights with the plain sampler; `predicted`, the product of the format's speed-up
        with the plain sampler and the decoder's with dense weights; and `tokens/s`, each the median over the timed rounds with
        quartiles; `measured / predicted`, with intervals that cover the medians of all pairs together 95 times in 100; `nats`
        and `distinct`, means over prompts; `best at its speed`: no pair at least as fast has fewer nats, and none with as few is
        faster (False without a judge).

    Raises:
        InputError: no such format, missing pairs, or not one plain sampler a format.
    """
    kinds, decoders = (list(dict.fromkeys(part)) for part in zip(*runs, strict=True))
    missing = [f"{kind} + {name}" for kind in kinds for name in decoders if (kind, name) not in runs]
    require(dense in kinds, f"formats must hold {dense}", ", ".join(kinds), "name the dense one")
    require(not missing, "every format must run with every decoder", f"none of {', '.join(missing)}", "measure the whole grid")
    first = _plain([runs[dense, name] for name in decoders])
    plain = next(name for name in decoders if runs[dense, name] is first)
    base, rows = first.seconds, []
    pairs = max(1, (len(kinds) - 1) * (len(decoders) - 1))  # of the others nothing is predicted
    for (kind, name), run in runs.items():
        product = (base / runs[kind, plain].seconds) * (base / runs[dense, name].seconds)
        rows.append({
            "format": kind,
            "decoder": name,
            **_with_quartiles("speed-up", base / run.seconds),
            **_with_quartiles("predicted", product),
            **_with_interval("measured / predicted", base / run.seconds / product, together=pairs),
            **_with_quartiles("tokens/s", run.timed_tokens / run.seconds),
            "nats": float("nan") if run.nats is None else float(run.nats.mean()),
            "distinct": float(run.distinct.mean()),
        })  # fmt: skip
    found = pd.DataFrame(rows)
    found["best at its speed"] = _front(found["tokens/s"].tolist(), found["nats"].tolist())
    return found


def _front(speeds: Sequence[float], losses: Sequence[float]) -> list[bool]:
    """Mark the pairs that no other one beats in one of speed and loss without being worse in the other.

    >>> _front([1.0, 2.0, 3.0, 2.0], [5.0, 4.0, 6.0, 4.5])
    [False, True, True, False]
    """
    pairs = list(zip(speeds, losses, strict=True))
    beaten = [any(fast >= speed and low <= loss and (fast, low) != (speed, loss) for fast, low in pairs) for speed, loss in pairs]
    return [loss == loss and not worse for (_, loss), worse in zip(pairs, beaten, strict=True)]


def _plain(runs: Sequence[DecoderRun]) -> DecoderRun:
    found = [run for run in runs if run.plan == PLAIN]
    require(len(found) == 1, f"runs must hold the {PLAIN} once, to compare with", f"{len(found)} of them", f"measure {PLAIN!r}")
    return found[0]


def _row(run: DecoderRun, plain: DecoderRun, *, seed: int) -> dict[str, object]:
    """Return one row of `table`."""
    middle, low, high = speed_up(plain.seconds, run.seconds)
    share = agreement(run, plain)
    # The paired difference to nothing is the mean with the interval over prompts that all other columns have.
    same = paired.paired_difference(share, torch.zeros_like(share), seed=seed)
    row = {"decoder": run.decoder, "forwards": run.forwards, "computed tokens": run.computed_tokens}
    row |= _with_quartiles("tokens/s", run.timed_tokens / run.seconds)
    row |= {"speed_up": middle, "speed_up_q1": low, "speed_up_q3": high}
    surely = median_interval(plain.seconds / run.seconds)
    row |= {"speed_up_low": surely[0], "speed_up_high": surely[1], "repeats": len(run.seconds)}
    row |= {"agreement": same.estimate, "agreement low": same.interval[0], "agreement high": same.interval[1]}
    row |= _against("nats", run.nats, plain.nats, seed=seed)
    return {**row, **_against("distinct", run.distinct, plain.distinct, seed=seed), "prompts": len(run.new)}


def _against(name: str, values: Tensor | None, baseline: Tensor | None, *, seed: int) -> dict[str, float]:
    """Return the mean of values by prompt, and their paired difference to the plain sampler's."""
    keys = (name, f"{name} difference", f"{name} difference low", f"{name} difference high")
    if values is None or baseline is None:
        return dict.fromkeys(keys, float("nan"))
    pair = paired.paired_difference(values, baseline, seed=seed)
    return dict(zip(keys, (float(values.mean()), pair.estimate, *pair.interval), strict=True))


def _with_interval(name: str, values: Float[Tensor, "repeat"], *, together: int) -> dict[str, float]:
    ends = median_interval(values, together=together)
    return {name: float(values.quantile(0.5)), f"{name} low": ends[0], f"{name} high": ends[1]}


def _with_quartiles(name: str, values: Float[Tensor, "repeat"]) -> dict[str, float]:
    return dict(zip((name, f"{name} low", f"{name} high"), quartiles(values), strict=True))
