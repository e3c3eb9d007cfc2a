"""Tasks with exact answers: two-number sums, generated or scored; and intervals of shares of right answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from scipy.stats import binomtest, norm
from torch import Tensor

from lib.core.runtime import generator
from lib.diffusion import likelihood, sampler
from lib.evaluation.scoring import grouped
from lib.models.language_model import LanguageModel, logits_at, tokenizer_of
from lib.texts.encoding import encode, encode_pair

ANSWER_TOKENS = 6  # a space, a sign, three digits, the end of the document


@dataclass(frozen=True)
class Questions:
    """Where questions are, and how an answer follows its question.

    Attributes:
        file: in `data/`, without `.jsonl`.
        between: text between question and answer.
        new_tokens: of the longest answer and the end of the document, in the embedded models' tokens.
    """

    file: str
    between: str = " "
    new_tokens: int = ANSWER_TOKENS


SUMS = Questions("sums_test")  # `23 - 60 =`, which any model may know
QUESTIONS = {"tiny_sums": SUMS, "tiny_add": Questions("tasks/tiny_add", "", 5)}  # the second one is in the family's training


def answer_sums(
    model: LanguageModel,
    rows: Sequence[dict[str, str]],
    *,
    kind: Questions = SUMS,
    use_cache: bool = True,
    on_batch: Callable[[], None] | None = None,
) -> list[str]:
    """Let the model answer `23 - 60 =`: greedily, one token per step, cut at the end of the document.

    Args:
        model: diffusion or autoregressive.
        rows: questions, as in `data/sums_test.jsonl`.
        kind: of the questions.
        use_cache: False for an autoregressive model whose keys are blocked.
        on_batch: called before each batch of questions of equal length.

    Returns:
        One answer a question, without white space around it.
    """
    tokenizer = tokenizer_of(model)
    prompts = [encode(tokenizer, row["question"]) for row in rows]
    answers = [""] * len(rows)
    for picked in grouped([len(prompt) for prompt in prompts]):
        batch, length = torch.tensor([prompts[index] for index in picked]), len(prompts[picked[0]])
        if on_batch is not None:
            on_batch()
        if model.is_causal:
            ids = sampler.continue_text(model, batch, new_tokens=kind.new_tokens, use_cache=use_cache)
        else:
            ids = sampler.sample(model, batch, new_tokens=kind.new_tokens, steps=kind.new_tokens)
        for index, row in zip(picked, ids[:, length:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            answers[index] = cast(str, tokenizer.decode(row[:end])).strip()
    return answers


def is_correct(answers: Sequence[str], rows: Sequence[dict[str, str]]) -> list[bool]:
    """Compare answers with the expected ones, exactly."""
    return [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]


def answer_loss(
    model: LanguageModel, rows: Sequence[dict[str, str]], *, draws: int, seed: int, kind: Questions = SUMS
) -> Float[Tensor, "row"]:
    """Return the negative log-likelihood of each right answer given its question, in nats for the whole answer.

    Args:
        model: diffusion (a Monte-Carlo upper bound) or autoregressive (exact).
        rows: questions with answers; the end of the document counts as part of the answer, once, whether the tokenizer appends
            it or not. Which tokens are the answer's says `encode_pair`.
        draws: masks per question, for a diffusion model.
        seed: of the masks, which depend on it and the question's index alone: all variants of a model see the same ones.
        kind: of the questions.

    Source: LLaDA (arXiv 2502.09992), Eq. 6, for the bound.
    """
    tokenizer = tokenizer_of(model)
    losses = []
    for index, row in enumerate(rows):
        question, answer = encode_pair(tokenizer, row["question"], kind.between + row["answer"])
        ids = torch.tensor([*question, *answer, cast(int, tokenizer.eos_token_id)], device=model.device)
        scored = torch.arange(len(ids), device=model.device) >= len(question)
        if model.is_causal:
            logits = logits_at(model, ids[None], scored[None])
            losses.append(torch.nn.functional.cross_entropy(logits, ids[scored], reduction="sum").cpu())
        else:
            stream = generator(seed, "answers", index)
            losses.append(-likelihood.masked_log_likelihood(model, ids, scored, draws=draws, generator=stream).mean())
    return torch.stack(losses)


def share_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    >>> [round(end, 3) for end in share_interval(10, 200)]
    [0.027, 0.09]
    """
    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def matched_interval(only_first: int, only_second: int, *, documents: int) -> tuple[float, float]:
    """Return a 95 % interval of the difference of two systems' shares of right answers to the same documents.

    Unlike a bootstrap's, it has a width where no document tells the two apart, so it can carry a claim of no loss. It is not for
    a system beside itself, whose difference is 0 whatever the documents are.

    Args:
        only_first: documents that only the first answers correctly.
        only_second: documents that only the second does.
        documents: all of them.

    Source: Agresti and Min, Simple improved confidence intervals for comparing matched proportions (2005): Wald's, with half a
        document added to each of the four cells. With 20 documents it covers 93 to 100 times in 100, but 88
        times where one of the two is right in a tenth and the other in none.

    >>> low, high = matched_interval(0, 0, documents=198)
    >>> round(low, 4), round(high, 4)
    (-0.0098, 0.0098)
    """
    size, gap = documents + 2, only_first - only_second
    half = float(norm.ppf(0.975)) * math.sqrt(only_first + only_second + 1 - gap**2 / size) / size
    return max(gap / size - half, -1.0), min(gap / size + half, 1.0)
