"""Continue a prompt with a fast decoder, and say how many passes it took."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from lib.commands.words import MODEL, UsageError, add_common, whole

if TYPE_CHECKING:
    from lib.decoding import DecodingPlan

EPILOG = """DECODER is words joined by +: a cache (prefix, dual, adaptive[=SHARE]), threshold[=P] (default .9) or steps=N a block,
refresh=N, suffix=BLOCKS, late=SHARE, stop. Example: dual+threshold=.95+suffix=1. An autoregressive model decodes greedily."""
DEFAULTS = {"threshold": 0.9, "adaptive": 0.25}
LONGEST_BLOCK = 16  # tokens of a block where none is asked for
ONE_OF = (("none", "prefix", "dual", "adaptive"), ("threshold", "steps"))  # words that say the same thing otherwise


def add(parser: argparse.ArgumentParser) -> None:
    """Add the words of this command."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="to be continued")
    parser.add_argument(
        "--decoder", metavar="DECODER", help="see below (default threshold, without a cache); of diffusion models"
    )
    parser.add_argument("--tokens", type=whole(1), default=64, metavar="N", help="new tokens (default 64)")
    parser.add_argument("--block", type=whole(1), metavar="N", help="tokens of a block (default at most 16, or the model's own)")
    add_common(parser)


def run(chosen: argparse.Namespace) -> None:
    """Decode one prompt."""
    import torch

    from lib import decoding
    from lib.commands import session
    from lib.diffusion import sampler
    from lib.models.language_model import check_length, tokenizer_of
    from lib.texts.encoding import encode

    decoder = chosen.decoder or "threshold"
    begun, plan = time.monotonic(), plan_of(decoder)
    model = session.open_model(chosen.model, chosen)
    tokenizer = tokenizer_of(model)
    ids = encode(tokenizer, chosen.prompt)
    if not ids:
        raise UsageError("--prompt must have a token, got an empty text: write some words")
    check_length(model, len(ids) + chosen.tokens)  # an autoregressive model would find out at its last position
    given = [name for name, value in (("--decoder", chosen.decoder), ("--block", chosen.block)) if value is not None]
    if model.is_causal and given:
        rule, instead = f"{' and '.join(given)} must be left out for an autoregressive model", "one that writes a token a pass"
        raise UsageError(f"{rule}, got {model.name}, {instead}: try a diffusion model")
    prompt, started = torch.tensor([ids]), time.monotonic()
    with session.blocks_counted(model, "decoding", passes=chosen.tokens):
        if model.is_causal:
            new, forwards = sampler.continue_text(model, prompt, new_tokens=chosen.tokens), chosen.tokens
        else:
            stop = model.stop_token_ids[0] if model.stop_token_ids else None
            block = chosen.block or model.block_length or even_block(chosen.tokens)
            length = chosen.tokens if chosen.block or model.block_length else -(-chosen.tokens // block) * block
            done = decoding.decode(model, prompt, new_tokens=length, block_length=block, plan=plan, stop_token_id=stop)
            new, forwards = done.ids[:, : len(ids) + chosen.tokens], done.forwards
    seconds = time.monotonic() - started
    text: Any = tokenizer.decode(new[0, len(ids) :].tolist(), skip_special_tokens=True)
    facts = {
        "model": session.facts_of(model), "prompt": chosen.prompt, "text": text, "forwards": forwards,
        "tokens": chosen.tokens, "tokens_per_second": chosen.tokens / seconds,
        "decoder": "greedy, one token a pass" if model.is_causal else decoder,
    }  # fmt: skip
    speed = f"{chosen.tokens} tokens in {forwards} passes, {chosen.tokens / seconds:.1f} tokens/s ({facts['decoder']})"
    session.finish(chosen, facts, [chosen.prompt + text, speed], begun=begun)


def even_block(tokens: int) -> int:
    """Return the tokens of a block where all blocks are equal, few, and no longer than `LONGEST_BLOCK`.

    Where they do not divide the tokens, the last block has up to one token fewer than there are blocks to spare, which is cut.

    >>> [even_block(tokens) for tokens in (5, 20, 23, 64)]
    [5, 10, 12, 16]
    """
    return -(-tokens // -(-tokens // LONGEST_BLOCK))


def plan_of(text: str) -> "DecodingPlan":
    """Read a decoder in words; this is all that knows how `lib.decoding` names its choices.

    Raises:
        UsageError: an unknown word, words that contradict each other, or a number that is none or does not belong.
        InputError: choices that do not go together.
    """
    from lib.decoding import fast_plan

    options: dict[str, Any] = {}
    words = [word.strip() for word in text.split("+")]
    _check_words(words)
    for word in words:
        name, _, value = word.partition("=")
        if name in ("none", "prefix", "dual", "adaptive"):
            options["cache"] = name
            if name == "adaptive":
                options["refresh_ratio"] = _number(word, value, DEFAULTS["adaptive"])
        elif name in ("threshold", "late"):
            options["threshold" if name == "threshold" else "late_share"] = _number(word, value, DEFAULTS.get(name))
        elif name in ("steps", "refresh", "suffix"):
            key = {"steps": "steps_per_block", "refresh": "refresh_every", "suffix": "suffix_blocks"}[name]
            options[key] = _whole(word, value)
        elif name == "stop":
            options["early_stop"] = True
        else:
            known = "none, prefix, dual, adaptive, threshold, steps, refresh, suffix, late, stop"
            raise UsageError(f"--decoder must be words of {known} joined by +, got {word!r}: write it like dual+threshold=.9")
    if "steps_per_block" not in options:
        options.setdefault("threshold", DEFAULTS["threshold"])
    return fast_plan(**options)


def _check_words(words: list[str]) -> None:
    """Refuse what contradicts itself."""
    names = [word.partition("=")[0] for word in words]
    for several in (*ONE_OF, *((name,) for name in names)):
        found = [word for word, name in zip(words, names, strict=True) if name in several]
        if len(found) > 1:
            both = " and ".join(found[:2])
            raise UsageError(f"--decoder must have one of {', '.join(several)}, got {both}: leave one of them out")
    for word, name in zip(words, names, strict=True):
        if "=" in word and name in ("none", "prefix", "dual", "stop"):
            raise UsageError(f"--decoder must have no number in {name}, got {word!r}: write {name}")


def _whole(word: str, value: str) -> int:
    """Read the whole number of a word such as `steps=2`."""
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise UsageError(f"--decoder must have a number in {word!r} from 1, got {value!r}: write it like steps=2")
    return int(value)


def _number(word: str, value: str, default: float | None) -> float:
    """Read the number of a word such as `threshold=.9`."""
    try:
        return float(value) if value or default is None else default
    except ValueError as error:
        raise UsageError(f"--decoder must have a number in {word!r}, got {value!r}: write it like threshold=.9") from error
