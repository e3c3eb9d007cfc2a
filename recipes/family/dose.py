"""Measure what sink weights do as sinks grow: `python -m recipes.family.dose MEMBER FOLDER ...`.

Each folder is a model kept along the training of one member (`--keep-every`), the last one the finished model. All are pruned to
50 % by Wanda, with and without sink weights and with as many random positions weighed down, on the same clean text; every
calibration has masks of its own. What is found is written beside the finished model's log.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lib.attention import masses, sinks
from lib.calibration.sets import NOISED
from lib.calibration.token_weights import Weighting
from lib.core.config import ROOT
from lib.core.provenance import write_json
from lib.core.runtime import use_processor
from lib.evaluation.recovered import Recovered, share_recovered
from lib.models import loading
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.pruning.methods import Target
from lib.studies.pruning import attribution, runs
from lib.studies.pruning.bench import Bench
from lib.studies.traces.training import DOSE
from lib.texts import articles
from recipes.family.cards import uniform_share

SPARSITY = 0.5
BOUND = 0.0459  # half of the paper's share of Wanda's damage, as in notebook 04
LENGTH, CALIBRATION_WINDOWS, DRAWS, BATCH = 256, 16, 2, 16
WANDA = attribution.method_of(attribution.WANDA, noised=NOISED)
WEIGHTED = attribution.method_of((0, 1, 0, 0), noised=NOISED)
METHODS = {"Wanda": WANDA, "sinks": WEIGHTED, "random": replace(WEIGHTED, weighting=Weighting("random"))}


def effect(folder: Path, *, windows: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Return how strong sinks are in one model, and which share of Wanda's damage weights on them recover.

    Args:
        folder: of the model.
        windows: held-out windows of the loss.
        seeds: of calibrations, and of the masks of each.
    """
    model = loading.load(folder, name=folder.name)
    texts = [articles.read_rows(f"articles_{name}") for name in ("calibration", "evaluation")]
    pool, held_out = (articles.article_windows(tokenizer_of(model), rows, length=LENGTH) for rows in texts)
    bench = Bench(model, pool, held_out[:windows], CALIBRATION_WINDOWS, DRAWS, 0)
    losses: dict[str, list[Any]] = {name: [] for name in (*METHODS, runs.DENSE)}
    for seed in seeds:
        own = replace(bench, seed=seed)
        for found in (runs.dense(own), *runs.compare(own, METHODS, [Target(SPARSITY)], seeds=[seed])):
            losses[found.method].append(found.loss)
    wanda, dense = (runs.stack(losses[name]) for name in ("Wanda", runs.DENSE))
    shares = {name: share_recovered(runs.stack(losses[name]), wanda, dense, bound=BOUND, seed=0) for name in ("sinks", "random")}
    line = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    return {
        "tokens": line["trained_tokens"],
        "top_share": round(top_share(model, held_out[:windows]), 5),
        "uniform_share": round(uniform_share(model), 5),
        "damage": round(float((wanda - dense).mean()), 5),
        **{name: _row(found) for name, found in shares.items()},
        "windows": windows,
        "calibrations": len(seeds),
    }


def top_share(model: LanguageModel, windows: Int[Tensor, "window position"]) -> float:
    """Return the share of attention that the top key of a head gets on clean text, over layers, heads and windows."""
    found = [sinks.top_k_share(masses.sink_mass(model, part, by_viewer=False), k=1) for part in windows.split(BATCH)]
    return float(torch.cat(found, dim=1).mean())


def _row(found: Recovered) -> dict[str, float | None]:
    low, high = found.interval or (None, None)
    return {"share": found.estimate, "low": low, "high": high, "p": found.p_value}


def main() -> None:
    """Read the command line, measure every model and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("member", help="whose folder in models/reference the result goes to")
    parser.add_argument("folders", nargs="+", type=Path, help="models kept along its training, the finished one too")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--calibrations", type=int, default=5, help="of every model")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "reference")
    args = parser.parse_args()
    use_processor()
    found = [effect(folder, windows=args.windows, seeds=range(args.calibrations)) for folder in args.folders]
    write_json(args.out / args.member / DOSE, sorted(found, key=lambda line: line["tokens"]))


if __name__ == "__main__":
    main()
