"""Time of a training step of the embedded family: `python -m benchmarks.training`.

Each way trains a member of its own from the same weights on the same rows: in float32, in bfloat16 products, and each of them by
`torch.compile` where a C++ compiler is there. Steps are interleaved, with one thread; the median of the processor's seconds is
printed, so that other work on the machine disturbs all alike. The rows are the embedded calibration articles and generated tasks,
so nothing is fetched.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from lib.core.config import ROOT
from lib.core.errors import require
from lib.core.runtime import use_processor
from lib.texts.articles import read_rows
from recipes.family import batches
from recipes.family.batches import Corpus
from recipes.family.objectives import MEMBERS, Member
from recipes.family.recipe import Recipe, build_model, compile_body, learning_rate, make_optimizers, update_
from recipes.family.train import step_loss

UNCOUNTED = 2  # steps of each way before those that count; the first one compiles


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    name: str
    bf16: bool
    compiled: bool


WAYS = (
    Way("float32", bf16=False, compiled=False),
    Way("bfloat16", bf16=True, compiled=False),
    Way("float32, compiled", bf16=False, compiled=True),
    Way("bfloat16, compiled", bf16=True, compiled=True),
)


def embedded_corpus(recipe: Recipe) -> Corpus:
    """Return training rows of what the repository holds."""
    tok = PreTrainedTokenizerFast.from_pretrained(ROOT / "models" / "reference" / "dlm")
    rows = read_rows("articles_calibration")
    documents = batches.tokenise(tok, [row["extract"] for row in rows])
    windows = list(batches.pack(documents, length=recipe.length, bos=cast(int, tok.bos_token_id)))
    return Corpus(tok, np.array(windows, dtype=np.uint16), {}, [row for row in rows if batches.asks_well(tok, row)])


def stepper(way: Way, member: Member, recipe: Recipe, corpus: Corpus) -> Callable[[int], tuple[float, int]]:
    """Return what makes a step, and returns its processor seconds and its tokens."""
    model = build_model(recipe, corpus.tok, member=member)
    optimizers = make_optimizers(model, recipe)
    network = compile_body(model) if way.compiled else model.model

    def step(number: int) -> tuple[float, int]:
        began = time.process_time()
        tokens = step_loss(member, model, network, corpus, number, recipe, bf16=way.bf16)[2]
        update_(model, optimizers, rate=learning_rate(number, recipe))
        return time.process_time() - began, tokens

    return step


def measured(ways: Sequence[Way], member: Member, recipe: Recipe, *, repeats: int) -> dict[str, tuple[float, float]]:
    """Return the median processor seconds of a step, and tokens a second, of each way."""
    corpus = embedded_corpus(recipe)
    steppers = {way.name: stepper(way, member, recipe, corpus) for way in ways}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in steppers}
    for number in range(UNCOUNTED + repeats):
        for name, step in steppers.items():
            found[name].append(step(number))
    counted = {name: each[UNCOUNTED:] for name, each in found.items()}
    return {
        name: (
            statistics.median(seconds for seconds, _ in each),
            statistics.median(tokens / seconds for seconds, tokens in each),
        )
        for name, each in counted.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--member", choices=MEMBERS, default="dlm")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each way (default 7)")
    for name in ("layers", "text_rows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Recipe(), name), help="of the recipe")
    given = parser.parse_args(arguments)
    require(given.repeats > 0, "repeats must be at least 1", str(given.repeats), "raise it")
    use_processor()
    torch.set_num_threads(1)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    ways = [way for way in WAYS if compiler or not way.compiled]
    recipe = replace(Recipe(), layers=given.layers, text_rows=given.text_rows)
    found = measured(ways, given.member, recipe, repeats=given.repeats)
    first = found[ways[0].name][0]
    print(f"{'a step of ' + given.member:22}{'seconds':>10}{'tokens/s':>10}{'times as fast':>15}")
    for name, (seconds, speed) in found.items():
        print(f"{name:22}{seconds:10.3f}{speed:10.0f}{first / seconds:15.2f}")
    if not compiler:
        print("not compiled: no C++ compiler is there")


if __name__ == "__main__":
    main()
