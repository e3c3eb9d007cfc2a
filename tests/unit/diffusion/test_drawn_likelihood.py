"""The estimator of the general bound: against its integral by enumeration, and against the masked estimator."""

import itertools
import math
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch import Tensor

from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import drawn_likelihood, likelihood, noise
from lib.diffusion.noise import Noise
from lib.models.language_model import LanguageModel
from tests import tiny

WORDS = 3  # clean tokens of the toy; state 3 is its mask
NOISES: dict[str, Noise] = {
    "masked": noise.masked_noise(WORDS + 1, mask_token_id=WORDS),
    "uniform": noise.uniform_noise(WORDS + 1, mask_token_id=WORDS),
    "mixed": noise.mixed_noise(WORDS + 1, mask_token_id=WORDS, uniform_share=0.3),
}
every_noise = pytest.mark.parametrize("name", NOISES)


@pytest.fixture
def table() -> Tensor:
    """Logits of both places by the pair that the network sees; its mask token is not the least likely."""
    return torch.randn((WORDS + 1, WORDS + 1, 2, WORDS + 1), generator=generator(3)) * 1.5


def toy(table: Tensor) -> LanguageModel:
    """A network of two positions."""
    return tiny.stub(lambda ids: table[ids[:, 0], ids[:, 1]], vocab=WORDS + 1, mask_token_id=WORDS)


@pytest.fixture
def model(tmp_path: Path) -> LanguageModel:
    return tiny.model(tmp_path, causal=False, seed=4)


def integral(table: Tensor, process: Noise, clean: tuple[int, int], *, may: tuple[bool, bool]) -> float:
    """The bound by Gauss-Legendre in t and enumeration of what is seen, from the noise's definition."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    total, states = 0.0, range(WORDS + 1)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        node, weight = node**3, 3 * node**2 * weight  # more nodes near 0, where the integrand is steep
        for seen in itertools.product(states, states):
            chance = 1.0
            for place in (0, 1):
                mixed = node * float(process.mixing[seen[place]]) if may[place] else 0.0
                stays = (1 - node if may[place] else 1.0) * (seen[place] == clean[place])
                chance *= mixed + stays
            if chance == 0.0:
                continue
            logits = table[seen[0], seen[1]].double().clone()
            logits[:, WORDS] = float("-inf")
            pair, at = torch.tensor(clean), torch.full((2,), node, dtype=torch.float64)
            terms = process.loss(logits.log_softmax(-1), pair, torch.tensor(seen), at)
            total += weight * chance * float(terms[torch.tensor(may)].sum())
    return total


def expectation(table: Tensor, process: Noise, clean: tuple[int, int], *, may: tuple[bool, bool]) -> float:
    """The mean of the estimator over all that it can draw: counts, places and tokens."""
    places = [place for place in (0, 1) if may[place]]
    rows, counts, chances = [], [], []
    for count in range(len(places) + 1):
        for drawn in itertools.combinations(places, count):
            for tokens in itertools.product(range(WORDS + 1), repeat=count):
                noisy = list(clean)
                for place, token in zip(drawn, tokens, strict=True):
                    noisy[place] = token
                rows.append(noisy)
                counts.append(count)
                share = np.prod([float(process.mixing[token]) for token in tokens])
                chances.append(share / math.comb(len(places), count) / (len(places) + 1))
    noisy, where = torch.tensor(rows), torch.tensor(may).expand(len(rows), -1)
    drawn = drawn_likelihood.Draws(noisy, torch.tensor(clean).expand(len(rows), -1), where, torch.tensor(counts))
    values = drawn_likelihood.losses(toy(table), process, drawn, batch_size=16)
    assert sum(chances) == pytest.approx(1)
    return float(values @ torch.tensor(chances, dtype=torch.float64))


@every_noise
@pytest.mark.parametrize("may", [(True, True), (False, True)], ids=["all", "given the first"])
def test_mean_is_the_integral(table: Tensor, name: str, may: tuple[bool, bool]) -> None:
    wanted = integral(table, NOISES[name], (0, 2), may=may)
    assert expectation(table, NOISES[name], (0, 2), may=may) == pytest.approx(wanted, rel=2e-3)


@every_noise
def test_constant_network_gives_the_cross_entropy_under_every_noise(table: Tensor, name: str) -> None:
    table[:] = torch.tensor([0.5, 0.3, 0.2, 0.1]).log()
    wanted = -np.log(0.3) - np.log(0.2)
    assert expectation(table, NOISES[name], (1, 2), may=(True, True)) == pytest.approx(wanted, rel=2e-3)


def test_draws_are_of_the_noise(model: LanguageModel) -> None:
    """Every count equally often, the places by chance, the tokens as the mixing has them; a prompt never changes."""
    process = noise.mixed_noise(tiny.VOCAB, mask_token_id=tiny.MASK, uniform_share=0.5)
    ids, where = torch.arange(3, 15), torch.arange(12) >= 6
    drawn = drawn_likelihood.draw(process, ids, where, draws=7000, generator=generator(0))
    assert torch.equal(drawn.counts.bincount(), torch.full((7,), 1000))
    assert torch.equal(drawn.noisy[:, ~where], ids[~where].expand(7000, -1))
    masks = (drawn.noisy == tiny.MASK).float().mean(0)[where]
    torch.testing.assert_close(masks, torch.full((6,), 0.5 * float(process.mixing[tiny.MASK])), rtol=0.1, atol=0)
    changed = (drawn.noisy != ids)[:, where].sum(1)
    assert (changed <= drawn.counts).all()


def test_masked_noise_agrees_with_the_masked_estimator(model: LanguageModel) -> None:
    """With logits that leave the mask token nothing, as the general bound has it."""
    ids, where = torch.arange(3, 15), torch.arange(12) >= 5
    head = cast(torch.nn.Linear, model.network.get_output_embeddings())
    head.bias = torch.nn.Parameter(torch.zeros(tiny.VOCAB), requires_grad=False)
    head.bias[tiny.MASK] = -1e4
    process = noise.masked_noise(tiny.VOCAB, mask_token_id=tiny.MASK)
    general = drawn_likelihood.log_likelihood(model, process, ids, where, draws=320, generator=generator(0), batch_size=200)
    masked = likelihood.masked_log_likelihood(model, ids, where, draws=350, generator=generator(1), batch_size=200).double()
    error = float((general.var() / 320 + masked.var() / 350) ** 0.5)
    assert abs(float(general.mean()) - float(masked.mean())) < 4 * error
    assert error < 0.05 * abs(float(masked.mean()))


@pytest.mark.parametrize(("count", "length"), [(0, 4), (1, 4), (4, 4), (1, 256), (255, 256), (256, 256)])
def test_times_follow_their_distribution_given_the_count(count: int, length: int) -> None:
    times, weights = drawn_likelihood.times_given_count(count, length)
    assert ((times > 0) & (times < 1)).all()
    known = beta(count + 1, length - count + 1)
    for power in (0, 1, 3):
        assert float((weights * times**power).sum()) == pytest.approx(known.moment(power), rel=1e-9)
    if count:
        by_time = float((weights / times * -times.log()).sum())  # as steep as the integrand gets
        expected = known.expect(lambda t: -np.log(t) / t, epsabs=1e-12, epsrel=1e-10)
        assert by_time == pytest.approx(expected, rel=2e-3)


def test_the_batch_changes_nothing(model: LanguageModel) -> None:
    ids, where = torch.arange(3, 15), torch.arange(12) >= 5
    process = noise.uniform_noise(tiny.VOCAB, mask_token_id=tiny.MASK)
    drawn = drawn_likelihood.draw(process, ids, where, draws=16, generator=generator(0))
    one, many = (drawn_likelihood.losses(model, process, drawn, batch_size=size) for size in (1, 7))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_nothing_to_score_is_refused(model: LanguageModel) -> None:
    process = noise.uniform_noise(tiny.VOCAB, mask_token_id=tiny.MASK)
    with pytest.raises(InputError, match="tokens to score and draws >= 1, got 0 and 4"):
        nothing = torch.zeros(12).bool()
        drawn_likelihood.log_likelihood(model, process, torch.arange(12), nothing, draws=4, generator=generator(0))
