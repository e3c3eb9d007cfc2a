"""The Monte-Carlo log-likelihood against the recorded estimate, by exact enumeration instead of more sampling."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lib.diffusion import likelihood
from lib.models.language_model import logits_at

PROMPT, TARGET = 12, 12
RECORDED_MEAN, RECORDED_STD, RECORDED_SEEDS = -69.02, 0.79, 40
BATCH = 16  # the release draws the counts batch by batch


@pytest.fixture(scope="module")
def per_count(llada: SimpleNamespace) -> Tensor:
    """Expected estimate given that k = 1..12 tokens are masked, over all 4095 masks."""
    ids = llada.expected["calibration.input_ids"][0, : PROMPT + TARGET]
    masks = torch.tensor([m for m in itertools.product([False, True], repeat=TARGET) if any(m)])
    where = torch.cat([torch.zeros((len(masks), PROMPT), dtype=torch.bool), masks], dim=1)
    sums = []
    for part in where.split(512):
        rows = ids.expand(len(part), -1)
        logits = logits_at(llada.model, rows.masked_fill(part, 127), part).log_softmax(-1)
        values = torch.zeros(part.shape)
        values[part] = logits.gather(1, rows[part][:, None])[:, 0]
        sums.append(values.sum(1))
    total, count = torch.cat(sums).double(), masks.sum(1)
    return torch.stack([total[count == k].mean() * TARGET / k for k in range(1, TARGET + 1)])


def release_count_probabilities() -> Tensor:
    """How often the release masks k of 12 tokens: every random start once, halves rounded to even."""
    seen = torch.zeros(TARGET)
    for start in range(1, TARGET + 1):
        for draw in range(BATCH):
            value = start + draw * TARGET / BATCH
            seen[(round(value) - 1) % TARGET] += 1
    return (seen / seen.sum()).double()


def estimate(llada: SimpleNamespace, *, draws: int, rule: likelihood.CountRule, seed: int) -> Tensor:
    ids = llada.expected["calibration.input_ids"][0, : PROMPT + TARGET]
    maskable = torch.arange(PROMPT + TARGET) >= PROMPT
    stream = torch.Generator().manual_seed(seed)
    return likelihood.masked_log_likelihood(
        llada.model, ids, maskable, draws=draws, generator=stream, count_rule=rule, batch_size=512
    )


def test_the_release_rule_explains_the_recorded_mean(per_count: Tensor) -> None:
    """Our side has no noise here; theirs has 0.79 / sqrt(40) = 0.125, so 3 sigma is 0.375."""
    expected = float((per_count * release_count_probabilities()).sum())
    assert abs(expected - RECORDED_MEAN) < 3 * RECORDED_STD / RECORDED_SEEDS**0.5


def test_the_recorded_single_value_is_a_likely_draw(llada: SimpleNamespace) -> None:
    value = float(llada.expected["loglikelihood.mc64_seed7"])
    assert abs(value - RECORDED_MEAN) < 3 * RECORDED_STD


@pytest.mark.parametrize("rule", ["stratified", "release"])
def test_the_estimator_is_unbiased_for_its_counts(llada: SimpleNamespace, per_count: Tensor, rule: likelihood.CountRule) -> None:
    weights = release_count_probabilities() if rule == "release" else torch.full((TARGET,), 1 / TARGET, dtype=torch.float64)
    draws = (
        torch.cat([estimate(llada, draws=BATCH, rule=rule, seed=seed) for seed in range(160)]).view(160, BATCH).mean(1).double()
    )
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - (per_count * weights).sum()) < 3 * error


def test_forty_estimates_of_64_draws_agree_with_the_recorded_mean(llada: SimpleNamespace) -> None:
    """As the release did it: 64 draws in 4 batches of 16, 40 seeds; the difference of two such means has error 0.177."""
    means = [
        torch.cat([estimate(llada, draws=BATCH, rule="release", seed=1000 * seed + part) for part in range(4)]).mean()
        for seed in range(40)
    ]
    values = torch.stack(means)
    assert abs(values.mean() - RECORDED_MEAN) < 3 * RECORDED_STD * (2 / RECORDED_SEEDS) ** 0.5
    assert 0.5 * RECORDED_STD < values.std() < 2 * RECORDED_STD


def test_wrong_weights_would_not_agree(per_count: Tensor) -> None:
    """Without n / k the value is far off, so the tests above would see it."""
    counts = torch.arange(1, TARGET + 1)
    unweighted = (per_count * counts / TARGET * release_count_probabilities()).sum()
    assert abs(unweighted - RECORDED_MEAN) > 20
