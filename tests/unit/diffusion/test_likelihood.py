"""Noising and likelihoods on networks whose answer is known."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import likelihood, noise
from lib.models.language_model import LanguageModel, logits_at
from tests import tiny

VOCAB = 5
STUB_MASK = 4


def uniform(input_ids: Tensor) -> Tensor:
    """Logits that say nothing."""
    return torch.zeros((*input_ids.shape, VOCAB))


def by_count(input_ids: Tensor) -> Tensor:
    """Logits whose cross-entropy for token 0 is log(1 + 4 / k), k = number of masks in the row."""
    count = (input_ids == STUB_MASK).sum(1).clamp(min=1).float()
    logits = torch.zeros((*input_ids.shape, VOCAB))
    logits[..., 0] = count.log()[:, None]
    return logits


def linear_in_count(input_ids: Tensor) -> Tensor:
    """Logits whose cross-entropy for token 0 is k / 10."""
    count = (input_ids == STUB_MASK).sum(1).clamp(min=1).double()
    logits = torch.zeros((*input_ids.shape, VOCAB))
    logits[..., 0] = -((0.1 * count).expm1() / 4).log()[:, None].float()
    return logits


def stub(logits_of: Callable[[Tensor], Tensor]) -> LanguageModel:
    return tiny.stub(logits_of, vocab=VOCAB, mask_token_id=STUB_MASK)


# Noise


def test_the_mask_share_follows_the_rate() -> None:
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    ids = torch.zeros((5, 20_000), dtype=torch.long)
    noised = noise.forward_noise(ids, mask_token_id=9, generator=generator(0), t=t)
    rate = (1 - 1e-3) * t + 1e-3
    torch.testing.assert_close(noised.mask_rate, rate)
    error = (rate * (1 - rate) / 20_000).sqrt()
    assert ((noised.is_masked.float().mean(1) - rate).abs() <= 4 * error).all()
    assert noised.is_masked[4].all()
    assert torch.equal(noised.input_ids, torch.where(noised.is_masked, 9, 0))


def test_eps_is_the_smallest_rate() -> None:
    noised = noise.forward_noise(tiny.ids(2, 4), mask_token_id=9, generator=generator(0), t=torch.tensor([0.0, 0.5]), eps=0.2)
    assert noised.mask_rate.tolist() == pytest.approx([0.2, 0.6])


def test_the_input_is_left_unchanged() -> None:
    ids = tiny.ids(2, 30)
    before = ids.clone()
    noise.forward_noise(ids, mask_token_id=30, generator=generator(0), t=torch.ones(2))
    assert torch.equal(ids, before)


def test_dream_never_masks_first_and_last_and_is_otherwise_the_same() -> None:
    ids = tiny.ids(200, 6)
    llada = noise.forward_noise(ids, mask_token_id=30, generator=generator(0))
    dream = noise.forward_noise(ids, mask_token_id=30, generator=generator(0), schedule="dream")
    assert llada.is_masked[:, 0].any()
    assert llada.is_masked[:, -1].any()
    assert not dream.is_masked[:, [0, -1]].any()
    assert torch.equal(dream.is_masked[:, 1:-1], llada.is_masked[:, 1:-1])
    assert torch.equal(dream.mask_rate, llada.mask_rate)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_stratified_times_fall_one_in_each_part(batch: int) -> None:
    for seed in range(50):
        times = noise.stratified_times(batch, generator=generator(seed))
        assert ((times >= 0) & (times < 1)).all()
        assert sorted((times.double() * batch + 1e-6).long().clamp(max=batch - 1).tolist()) == list(range(batch))


def test_a_stratified_time_is_uniform_in_every_row() -> None:
    times = torch.stack([noise.stratified_times(4, generator=generator(seed)) for seed in range(2000)])
    # standard error of a uniform mean over 2000 draws is 0.0065
    assert (times.mean(0) - 0.5).abs().max() < 4 * 0.0065


# Counts and masks


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_exact_counts_take_each_value_once_when_draws_equal_length(length: int) -> None:
    for seed in range(30):
        counts = likelihood.exact_counts(length, length, generator=generator(seed))
        assert sorted(counts.tolist()) == list(range(1, length + 1))


@pytest.mark.parametrize("rule", ["stratified", "antithetic"])
def test_counts_are_uniform_in_every_draw_whatever_their_number(rule: likelihood.CountRule) -> None:
    """6 counts, 4 draws: a rule that rounds would favour some (chi-square with 5 degrees of freedom, 0.1 % point 20.5)."""
    counts = torch.stack([likelihood.COUNT_RULES[rule](6, 4, generator=generator(seed)) for seed in range(1500)])
    for some, expected in ((counts, 1000), (counts[:, 0], 250), (counts[:, 3], 250)):
        seen = torch.bincount(some.flatten(), minlength=7).double()
        assert len(seen) == 7 and seen[0] == 0
        assert ((seen[1:] - expected) ** 2 / expected).sum() < 20.5


@pytest.mark.parametrize("draws", [1, 2, 5, 8])
def test_antithetic_counts_lie_one_in_each_stratum_and_mirror_each_other(draws: int) -> None:
    """8 tokens a stratum; of two neighbours one lies as far from its start as the other from its end."""
    length = 8 * draws
    for seed in range(30):
        counts = likelihood.antithetic_counts(length, draws, generator=generator(seed)).sort().values
        assert ((counts - 1) // 8).tolist() == list(range(draws))
        for at in range(0, draws - 1, 2):
            assert int(counts[at] + counts[at + 1]) == 2 * 8 * (at + 1) + 1


def test_release_counts_favour_even_numbers() -> None:
    """12 tokens, 16 draws: steps of 0.75, and every half is rounded to an even count."""
    counts = torch.cat([likelihood.release_counts(12, 16, generator=generator(seed)) for seed in range(400)])
    assert set(counts.tolist()) == set(range(1, 13))
    assert float((counts % 2 == 0).float().mean()) > 0.55
    fair = torch.cat([likelihood.exact_counts(12, 16, generator=generator(seed)) for seed in range(400)])
    assert abs(float((fair % 2 == 0).float().mean()) - 0.5) < 0.02


def test_release_counts_are_what_python_rounds_to() -> None:
    for seed in range(20):
        start = int(torch.randint(1, 13, (), generator=generator(seed)))
        expected = [(round(start + draw * 0.75) - 1) % 12 + 1 for draw in range(16)]
        assert likelihood.release_counts(12, 16, generator=generator(seed)).tolist() == expected


@pytest.mark.parametrize("rule", ["stratified", "release"])
def test_masks_hide_exactly_the_counted_tokens_and_only_maskable_ones(rule: likelihood.CountRule) -> None:
    maskable = torch.tensor([False, True, True, False, True, True, True])
    masks = likelihood.exact_count_masks(maskable, 40, generator=generator(1), count_rule=rule)
    counts = likelihood.COUNT_RULES[rule](5, 40, generator=generator(1))
    assert not masks[:, ~maskable].any()
    assert torch.equal(masks.sum(1), counts)


def test_every_subset_of_a_count_is_equally_likely() -> None:
    maskable = torch.ones(4, dtype=torch.bool)
    masks = torch.cat([likelihood.exact_count_masks(maskable, 4, generator=generator(seed)) for seed in range(1200)])
    pairs = masks[masks.sum(1) == 2]
    code = (pairs.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    seen = torch.stack([(code == value).sum() for value in (3, 5, 6, 9, 10, 12)]).double()
    assert len(pairs) == 1200
    assert ((seen - 200) ** 2 / 200).sum() < 20.5  # chi-square, 5 degrees of freedom, 0.1 %


@pytest.mark.parametrize(
    ("tokens", "counts"), [(3, (1, 1, 2)), (3, (2, 1, 3)), (3, (2, 2, 2)), (4, (1, 2)), (4, (2, 2)), (4, (3, 1))]
)
def test_each_balanced_mask_alone_is_uniform_over_its_count(tokens: int, counts: tuple[int, ...]) -> None:
    """By enumeration of all orders, so exactly: no subset of a count comes more often than another in any of the draws."""
    seen = [Counter[tuple[bool, ...]]() for _ in counts]
    orders = list(itertools.permutations(range(tokens)))
    for chosen in itertools.product(orders, repeat=len(counts)):
        masks = likelihood.balanced_masks(torch.tensor(counts), torch.tensor(chosen))
        for of_draw, mask in zip(seen, masks, strict=True):
            of_draw[tuple(mask.tolist())] += 1
    for of_draw, count in zip(seen, counts, strict=True):
        assert len(of_draw) == math.comb(tokens, count) and len(set(of_draw.values())) == 1
        assert all(sum(mask) == count for mask in of_draw)


def test_balanced_masks_weigh_tokens_alike() -> None:
    spreads = {}
    for rule in ("independent", "balanced"):
        masks = [
            likelihood.exact_count_masks(torch.ones(24, dtype=torch.bool), 8, generator=generator(s), masks=rule)
            for s in range(20)
        ]
        weights = torch.stack([(one / one.sum(1, keepdim=True)).sum(0) for one in masks])
        torch.testing.assert_close(weights.sum(1), torch.full((20,), 8.0))
        spreads[rule] = float(weights.std(1).mean())
    assert spreads["balanced"] < spreads["independent"] / 2


def test_two_balanced_antithetic_masks_share_one_token() -> None:
    masks = likelihood.exact_count_masks(
        torch.ones(9, dtype=torch.bool), 2, generator=generator(5), count_rule="antithetic", masks="balanced"
    )
    assert int(masks.sum()) == 10 and bool(masks.any(0).all())


# Likelihoods


def test_uniform_logits_give_the_log_of_the_vocabulary_for_every_draw() -> None:
    """n / k times k log V: exact whatever the mask; a 1 / rate weight would scatter."""
    model = stub(uniform)
    got = likelihood.masked_log_likelihood(
        model, torch.zeros(7, dtype=torch.long), torch.arange(7) > 1, draws=9, generator=generator(0)
    )
    torch.testing.assert_close(got, torch.full((9,), -5 * math.log(VOCAB)))
    bound = likelihood.nelbo(model, torch.zeros((3, 7), dtype=torch.long), draws=4, seed=0)
    assert bound.mean == pytest.approx(math.log(VOCAB), abs=1e-6)
    assert bound.standard_error == pytest.approx(0.0, abs=1e-6)
    assert bound.per_window.shape == (3,)


def test_a_loss_that_depends_on_the_count_is_weighted_by_one_over_k() -> None:
    """Every count once (draws = n): the mean is (1/n) sum_k n log(1 + 4/k), k weights or a plain mean give other values."""
    n = 6
    got = likelihood.masked_log_likelihood(
        stub(by_count), torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.bool), draws=n, generator=generator(3)
    )
    per_count = [math.log(1 + 4 / k) for k in range(1, n + 1)]
    assert float(got.mean()) == pytest.approx(-sum(per_count), rel=1e-5)
    weighted_by_k = sum(k * value for k, value in enumerate(per_count, 1)) / n
    assert abs(weighted_by_k - sum(per_count)) > 0.5
    bound = likelihood.nelbo(stub(by_count), torch.zeros((2, n), dtype=torch.long), draws=n, seed=1)
    assert bound.mean == pytest.approx(sum(per_count) / n, rel=1e-5)


def test_the_likelihood_agrees_with_every_subset_of_four_tokens(tmp_path: Path) -> None:
    """Brute force: mean over k of the mean over the subsets of size k of n / k times the masked log-probability."""
    model = tiny.model(tmp_path, causal=False)
    ids, maskable = tiny.ids(1, 7)[0], torch.tensor([False, True, False, True, True, False, True])
    positions, n = maskable.nonzero()[:, 0].tolist(), 4
    expected = 0.0
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(positions, k))
        for subset in subsets:
            noisy = ids.clone()
            noisy[list(subset)] = tiny.MASK
            with torch.no_grad():
                logits = model.network(input_ids=noisy[None]).logits[0].log_softmax(-1)
            expected += n / k * sum(float(logits[p, ids[p]]) for p in subset) / len(subsets) / n
    draws = likelihood.masked_log_likelihood(model, ids, maskable, draws=6000, generator=generator(0), batch_size=2000)
    error = float(draws.std()) / 6000**0.5
    assert error < 0.2
    assert abs(float(draws.mean()) - expected) < 3 * error


@pytest.mark.parametrize("draws", [2, 3, 8])
@pytest.mark.parametrize("masks", ["independent", "balanced"])
@pytest.mark.parametrize("count_rule", ["stratified", "antithetic"])
def test_every_rule_estimates_the_same_bound(
    tmp_path: Path, count_rule: likelihood.CountRule, masks: likelihood.MaskRule, draws: int
) -> None:
    """The exact bound of four tokens, from all fifteen masks; 400 windows with the same tokens and other masks estimate it."""
    model, ids, n = tiny.model(tmp_path, causal=False), tiny.ids(1, 4), 4
    every = [mask for mask in itertools.product((False, True), repeat=n) if any(mask)]
    hidden = torch.tensor(every)
    losses = torch.cat(list(likelihood.masked_losses(model, ids[0], hidden, batch_size=15))).sum(1) / hidden.sum(1)
    exact = sum(float(losses[hidden.sum(1) == k].mean()) for k in range(1, n + 1)) / n
    found = likelihood.nelbo(model, ids.expand(400, n), draws=draws, seed=3, count_rule=count_rule, masks=masks, batch_size=800)
    assert found.standard_error < 0.1 * exact
    assert abs(found.mean - exact) < 3.5 * found.standard_error


def test_antithetic_counts_take_the_noise_of_a_loss_that_is_linear_in_the_count() -> None:
    windows = torch.zeros((40, 32), dtype=torch.long)
    rules: tuple[likelihood.CountRule, ...] = ("stratified", "antithetic")
    found = [likelihood.nelbo(stub(linear_in_count), windows, draws=4, seed=0, count_rule=rule) for rule in rules]
    assert found[1].mean == pytest.approx(0.1 * 33 / 2, rel=1e-4)
    assert found[0].standard_error > 0.01 > 1e-4 > found[1].standard_error


def test_the_batch_size_changes_nothing(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=False)
    ids, maskable = tiny.ids(1, 9)[0], torch.arange(9) > 2
    values = [
        likelihood.masked_log_likelihood(model, ids, maskable, draws=7, generator=generator(0), batch_size=size)
        for size in (1, 3, 50)
    ]
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], atol=1e-4, rtol=1e-5)  # float32 products in other shapes


def test_two_models_see_the_same_masks() -> None:
    models = [stub(uniform), stub(by_count)]
    for model in models:
        likelihood.nelbo(model, tiny.ids(3, 8, vocab=4), draws=5, seed=4, batch_size=2)
    first, second = (torch.cat(model.network.calls.inputs) for model in models)  # pyright: ignore
    assert torch.equal(first, second)
    assert len(first) == 15


def test_the_masks_of_a_window_do_not_depend_on_the_other_windows() -> None:
    windows = tiny.ids(4, 8, vocab=4)
    whole, part = stub(uniform), stub(uniform)
    likelihood.nelbo(whole, windows, draws=3, seed=0)
    likelihood.nelbo(part, windows[:2], draws=3, seed=0)
    assert torch.equal(torch.cat(whole.network.calls.inputs)[:6], torch.cat(part.network.calls.inputs))  # pyright: ignore
    masks = (torch.cat(whole.network.calls.inputs) == STUB_MASK).view(4, 3, 8)  # pyright: ignore
    assert not torch.equal(masks[0], masks[1])
    other = stub(uniform)
    likelihood.nelbo(other, windows, draws=3, seed=1)
    assert not torch.equal(torch.cat(whole.network.calls.inputs), torch.cat(other.network.calls.inputs))  # pyright: ignore


def test_the_head_runs_on_masked_positions_only() -> None:
    model = stub(uniform)
    likelihood.masked_log_likelihood(
        model, torch.zeros(10, dtype=torch.long), torch.arange(10) >= 4, draws=6, generator=generator(0), batch_size=4
    )
    assert model.network.calls.head_rows == sum(range(1, 7))  # pyright: ignore
    assert model.network.calls.forwards == 2  # pyright: ignore


def test_the_head_of_a_real_network_sees_the_selected_rows_only(tmp_path: Path) -> None:
    model, rows = tiny.model(tmp_path, causal=False), []
    head = model.network.get_output_embeddings()
    assert head is not None
    hook = head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    where = torch.zeros((2, 9), dtype=torch.bool)
    where[0, 3] = where[1, 5] = where[1, 8] = True
    logits_at(model, tiny.ids(2, 9), where)
    hook.remove()
    assert rows == [3]


def test_next_token_nll_equals_the_loss_of_transformers(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=True)
    windows = tiny.ids(5, 12)
    got = likelihood.next_token_nll(model, windows, batch_size=2)
    with torch.no_grad():
        losses = [float(model.network(input_ids=row[None], labels=row[None]).loss) for row in windows]
    assert got.per_window.tolist() == pytest.approx(losses, abs=1e-5)
    assert got.mean == pytest.approx(sum(losses) / 5, abs=1e-5)
    spread = torch.tensor(losses, dtype=torch.float64)
    assert got.standard_error == pytest.approx(float(spread.std()) / 5**0.5, abs=1e-5)


def test_next_token_nll_is_not_the_unshifted_loss(tmp_path: Path) -> None:
    model, windows = tiny.model(tmp_path, causal=True), tiny.ids(2, 12)
    with torch.no_grad():
        logits = model.network(input_ids=windows).logits
    unshifted = F.cross_entropy(logits[:, 1:].flatten(0, 1), windows[:, 1:].flatten())
    assert abs(likelihood.next_token_nll(model, windows).mean - float(unshifted)) > 0.1


def test_the_standard_error_of_one_window_is_unknown() -> None:
    assert math.isnan(likelihood.summarise(torch.tensor([2.0])).standard_error)


# Bad input


def test_each_likelihood_refuses_the_other_kind_of_model(tmp_path: Path) -> None:
    causal = tiny.model(tmp_path, causal=True)
    with pytest.raises(InputError, match="use next_token_nll"):
        likelihood.nelbo(causal, tiny.ids(1, 6), draws=2, seed=0)
    with pytest.raises(InputError, match="use nelbo"):
        likelihood.next_token_nll(stub(uniform), tiny.ids(1, 6, vocab=4))


@pytest.mark.parametrize(("scored", "draws"), [(0, 3), (2, 0)])
def test_nothing_to_score_is_refused(scored: int, draws: int) -> None:
    maskable = torch.arange(5) < scored
    with pytest.raises(InputError, match="tokens to score and draws >= 1"):
        likelihood.masked_log_likelihood(
            stub(uniform), torch.zeros(5, dtype=torch.long), maskable, draws=draws, generator=generator(0)
        )


@pytest.mark.parametrize(("windows", "length", "draws"), [(2, 4, 0), (2, 0, 3), (0, 4, 3)])
def test_a_bound_of_nothing_is_refused(windows: int, length: int, draws: int) -> None:
    with pytest.raises(InputError, match="tokens to score and draws >= 1"):
        likelihood.nelbo(stub(uniform), torch.zeros(windows, length, dtype=torch.long), draws=draws, seed=0)
