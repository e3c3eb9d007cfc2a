"""Masks and channels: overlaps by hand, what unrelated masks share, and the energy on sinks from slow loops."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from lib.calibration.sets import Inputs
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel
from lib.pruning.methods import SINKS, Method, Target
from lib.studies.pruning import runs, where_it_acts
from lib.studies.pruning.runs import Bench, Calibrations
from tests import tiny
from tests.unit import slow_pruning as slow

LENGTH, HALF = 16, Target(0.5)
NOISED = Inputs("noised", levels=2)
SINK_AWARE = Method("wanda", NOISED, replace(SINKS, margin=1.0), sequential=False, aggregate="sum_of_norms")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Calibrations:
    model = tiny.model(tmp_path_factory.mktemp("model"), causal=False)
    return Calibrations(Bench(model, tiny.ids(10, LENGTH), tiny.ids(3, LENGTH, seed=1), 4, 1, 0), seed=0)


@pytest.fixture(autouse=True)
def untouched(found: Calibrations) -> Iterator[None]:
    """Whatever is looked at, the model stays as it is."""
    before = slow.state_of(found.bench.model)
    yield
    assert slow.same_state(found.bench.model, before)


def bits(*rows: str) -> Tensor:
    """A mask, 1 = kept."""
    return torch.tensor([[character == "1" for character in row] for row in rows])


# --- overlap -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (("0011", "1111"), ("0011", "1111"), 1.0),
        (("0011",), ("1100",), 0.0),
        (("0001", "1111"), ("0111", "1101"), 1 / 4),  # removed 3 and 2, one by both
        (("0111", "1110"), ("0110", "1110"), 2 / 3),  # of what is kept it would be 5/6
        (("1111",), ("1111",), 1.0),  # nothing removed: nothing differs
        (("1111",), ("0111",), 0.0),
    ],
)
def test_overlaps_by_hand(first: tuple[str, ...], second: tuple[str, ...], wanted: float) -> None:
    assert where_it_acts.removed_overlap(bits(*first), bits(*second)) == pytest.approx(wanted)
    assert where_it_acts.removed_overlap(bits(*second), bits(*first)) == pytest.approx(wanted)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.8])
def test_unrelated_masks_overlap_as_expected(sparsity: float) -> None:
    """Removed by both: s^2; by either: 2s - s^2."""
    drawn = torch.rand(2, 200, 1000, generator=torch.Generator().manual_seed(3))
    count = round(sparsity * 1000)
    masks = drawn.argsort(2).argsort(2) >= count  # every row loses as many
    assert where_it_acts.removed_overlap(masks[0], masks[1]) == pytest.approx(where_it_acts.expected_overlap(sparsity), abs=0.005)


@given(st.floats(0, 0.999))
def test_the_expected_overlap_rises_from_nothing_to_all(sparsity: float) -> None:
    expected = where_it_acts.expected_overlap(sparsity)
    assert expected == pytest.approx(sparsity**2 / (2 * sparsity - sparsity**2) if sparsity else 0.0)
    assert 0 <= expected <= sparsity


def test_masks_are_those_of_the_pruned_model(found: Calibrations) -> None:
    masks = where_it_acts.keep_masks(found, SINK_AWARE, Target(0.25))
    small = runs.pruned_copy(found, SINK_AWARE, Target(0.25))
    assert list(masks) == [layer.name for layer in found.bench.model.layers]
    for layer in small.layers:
        assert torch.equal(masks[layer.name], layer.module.weight != 0)
        assert (masks[layer.name].sum(1) == 0.75 * masks[layer.name].shape[1]).all()


def test_overlaps_stand_in_the_row_of_their_matrix(found: Calibrations) -> None:
    layers = found.bench.model.layers
    ones = {layer.name: torch.ones(2, 50, dtype=torch.bool) for layer in layers}
    first, second = ({name: mask.clone() for name, mask in ones.items()} for _ in range(2))
    for index, layer in enumerate(layers):  # the second removes more and more beside what the first removes
        first[layer.name][0, 0] = False
        second[layer.name][0, : index + 1] = False
    table = where_it_acts.overlap_table(found, first, second)
    roles = ["q", "k", "v", "o", "gate", "up", "down"]
    assert table["layer"].tolist() == [0] * 7 + [1] * 7 and table["role"].tolist() == roles * 2
    assert table["jaccard"].tolist() == pytest.approx([1 / (index + 1) for index in range(14)])


# --- channels ------------------------------------------------------------------------------------------------------------


def slow_shares(found: Calibrations, on_sinks: Tensor) -> dict[str, Tensor]:
    """Energy of each channel on the marked tokens over all of its energy, from what transformers' own pass hands the layers."""
    inputs = slow.captured(found.bench.model, found.set_of(SINK_AWARE).input_ids)
    return {
        name: (values.square() * on_sinks[:, :, None]).sum((0, 1)) / values.square().sum((0, 1))
        for name, values in inputs.items()
    }


def test_the_share_of_a_channel_is_its_energy_on_sinks_over_all_its_energy(found: Calibrations) -> None:
    ids = found.set_of(SINK_AWARE).input_ids
    assert found.bench.model.mask_token_id in ids
    on_sinks = slow.sink_weights(found.bench.model, ids, num_std=1.0, alpha=SINKS.alpha or 1.0) < 0.5
    assert 0.02 < float(on_sinks.double().mean()) < 0.4
    table = where_it_acts.channel_table(found, SINK_AWARE, HALF)
    shares = slow_shares(found, on_sinks)
    for layer in found.bench.model.layers:
        rows = table[(table["layer"] == layer.block) & (table["role"] == layer.role)]
        assert rows["channel"].tolist() == list(range(layer.module.in_features))
        assert rows["share"].tolist() == pytest.approx(shares[layer.name].tolist(), rel=1e-4, abs=1e-7)
    everything = table["share"].tolist()
    assert min(everything) >= 0 and max(everything) <= 1 and max(everything) - min(everything) > 0.1


@pytest.mark.parametrize("level", ["layer", "head"])
def test_weights_by_layer_and_head_are_averaged_before_a_token_counts_as_a_sink(found: Calibrations, level: Any) -> None:
    weighting = Weighting(level=level, margin=1.0, unit="mean_one", alpha=None)
    method = replace(SINK_AWARE, weighting=weighting)
    masses = slow.masses(found.bench.model, found.set_of(method).input_ids)  # [layer, sample, head, position]
    masses = masses.mean(2, keepdim=True) if level == "layer" else masses
    above = masses > masses.mean(-1, keepdim=True) + masses.std(-1, correction=0, keepdim=True)
    share = above.double().mean((0, 2))
    assert ((share > 0) & (share <= 0.5)).any() and (share > 0.5).any()  # any, most: not the same
    shares = slow_shares(found, share > 0.5)
    table = where_it_acts.channel_table(found, method, HALF)
    for layer in found.bench.model.layers:
        rows = table[(table["layer"] == layer.block) & (table["role"] == layer.role)]
        assert rows["share"].tolist() == pytest.approx(shares[layer.name].tolist(), rel=1e-4, abs=1e-7)


def test_weights_gone_and_back_are_counted_channel_by_channel(found: Calibrations) -> None:
    plain, weighted = (
        {layer.name: layer.module.weight == 0 for layer in runs.pruned_copy(found, method, HALF).layers}
        for method in (replace(SINK_AWARE, weighting=None), SINK_AWARE)
    )
    table = where_it_acts.channel_table(found, SINK_AWARE, HALF)
    for layer in found.bench.model.layers:
        rows = table[(table["layer"] == layer.block) & (table["role"] == layer.role)]
        before, after = plain[layer.name].tolist(), weighted[layer.name].tolist()
        found_gone, found_back, found_net = (rows[name].tolist() for name in ("gone", "back", "net"))
        for channel in range(layer.module.in_features):
            column = [(one[channel], other[channel]) for one, other in zip(before, after, strict=True)]
            gone, back = (100 * column.count(pair) / len(column) for pair in ((False, True), (True, False)))
            assert (found_gone[channel], found_back[channel]) == pytest.approx((gone, back), abs=1e-4)
            assert found_net[channel] == pytest.approx(gone - back, abs=1e-4)
        assert sum(found_net) == pytest.approx(0.0, abs=1e-3) and sum(found_gone) > 0  # a row loses as many as before
    by_role = where_it_acts.rank_correlations(table.assign(model="m"))["rank correlation"].tolist()
    assert len(by_role) == 7 and sum(by_role) / 7 > 0.2  # what reads sinks goes


def test_correlations_are_those_of_ranks_in_each_model_and_role() -> None:
    """1 - 6 x 2 / (4 x 15) by hand, where Pearson's would be 0.98; pooled over roles or models it would be something else."""
    shares, nets = [0.1, 0.2, 0.3, 0.9], [-5.0, -1.0, -2.0, 50.0]
    parts = [
        pd.DataFrame({"model": model, "role": role, "share": [at + share for share in shares], "net": [sign * n for n in nets]})
        for model, role, at, sign in (("m", "q", 0.0, 1), ("m", "o", 2.0, -1), ("n", "q", 4.0, -1), ("n", "o", 6.0, 1))
    ]
    parts[3]["net"] = [1.0, 2.0, 3.0, 4.0]
    table = where_it_acts.rank_correlations(pd.concat(parts))
    assert list(zip(table["model"], table["role"], strict=True)) == [("m", "q"), ("m", "o"), ("n", "q"), ("n", "o")]
    assert table["rank correlation"].tolist() == pytest.approx([0.8, -0.8, -0.8, 1.0])
    drawn = pd.DataFrame(torch.rand(2, 30, generator=torch.Generator().manual_seed(1)).T.numpy(), columns=["share", "net"])
    found = where_it_acts.rank_correlations(drawn.assign(model="m", role="q"))["rank correlation"].tolist()
    assert found == pytest.approx([spearmanr(drawn["share"], drawn["net"])[0]])


@pytest.mark.parametrize("weighting", [None, Weighting("sinks_up"), Weighting("random"), Weighting("variance")])
def test_channels_of_a_method_without_sink_weights_are_refused(found: Calibrations, weighting: Weighting | None) -> None:
    with pytest.raises(
        InputError, match="channels must be compared for a one-shot method with sink weights, got another: use the released one"
    ):
        where_it_acts.channel_table(found, replace(SINK_AWARE, weighting=weighting), HALF)


def test_a_twin_is_looked_at_on_clean_text(tmp_path: Path) -> None:
    model: LanguageModel = tiny.model(tmp_path, causal=True)
    found = Calibrations(Bench(model, tiny.ids(6, LENGTH), tiny.ids(2, LENGTH), 3, 1, 0), seed=1)
    table = where_it_acts.channel_table(found, replace(SINK_AWARE, inputs=Inputs()), HALF)
    assert len(table) == sum(layer.module.in_features for layer in model.layers)
    assert 0 < max(table["share"].tolist()) <= 1 + 1e-6


def test_without_any_sink_nothing_is_on_sinks(found: Calibrations) -> None:
    table = where_it_acts.channel_table(found, replace(SINK_AWARE, weighting=replace(SINKS, margin=50.0)), HALF)
    assert not table[["share", "gone", "back", "net"]].to_numpy().any()


def test_channels_of_a_sequential_method_are_refused(found: Calibrations) -> None:
    with pytest.raises(InputError, match="channels must be compared for a one-shot method with sink weights"):
        where_it_acts.channel_table(found, replace(SINK_AWARE, sequential=True), HALF)
