"""The published analytical step against loops over windows, and what its subset is for."""

import math

import pytest
import torch
from torch import Tensor

from lib.core.errors import InputError
from lib.decoding.analytical import retrieval
from lib.decoding.analytical.retrieval import retrieved
from lib.decoding.decoder import DecodingPlan, decode
from lib.decoding.late_steps import RADIUS, windows_at
from tests import tiny

MASK, VOCAB = 9, 10


def texts(rows: int = 6, length: int = 30) -> Tensor:
    return torch.randint(0, 8, (rows, length), generator=torch.Generator().manual_seed(1))


def slow(query: list[int], windows: list[list[int]], frequency: list[float], count: int) -> list[float]:
    """Sum over the `count` windows that differ least, offset by offset."""
    costs = []
    for window in windows:
        cost = 0.0
        for offset in range(-RADIUS, RADIUS + 1):
            token = query[offset + RADIUS]
            if offset and token not in (MASK, -1) and window[offset + RADIUS] != token:
                cost += 0.7 ** (abs(offset) - 1)
        costs.append(cost)
    nearest = sorted(range(len(windows)), key=lambda n: costs[n])[:count]
    votes = [0.5 * share for share in frequency]
    for n in nearest:
        votes[windows[n][RADIUS]] += math.exp(-8.0 * costs[n])
    return [vote / sum(votes) for vote in votes]


def test_a_prediction_is_a_weighted_histogram() -> None:
    """All windows, so that ties do not matter; an end of text and masks in the query."""
    step = retrieved(texts(), vocab=VOCAB, everything=True)
    queries = torch.tensor([[-1, -1, 3, MASK, MASK, 2, 5, MASK, 1], [1, 2, 3, 4, MASK, 5, 6, 7, 0], [MASK] * 9])
    got = step.probabilities(queries, mask_id=MASK)
    for row, query in zip(got, queries.tolist(), strict=True):
        wanted = slow(query, step.windows.tolist(), step.frequency.tolist(), len(step.windows))
        assert row.tolist() == pytest.approx(wanted, abs=1e-9)
    assert got[2].tolist() == pytest.approx(step.frequency.tolist(), abs=1e-9), "with nothing written, the histogram of all"


def test_few_windows_count_when_few_masks_are_left_and_all_when_all_are() -> None:
    step = retrieved(texts(), vocab=VOCAB, least=20)
    assert [step.count(share) for share in (0.0, 0.5, 1.0)] == [20, 100, 180]
    assert retrieved(texts(), vocab=VOCAB, least=20, everything=True).count(0.0) == 180
    query = torch.tensor([[*step.windows[7, :RADIUS].tolist(), MASK, *step.windows[7, RADIUS + 1 :].tolist()]])
    found = step.probabilities(query, mask_id=MASK)[0]
    assert int(found.argmax()) == int(step.windows[7, RADIUS])
    costs = [sum(0.7 ** (abs(o) - 1) for o in range(-4, 5) if o and int(w[o + 4]) != int(query[0, o + 4])) for w in step.windows]
    assert sorted(costs)[19] < sorted(costs)[20] or len(step.windows) == 180  # the subset is by cost


def test_written_neighbours_decide_over_the_histogram() -> None:
    """A text of pairs: 1 is always followed by 2, though 3 is ten times as frequent."""
    text = torch.tensor([[3] * 40 + [1, 2] * 4])
    step = retrieved(text, vocab=VOCAB)
    queries = torch.tensor([[3, 3, 3, 1, MASK, 1, 2, 1, 2], [MASK] * 9])
    assert step.probabilities(queries, mask_id=MASK).argmax(-1).tolist() == [2, 3]


def test_training_windows_that_are_the_test_text_do_not_answer() -> None:
    """1 2 3 4 5 6 7 8 9 stands once; asked about its middle, it says 5 alone, and nothing any more when it is a test window."""
    text = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0]])
    own = windows_at(text, torch.ones_like(text, dtype=torch.bool))[8][None]
    other = own.clone()
    other[0, 0] = 7  # one token further off is another window
    query = own.masked_fill(torch.arange(2 * RADIUS + 1) == RADIUS, MASK)
    plain = retrieved(text, vocab=VOCAB)
    without = retrieved(text, vocab=VOCAB, test=torch.cat([own, other, other, other]))
    assert math.isnan(plain.duplicates) and without.duplicates == 0.25
    assert len(without.windows) == len(plain.windows) - 1
    assert int(plain.probabilities(query, mask_id=MASK).argmax()) == 5 != int(without.probabilities(query, mask_id=MASK).argmax())
    with pytest.raises(InputError, match="training windows must not all be test windows"):
        retrieved(text, vocab=VOCAB, test=plain.windows)


def test_a_subset_has_a_window() -> None:
    with pytest.raises(InputError, match="least must be at least 1 window, got 0"):
        retrieved(texts(), vocab=VOCAB, least=0)
    assert retrieval.QUERIES_AT_ONCE > 0


def test_decoding_writes_late_tokens_by_retrieval() -> None:
    """Two of four tokens come from passes; the rest are what windows of the text with masks there say, not the network's 1."""

    def ramp(ids: Tensor) -> Tensor:
        logits = torch.zeros((*ids.shape, VOCAB))
        logits[..., 1] = 5.0 - torch.arange(ids.shape[1])
        return logits

    stub = tiny.stub(ramp, vocab=VOCAB, mask_token_id=MASK)
    step = retrieved(torch.tensor([[1, 1, 1, 6, 7] * 8]), vocab=VOCAB)
    plan = DecodingPlan(late_share=0.5, late_step=step)
    prompt = torch.tensor([[1]])
    got = decode(stub, prompt, new_tokens=4, block_length=4, plan=plan)
    text = torch.tensor([[1, 1, 1, MASK, MASK]])
    windows = windows_at(text, text == MASK)
    assert got.ids[0, 3:].tolist() == step.probabilities(windows, mask_id=MASK).argmax(-1).tolist() == [6, 7]
    assert got.forwards == 2
