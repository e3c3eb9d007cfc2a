"""Write a byte-level BPE tokenizer into a GGUF file, as llama.cpp reads it."""

import json
from collections.abc import Mapping
from typing import Any, cast

import gguf
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lib.core.errors import require

NAMED_SPLITS = ("llama-bpe", "qwen2", "tekken", "gpt-4o")  # llama.cpp's names of regular expressions that transformers knows, too
REMEDY = "export the model without its tokenizer (dataclasses.replace(model, tokenizer=None)) and pass token ids"


def write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase | None, *, rows: int, pre: str | None = None
) -> None:
    """Write tokens, merges, types, special ids and the chat template.

    Args:
        writer: of the file.
        tokenizer: byte-level BPE; None writes a model that takes token ids only.
        rows: of the embedding; those without a token are named and marked as unused.
        pre: llama.cpp's name of the pre-tokenizer; None finds it.

    Raises:
        InputError: another kind of tokenizer, a way to split texts that llama.cpp has no name for, or more tokens than rows.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    raw = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    kind = f"{raw['model']['type']} with a decoder {(raw['decoder'] or {}).get('type')}"
    is_byte_level = raw["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(raw["decoder"])
    rule = "the tokenizer of a GGUF export must be byte-level BPE"
    require(is_byte_level, rule, kind, REMEDY)
    tokens = {**raw["model"]["vocab"], **{added["content"]: added["id"] for added in raw["added_tokens"]}}
    require(max(tokens.values()) < rows, f"tokens must have ids below {rows}", str(max(tokens.values())), "resize the embedding")
    by_id = {index: token for token, index in tokens.items()}
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    types = {added["id"]: kinds[added["special"]] for added in raw["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or pre_tokenizer_name(raw))
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types(
        [types.get(index, gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED) for index in range(rows)]
    )
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    _write_specials(writer, tokenizer)


def pre_tokenizer_name(raw: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a tokenizer cuts texts before it merges.

    Args:
        raw: a tokenizer.json.

    Raises:
        InputError: llama.cpp has no name for it.

    Source: llama.cpp's `llama-vocab.cpp`: `gpt-2` is GPT-2's regular expression, and `smollm` the same behind single digits.

    >>> pre_tokenizer_name({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}})
    'gpt-2'
    """
    given = raw["pre_tokenizer"] or {}
    parts = given.get("pretokenizers", [given])
    kinds, last = [part.get("type") for part in parts], parts[-1]
    rule = "a tokenizer must split texts in a way that llama.cpp has a name for"
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    found = None
    if plain and last.get("use_regex", True):
        found = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}.get(tuple(kinds))
        if found == "smollm" and not parts[0].get("individual_digits"):
            found = None
    elif plain and kinds == ["Split", "ByteLevel"]:
        pattern = parts[0].get("pattern", {}).get("Regex")
        found = next((name for name in NAMED_SPLITS if GGUF_PRE_TOKENIZER_SPLITS[name] == pattern), None)
    require(found is not None, rule, json.dumps(given)[:120], f"give pre_tokenizer=NAME, or {REMEDY}")
    return cast(str, found)


def _write_specials(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write ids of special tokens, what is put around a text, and the chat template."""
    add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for name, put in {**add, "unk": writer.add_unk_token_id}.items():
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            put(index)
    made = cast(list[int], tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"])
    writer.add_add_bos_token(bool(made and made[0]))
    writer.add_add_eos_token(bool(made and made[-1]))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
