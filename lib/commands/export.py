"""Write a checkpoint in another form: as transformers, LLaDA's or Dream's own code, or llama.cpp loads it, or packed."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lib.commands.words import MODEL, UsageError, add_common

if TYPE_CHECKING:
    from lib.models.export import QuantizedWeight
    from lib.models.language_model import LanguageModel

FORMS = ("transformers", "llada", "dream", "gguf", "packed", "sparse")
EPILOG = """Weights keep the dtype that they are stored in unless --dtype says another. gguf and packed (compressed-tensors'
pack-quantized) hold the codes of a folder of sinks quantize; gguf takes floats, too. sparse stores no zeros and is
read by sinks alone."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the words of this command."""
    parser.add_argument("model", metavar="FOLDER", help=MODEL)
    parser.add_argument("--as", dest="form", choices=FORMS, required=True, help="in which form")
    parser.add_argument("-o", "--output", metavar="PATH", required=True, help="a new folder, or a new .gguf file")
    add_common(parser)


def run(chosen: argparse.Namespace) -> None:
    """Read one form, write another."""
    from lib.commands import session
    from lib.models import containers, export
    from lib.models.gguf.export import save_gguf

    begun = time.monotonic()
    path = session.new_folder(chosen.output)
    if chosen.form == "gguf" and path.suffix != ".gguf":
        raise UsageError(f"a GGUF must be a file that ends in .gguf, got {chosen.output!r}: name it so")
    model = session.open_model(chosen.model, chosen, as_stored=True)
    codes = _codes(model, chosen)
    note, told = "", dict[str, float | None]()
    if chosen.form == "transformers":
        export.save_plain(model, path)
    elif chosen.form == "sparse":
        containers.save_sparse(model, path, quantized=codes)
    elif chosen.form == "packed":
        export.save_packed(model, path, quantized=codes)
    elif chosen.form == "gguf":
        done = save_gguf(model, path, quantized=codes)
        note = f", {len(done.exact)} layers bit for bit, {len(done.requantized)} rounded again" if codes else ", floats"
        rate = _mismatch(model, path)
        note += "" if rate is None else f", {rate:.2%} of articles in other tokens when its tokenizer is read back"
        told = {"exact": len(done.exact), "tokenizer_mismatch": rate}
    else:
        _official(model, path, chosen.form)
    _keep_card(model, path, chosen.form)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    facts = {"model": session.facts_of(model), "output": str(path), "form": chosen.form, "bytes": size, "codes": len(codes)}
    session.finish(chosen, facts | told, [f"wrote {path} (as {chosen.form}, {size / 1e6:.1f} MB{note})"], begun=begun)


def _official(model: "LanguageModel", path: Path, form: str) -> None:
    """Write in a family's own layout: as it was read where it has that already."""
    from lib.checkpoints import lookup
    from lib.models import official

    source = lookup.resolve(model.source)
    if not official.other_layout(source) and lookup.family_of(source).layout == form:
        official.save_as_read(model, path)
    else:
        official.save_as(model, path, layout="llada" if form == "llada" else "dream")


def _keep_card(model: "LanguageModel", path: Path, form: str) -> None:
    """Put the card of what was exported into the new folder, with a word on what the folder is; a GGUF is a file and has none."""
    from lib.checkpoints import lookup
    from lib.core.provenance import write_text

    card, own = lookup.resolve(model.source) / "README.md", path / "README.md"
    if path.is_dir() and card.is_file() and not own.exists():
        text = card.read_text(encoding="utf-8", errors="replace").rstrip()
        said = f"Written by `sinks export --as {form}`; the card above is of what was exported."
        write_text(own, f"{text}\n\n## This copy\n\n{said}\n")


def _mismatch(model: "LanguageModel", path: Path) -> float | None:
    """Return the share of articles that the file's tokenizer writes with other tokens; None where it cannot be read back."""
    from lib.models.gguf.export import tokenizer_mismatch
    from lib.texts import articles

    if model.tokenizer is None:
        return None
    texts = [articles.format_article(row, description_last=False) for row in articles.read_rows("articles_evaluation")]
    try:
        return tokenizer_mismatch(model.tokenizer, path, texts)
    except (ValueError, KeyError):  # an architecture or a kind of tokenizer that transformers' reader does not know
        return None


def _codes(model: "LanguageModel", chosen: argparse.Namespace) -> "dict[str, QuantizedWeight]":
    """Return the codes and scales that a folder holds.

    Raises:
        UsageError: packed weights are wanted and there are none.
    """
    from lib.checkpoints import lookup
    from lib.models import containers

    if chosen.form not in ("gguf", "packed", "sparse"):
        return {}
    stored = containers.read_codes(lookup.resolve(model.source))
    if not stored and chosen.form == "packed":
        raise UsageError(
            f"--as packed must be of a folder with codes, got the floats of {chosen.model}: use sinks quantize --bits 4"
        )
    return stored
