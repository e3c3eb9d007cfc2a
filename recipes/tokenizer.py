"""The byte-level BPE tokenizer of the reference pair, and token windows of the corpus."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes import corpus

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "mask_token": "<|mask|>"}


def train_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with one token per digit on `texts`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **SPECIAL)


def load_or_train(folder: Path, articles: list[dict[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer kept in `folder`, training it on the training split when it is not there yet."""
    if not (folder / "tokenizer.json").exists():
        texts = corpus.training_documents(articles, seed=0, epoch=0)
        train_tokenizer(texts, vocab_size=vocab_size).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode_documents(tok: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Tokenise documents as BOS, text, EOS."""
    rows = tok(texts, add_special_tokens=False)["input_ids"]
    return [[tok.bos_token_id, *row, tok.eos_token_id] for row in rows]


def article_windows(tok: PreTrainedTokenizerFast, articles: list[dict[str, str]], *, length: int) -> Tensor:
    """Pack articles (description first) into windows `[window, length]`, in the order given."""
    texts = [format_row for row in articles if (format_row := corpus.format_article(row, description_last=False))]
    return torch.tensor(list(corpus.pack(encode_documents(tok, texts), length=length)))
