"""What a checkpoint is for a diffusion model's algorithms: mask token, logit shift, attention, block grid and stop tokens.

Facts go into the configuration in memory under names that load again, so that every way of saving a model keeps them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lib.checkpoints.families import Attention, BlockOrigin, Family
from lib.core.errors import InputError, require

# Added tokens that stand for the mask in one family or another, where the tokenizer does not say which one is its mask.
MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>", "<|MASK|>", "|<MASK>|", "<[MASK]>", "<[MASK_TOKEN]>")
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Facts:
    """What `LanguageModel` says of a checkpoint beside its network; see there."""

    family: str
    is_causal: bool
    mask_token_id: int | None
    logit_shift: int
    attention: Attention
    block_length: int | None
    block_origin: BlockOrigin
    stop_token_ids: tuple[int, ...]


def read(
    raw: Mapping[str, Any],
    family: Family,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocabulary: int,
    folder: Path,
    generation: Mapping[str, Any],
) -> Facts:
    """Gather a checkpoint's facts from its configuration, its tokenizer and its family, in this order.

    Args:
        raw: its config.json.
        family: as recognised.
        tokenizer: None when it has none.
        vocabulary: rows of the embedding.
        folder: of the checkpoint, for errors.
        generation: its generation_config.json; empty when it has none.

    Raises:
        InputError: no mask token, sources that name different ones, one outside the vocabulary, a shift other than 0 and 1, or
            a tokenizer with words that the network does not have.
    """
    _check_words(tokenizer, vocabulary, folder)
    is_causal = family.attention == "causal"
    stated = {
        file: where["mask_token_id"]
        for file, where in (("config.json", raw), (GENERATION, generation))
        if "mask_token_id" in where
    }
    shift = 1 if is_causal else raw.get("logit_shift", family.logit_shift)
    require(shift in (0, 1), "logit_shift must be 0 or 1", repr(shift), f"mend config.json in {folder}")
    return Facts(
        family=family.name,
        is_causal=is_causal,
        mask_token_id=None if is_causal else _mask(stated, family, tokenizer, vocabulary=vocabulary, folder=folder),
        logit_shift=int(shift),
        attention=family.attention,
        block_length=family.block_length,
        block_origin=family.block_origin,
        stop_token_ids=_stops(raw, family, tokenizer, generation, vocabulary),
    )


def remember_(config: PretrainedConfig, facts: Any) -> None:
    """Put facts into a configuration, under the names from which `read` and `recognition` take them.

    Args:
        config: of the network or a copy; changed in place.
        facts: `Facts`, or a `LanguageModel`, which has the same fields.
    """
    saved: Any = config
    saved.is_causal, saved.stop_token_ids = facts.is_causal, list(facts.stop_token_ids)
    if facts.is_causal:  # a plain class says the rest itself
        return
    saved.mask_token_id, saved.logit_shift, saved.attention_kind = facts.mask_token_id, facts.logit_shift, facts.attention
    saved.block_length, saved.block_origin, saved.family = facts.block_length, facts.block_origin, facts.family


def _check_words(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, folder: Path) -> None:
    """Refuse the tokenizer of another network; a token that was added and never used may lie outside."""
    if tokenizer is None:
        return
    made: Any = tokenizer
    added = made.get_added_vocab()
    last = max((number for word, number in made.get_vocab().items() if word not in added), default=0)
    last = max([last, *(number for number in (made.bos_token_id, made.eos_token_id) if number is not None)])
    rule, remedy = (
        f"words must be among the {vocabulary} tokens of the network",
        "copy the tokenizer that goes with these weights",
    )
    require(last < vocabulary, rule, f"token {last} of the tokenizer in {folder}", remedy)


def _mask(
    stated: Mapping[str, Any], family: Family, tokenizer: PreTrainedTokenizerBase | None, *, vocabulary: int, folder: Path
) -> int:
    """Return the mask id that all sources agree on, `stated` by the name of the file; the family's own where none says one."""
    said: dict[str, set[int]] = {}
    remedy = "set mask_token_id in config.json"
    for file, number in stated.items():
        if number is not None:
            valid = isinstance(number, int) and not isinstance(number, bool)
            rule = f"mask_token_id must be one of the {vocabulary} tokens of the network"
            require(valid, rule, f"{number!r} in {folder}", remedy)
            said[file] = {number}
    if tokenizer is not None:
        own = getattr(tokenizer, "mask_token_id", None)
        added = cast(Any, tokenizer).get_added_vocab()
        named = {added[token] for token in MASK_TOKENS if token in added}
        said |= {"the tokenizer": {own}} if own is not None else {}
        said |= {"its added tokens": named} if named else {}
    if not said and family.mask_token_id is not None and family.mask_token_id < vocabulary:
        said["the family"] = {family.mask_token_id}
    require(bool(said), "a diffusion model must name its mask token", f"none in {folder}", remedy)
    common = set.intersection(*said.values())
    if len(common) != 1:
        got = ", ".join(f"{' or '.join(sorted(map(str, ids), key=_by_size))} in {source}" for source, ids in said.items())
        raise InputError(f"all that name the mask token of {folder} must name the same one, got {got}: mend what is wrong")
    (found,) = common
    valid = 0 <= found < vocabulary
    require(valid, f"mask_token_id must be one of the {vocabulary} tokens of the network", f"{found!r} in {folder}", remedy)
    return found


def _by_size(number: str) -> tuple[int, str]:
    return len(number), number


def _stops(
    raw: Mapping[str, Any],
    family: Family,
    tokenizer: PreTrainedTokenizerBase | None,
    generation: Mapping[str, Any],
    vocabulary: int,
) -> tuple[int, ...]:
    """Return every token that ends a text for the family, the configuration or the tokenizer."""
    if raw.get("stop_token_ids") is not None:
        return tuple(raw["stop_token_ids"])
    own = getattr(tokenizer, "eos_token_id", None)
    found: list[Any] = [*family.stop_token_ids]
    for each in (raw.get("eos_token_id"), generation.get("eos_token_id"), own):
        found += each if isinstance(each, list) else [each]
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int) and 0 <= token < vocabulary))
