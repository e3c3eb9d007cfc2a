"""The authors' perplexity against a slow float64 loop, and against the bounds and wrong formulas it is mistaken for."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.core.errors import InputError
from lib.core.runtime import generator
from lib.diffusion import likelihood
from lib.evaluation import pseudo_perplexity
from lib.evaluation.pseudo_perplexity import answer_masks, answer_windows
from lib.models.language_model import LanguageModel
from tests import tiny

VOCAB = 5
STUB_MASK = 4


def by_count(input_ids: Tensor) -> Tensor:
    """Logits whose cross-entropy for token 0 is log(1 + 4 / k), k = number of masks in the row."""
    count = (input_ids == STUB_MASK).sum(1).clamp(min=1).float()
    logits = torch.zeros((*input_ids.shape, VOCAB))
    logits[..., 0] = count.log()[:, None]
    return logits


def stub() -> LanguageModel:
    return tiny.stub(by_count, vocab=VOCAB, mask_token_id=STUB_MASK)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return tiny.model(tmp_path_factory.mktemp("model"), causal=False)


def masks_of(seed: int, index: int, length: int, *, answer: int, draws: int) -> Tensor:
    return answer_masks(length, answer_tokens=answer, draws=draws, generator=generator(seed, "pseudo_perplexity", index))


def surprise(model: LanguageModel, ids: Tensor, mask: Tensor) -> list[float]:
    """Cross-entropy of every masked token, one at a time in float64."""
    with torch.inference_mode():
        logits = model.network(input_ids=torch.where(mask, tiny.MASK, ids)[None]).logits[0].double()
    return [
        math.log(sum(math.exp(value) for value in logits[p].tolist())) - float(logits[p, ids[p]]) for p in mask.nonzero()[:, 0]
    ]


# The value


def test_the_figure_equals_a_slow_loop_and_no_other_mean(model: LanguageModel) -> None:
    windows, answer, draws = tiny.ids(3, 9), 5, 8
    means, pooled, unweighted, arithmetic = [], [], [], []
    for index, ids in enumerate(windows):
        losses = [surprise(model, ids, mask) for mask in masks_of(7, index, 9, answer=answer, draws=draws)]
        means.append(sum(sum(values) / len(values) for values in losses) / draws)
        pooled.append(sum(map(sum, losses)) / sum(map(len, losses)))
        unweighted.append(sum(map(sum, losses)) / answer / draws)
        arithmetic.append(math.exp(means[-1]))
    got = pseudo_perplexity.pseudo_perplexity(model, windows, answer_tokens=answer, draws=draws, seed=7)
    assert got.per_window.tolist() == pytest.approx(means, abs=1e-5)
    assert got.value == pytest.approx(math.exp(sum(means) / 3), rel=1e-5)
    for wrong in (pooled, unweighted):
        assert abs(sum(wrong) - sum(means)) / 3 > 0.01
    assert abs(sum(arithmetic) / 3 - got.value) > 0.1


def test_a_loss_that_depends_on_the_count_tells_the_formulas_apart() -> None:
    """Cross-entropy log(1 + 4/k): the mean over uniform k, not the mean over masked tokens, nor the sum over n."""
    n, draws = 6, 4000
    got = pseudo_perplexity.pseudo_perplexity(
        stub(), torch.zeros((1, 10), dtype=torch.long), answer_tokens=n, draws=draws, seed=0, batch_size=draws
    )
    losses = {k: math.log(1 + 4 / k) for k in range(1, n + 1)}
    expected = sum(losses.values()) / n
    deviation = (sum((loss - expected) ** 2 for loss in losses.values()) / n / draws) ** 0.5
    assert abs(math.log(got.value) - expected) < 4 * deviation
    over_tokens = sum(k * loss for k, loss in losses.items()) / sum(losses)
    over_n = sum(k / n * loss for k, loss in losses.items()) / n
    assert min(abs(over_tokens - expected), abs(over_n - expected)) > 20 * deviation


def test_the_weight_n_over_k_is_in_the_mean_over_masked_tokens(model: LanguageModel) -> None:
    """The same masks, summed with weight n / k and divided by n, are the likelihood bound of the answer given its context."""
    ids, answer, draws = tiny.ids(1, 9)[0], 4, 5
    weighted = [
        answer / int(mask.sum()) * sum(surprise(model, ids, mask)) / answer
        for mask in masks_of(2, 0, 9, answer=answer, draws=draws)
    ]
    got = pseudo_perplexity.pseudo_perplexity(model, ids[None], answer_tokens=answer, draws=draws, seed=2)
    assert math.log(got.value) == pytest.approx(sum(weighted) / draws, abs=1e-5)


def test_the_expectation_is_the_bound_of_the_answer_and_not_that_of_the_window(model: LanguageModel) -> None:
    """Brute force over all subsets of a 3-token answer; masking the whole window is another quantity."""
    ids, n = tiny.ids(1, 8, seed=6)[0], 3
    expected = 0.0
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(5, 8), k))
        for subset in subsets:
            mask = torch.zeros(8, dtype=torch.bool)
            mask[list(subset)] = True
            expected += sum(surprise(model, ids, mask)) / k / len(subsets) / n
    got = pseudo_perplexity.pseudo_perplexity(model, ids[None], answer_tokens=n, draws=4000, seed=0, batch_size=1000)
    assert math.log(got.value) == pytest.approx(expected, abs=0.04)  # six standard errors
    bound = likelihood.masked_log_likelihood(
        model, ids, torch.arange(8) >= 5, draws=3000, generator=generator(1), batch_size=1000
    )
    assert -float(bound.mean()) / n == pytest.approx(expected, abs=0.04)
    whole = likelihood.nelbo(model, ids[None], draws=3000, seed=0, batch_size=1000)
    assert abs(whole.mean - expected) > 0.5


def test_a_shifted_model_is_read_one_place_earlier(model: LanguageModel) -> None:
    shifted = LanguageModel(**{**vars(model), "logit_shift": 1})
    ids, mask = tiny.ids(1, 6)[0], masks_of(0, 0, 6, answer=3, draws=1)[0]
    with torch.inference_mode():
        logits = model.network(input_ids=torch.where(mask, tiny.MASK, ids)[None]).logits[0].double().log_softmax(-1)
    expected = [-float(logits[p - 1, ids[p]]) for p in mask.nonzero()[:, 0].tolist()]
    got = pseudo_perplexity.pseudo_perplexity(shifted, ids[None], answer_tokens=3, draws=1, seed=0)
    assert math.log(got.value) == pytest.approx(sum(expected) / len(expected), abs=1e-5)


# The masks


@given(length=st.integers(1, 12), data=st.data(), draws=st.integers(1, 9), seed=st.integers(0, 99))
def test_only_answer_tokens_are_masked_and_at_least_one(length: int, data: st.DataObject, draws: int, seed: int) -> None:
    answer = data.draw(st.integers(1, length))
    masks = answer_masks(length, answer_tokens=answer, draws=draws, generator=generator(seed))
    assert masks.shape == (draws, length)
    assert not masks[:, : length - answer].any()
    assert bool((masks.sum(1) >= 1).all())


def test_counts_are_uniform_and_so_are_places() -> None:
    masks = answer_masks(7, answer_tokens=4, draws=8000, generator=generator(0))
    counts = torch.bincount(masks.sum(1), minlength=5)[1:].double()
    assert ((counts - 2000) ** 2 / 2000).sum() < 16.3  # chi-square, 3 degrees of freedom, 0.1 %
    pairs = masks[masks.sum(1) == 2][:, 3:]
    seen = torch.bincount((pairs.long() * torch.tensor([8, 4, 2, 1])).sum(1), minlength=13)[[3, 5, 6, 9, 10, 12]].double()
    assert ((seen - len(pairs) / 6) ** 2 / (len(pairs) / 6)).sum() < 20.5  # 5 degrees of freedom
    assert masks[0].ne(masks[1:9]).any()


def test_two_models_and_two_batch_sizes_see_the_same_masks() -> None:
    windows, first, second = tiny.ids(3, 8, vocab=4), stub(), stub()
    whole = pseudo_perplexity.pseudo_perplexity(first, windows, answer_tokens=5, seed=4, batch_size=8)
    parts = pseudo_perplexity.pseudo_perplexity(second, windows, answer_tokens=5, seed=4, batch_size=3)
    inputs = [torch.cat(one.network.calls.inputs) for one in (first, second)]  # pyright: ignore
    assert torch.equal(*inputs)
    assert inputs[0].shape == (3 * 8, 8)
    assert torch.equal(inputs[0][:, :3], windows[:, :3].repeat_interleave(8, 0))
    torch.testing.assert_close(whole.per_window, parts.per_window)


def test_the_masks_of_a_window_do_not_depend_on_the_other_windows() -> None:
    windows, inputs = tiny.ids(4, 8, vocab=4), []
    for chosen, seed in ((windows, 0), (windows[:2], 0), (windows, 1)):
        one = stub()
        pseudo_perplexity.pseudo_perplexity(one, chosen, answer_tokens=6, draws=3, seed=seed)
        inputs.append(torch.cat(one.network.calls.inputs))  # pyright: ignore
    assert torch.equal(inputs[0][:6], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])
    masks = (inputs[0] == STUB_MASK).view(4, 3, 8)
    assert not torch.equal(masks[0], masks[1])


def test_the_head_runs_on_masked_positions_only() -> None:
    one = stub()
    pseudo_perplexity.pseudo_perplexity(
        one, torch.zeros((2, 9), dtype=torch.long), answer_tokens=4, draws=6, seed=0, batch_size=4
    )
    masks = [masks_of(0, index, 9, answer=4, draws=6) for index in range(2)]
    assert one.network.calls.head_rows == sum(int(mask.sum()) for mask in masks)  # pyright: ignore
    assert one.network.calls.forwards == 4  # pyright: ignore


# The windows


def test_windows_of_the_release() -> None:
    """Context grows to its limit, answers lie side by side, and the one that ends the text is left out (320 = 5 x 64)."""
    tokens = torch.arange(2000)
    windows = answer_windows(tokens)
    assert [int(window[-64]) for window in windows] == list(range(64, 2000 - 64, 64))
    assert [len(window) for window in windows] == [min(start, 960) + 64 for start in range(64, 2000 - 64, 64)]
    assert all(torch.equal(window, tokens[window[0] : window[-1] + 1]) for window in windows)
    assert len(answer_windows(tokens[:320])) == 3
    assert answer_windows(tokens[:128]) == []
    with pytest.raises(InputError, match="must be at least 1, got 0 and 64"):
        answer_windows(tokens, context_tokens=0)


def test_windows_may_differ_in_length(model: LanguageModel) -> None:
    windows = answer_windows(tiny.ids(1, 14)[0], context_tokens=5, answer_tokens=3)
    assert [len(window) for window in windows] == [6, 8, 8]
    got = pseudo_perplexity.pseudo_perplexity(model, windows, answer_tokens=3, draws=4, seed=1)
    for index, ids in enumerate(windows):
        losses = [surprise(model, ids, mask) for mask in masks_of(1, index, len(ids), answer=3, draws=4)]
        assert float(got.per_window[index]) == pytest.approx(sum(sum(v) / len(v) for v in losses) / 4, abs=1e-5)
    same = pseudo_perplexity.pseudo_perplexity(model, torch.stack(windows[1:]), answer_tokens=3, draws=4, seed=1)
    assert same.per_window.shape == (2,)


# Bad input


def test_an_autoregressive_model_is_refused(tmp_path: Path) -> None:
    causal = tiny.model(tmp_path, causal=True)
    with pytest.raises(InputError, match="use next_token_nll"):
        pseudo_perplexity.pseudo_perplexity(causal, tiny.ids(1, 6), answer_tokens=2, seed=0)


@pytest.mark.parametrize("answer_tokens", [-1, 0, 7])
def test_an_answer_that_does_not_fit_is_refused(answer_tokens: int) -> None:
    windows = [tiny.ids(9, vocab=4), tiny.ids(6, vocab=4)]
    with pytest.raises(InputError, match=rf"answer_tokens must be in \[1, 6\], the shortest window, got {answer_tokens}"):
        pseudo_perplexity.pseudo_perplexity(stub(), windows, answer_tokens=answer_tokens, seed=0)


@pytest.mark.parametrize(("windows", "draws"), [(0, 8), (2, 0)])
def test_nothing_to_measure_is_refused(windows: int, draws: int) -> None:
    with pytest.raises(InputError, match=f"windows and draws >= 1, got {windows} and {draws}"):
        pseudo_perplexity.pseudo_perplexity(stub(), tiny.ids(windows, 6, vocab=4), answer_tokens=2, draws=draws, seed=0)
