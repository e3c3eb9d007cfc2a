"""Tables of agreement (notebook 02): of sink sets between steps, and of generation with random masks."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.attention import stability
from lib.core.runtime import generator
from lib.diffusion.traces import SinkTrace
from lib.studies.variance import noise_match
from lib.studies.variance import statistics as ts
from lib.studies.variance.noise_match import NoiseMatch
from lib.studies.variance.statistics import per_prompt
from lib.studies.variance.tables import interval_of

NO_VALUE = float("nan")


def step_distances(steps: int) -> list[int]:
    """Return the step distances at which overlap is measured: doubling, and a quarter and half of the trajectory.

    >>> step_distances(48)
    [1, 2, 4, 8, 12, 16, 24]
    """
    doubling = [2**power for power in range(steps.bit_length()) if 2**power <= steps // 2]
    return sorted({*doubling, max(1, steps // 4), max(1, steps // 2)})


def overlaps(trace: SinkTrace, *, level: str, prompts: int, seed: int) -> dict[str, Float[Tensor, "prompt distance"]]:
    """Return overlaps by step distance: real, with steps shuffled, with positions shuffled, and the real one beyond chance.

    Args:
        trace: one model's.
        level: one of `statistics.LEVELS`.
        prompts: number of prompts.
        seed: of the shuffles.
    """
    distances = step_distances(trace.mass.shape[1])
    found = {}
    for name, null in (("overlap", ""), ("steps shuffled", "steps"), ("positions shuffled", "positions")):
        stream = generator(seed, "shuffle", null, trace.name, level)
        rows = ts.overlap(trace, level=level, distances=distances, generator=stream, null=null)
        found[name] = torch.stack([per_prompt(column, prompts=prompts) for column in rows.T], 1)
    found["beyond chance"] = stability.beyond_chance(found["overlap"], found["positions shuffled"])
    return found


def overlap_table(
    found: Mapping[tuple[str, str], Mapping[str, Float[Tensor, "prompt distance"]]], *, distances: Sequence[int], seed: int
) -> pd.DataFrame:
    """Tabulate overlaps, one row a model, level, step distance and kind.

    Args:
        found: what `overlaps` returned, by model and level.
        distances: the step distances.
        seed: of the bootstrap.
    """
    rows = [
        {"model": model, "level": level, "kind": kind, "step distance": distance}
        | interval_of(values[:, index], seed=seed, stream=(model, level, kind, str(distance)))
        for (model, level), kinds in found.items()
        for kind, values in kinds.items()
        for index, distance in enumerate(distances)
    ]
    return pd.DataFrame(rows)


def noise_table(matched: NoiseMatch, *, model: str, prompts: int, seed: int) -> pd.DataFrame:
    """Tabulate how well sinks agree between generation and random masks.

    Args:
        matched: masses of the same texts under different masks.
        model: name for the rows.
        prompts: number of prompts.
        seed: of the bootstrap.

    Returns:
        One row a pair of `noise_match.pairs` and mask ratio: rank correlation of the masses and of the released sink scores,
        Jaccard overlap of the sink sets, each with its interval. A last row of each pair, its mask ratio NaN, averages masses and
        scores over the ratios before they are compared, as calibration does; there are no sets of averages.
    """

    def scores(mass: Tensor) -> Tensor:
        """Score masses as the release does."""
        return noise_match.release_score(mass, depth=matched.depth)

    def overlap(first: Tensor, second: Tensor) -> Tensor:
        """Compare sink sets."""
        return stability.jaccard(noise_match.sink_sets(first), noise_match.sink_sets(second))

    rows = []
    for pair, (first, second) in noise_match.pairs(matched).items():
        measured = {
            "mass": noise_match.rank_correlation(first, second),
            "score": noise_match.rank_correlation(scores(first), scores(second)),
            "sets": overlap(first, second),
        }
        averaged = {
            "mass": noise_match.rank_correlation(first.mean(1), second.mean(1)),
            "score": noise_match.rank_correlation(scores(first).mean(1), scores(second).mean(1)),
            "sets": torch.full((len(first),), NO_VALUE),
        }
        levels = [{name: values[:, level] for name, values in measured.items()} for level in range(first.shape[1])]
        for ratio, values in zip((*matched.mask_ratio, NO_VALUE), (*levels, averaged), strict=True):
            row: dict[str, object] = {"model": model, "pair": pair, "mask ratio": ratio}
            for name, found in values.items():
                shown = interval_of(per_prompt(found, prompts=prompts), seed=seed, stream=(model, pair, name, f"{ratio:.3f}"))
                row |= {name: shown["mean"], f"{name}, low": shown["low"], f"{name}, high": shown["high"]}
            rows.append({**row, "n": prompts})
    return pd.DataFrame(rows)
