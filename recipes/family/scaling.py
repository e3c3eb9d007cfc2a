"""Train `dlm` at three sizes for equal time and write the curves: `python -m recipes.family.scaling`.

The sizes share everything but width and depth; each goes on at the highest learning rate until its time of one processor is over.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.core import processor
from lib.core.config import ROOT
from lib.core.provenance import write_json
from lib.core.runtime import use_processor
from recipes.family import progress
from recipes.family.batches import Corpus
from recipes.family.recipe import Recipe, build_model, compile_body, learning_rate, make_optimizers, update_
from recipes.family.train import prepare, step_loss

SIZES = {
    "small": {"hidden_size": 160, "intermediate_size": 560, "layers": 6, "heads": 5, "kv_heads": 1},
    "shipped": {},
    "large": {"hidden_size": 384, "intermediate_size": 1344, "layers": 8, "heads": 12, "kv_heads": 3},
}
MEASURES = 6
SOURCE = "encyclopaedia"


def curve(recipe: Recipe, corpus: Corpus, *, seconds: float, compiled: bool = True) -> dict[str, Any]:
    """Train for a time and return the held-out loss along it.

    Args:
        recipe: of one size.
        corpus: what is read.
        seconds: of processor time, measurements not counted.
        compiled: whether by `torch.compile`, whose compilation counts neither.
    """
    model = build_model(recipe, corpus.tok, member="dlm")
    optimizers, probe = make_optimizers(model, recipe), progress.shadow(model)
    network = compile_body(model) if compiled else model.model
    bf16 = processor.is_bfloat16_faster()
    step_loss("dlm", model, network, corpus, 0, recipe, bf16=bf16)  # compiles; its gradients are dropped
    model.zero_grad()
    spent, tokens, step, points = 0.0, 0, 0, []
    while spent < seconds:
        started = time.process_time()
        tokens += step_loss("dlm", model, network, corpus, step, recipe, bf16=bf16)[2]
        update_(model, optimizers, rate=learning_rate(step, recipe))
        spent, step = spent + time.process_time() - started, step + 1
        if spent >= seconds * (len(points) + 1) / MEASURES:
            loss = progress.held_out_losses("dlm", probe, {SOURCE: corpus.held_out[SOURCE]}, seed=recipe.seed)[SOURCE]
            points.append({"seconds": round(spent, 1), "tokens": tokens, "loss": loss})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"width": recipe.hidden_size, "blocks": recipe.layers, "parameters": parameters, "curve": points}


def main() -> None:
    """Read the command line, train every size and write the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache/family"), help="packages and corpus")
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time for each size")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "reference" / "scaling.json")
    args = parser.parse_args()
    use_processor()
    corpus = prepare(args.folder, Recipe())
    found = [curve(replace(Recipe(), **size), corpus, seconds=60 * args.minutes) for size in SIZES.values()]
    write_json(args.out, found)


if __name__ == "__main__":
    main()
