"""Remove weights of a model and write it in the layout it was read in, with its tokenizer, a model card and what it lost."""

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.commands.words import MODEL, UsageError, add_common, pattern, share, whole

if TYPE_CHECKING:
    from lib.models.language_model import LanguageModel
    from lib.pruning.methods import Method, Target

EPILOG = "The paper calibrates with --calibration wikitext2 --windows 128 --length 2048."
SHORT = {"sink-wanda": "sink-aware-wanda", "sink-sparsegpt": "sink-aware-sparsegpt"}
NAMES = ("sink-wanda", "sink-sparsegpt", "wanda", "sparsegpt", "magnitude", "random", "ar-sink-preserve", "dwanda")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the words of this command."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="a new folder")
    parser.add_argument("--method", default="sink-wanda", metavar="NAME", help=f"{', '.join(NAMES)}, ... (default sink-wanda)")
    add_target(parser)
    add_calibration(parser)
    add_loss(parser)
    add_common(parser)


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add how many weights go."""
    parser.add_argument("--sparsity", type=share(), metavar="S", help="share of every matrix, in [0, 1) (default 0.5)")
    parser.add_argument(
        "--pattern", type=pattern, metavar="N:M", help="keep N of every M neighbours, such as 2:4, instead of a share"
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add what is read to tell which weights matter."""
    group = parser.add_argument_group("calibration")
    group.add_argument("--calibration", default="articles", metavar="TEXT", help="wikitext2, c4, articles (default) or a file")
    group.add_argument("--windows", type=whole(1), default=32, metavar="N", help="windows of text (default 32)")
    group.add_argument(
        "--length", type=whole(2), metavar="N", help="tokens of a window (default 256, or all that the model reads)"
    )
    group.add_argument("--batch", type=whole(1), default=4, metavar="N", help="windows at one time (default 4)")


def add_loss(parser: argparse.ArgumentParser) -> None:
    """Add on what the loss before and after is measured."""
    group = parser.add_argument_group("loss before and after")
    group.add_argument("--loss-text", default="articles", metavar="TEXT", help="wikitext2, c4, articles (default) or a file")
    group.add_argument("--loss-windows", type=whole(2), default=16, metavar="N", help="held-out windows (default 16)")


def run(chosen: argparse.Namespace) -> None:
    """Prune, write, read back, measure; the folder takes its name when all of that is in it."""
    from lib.commands import session

    begun = time.monotonic()
    folder, target, method = session.new_folder(chosen.output), target_of(chosen), method_of(chosen.method)
    session.check_held_out(chosen)
    with session.finished(folder) as partial:
        facts, lines = _pruned(chosen, partial, method, target)
    lines += [f"wrote {folder} ({facts['layout']})"]
    session.finish(chosen, {**facts, "output": str(folder)}, lines, begun=begun)


def _pruned(chosen: argparse.Namespace, folder: Path, method: "Method", target: "Target") -> tuple[dict[str, Any], list[str]]:
    """Fill a folder; return the facts of it, and lines for people."""
    from lib.commands import session
    from lib.evaluation import model_card
    from lib.pruning import pruner

    model = session.open_model(chosen.model, chosen)
    method = fitting(method, model)
    pruner.check(model, target)
    length = session.length_for(model, chosen.length)
    read: dict[str, Any] = {"length": length, "seed": chosen.seed}
    loss_windows = session.windows(model, chosen.loss_text, count=chosen.loss_windows, split="test", **read)
    windows = None
    if method.needs_calibration:
        windows = session.windows(model, chosen.calibration, count=chosen.windows, split="train", **read)
    before = session.loss(model, loss_windows, seed=chosen.seed, what="loss of the dense model")
    samples = chosen.windows * (1 if method.inputs.kind == "clean" else method.inputs.levels)
    with session.blocks_counted(model, "pruning", passes=-(-samples // chosen.batch) * (2 if method.needs_calibration else 0)):
        fallen = pruner.prune_(model, method, target, windows=windows, seed=chosen.seed, batch_size=chosen.batch)
    dense, note = model, session.write(model, folder)
    del model
    pruned = session.reread(folder, dense)
    after = session.loss(pruned, loss_windows, seed=chosen.seed, what="loss of the pruned model")
    reading = reading_of(chosen, length) if method.needs_calibration else None
    measures = [session.loss_measure(before, after, chosen, length)]
    card = {"method": method, "target": target, "reading": reading, "measured": measures}
    model_card.write(folder, model=pruned, license_id=session.license_of(dense), **card)
    sparsity = pruner.measured_sparsity(pruned)
    facts = {
        "model": session.facts_of(dense), "method": chosen.method, "pattern": target.pattern,
        "sparsity": sparsity, "sparsity_asked": target.sparsity, "layout": note, "fallbacks": len(fallen),
        "windows": None if windows is None else len(windows), "length": length,
        **session.loss_facts(before, after, chosen, dense=dense, length=length),
    }  # fmt: skip
    lines = [
        f"{dense.name}: {chosen.method}, {sparsity:.2%} of the weights of its linear layers are zero ({target.pattern})",
        session.loss_line(before, after, chosen),
    ]
    return facts, lines


def target_of(chosen: argparse.Namespace) -> "Target":
    """Return how much goes.

    Raises:
        UsageError: a share beside a pattern.
    """
    from lib.pruning import methods

    if chosen.pattern is None:
        return methods.Target(0.5 if chosen.sparsity is None else chosen.sparsity)
    found = methods.pattern_target(chosen.pattern)
    if chosen.sparsity not in (None, found.sparsity):
        raise UsageError(f"--sparsity must be {found.sparsity:g} as {chosen.pattern} says, got {chosen.sparsity:g}: leave it out")
    return found


def method_of(name: str) -> "Method":
    """Return a method by its name here: that of the tables in lower case with hyphens, or a short one.

    Raises:
        UsageError: no such method.
    """
    import difflib

    from lib.pruning import methods

    known = {slug(shown): method for shown, method in methods.METHODS.items()}
    wanted = slug(name)
    if SHORT.get(wanted, wanted) not in known:
        close = difflib.get_close_matches(wanted, [*SHORT, *known], n=1)
        remedy = f"did you mean {close[0]}?" if close else "choose one of them"
        raise UsageError(f"--method must be one of {', '.join([*SHORT, *known])}, got {name!r}: {remedy}")
    return known[SHORT.get(wanted, wanted)]


def slug(name: str) -> str:
    """Write a name for a command line.

    >>> slug("sink-aware (Wanda)"), slug("sink_wanda")
    ('sink-aware-wanda', 'sink-wanda')
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def fitting(method: "Method", model: "LanguageModel") -> "Method":
    """Return the method as the model can run it: an autoregressive one reads clean text."""
    from lib.pruning import methods

    return methods.without_noise(method) if model.is_causal else method


def reading_of(chosen: argparse.Namespace, length: int) -> Any:
    """Describe the calibration for the model card, without a path of this machine."""
    from lib.commands import session
    from lib.evaluation.model_card import Reading
    from lib.texts import corpora

    text = chosen.calibration
    named = corpora.identity(text) if text in session.CORPORA else f"a file, {Path(text).name}"
    return Reading(named, chosen.windows, length, chosen.seed)
