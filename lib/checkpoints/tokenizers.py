"""Tokenizers, loaded with classes of transformers itself: no code of a checkpoint is run, and nobody is asked whether to.

A folder that names code (`auto_map`) is read from a copy that does not, so there is nothing to run or to ask about.
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from lib.checkpoints import files
from lib.checkpoints.families import Tokenizer
from lib.checkpoints.files import MERGES, PIECES, TEXT_FILES, VOCABULARY, WHOLE
from lib.core.errors import InputError, require

SETTINGS, CONFIG = "tokenizer_config.json", "config.json"
BOM = b"\xef\xbb\xbf"
PROBE = "the quick brown fox, 123"
PROBES = 50  # of its own words, where it knows none of these


def load(folder: Path, *, kind: Tokenizer = "auto") -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a folder; None when there is none.

    Args:
        folder: of the checkpoint.
        kind: class that the family has, for a folder without `tokenizer.json`; `"auto"` is what the folder says, where that is
            one of transformers', else by its files.

    Raises:
        InputError: files that do not make a tokenizer: some are missing or damaged, or the vocabulary is empty.

    Source: `tokenizer.json` is the whole tokenizer. Where the class is the checkpoint's own, `vocab.json` with `merges.txt` is
        read as Qwen2's, which Dream, SDAR and their kin have.
    """
    lost = files.lacks_tokenizer(folder)
    if lost is not None:
        named = files.exists(folder / SETTINGS) or files.exists(folder / VOCABULARY)
        remedy = "copy it from the original checkpoint, or delete the others to load without a tokenizer"
        require(not named, f"a tokenizer must have its vocabulary in {folder}", lost, remedy)
        return None
    only_pieces = not any((folder / name).exists() for name in (WHOLE, MERGES))
    readable = not only_pieces or importlib.util.find_spec("sentencepiece") is not None
    rule, remedy = f"a tokenizer must be in {WHOLE}, or in {VOCABULARY} and {MERGES}", f"copy {WHOLE} of the original checkpoint"
    require(readable, rule, f"{PIECES} alone in {folder}, and no sentencepiece to read it", remedy)
    try:
        with _without_code(folder) as (place, had_code):
            made = _made(place, kind=kind, had_code=had_code)
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds for a damaged file or a library that is missing
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise InputError(f"the tokenizer in {folder} must be readable, got {reason}: {remedy}") from error
    made.name_or_path = str(folder)
    _check_speaks(made, folder)
    return made


def _made(folder: Path, *, kind: Tokenizer, had_code: bool) -> PreTrainedTokenizerBase:
    """Read the whole file as it is; without one choose the class: the family's, else what the folder says or its files.

    Classes of transformers take words and merges alone out of `tokenizer.json` and put their own rules round them, whatever
    stands there: words without merges become a Qwen2's, and a Llama's pieces lose their spaces.
    """
    if (folder / WHOLE).exists():
        return cast(Any, PreTrainedTokenizerFast).from_pretrained(folder)
    if kind == "qwen2":
        return cast(Any, Qwen2Tokenizer).from_pretrained(folder)
    if not had_code:
        return cast(Any, AutoTokenizer).from_pretrained(folder, trust_remote_code=False)
    stated = files.read_json(folder / SETTINGS).get("tokenizer_class") if (folder / SETTINGS).exists() else None
    known = getattr(transformers, str(stated), None)
    if isinstance(known, type) and issubclass(known, PreTrainedTokenizerBase):
        return cast(Any, known).from_pretrained(folder)
    rule = f"a tokenizer whose class is the checkpoint's own must have {WHOLE}, or {VOCABULARY} with {MERGES}"
    require((folder / MERGES).exists(), rule, PIECES, f"save it once as {WHOLE} where you trust its code")
    return cast(Any, Qwen2Tokenizer).from_pretrained(folder)


def _check_speaks(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a tokenizer that turns every text into nothing, its own words too."""
    made = cast(Any, tokenizer)
    own = made.get_vocab().keys() - made.get_added_vocab().keys()
    probes = (PROBE, *(made.convert_tokens_to_string([token]) for token in islice(own, PROBES)))
    speaks = any(made(probe, add_special_tokens=False)["input_ids"] for probe in probes)
    rule = f"the tokenizer in {folder} must know words"
    require(speaks, rule, f"an empty vocabulary ({len(tokenizer)} tokens in all)", "copy the files of the original checkpoint")


@contextmanager
def _without_code(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Give a folder to read from, in which no file names code or begins with a byte order mark; and whether one did."""
    read = {path: path.read_bytes() for path in _small_files(folder)}
    own = [path for path, content in read.items() if path.name in (SETTINGS, CONFIG) and b'"auto_map"' in content]
    if not own and not any(content.startswith(BOM) for content in read.values()):
        yield folder, _is_foreign(read.get(folder / CONFIG))
        return
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as temporary:
        for path, content in read.items():
            copy = Path(temporary) / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(_plain(content, path) if path.suffix == ".json" else content.removeprefix(BOM))
        yield Path(temporary), bool(own) or _is_foreign(read.get(folder / CONFIG))


def _is_foreign(config: bytes | None) -> bool:
    """Tell whether transformers has no class for the network of a folder, so that it cannot choose a tokenizer by it."""
    from transformers import CONFIG_MAPPING

    stated = json.loads(config.decode("utf-8-sig")).get("model_type") if config else None
    return stated not in CONFIG_MAPPING


def _plain(content: bytes, path: Path) -> bytes:
    """Return JSON without a byte order mark; settings without the code that they name."""
    content = content.removeprefix(BOM)
    if path.name not in (SETTINGS, CONFIG):
        return content
    value = json.loads(content)
    return json.dumps({key: item for key, item in value.items() if key != "auto_map"}).encode()


def _small_files(folder: Path) -> list[Path]:
    """Return the files that make a tokenizer; links are followed, folders and weights are not."""
    found = {path for pattern in (*TEXT_FILES, CONFIG) for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.suffix != ".py")
