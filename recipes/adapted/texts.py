"""What the adapted model reads: the encyclopaedia's summaries, one epoch after another."""

import random

from lib.texts.articles import format_article
from recipes import corpus


def documents(articles: list[dict[str, str]], *, seed: int, epoch: int) -> list[str]:
    """Return the training articles of one epoch, shuffled, the description before the text or behind it."""
    rng = random.Random(f"adapted-{seed}-{epoch}")
    texts = [format_article(row, description_last=rng.random() < 0.5) for row in corpus.split_articles(articles, "train")]
    rng.shuffle(texts)
    return texts


def held_out(articles: list[dict[str, str]]) -> list[str]:
    """Return the articles that no training reads, the description before the text."""
    return [format_article(row, description_last=False) for row in corpus.split_articles(articles, "evaluation")]
