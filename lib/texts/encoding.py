"""Tokenise texts as lm_eval does, so that other models' published numbers compare; what a tokenizer appends (EOS) is left out."""

from itertools import takewhile
from typing import cast

from transformers import PreTrainedTokenizerBase

from lib.core.errors import require


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Tokenise a text, with what the tokenizer itself puts before it (BOS) unless `special` is False.

    What it puts behind (the EOS of some tokenizers) is never part of it: a prompt that is to be continued must not be over, and
    an answer is scored on its own tokens.
    """
    if not special:
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    made = tokenizer(text, return_special_tokens_mask=True)
    ids, is_added = cast(list[int], made["input_ids"]), cast(list[int], made["special_tokens_mask"])
    if all(is_added):  # which of them stand before the text and which behind cannot be seen without a text
        return _before(tokenizer)
    return ids[: len(ids) - is_added[::-1].index(0)]


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenise a context and its continuation together and split them again, behind the tokens that the context alone has, too.

    White space at the end of the context goes to the continuation, since most tokenizers put a space into the token after it. A
    token of both, the end of the context and the beginning of the continuation, goes to the continuation as well (see
    `is_merged`): no token of the continuation is lost or scored twice. An empty context becomes what the tokenizer puts before a
    text (BOS), or its end-of-text token; so does one of which merging leaves nothing.

    Returns:
        (context ids, continuation ids). Together they are the tokens of the whole text, the first ones of an empty context aside.

    Source: lm_eval's own models, which cut by the number of the context's tokens: the same wherever nothing is merged.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return first_tokens(tokenizer), encode(tokenizer, continuation, special=False)
    head, whole = encode(tokenizer, stripped), encode(tokenizer, stripped + continuation)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(head, whole, strict=False)))
    return whole[:shared] or first_tokens(tokenizer), whole[shared:]


def is_merged(tokenizer: PreTrainedTokenizerBase, context: str, head: list[int]) -> bool:
    """Tell whether a continuation took tokens of its context.

    Args:
        tokenizer: that of `encode_pair`.
        context: as given to it.
        head: the context ids that it returned.
    """
    return bool(context.strip()) and head != encode(tokenizer, context.rstrip())


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what stands before an empty context: what the tokenizer puts before a text, else BOS or end of text.

    Raises:
        InputError: it has none of these.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    before = _before(tokenizer)
    rule = "a tokenizer must have something to begin a text with"
    require(bool(before) or first is not None, rule, "neither BOS nor end of text", "set bos_token in its tokenizer_config.json")
    return before or [cast(int, first)]


def _before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text."""
    made = tokenizer("a", return_special_tokens_mask=True)
    ids, is_added = cast(list[int], made["input_ids"]), cast(list[int], made["special_tokens_mask"])
    return ids[: is_added.index(0)] if 0 in is_added else [token for token in ids if token != tokenizer.eos_token_id]
