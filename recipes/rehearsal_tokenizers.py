"""Tokenizer files of the rehearsal's checkpoints: the reference model's first tokens in the layouts of released tokenizers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from lib.core.config import ROOT

TEXT_TOKENS = 1024  # bytes and the first merges of the reference tokenizer
UNBOUNDED = 1000000000000000019884624838656  # how tokenizers write that they have no longest text
# The order of the ids in LLaDA's own file, with 16 reserved tokens for its 256. MMaDA uses some of those for images.
LLADA_SPECIAL = (
    *("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]"),
    *(f"<|reserved_token_{index}|>" for index in range(16)),
    "<|mdm_mask|>",
    *("<role>", "</role>", "<|arithmetic_start|>", "<|arithmetic_end|>", "<|number_start|>", "<|number_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
LLAMA_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{index}|>" for index in range(8)))
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>")
DREAM_SPECIAL = (*QWEN_SPECIAL, "<|beginoftext|>", "<|mask|>")


def token_id(special: Sequence[str], name: str) -> int:
    """Return the id of a special token; they follow the text's."""
    return TEXT_TOKENS + special.index(name)


def llada_files(*, chat_template: str | None = None) -> dict[str, str]:
    """Return LLaDA's tokenizer files by name: no BOS before a text, and a mask that the tokenizer does not know as its mask."""
    named = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "cls_token": "[CLS]"}
    config: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        **named,
        "clean_up_tokenization_spaces": False,
        "fast_tokenizer": True,
        "gmask_token": "[gMASK]",
        "merges_file": None,
        "model_max_length": UNBOUNDED,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "trust_remote_code": True,
        "vocab_file": None,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    return {
        "tokenizer.json": _fast(LLADA_SPECIAL).to_str(pretty=True),
        "tokenizer_config.json": _text(config),
        "special_tokens_map.json": _text({**named, "gmask_token": "[gMASK]"}),
    }


def llama_files() -> dict[str, str]:
    """Return Llama's tokenizer files by name; it puts BOS before a text."""
    core, bos = _fast(LLAMA_SPECIAL), LLAMA_SPECIAL[0]
    core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    named = {"bos_token": bos, "eos_token": LLAMA_SPECIAL[1]}
    config = {"clean_up_tokenization_spaces": True, "model_max_length": 131072, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer.json": core.to_str(pretty=True),
        "tokenizer_config.json": _text({**config, **named, "added_tokens_decoder": _decoder(LLAMA_SPECIAL)}),
        "special_tokens_map.json": _text(named),
    }


def qwen_files() -> dict[str, str]:
    """Return the tokenizer files of a Qwen2.5 base model by name."""
    core = _fast(QWEN_SPECIAL)
    return {"tokenizer.json": core.to_str(pretty=True), **_qwen_like(QWEN_SPECIAL, {"tokenizer_class": "Qwen2Tokenizer"}, {})}


def dream_files() -> dict[str, str]:
    """Return Dream's tokenizer files by name: Qwen2's, for a class of remote code that is never loaded."""
    remote = {
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer",
    }
    files = _qwen_like(DREAM_SPECIAL, remote, {"bos_token": "<|beginoftext|>", "mask_token": "<|mask|>"})
    added = {name: token_id(DREAM_SPECIAL, name) for name in sorted(DREAM_SPECIAL)}
    return {**files, "added_tokens.json": _text(added)}


def _qwen_like(special: Sequence[str], extra: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, str]:
    """Return vocabulary, merges and settings as Qwen2 keeps them."""
    vocab, merges = _vocabulary()
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **named}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": _decoder(special),
        "additional_special_tokens": list(special[1:]),
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "unk_token": None,
        **extra,
        **named,
    }
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
        "tokenizer_config.json": _text(config),
        "special_tokens_map.json": _text({**named, "additional_special_tokens": list(special[1:])}),
    }


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the first text tokens of the reference tokenizer, renumbered from 0, and the merges that make them."""
    raw = json.loads((ROOT / "models" / "reference" / "dlm" / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in raw["added_tokens"]}
    ordered = sorted((found, token) for token, found in raw["model"]["vocab"].items() if token not in special)
    vocab = {token: index for index, (_, token) in enumerate(ordered[:TEXT_TOKENS])}
    return vocab, [(left, right) for left, right in raw["model"]["merges"] if left + right in vocab]


def _fast(special: Sequence[str]) -> Tokenizer:
    """Build a byte-level tokenizer with its special tokens behind the text's."""
    vocab, merges = _vocabulary()
    core = Tokenizer(models.BPE(vocab, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return core


def _decoder(special: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Describe special tokens by id, as tokenizer_config.json does."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(token_id(special, token)): {"content": token, **flags} for token in special}


def _text(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
