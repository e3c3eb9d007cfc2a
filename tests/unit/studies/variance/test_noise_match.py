"""A generation against random masks: how many positions are hidden, which, and what the network then reads."""

import dataclasses
import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from lib.attention import masses
from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import traces
from lib.diffusion.traces import SinkTrace
from lib.models.language_model import LanguageModel
from lib.studies.variance import noise_match
from tests import tiny

PROMPTS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
SIZE, PROMPT = 20, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("dlm"), causal=False, seed=1)


@pytest.fixture(scope="module")
def trace(model: LanguageModel) -> SinkTrace:
    made = traces.trace(model, PROMPTS, positions=SIZE, steps=8)
    assert not (made.texts == tiny.MASK).any()
    return made


def test_random_masks_hide_exactly_as_many_as_asked_and_only_what_may_be() -> None:
    maskable = torch.tensor([False, True, True, False, True, True, True, False]).repeat(4, 1)
    maskable[1] = ~maskable[0]  # each row has its own
    masks = noise_match.random_masks([0, 1, 3, 5], maskable, generator=generator(0))
    assert masks.sum(1).tolist() == [0, 1, 3, 5]
    assert not (masks & ~maskable).any()
    assert torch.equal(masks, noise_match.random_masks([0, 1, 3, 5], maskable, generator=generator(0)))
    with pytest.raises(InputError, match="5 maskable positions, got 6"):
        noise_match.random_masks([1, 6], maskable[[1, 0]], generator=generator(0))


def test_random_masks_are_drawn_evenly() -> None:
    """Chi-square with 4 degrees of freedom, 0.1 % point 18.5."""
    maskable = torch.tensor([False, True, True, False, True, True, True])
    counts = noise_match.random_masks([2] * 5000, maskable.expand(5000, -1), generator=generator(1)).sum(0)[maskable]
    assert ((counts - 2000) ** 2 / 2000).sum() < 18.5


def test_the_step_with_the_closest_share_of_masks_is_picked(trace: SinkTrace) -> None:
    """16 new tokens in 8 steps: the shares are 1, 7/8, 6/8 and so on."""
    assert noise_match.matching_steps(trace, [0.99, 0.8, 0.7, 0.5, 0.3, 0.01]) == (0, 2, 2, 4, 6, 7)
    # the mean over prompts decides, and the prompt does not count
    masked = trace.is_masked.clone()
    masked[:, :, PROMPT:] = False
    masked[0, 1, PROMPT:], masked[1, 2, PROMPT:] = True, True
    masked[2, 2, PROMPT : PROMPT + 8] = True  # shares 0, 1/3, 1/2, 0, ...
    uneven = dataclasses.replace(trace, is_masked=masked)
    assert noise_match.matching_steps(uneven, [0.4, 0.45, 0.2]) == (1, 2, 1)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_ratios_outside_are_refused(trace: SinkTrace, ratio: float) -> None:
    with pytest.raises(InputError, match=r"mask ratios must be in \(0, 1\)"):
        noise_match.matching_steps(trace, [0.5, ratio])


def test_an_autoregressive_trace_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    causal = tiny.model(tmp_path_factory.mktemp("ar"), causal=True)
    grown = traces.trace(causal, PROMPTS, positions=SIZE, steps=8)
    with pytest.raises(InputError, match="the trace a diffusion model's"):
        noise_match.match(causal, grown, ratios=[0.5], generator=generator(0))


def test_each_draw_reads_the_final_text_under_as_many_masks(
    model: LanguageModel, trace: SinkTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Tensor] = []
    sink_mass = masses.sink_mass

    def watched(model: LanguageModel, ids: Tensor) -> Tensor:
        read.append(ids.clone())
        return sink_mass(model, ids)

    monkeypatch.setattr(masses, "sink_mass", watched)
    matched = noise_match.match(model, trace, ratios=[0.75, 0.25], generator=generator(0))
    assert matched.steps == (2, 6)
    assert matched.mask_ratio == (0.75, 0.25)
    assert matched.depth == 2 * 4
    assert torch.equal(matched.generation, trace.mass[:, [2, 6]])
    assert len(read) == 2 * 2 * 2  # kinds, draws, levels
    for index, ids in enumerate(read):
        hidden = ids == tiny.MASK
        assert (ids[~hidden] == trace.texts[~hidden]).all()
        assert torch.equal(hidden.sum(1), trace.is_masked[:, matched.steps[index % 2]].sum(1))
        expected = sink_mass(model, ids).mean(dim=(0, 2))  # layers and heads
        where = (matched.noised, matched.prompt_kept)[index // 4][index // 2 % 2, :, index % 2]
        torch.testing.assert_close(where, expected, atol=1e-5, rtol=0)
        assert index < 4 or not hidden[:, :PROMPT].any()
    assert torch.stack(read[:4])[..., :PROMPT].eq(tiny.MASK).any()  # the authors' noise hides the prompt too
    for draw, again in ((0, 2), (1, 3), (4, 6), (5, 7)):
        assert not torch.equal(read[draw] == tiny.MASK, read[again] == tiny.MASK)
    everything = torch.cat([matched.generation[None], matched.noised, matched.prompt_kept])
    torch.testing.assert_close(everything.mean(-1), torch.ones(5, 3, 2), atol=1e-5, rtol=0)


def test_equal_masks_give_equal_masses(model: LanguageModel, trace: SinkTrace) -> None:
    """At step 0 all new tokens are masked, and no other mask of that size keeps the prompt."""
    matched = noise_match.match(model, trace, ratios=[0.99, 0.5], generator=generator(0))
    for draw in range(2):
        torch.testing.assert_close(matched.prompt_kept[draw, :, 0], matched.generation[:, 0], atol=1e-5, rtol=0)
        assert (matched.noised[draw, :, 0] - matched.generation[:, 0]).abs().amax(-1).min() > 0.01
        assert (matched.prompt_kept[draw, :, 1] - matched.generation[:, 1]).abs().amax(-1).min() > 0.01


def test_the_pairs_compare_two_draws_as_well(model: LanguageModel, trace: SinkTrace) -> None:
    matched = noise_match.match(model, trace, ratios=[0.5], generator=generator(0))
    pairs = noise_match.pairs(matched)
    assert list(pairs) == [
        "generation, noised", "noised, noised", "generation, noised with prompt kept", "noised, noised with prompt kept",
    ]  # fmt: skip
    expected = [
        (matched.generation, matched.noised[0]), (matched.noised[1], matched.noised[0]),
        (matched.generation, matched.prompt_kept[0]), (matched.prompt_kept[1], matched.prompt_kept[0]),
    ]  # fmt: skip
    for got, wanted in zip(pairs.values(), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
        assert not torch.equal(*got)


def test_rank_correlation_is_spearmans_row_by_row() -> None:
    stream = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 3, 15, generator=stream), torch.rand(2, 3, 15, generator=stream).pow(3)
    first[0], second[1] = (first[0] * 4).round(), (second[1] * 3).round()  # ties on either side
    second[0, 2] = first[0, 2].exp()  # 1 by ranks, below it by values
    got = noise_match.rank_correlation(first, second)
    for row in range(2):
        for level in range(3):
            expected = spearmanr(first[row, level].numpy(), second[row, level].numpy())[0]
            assert float(got[row, level]) == pytest.approx(expected, abs=1e-6)
    assert float(got[0, 2]) == pytest.approx(1.0)
    assert noise_match.rank_correlation(torch.ones(1, 4), torch.rand(1, 4)).isnan().all()


def test_the_release_score_is_that_of_masses_summed_over_layers_and_heads() -> None:
    mass = torch.tensor([1.0, 0.9, 1.1, 0.2, 1.3, 0.8, 1.0, 1.2, 0.9, 1.92])
    depth = 6
    total = [depth * value for value in mass.double().tolist()]
    mean = sum(total) / 10
    std = (sum((value - mean) ** 2 for value in total) / 10) ** 0.5
    expected = [1 / (1 + math.exp(-5 * (value - mean - 2 * std))) for value in total]
    got = noise_match.release_score(mass, depth=depth)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert 0.1 < expected[-1] < 0.9  # near the threshold, where the depth matters
    assert abs(float(noise_match.release_score(mass, depth=1)[-1]) - expected[-1]) > 0.05
    assert noise_match.sink_sets(mass).tolist() == [value > mean + 2 * std for value in total]
