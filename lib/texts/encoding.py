"""Tokenise texts as lm_eval does, so that other models' published numbers compare."""

from typing import cast

from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Tokenise a text, with what the tokenizer itself puts before it (BOS) unless `special` is False."""
    return cast(list[int], tokenizer(text, add_special_tokens=special)["input_ids"])


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenise a context and its continuation together and split them again.

    White space at the end of the context goes to the continuation, since most tokenizers put a space into the token after it.
    An empty context becomes what the tokenizer puts before a text (BOS), or its end-of-text token.

    Returns:
        (context ids, continuation ids).

    Source: lm_eval's own models; the same splitting, so that other models' published numbers compare.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return first_tokens(tokenizer), encode(tokenizer, continuation, special=False)
    head = encode(tokenizer, stripped)
    return head, encode(tokenizer, stripped + continuation)[len(head) :]


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what stands before an empty context: what the tokenizer puts before a text, else BOS or end of text."""
    before = encode(tokenizer, "")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return before or [cast(int, first)]
