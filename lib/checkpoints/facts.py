"""What a checkpoint is for a diffusion model's algorithms: noise, mask token, logit shift, attention, blocks and stop tokens.

Facts go into the configuration in memory under names that load again, so that every way of saving a model keeps them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lib.checkpoints.families import Attention, BlockOrigin, Family
from lib.core.errors import InputError, require

# Added tokens that stand for the mask in one family or another, where the tokenizer does not say which one is its mask.
MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>", "<|MASK|>", "|<MASK>|", "<[MASK]>", "<[MASK_TOKEN]>")
GENERATION = "generation_config.json"
NO_GENERATION = ("transformers_version", "_from_model_config")  # settings that say nothing about how to generate
Corruption = Literal["masked", "uniform", "mixed"]


@dataclass(frozen=True)
class NoiseKind:
    """Which noise a diffusion model was trained with; `diffusion.noise.process_of` makes the process of it.

    In config.json: `noise: {"kind": "uniform"}` or `{"kind": "mixed", "uniform": 0.1}`; no such field means masked.

    Attributes:
        kind: whether tokens become masks, other tokens, or either.
        uniform: share of the noise that is other tokens.
        never_drawn: mask token of a vocabulary shared with masked models, where the noise is uniform: no state of the process.
    """

    kind: Corruption = "masked"
    uniform: float = 0.0
    never_drawn: int | None = None

    @property
    def is_masked(self) -> bool:
        """Tell whether tokens become masks and nothing else."""
        return self.kind == "masked"

    def __str__(self) -> str:
        """Say it in words."""
        return f"mixed (uniform {self.uniform:g})" if self.kind == "mixed" else self.kind

    def written(self) -> dict[str, object]:
        """Return what stands in config.json."""
        share: dict[str, object] = {"uniform": self.uniform} if self.kind == "mixed" else {}
        return {"kind": self.kind} | share


MASKED = NoiseKind()


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
    noise: NoiseKind = MASKED
    seen_token_ids: tuple[int, ...] = ()


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
        InputError: no mask token where the noise has one, sources that name different ones, one outside the vocabulary, a shift
            other than 0 and 1, a noise that is not known, or a tokenizer with words that the network does not have.
    """
    _check_words(tokenizer, vocabulary, folder)
    is_causal = family.attention == "causal"
    stated = {
        file: where["mask_token_id"]
        for file, where in (("config.json", raw), (GENERATION, generation))
        if "mask_token_id" in where
    }
    kind = read_noise(raw, is_causal=is_causal, attention=family.attention, folder=folder)
    mask = None if is_causal else _mask(stated, family, tokenizer, vocabulary=vocabulary, folder=folder, noise=kind)
    shift = 1 if is_causal else raw.get("logit_shift", family.logit_shift)
    require(shift in (0, 1), "logit_shift must be 0 or 1", repr(shift), f"mend config.json in {folder}")
    return Facts(
        family=family.name,
        is_causal=is_causal,
        mask_token_id=None if kind.kind == "uniform" else mask,
        logit_shift=int(shift),
        attention=family.attention,
        block_length=family.block_length,
        block_origin=family.block_origin,
        stop_token_ids=_stops(raw, family, tokenizer, generation, vocabulary),
        noise=replace(kind, never_drawn=mask) if kind.kind == "uniform" else kind,
        seen_token_ids=_seen(raw, family, tokenizer, vocabulary=vocabulary, folder=folder),
    )


def read_noise(raw: Mapping[str, Any], *, is_causal: bool, attention: Attention, folder: Path) -> NoiseKind:
    """Read the noise that a configuration states; masked where it states none.

    Args:
        raw: the config.json.
        is_causal: of the checkpoint.
        attention: of the checkpoint.
        folder: of the checkpoint, for errors.

    Raises:
        InputError: a kind that is not known, a share outside (0, 1), a setting too many, or noise that cannot go with the rest.
    """
    said = raw.get("noise")
    if said is None:
        return MASKED
    remedy = f"mend config.json in {folder}"
    require(not is_causal, "noise must be that of a diffusion model", f"{said!r} with is_causal", remedy)
    kind = said.get("kind") if isinstance(said, dict) else None
    known = get_args(Corruption)
    require(kind in known, f"noise must be a table whose kind is one of {', '.join(known)}", repr(said), remedy)
    wanted = {"kind", "uniform"} if kind == "mixed" else {"kind"}
    require(said.keys() == wanted, f"{kind} noise must state {' and '.join(sorted(wanted))}", repr(said), remedy)
    share = said.get("uniform", 0.0 if kind == "masked" else 1.0)
    is_share = isinstance(share, int | float) and not isinstance(share, bool)
    require(is_share and (kind != "mixed" or 0 < share < 1), "uniform of mixed noise must be in (0, 1)", repr(share), remedy)
    require(kind == "masked" or attention == "full", "attention by blocks must go with masked noise", repr(said), remedy)
    return NoiseKind(cast(Corruption, kind), float(share))


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
    if facts.seen_token_ids:
        saved.seen_token_ids = list(facts.seen_token_ids)
    if not facts.noise.is_masked:
        saved.noise = facts.noise.written()
    if facts.noise.never_drawn is not None:
        saved.mask_token_id = facts.noise.never_drawn


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
    stated: Mapping[str, Any],
    family: Family,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocabulary: int,
    folder: Path,
    noise: NoiseKind,
) -> int | None:
    """Return the mask id that all sources agree on, `stated` by the name of the file; the family's own where none says one.

    Uniform noise needs none.
    """
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
    if not said and noise.kind == "uniform":
        return None
    require(bool(said), "a diffusion model must name its mask token", f"none in {folder}", remedy)
    common = set.intersection(*said.values())
    if len(common) != 1:
        got = ", ".join(f"{' or '.join(sorted(map(str, ids), key=_by_size))} in {source}" for source, ids in said.items())
        raise InputError(f"all that name the mask token of {folder} must name the same one, got {got}: mend what is wrong")
    (found,) = common
    valid = 0 <= found < vocabulary
    require(valid, f"mask_token_id must be one of the {vocabulary} tokens of the network", f"{found!r} in {folder}", remedy)
    return found


def _seen(
    raw: Mapping[str, Any], family: Family, tokenizer: PreTrainedTokenizerBase | None, *, vocabulary: int, folder: Path
) -> tuple[int, ...]:
    """Return the tokens that were never masked in training: as stated, or what an encoder's tokenizer puts round a text."""
    stated = raw.get("seen_token_ids")
    if stated is None and family.layout == "encoder":
        stated = [token for name in ("cls", "sep") if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None]
    found = tuple(stated or ())
    valid = all(isinstance(token, int) and 0 <= token < vocabulary for token in found)
    rule = f"seen_token_ids must be among the {vocabulary} tokens of the network"
    require(valid, rule, str(stated), f"mend config.json in {folder}")
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
