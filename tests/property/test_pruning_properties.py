"""What must hold for every matrix, every sparsity and every allocation."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib.calibration import token_weights
from lib.pruning import allocation, importances
from lib.pruning.importances import keep_mask, keep_mask_by_count, removed_count
from lib.pruning.sparsegpt import sparsegpt
from tests.unit import slow_pruning as slow

settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("quick")


@st.composite
def matrices(draw: st.DrawFn, multiple: int = 1) -> Tensor:
    """Importances with many ties; as many columns as a multiple says."""
    rows, columns = draw(st.integers(1, 6)), multiple * draw(st.integers(1, 24 // multiple))
    values = draw(st.lists(st.integers(0, 9), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.float64).view(rows, columns)


percents = st.integers(0, 99)


@given(matrices(), percents)
def test_rows_and_matrices_lose_exactly_the_floor(importance: Tensor, percent: int) -> None:
    rows, columns = importance.shape
    by_row = keep_mask(importance, sparsity=percent / 100)
    assert (~by_row).sum(1).tolist() == [columns * percent // 100] * rows
    assert torch.equal(by_row, slow.keep_by_row(importance, columns * percent // 100))
    by_layer = keep_mask(importance, sparsity=percent / 100, granularity="layer")
    assert torch.equal(by_layer, slow.keep_by_layer(importance, rows * columns * percent // 100))


@given(st.integers(1, 10**10), percents)
def test_counts_are_the_floor_at_every_size(size: int, percent: int) -> None:
    assert removed_count(size, percent / 100) == size * percent // 100


@given(matrices(4), st.integers(1, 3))
def test_every_group_keeps_n_of_four(importance: Tensor, kept: int) -> None:
    mask = keep_mask(importance, sparsity=1 - kept / 4, pattern=f"{kept}:4")
    assert (mask.view(len(importance), -1, 4).sum(2) == kept).all()
    assert torch.equal(mask, slow.keep_by_group(importance, kept, 4))


@given(matrices(), percents, st.randoms(use_true_random=False))
def test_what_goes_at_a_low_sparsity_goes_at_a_higher_one(importance: Tensor, percent: int, random) -> None:
    """And the order of the rows changes nothing."""
    low, high = sorted((percent, random.randrange(100)))
    small, large = (keep_mask(importance, sparsity=value / 100) for value in (low, high))
    assert not (~small & large).any()
    order = random.sample(range(len(importance)), len(importance))
    assert torch.equal(keep_mask(importance[order], sparsity=low / 100), small[order])


@given(matrices(), st.integers(0, 10**6))
def test_an_exact_number_goes_and_rows_stay_within_one(importance: Tensor, draw: int) -> None:
    total = draw % importance.numel()
    mask = keep_mask_by_count(importance, removed=total)
    gone = (~mask).sum(1)
    assert int(gone.sum()) == total and int(gone.max() - gone.min()) <= 1
    for row in range(len(importance)):
        assert torch.equal(mask[row : row + 1], slow.keep_by_row(importance[row : row + 1], int(gone[row])))
    each = total // len(importance)
    following = [sorted(row)[each] for row in importance.tolist() if each < importance.shape[1]]
    extra = [value for value, count in zip(following, gone.tolist(), strict=False) if count > each]
    spared = [value for value, count in zip(following, gone.tolist(), strict=False) if count == each]
    assert not extra or not spared or max(extra) <= min(spared)


@given(matrices(), st.integers(0, 10**6), st.integers(1, 24))
def test_sparsegpt_removes_an_exact_number_whatever_the_blocks(weight: Tensor, draw: int, block: int) -> None:
    total, width = draw % weight.numel(), weight.shape[1]
    inputs = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(draw)).double()
    got, mask = sparsegpt(weight + 10, inputs.T @ inputs, sparsity=0.5, block=block, removed=total)
    assert int((~mask).sum()) == total
    assert torch.equal(got == 0, ~mask)
    for start in range(0, width, block):  # and up to each block as many as its share of the columns
        stop = min(start + block, width)
        assert int((~mask[:, :stop]).sum()) == total * stop // width


sizes_of = st.lists(st.integers(50, 5000), min_size=1, max_size=12)


def check_total(wanted: Tensor, sizes: list[int], percent: int) -> None:
    """The mean weighted by size is the sparsity, and whole numbers add up to the floor of the whole, none out of range."""
    sparsities = allocation.with_total(wanted, sizes, sparsity=percent / 100)
    total = sum(sizes) * percent // 100
    assert (
        abs(sum(float(value) * size for value, size in zip(sparsities, sizes, strict=True)) - sum(sizes) * percent / 100) < 1e-6
    )
    torch.testing.assert_close(sparsities - sparsities[0], wanted - wanted[0], atol=1e-12, rtol=0)
    counts = allocation.removed_counts(sparsities, sizes, total=total)
    assert sum(counts) == total
    for count, value, size in zip(counts, sparsities.tolist(), sizes, strict=True):
        assert abs(count - value * size) < 1 + 1e-6 and 0 <= count < size


@given(sizes_of, st.integers(20, 80), st.floats(-0.09, 0.09))
def test_early_and_deep_is_sparser_keep_the_total(sizes: list[int], percent: int, epsilon: float) -> None:
    check_total(allocation.early_is_sparser(len(sizes), epsilon=epsilon), sizes, percent)


@given(sizes_of, st.integers(20, 80), st.floats(0.0, 0.09), st.randoms(use_true_random=False))
def test_scores_keep_the_total_and_order_the_layers(sizes: list[int], percent: int, spread: float, random) -> None:
    scores = torch.tensor([random.choice([0.0, 0.1, 0.5, 0.9]) for _ in sizes], dtype=torch.float64)
    wanted = allocation.from_scores(scores, spread=spread)
    check_total(wanted, sizes, percent)
    assert float(wanted.abs().max()) <= spread + 1e-12
    for first, low in enumerate(scores.tolist()):
        for second, high in enumerate(scores.tolist()):
            assert low >= high or wanted[first] >= wanted[second]


@given(sizes_of, st.integers(20, 80), st.integers(0, 10**6))
def test_outlier_shares_keep_the_total(sizes: list[int], percent: int, seed: int) -> None:
    """OWL: the shares of outliers of random matrices decide."""
    stream = torch.Generator().manual_seed(seed)
    shares = [allocation.outlier_share(torch.rand(5, 8, generator=stream).pow(6), factor=3.0) for _ in sizes]
    check_total(allocation.from_scores(torch.tensor(shares, dtype=torch.float64)), sizes, percent)


@given(sizes_of, st.integers(1, 98), st.lists(st.floats(-0.3, 0.3), min_size=12, max_size=12))
def test_any_offsets_in_range_keep_the_total(sizes: list[int], percent: int, offsets: list[float]) -> None:
    wanted = torch.tensor(offsets[: len(sizes)], dtype=torch.float64)
    shift = sum(float(value) * size for value, size in zip(wanted, sizes, strict=True)) / sum(sizes)
    shifted = wanted + percent / 100 - shift
    assume(float(shifted.min()) > 0.01 and float(shifted.max()) < 0.97)
    check_total(wanted, sizes, percent)


@given(st.integers(1, 4), st.integers(2, 9), st.integers(1, 20), st.integers(0, 10**6))
def test_instability_lies_in_the_unit_interval_and_ignores_the_order_of_levels(
    windows: int, levels: int, positions: int, seed: int
) -> None:
    stream = torch.Generator().manual_seed(seed)
    mass = torch.rand(windows, levels, positions, generator=stream).double().pow(8)
    order = torch.randperm(levels, generator=stream)
    for kind in ("variance", "presence"):
        score = token_weights.instability_score(mass, kind=kind, margin=0.7)
        assert ((score >= 0) & (score <= 1)).all()
        assert torch.equal(score, token_weights.instability_score(mass[:, order], kind=kind, margin=0.7))


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 10**6))
def test_controls_take_out_as_many_tokens_as_there_are_sinks(samples: int, positions: int, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    score = torch.rand(samples, positions, generator=stream)
    ids = torch.randint(0, 2, score.shape, generator=stream)
    sinks = (score > 0.5).sum(1)
    for control in token_weights.CONTROLS:
        weight = token_weights.control_down(
            score,
            control,
            input_ids=ids,
            mask_token_id=1,
            activation_norm=torch.rand(score.shape, generator=stream),
            generator=stream,
        )
        others = (score <= 0.5) & ((ids == 1) if control == "mask" else torch.ones_like(ids, dtype=torch.bool))
        assert torch.equal((weight == 0).sum(1), torch.minimum(sinks, others.sum(1)))
        assert not ((weight == 0) & (score > 0.5)).any()
        assert control != "mask" or bool((ids[weight == 0] == 1).all())


@given(matrices(), st.lists(st.integers(1, 64), min_size=24, max_size=24), percents)
def test_a_group_of_rows_is_ranked_by_its_own_norms(weight: Tensor, norms: list[int], percent: int) -> None:
    norm = torch.tensor(norms[: weight.shape[1]], dtype=torch.float64)
    by_group = torch.stack([norm * (row + 1) for row in range(len(weight))])  # a common factor of a row changes no mask
    first = keep_mask(importances.wanda_importance(weight, norm), sparsity=percent / 100)
    assert torch.equal(first, keep_mask(importances.wanda_importance(weight, by_group), sparsity=percent / 100))
