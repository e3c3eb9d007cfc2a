"""What every command does first and last: find the model, choose the device, say where things went. Imports slowly on purpose."""

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lib import models
from lib.checkpoints import files, lookup
from lib.commands import terminal
from lib.commands.words import UsageError
from lib.core import config, runtime
from lib.core.config import ModelSource
from lib.core.errors import InputError, require
from lib.core.provenance import file_hash
from lib.evaluation import paired
from lib.evaluation.model_card import Measure
from lib.models import export, official
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.models.layers.anatomy import blocks_in
from lib.studies.variance.sink_effect import text_loss
from lib.texts import corpora

CORPORA = ("wikitext2", "c4", "articles")
DRAWS = 16  # masks of each window of the loss


def source_of(text: str) -> ModelSource:
    """Return the checkpoint that a word names: a folder first, then a name of the profiles, then a hub id.

    Raises:
        InputError: none of these.
    """
    known: dict[str, ModelSource] = {}
    if not text.startswith(lookup.WHEEL_PREFIX) and not files.exists(files.local_path(text)):
        for profile in (name for name in config.PROFILES if name != "rehearsal"):
            settings = config.load(profile)
            named = {**settings.models, **(settings.grid.models if settings.grid is not None else {})}
            known |= {name: source for name, source in named.items() if name not in known}
        if text in known:
            return known[text]
        rule = f"a model must be a folder, HUB/ID@REVISION, or one of {', '.join(known)}"
        require("/" in text, rule, f"{text!r} and no such folder", "check the path")
    return lookup.parse(text)


def device_of(chosen: argparse.Namespace) -> runtime.Device:
    """Settle device and dtype, and use the threads that there are."""
    runtime.use_processor()
    return runtime.choose_device(config.load("quick", overrides={"device": chosen.device, "dtype": chosen.dtype}))


def open_model(text: str, chosen: argparse.Namespace, *, as_stored: bool = False) -> LanguageModel:
    """Load a model onto the device, in one line of complaint where it cannot be had.

    Args:
        text: of the command line.
        chosen: device and dtype.
        as_stored: keep each tensor's own dtype where none is chosen, onto the CPU: nothing is computed.

    Raises:
        InputError: see `models.load`; or a tokenizer is wanted and missing.
    """
    place, source = device_of(chosen), source_of(text)
    check(source, tokenizer=not as_stored)
    if as_stored and chosen.dtype == "auto":
        return official.load_as_stored(source)
    return models.load(source, dtype=place.dtype, device="cpu" if as_stored else place.device)


def check(source: ModelSource, *, tokenizer: bool = True) -> None:
    """Refuse a checkpoint that cannot be loaded, from its name and its headers.

    Raises:
        InputError: see `lookup.check` and `lookup.check_tokenizer`.
    """
    lookup.check(source)
    if tokenizer:
        lookup.check_tokenizer(source)


def new_folder(text: str) -> Path:
    """Return the folder that will be written, refusing one that exists before any work.

    Raises:
        InputError: it exists, or nothing can be written there.
    """
    folder = typed(text)
    require(
        not folder.exists(), "the output must be a new folder or file", f"{folder}, which exists", "name another or delete it"
    )
    above = next(path for path in folder.parents if path.exists())
    can = above.is_dir() and os.access(above, os.W_OK)
    require(can, "the output must be where one can write", f"{folder} below {above}", "name another place")
    return folder


@contextmanager
def finished(folder: Path) -> Iterator[Path]:
    """Give a hidden place beside an output, which takes its name when the block ends: half of it never looks whole.

    Raises:
        KeyboardInterrupt: somebody pressed Ctrl-C; it says what is left on disk.
        InputError: somebody else wrote the output meanwhile.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        yield partial
        require(not folder.exists(), "the output must be a new folder", f"{folder}, written by another run", "name another")
        partial.rename(folder)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{folder} was not written and nothing of it is left on disk, run again to begin anew") from stop
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_held_out(chosen: argparse.Namespace) -> None:
    """Refuse a loss on the text that the calibration reads: it would look smaller than it is.

    Raises:
        UsageError: both are one file, or copies of one.
    """
    files = [typed(text) for text in (chosen.calibration, chosen.loss_text) if text not in CORPORA]
    if len(files) == 2 and all(path.is_file() for path in files) and len({file_hash(path) for path in files}) == 1:
        rule = "--loss-text must be another text than --calibration, or its loss is not held out"
        raise UsageError(f"{rule}, got {chosen.loss_text!r} for both: name another file, split yours, or leave --loss-text out")


def typed(text: str) -> Path:
    """Return the absolute path that somebody typed."""
    try:
        return config.typed_path(Path(text).expanduser()).resolve()
    except RuntimeError as error:
        raise InputError(f"~ must stand for a home folder, got {text!r}: write the whole path") from error


def windows(
    model: LanguageModel, corpus: str, *, count: int, length: int, seed: int, split: str
) -> Int[Tensor, "window position"]:
    """Draw token windows from a corpus by name or from a file.

    Raises:
        InputError: neither, too short, or windows longer than the model reads.
        UnavailableError: the hub's data cannot be fetched.
    """
    tokenizer = tokenizer_of(model)
    if corpus in CORPORA:
        drawn: Any = corpora.windows  # the names were checked
        return drawn(corpus, tokenizer, count=count, length=length, seed=seed, split=split)
    path = typed(corpus)
    rule = f"a text must be one of {', '.join(CORPORA)} or a file"
    require(path.is_file(), rule, f"{corpus!r} and no such file", "check the path")
    return corpora.file_windows(path, tokenizer, count=count, length=length, seed=seed + (split == "test"))


def length_for(model: LanguageModel, wanted: int | None, *, default: int = 256) -> int:
    """Return how many tokens a window has: as asked, or the default where the model reads so many.

    Raises:
        InputError: more than the model reads.
    """
    longest = int(getattr(model.network.config, "max_position_embeddings", default))
    length = min(default, longest) if wanted is None else wanted
    require(2 <= length <= longest, f"--length must be in [2, {longest}] for {model.name}", str(length), "choose one inside")
    return length


@contextmanager
def blocks_counted(model: LanguageModel, what: str, *, passes: int) -> Iterator[None]:
    """Show a bar over the decoder blocks that are computed: it works for whatever reads the model, block by block or whole.

    Args:
        model: whose blocks.
        what: is done, for the bar.
        passes: through the whole network that are expected at most.
    """
    blocks = blocks_in(model.network)
    bar = runtime.progress(total=passes * len(blocks), desc=what, unit="block")
    hooks = [block.register_forward_hook(lambda *_: bar.update() and None) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        bar.close()


def finish(chosen: argparse.Namespace, facts: dict[str, Any], lines: Sequence[str], *, begun: float) -> None:
    """Say what was done: one JSON object, or lines for people and the time.

    Args:
        chosen: whether JSON is wanted.
        facts: of the JSON object, plain values.
        lines: for people.
        begun: `time.monotonic()` at the start.
    """
    seconds = time.monotonic() - begun
    if chosen.json:
        terminal.show_json({"command": chosen.command, **facts, "seconds": round(seconds, 1)})
        return
    for line in lines:
        terminal.say(line)
    terminal.say(f"total {seconds:.1f} s")


def facts_of(model: LanguageModel) -> dict[str, Any]:
    """Return what names a model in a result."""
    return {
        "name": model.name,
        "source": model.source.source,
        "revision": model.source.revision,
        "fingerprint": model.fingerprint,
        "family": model.family,
        "parameters": model.num_parameters,
        "device": str(model.device),
        "dtype": str(model.network.dtype).removeprefix("torch."),
    }


def loss(model: LanguageModel, windows: Int[Tensor, "window position"], *, seed: int, what: str) -> Float[Tensor, "window"]:
    """Measure the NELBO, or the exact loss of an autoregressive model, of each window in nats per token, with a bar."""
    rows = len(windows) * (1 if model.is_causal else DRAWS)
    with blocks_counted(model, what, passes=-(-rows // 16)):
        return text_loss(model, windows, draws=DRAWS, seed=seed)


def loss_facts(
    before: Float[Tensor, "window"],
    after: Float[Tensor, "window"],
    chosen: argparse.Namespace,
    *,
    dense: LanguageModel,
    length: int,
) -> dict[str, Any]:
    """Return both losses for a result file, window by window, and how they were measured: `sinks compare` pairs equal ones."""
    file = None if chosen.loss_text in CORPORA else typed(chosen.loss_text)
    return {
        "loss_settings": {
            "text": chosen.loss_text if file is None else f"{file.name}, SHA-256 {file_hash(file)}",
            "windows": len(before), "length": length, "masks": DRAWS, "seed": chosen.seed,
            "dtype": str(dense.network.dtype).removeprefix("torch."), "dense model": dense.fingerprint,
        },
        "loss_before": float(before.mean()),
        "loss_after": float(after.mean()),
        "losses_before": before.tolist(),
        "losses_after": after.tolist(),
    }  # fmt: skip


def loss_line(before: Float[Tensor, "window"], after: Float[Tensor, "window"], chosen: argparse.Namespace) -> str:
    """Say both losses and the interval of what was lost."""
    found = paired.paired_difference(after, before, seed=chosen.seed)
    low, high = found.interval
    ends = f"{found.estimate:+.4f} [{low:+.4f}, {high:+.4f}]"
    text = f"{len(before)} windows of {chosen.loss_text if chosen.loss_text in CORPORA else Path(chosen.loss_text).name}"
    return f"loss {before.mean():.4f} -> {after.mean():.4f} nats per token, {ends} on {text}"


def loss_measure(
    before: Float[Tensor, "window"], after: Float[Tensor, "window"], chosen: argparse.Namespace, length: int
) -> Measure:
    """Return the loss as a row of a model card."""
    text = chosen.loss_text if chosen.loss_text in CORPORA else Path(chosen.loss_text).name
    settings = f"{len(after)} held-out windows of {length} tokens of {text}, {DRAWS} masks each, seed {chosen.seed}"
    return Measure(
        "loss, nats per token", float(after.mean()), documents=len(after), dense=float(before.mean()), settings=settings
    )


def write(model: LanguageModel, folder: Path) -> str:
    """Write a model in the layout that it was read in, else as transformers loads it; say which."""
    why = official.other_layout(lookup.resolve(model.source))
    if why:
        export.save_plain(model, folder)
        return f"as transformers loads it, since it was read from {why}"
    official.save_as_read(model, folder)
    return f"in the layout of {model.family}, as it was read"


def reread(folder: Path, dense: LanguageModel) -> LanguageModel:
    """Read back what was written, so that what is measured is what lies on disk; it says where its weights came from."""
    model = models.load(folder, dtype=dense.network.dtype, device=dense.device)
    return replace(model, name=dense.name, source=dense.source, fingerprint=dense.fingerprint)


def license_of(model: LanguageModel) -> str:
    """Return the licence that the base model's card says, which holds for its changed weights too; `other` when unknown."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    card = lookup.resolve(model.source) / "README.md"
    try:
        said: Any = ModelCard.load(card).data.to_dict() if card.is_file() else {}
        return str(said.get("license") or "other")
    except (OSError, ValueError, YAMLError):
        return "other"
