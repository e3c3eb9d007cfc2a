"""Which tokens are scored, with tokenizers of every kind: with a beginning, an end, both or none, and with tokens that merge."""

from itertools import product
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.normalizers import Strip
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lib.core.errors import InputError
from lib.texts import articles
from lib.texts.encoding import encode, encode_pair, first_tokens, is_merged
from tests import tiny

BOS, EOS = 1, 2
FRAMES = {"none": ([], []), "bos": ([BOS], []), "eos": ([], [EOS]), "both": ([BOS], [EOS]), "two": ([BOS, BOS], [EOS, EOS])}


def dressed(core: Tokenizer, frame: str) -> PreTrainedTokenizerFast:
    before, after = FRAMES[frame]
    single = " ".join(["[BOS]"] * len(before) + ["$A"] + ["[EOS]"] * len(after))
    core.post_processor = TemplateProcessing(single=single, special_tokens=[("[BOS]", BOS), ("[EOS]", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")


def merging(frame: str = "none") -> PreTrainedTokenizerFast:
    """Letters, of which "bc", "ab" and "abc" become one token."""
    vocab = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, "a": 3, "b": 4, "c": 5, "bc": 6, "ab": 7, "abc": 8, "d": 9}
    return dressed(Tokenizer(BPE(vocab, [("b", "c"), ("a", "b"), ("a", "bc")], unk_token="[UNK]")), frame)


def words(frame: str) -> PreTrainedTokenizerFast:
    vocab = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{index}": 3 + index for index in range(10)}}
    core = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    return dressed(core, frame)


def pieces(frame: str) -> PreTrainedTokenizerFast:
    """Like SentencePiece: a space is put before every text, also before a continuation that is tokenised alone."""
    scores = [("[UNK]", 0.0), ("[BOS]", 0.0), ("[EOS]", 0.0), ("▁", -3.0), ("▁a", -1.0), ("▁b", -1.0), ("a", -2.0), ("b", -2.0)]
    core = Tokenizer(Unigram(scores, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = Metaspace(prepend_scheme="always")
    return dressed(core, frame)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_text_has_its_beginning_and_no_end(frame: str) -> None:
    made, before = words(frame), FRAMES[frame][0]
    assert encode(made, "w1 w2") == [*before, 4, 5]
    assert encode(made, "w1 w2", special=False) == [4, 5]
    assert encode(made, "") == before
    assert first_tokens(made) == (before or [BOS])
    assert encode(made, "w1 [EOS]") == [*before, 4, EOS], "an end that the text itself names stays"
    assert encode(made, "[EOS] [BOS]") == [*before, EOS, BOS]


@pytest.mark.parametrize("frame", FRAMES)
def test_a_continuation_is_scored_on_its_own_tokens_whatever_is_put_around_texts(frame: str) -> None:
    made, before = words(frame), FRAMES[frame][0]
    assert encode_pair(made, "w1 w2", " w3 w4") == ([*before, 4, 5], [6, 7])
    assert encode_pair(made, "w1 w2 ", "w3") == ([*before, 4, 5], [6])
    assert encode_pair(made, "", "w3") == (before or [BOS], [6])
    assert encode_pair(made, "w1", " [EOS]") == ([*before, 4], [EOS])
    assert encode_pair(made, "w1", "") == ([*before, 4], [])


@pytest.mark.parametrize("frame", FRAMES)
def test_a_token_of_both_is_scored_once_and_said(frame: str) -> None:
    made, before = merging(frame), FRAMES[frame][0]
    head, tail = encode_pair(made, "db", "cd")
    assert (head, tail) == ([*before, 9], [6, 9])  # cutting by the number of the context's tokens would score the d alone
    assert is_merged(made, "db", head) and not is_merged(made, "d", head)
    assert encode_pair(made, "ab", "c")[1] == [8], "nothing of the context is left, so it begins as an empty one does"
    assert encode_pair(made, "ab", "c")[0] == (before or [BOS])
    assert encode_pair(made, "da", "bc") == ([*before, 9], [8])


@pytest.mark.parametrize(("frame", "make"), [*product(FRAMES, [merging, words, pieces])])
def test_context_and_continuation_are_the_tokens_of_the_whole(frame: str, make: Any) -> None:
    made, letters = make(frame), ["w1", "w2 "] if make is words else ["a", "b", "c", "d", " "]
    texts = ["".join(parts) for size in (1, 2) for parts in product(letters, repeat=size)]
    for context, continuation in product(texts, texts):
        head, tail = encode_pair(made, context, continuation)
        alone, whole = encode(made, context.rstrip()), encode(made, context + continuation)
        before = FRAMES[frame][0]
        if context.strip() and whole[: len(alone)] == alone and alone:
            assert (head, tail) == (alone, whole[len(alone) :]), "where nothing merges, it is cut as lm_eval does"
            assert not is_merged(made, context, head)
        if context.strip() and (head != [BOS] or before):
            assert head + tail == whole


def test_white_space_that_a_tokenizer_drops_merges_nothing() -> None:
    core = words("both").backend_tokenizer
    core.normalizer = Normalizers([Strip()])
    made = dressed(core, "both")
    assert encode_pair(made, "w1 ", "w2") == ([BOS, 4], [5])


def test_bytes_merge_across_the_border_of_a_word() -> None:
    """Byte-level BPE as GPT-2's: a space belongs to the word after it, and two line ends are one token."""
    vocab = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, "a": 3, "Ġ": 4, "Ġa": 5, "Ċ": 6, "ĊĊ": 7}
    core = Tokenizer(BPE(vocab, [("Ġ", "a"), ("Ċ", "Ċ")], unk_token="[UNK]"))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made = dressed(core, "eos")
    assert encode_pair(made, "a", " a") == encode_pair(made, "a ", "a") == ([3], [5])
    assert encode_pair(made, "a\n", "\n") == ([3], [7])


def test_a_tokenizer_that_has_nothing_to_begin_with_says_so() -> None:
    core = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    with pytest.raises(InputError, match="something to begin a text with, got neither BOS nor end of text: set bos_token"):
        encode_pair(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"), "", "a")


def test_prompts_do_not_end_before_they_are_cut() -> None:
    """An article of exactly as many tokens as the prompt has no room for an end behind it."""
    row = {"title": "w1 w2", "extract": " ".join(["w3"] * 20), "description": "", "topic": ""}
    own = len(encode(words("bos"), articles.format_article(row, description_last=False)))
    prompt = articles.article_prompts(words("both"), [row], count=1, length=own - 20)
    assert EOS not in prompt[0]
    with pytest.raises(InputError, match=f"at most {own}"):
        articles.article_prompts(words("both"), [{**row, "extract": row["extract"] + " " * 400}], count=1, length=own + 1)


def test_the_plain_words_of_other_tests_are_unmoved() -> None:
    made = tiny.words()
    assert encode(made, "w1") == [1, 4] and encode(made, "") == [1] and encode_pair(made, "w1", " w2") == ([1, 4], [5])
