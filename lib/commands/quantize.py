"""Round the weights of a model to a few bits, with or without removing some; write codes that transformers loads, and a card."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.commands import prune
from lib.commands.words import MODEL, UsageError, add_common, whole

if TYPE_CHECKING:
    from lib.evaluation.model_card import Measure, Reading
    from lib.models.language_model import LanguageModel
    from lib.studies.joint.runs import Recipe

EPILOG = """With --prune, SparseGPT prunes and rounds in one sweep; any other method prunes first. Mixtures of experts are
written as a container that sinks alone reads."""
BITS = (2, 3, 4, 8)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the words of this command."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--bits", type=int, choices=BITS, required=True, help="of a weight")
    parser.add_argument("--group", type=whole(1), default=64, metavar="N", help="neighbours that share a scale (default 64)")
    parser.add_argument("--nearest", action="store_true", help="round to the nearest instead of by GPTQ")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="a new folder")
    parser.add_argument("--prune", metavar="NAME", help=f"remove weights too, by {', '.join(prune.NAMES)}, ...")
    prune.add_target(parser)
    prune.add_calibration(parser)
    prune.add_loss(parser)
    add_common(parser)


def run(chosen: argparse.Namespace) -> None:
    """Round, write, read back, measure; the folder takes its name when that is done."""
    from lib.commands import session

    begun = time.monotonic()
    if chosen.prune is None and (chosen.sparsity is not None or chosen.pattern is not None):
        raise UsageError("--sparsity and --pattern must go with --prune, got no method: add --prune sparsegpt")
    folder = session.new_folder(chosen.output)
    session.check_held_out(chosen)
    with session.finished(folder) as partial:
        facts, lines = _rounded(chosen, partial)
    lines += [f"wrote {folder} ({facts['bytes'] / 1e6:.1f} MB)"]
    session.finish(chosen, {**facts, "output": str(folder)}, lines, begun=begun)


def _rounded(chosen: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Fill a folder; return the facts of it, and lines for people."""
    import torch

    from lib.checkpoints import lookup
    from lib.commands import session
    from lib.evaluation import model_card
    from lib.models import containers, export, official
    from lib.pruning import pruner
    from lib.pruning.methods import Target
    from lib.quantization.rounding import Grid
    from lib.studies.joint import exported, runs
    from lib.studies.pruning.runs import Bench, Calibrations

    method = runs.PLAIN if chosen.prune is None else prune.method_of(chosen.prune)
    target = Target(0.0) if chosen.prune is None else prune.target_of(chosen)
    rounding = "nearest" if chosen.nearest else "gptq"
    order = "joint" if (method.importance, rounding) == ("sparsegpt", "gptq") else "prune, quantize"
    model = session.open_model(chosen.model, chosen)
    recipe = runs.Recipe(Grid(chosen.bits, chosen.group, "search"), target, prune.fitting(method, model), order, rounding)
    runs.check(model, recipe)
    length = session.length_for(model, chosen.length)
    read = {"length": length, "seed": chosen.seed}
    held_out = session.windows(model, chosen.loss_text, count=chosen.loss_windows, split="test", **read)
    pool = session.windows(model, chosen.calibration, count=chosen.windows, split="train", **read)
    before = session.loss(model, held_out, seed=chosen.seed, what="loss of the dense model")
    bench = Bench(model, pool, held_out, chosen.windows, session.DRAWS, chosen.seed, batch_size=chosen.batch)
    stored = official.stored_dtypes(lookup.resolve(model.source))[0]
    dtype = torch.bfloat16 if stored == torch.float16 else stored  # scales are bfloat16
    passes = -(-chosen.windows * method.inputs.levels // chosen.batch) * 2 if recipe.needs_calibration else 0
    with session.blocks_counted(model, "rounding", passes=passes):
        ready = exported.exportable(Calibrations(bench, chosen.seed), recipe, dtype=dtype)
    if model.has_experts:
        containers.save_sparse(ready.model, folder, quantized=ready.quantized)
    else:
        export.save_packed(ready.model, folder, quantized=ready.quantized)
    del ready, bench
    rounded = session.reread(folder, model)
    after = session.loss(rounded, held_out, seed=chosen.seed, what="loss of the rounded model")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    zeros = pruner.measured_sparsity(rounded)
    sizes = model_card.size_measures(rounded, folder, dense_bits=8 * stored.itemsize)
    reading = prune.reading_of(chosen, length) if recipe.needs_calibration else None
    measures = [*sizes, session.loss_measure(before, after, chosen, length)]
    _write_card(folder, recipe, dense=model, rounded=rounded, reading=reading, measures=measures)
    facts = {
        "model": session.facts_of(model), "bits": chosen.bits, "group": chosen.group,
        "rounding": rounding, "order": order, "method": chosen.prune, "sparsity_asked": target.sparsity,
        "pattern": target.pattern, "zeros": zeros, "bytes": size, "bits_a_weight": sizes[0].value,
        **session.loss_facts(before, after, chosen, dense=model, length=length),
    }  # fmt: skip
    stored_as = f"{chosen.bits} bits ({sizes[0].value:.2f} with scales and masks)"
    what = f"{stored_as}, groups of {chosen.group}, {rounding}" + (f", {chosen.prune} {order}" if chosen.prune else "")
    lines = [
        f"{model.name}: {what}; {zeros:.2%} of the weights of its linear layers are zero",
        session.loss_line(before, after, chosen),
    ]
    return facts, lines


def _write_card(
    folder: Path,
    recipe: "Recipe",
    *,
    dense: "LanguageModel",
    rounded: "LanguageModel",
    reading: "Reading | None",
    measures: "list[Measure]",
) -> None:
    """Write the card of a rounded checkpoint."""
    from lib.commands import session
    from lib.evaluation import model_card

    order = recipe.order if recipe.prunes else ""
    rounding = model_card.Rounding(recipe.grid.bits, recipe.grid.group_size or 0, recipe.rounding, order)
    model_card.write(
        folder,
        model=rounded,
        method=recipe.method,
        target=recipe.target,
        reading=reading,
        measured=measures,
        rounding=rounding,
        license_id=session.license_of(dense),
    )
