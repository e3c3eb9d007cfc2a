"""The sink rules on worked examples and against slow loops."""

import pytest
import torch
from torch import Tensor

from lib.attention import sinks
from lib.core.errors import InputError

# The worked example of the paper's pipeline figure: 5 tokens, 4 features.
MASS = torch.tensor([5.0, 18.0, 9.0, 22.0, 7.0])
FEATURES = torch.tensor([[2, 3, 1, 4], [10, 9, 6, 7], [3, 4, 2, 4], [9, 11, 10, 9], [1, 3, 2, 1]], dtype=torch.float64)
NORMS = [3.74, 5.83, 3.00, 5.74]
GRAM = [[14, 21, 10, 21], [21, 34, 17, 31], [10, 17, 9, 14], [21, 31, 14, 33]]


def test_the_leave_one_out_rule_passes_the_papers_worked_example() -> None:
    found = sinks.sinks_leave_one_out(MASS, epsilon=3.0)
    assert found.nonzero()[:, 0].tolist() == [1, 3]
    weighted = sinks.token_weight(found.double())[:, None] * FEATURES
    assert [round(value, 2) for value in weighted.norm(dim=0).tolist()] == NORMS
    assert (weighted.T @ weighted).tolist() == GRAM


def test_the_released_rule_fails_the_papers_worked_example() -> None:
    assert float(sinks.mean_std_threshold(MASS)) == pytest.approx(12.2 + 2 * 6.62, abs=0.02)
    assert not sinks.sinks_mean_std(MASS).any()


def test_the_two_rules_differ_from_a_plain_mean_rule() -> None:
    """9.5 is above mean - and below leave-one-out mean + 3: neither rule is `mass > mean`."""
    mass = torch.tensor([1.0, 1.0, 1.0, 9.5, 10.5, 1.0])
    assert sinks.sinks_leave_one_out(mass, epsilon=6.6).tolist() == [False, False, False, False, True, False]


def test_leave_one_out_equals_a_loop() -> None:
    mass = torch.rand(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    for row, got in zip(mass, sinks.leave_one_out_threshold(mass, epsilon=0.7), strict=True):
        for index in range(9):
            others = [float(value) for k, value in enumerate(row) if k != index]
            assert float(got[index]) == pytest.approx(sum(others) / 8 + 0.7, abs=1e-12)


def test_leave_one_out_is_the_mean_plus_a_shrunk_epsilon() -> None:
    """Found equal to m > mean + epsilon (S - 1) / S on masses set just on either side of it."""
    base, size, epsilon = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64), 4, 2.0
    for offset, expected in ((1e-9, True), (-1e-9, False)):
        # x = (6 + x) / 4 + epsilon * 3 / 4 + offset, solved for x
        x = (6 + 3 * epsilon + 4 * offset) / 3
        mass = torch.cat([base, torch.tensor([x], dtype=torch.float64)])
        assert x - float(mass.mean()) - epsilon * (size - 1) / size == pytest.approx(offset, abs=1e-12)
        assert bool(sinks.sinks_leave_one_out(mass, epsilon=epsilon)[-1]) is expected


def test_one_key_has_no_others() -> None:
    with pytest.raises(InputError, match="at least 2 keys, got 1"):
        sinks.leave_one_out_threshold(torch.ones(1))


def test_mean_std_uses_the_population_deviation() -> None:
    mass = torch.tensor([0.0, 0.0, 0.0, 4.0])
    assert float(sinks.mean_std_threshold(mass, num_std=1.0)) == pytest.approx(1 + 3**0.5)  # the sample one gives 1 + 2


def test_five_keys_or_fewer_never_exceed_two_deviations() -> None:
    extreme = torch.tensor([0.0, 0.0, 0.0, 0.0, 1e6], dtype=torch.float64)
    assert not sinks.sinks_mean_std(extreme).any()
    assert sinks.sinks_mean_std(torch.cat([extreme, torch.zeros(1)])).sum() == 1


@pytest.mark.parametrize(("alpha", "expected"), [(5.0, 0.9933071), (1.0, 0.7310586)])
def test_soft_score_is_a_sigmoid(alpha: float, expected: float) -> None:
    score = sinks.soft_score(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0]), alpha=alpha)
    assert score.tolist() == pytest.approx([expected, 0.5, 1 - expected], abs=1e-6)
    assert sinks.token_weight(score).tolist() == pytest.approx([1 - expected, 0.5, expected], abs=1e-6)


def test_top_k_takes_the_earlier_of_equals() -> None:
    mass = torch.tensor([[2.0, 5.0, 2.0, 5.0, 2.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    assert sinks.top_k_positions(mass, k=3).tolist() == [[1, 3, 0], [4, 0, 1]]
    assert sinks.dominant_position(mass).tolist() == [1, 4]
    assert sinks.top_k_positions(torch.ones(300), k=4).tolist() == [0, 1, 2, 3]  # argsort is unstable there unless asked


@pytest.mark.parametrize("k", [0, 6])
def test_top_k_outside_the_keys_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=rf"k must be in \[1, 5\].*got {k}"):
        sinks.top_k_positions(MASS, k=k)


def test_mean_one_ignores_padding() -> None:
    real = torch.tensor([True, True, False, True])
    got = sinks.mean_one(torch.tensor([1.0, 2.0, 100.0, 3.0]), real)
    assert got.tolist() == [0.5, 1.0, 0.0, 1.5]


def test_mean_one_takes_padding_that_is_not_a_number() -> None:
    got = sinks.mean_one(torch.tensor([[1.0, 3.0, float("nan")]]), torch.tensor([[True, True, False]]))
    assert got.tolist() == [[0.5, 1.5, 0.0]]


def test_a_row_without_mass_is_refused() -> None:
    with pytest.raises(InputError, match="positive sum"):
        sinks.mean_one(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))


def test_aggregate_averages_layers_and_heads_only() -> None:
    mass = torch.arange(24, dtype=torch.float32).view(2, 1, 3, 4)
    expected = [[sum(float(mass[layer, 0, h, k]) for layer in range(2) for h in range(3)) / 6 for k in range(4)]]
    assert sinks.aggregate(mass).tolist() == expected


def test_rulli_count_is_per_row() -> None:
    assert sinks.rulli_count(torch.stack([MASS, torch.ones(5)])).tolist() == [2.0, 0.0]


def slow_gu(probs: Tensor, *, causal: bool, epsilon: float) -> list[float]:
    """Gu's importance score with the loops written out."""
    keys = probs.shape[-1]
    found = []
    for k in range(keys):
        queries = range(k, keys) if causal else range(keys)
        found.append(float(sum(float(probs[q, k]) for q in queries) / len(queries) > epsilon))
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.3])
def test_gu_sink_rate_equals_a_loop(causal: bool, epsilon: float) -> None:
    scores = 2 * torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    if causal:
        scores = scores.masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf"))
    probs = scores.softmax(-1)
    got = sinks.gu_sink_rate(probs.sum(0), is_causal=causal, epsilon=epsilon)
    assert got.tolist() == slow_gu(probs, causal=causal, epsilon=epsilon)


def test_gu_divides_a_late_causal_key_by_the_queries_that_see_it() -> None:
    """The last key is seen by one query: 0.5 of it is a sink, although 0.5 / 4 is not above 0.3."""
    sums = torch.tensor([2.0, 1.0, 0.5, 0.5])
    assert sinks.gu_sink_rate(sums, is_causal=True).tolist() == [1.0, 1.0, 0.0, 1.0]
    assert sinks.gu_sink_rate(sums, is_causal=False).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_gu_leaves_out_keys_beyond_the_sequence() -> None:
    sums = torch.tensor([1.5, 0.5, 9.0])
    assert sinks.gu_sink_rate(sums, is_causal=True, real_keys=2).tolist() == [1.0, 1.0, 0.0]
    assert sinks.gu_sink_rate(sums, is_causal=False, real_keys=2).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("positions", "rate"), [([3, 3, 3, 3], 0.0), ([1, 2, 3, 4], 0.75), ([5, 0, 5, 0, 5], 0.4)])
def test_wander_rate(positions: list[int], rate: float) -> None:
    assert float(sinks.wander_rate(torch.tensor(positions))) == pytest.approx(rate)


def test_wander_rate_by_row() -> None:
    assert sinks.wander_rate(torch.tensor([[0, 0], [0, 1]])).tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n", "newline"),
        (".\n", "newline"),
        (" \n\n", "newline"),
        (",", "punctuation"),
        (" (", "punctuation"),
        (" ", "punctuation"),
        ("", "punctuation"),
        ("7", "digit"),
        (" 12", "digit"),
        (" the", "word start"),
        (" 3rd", "word start"),
        ("ing", "word piece"),
        ("x1", "word piece"),
    ],
)
def test_token_kind(text: str, kind: str) -> None:
    assert sinks.token_kind(text, is_special=False, is_mask=False, is_bos=False) == kind


@pytest.mark.parametrize(
    ("mask", "bos", "special", "kind"),
    [(True, False, True, "mask"), (True, True, True, "mask"), (False, True, True, "bos"), (False, False, True, "special")],
)
def test_token_kind_of_special_tokens(mask: bool, bos: bool, special: bool, kind: str) -> None:
    assert sinks.token_kind("<x>\n", is_special=special, is_mask=mask, is_bos=bos) == kind


def test_shares_are_in_per_cent_and_name_every_kind() -> None:
    got = sinks.shares(["digit", "mask", "digit", "digit"])
    assert got == {**dict.fromkeys(sinks.TOKEN_KINDS, 0.0), "digit": 75.0, "mask": 25.0}
    weighted = sinks.shares(["digit", "mask"], [1.0, 4.0])
    assert (weighted["digit"], weighted["mask"]) == (20.0, 80.0)
