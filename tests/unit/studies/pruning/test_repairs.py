"""Four masks with four repairs: each is what its method says, masks differ in one thing, and tables pair what they name."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from lib.calibration.sets import CLEAN, Inputs
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel
from lib.pruning import methods, pruner
from lib.pruning.methods import REPAIRS, Target
from lib.studies.pruning import repairs, runs, sink_figures
from lib.studies.pruning.bench import Bench, Calibrations
from lib.studies.pruning.runs import Outcome
from tests import tiny

FEW = Inputs("noised", levels=2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    model = tiny.model(tmp_path_factory.mktemp("diffusion"), causal=False)
    return Bench(model, tiny.ids(12, 16, seed=3), tiny.ids(4, 16, seed=4), 4, 3, 11, 16)


@pytest.fixture(scope="module")
def outcomes(bench: Bench) -> list[Outcome]:
    return [runs.dense(bench), *repairs.measure(bench, Target(0.5), seeds=[0, 1], noised=FEW)]


def test_all_cells_are_measured_and_the_model_is_as_before(bench: Bench, outcomes: list[Outcome]) -> None:
    names = [repairs.name_of(mask, repair) for mask in repairs.masks(bench.model) for repair in REPAIRS]
    assert [found.method for found in outcomes[1:]] == names * 2 and len(set(names)) == 16
    assert all(found.measured_sparsity == pytest.approx(0.5, abs=1e-6) for found in outcomes[1:])
    assert torch.equal(runs.loss(bench), outcomes[0].loss)


def test_the_rival_and_the_control_differ_in_token_weights_alone(bench: Bench) -> None:
    found = repairs.masks(bench.model, noised=FEW)
    sink = found[repairs.SINK]
    assert sink == replace(methods.RELEASE["sink_wanda"], inputs=FEW)
    assert found[repairs.RIVAL] == replace(sink, weighting=None)
    assert found[repairs.CONTROL].weighting is not None
    assert found[repairs.CONTROL] == replace(sink, weighting=found[repairs.CONTROL].weighting)


@pytest.mark.parametrize(("mask", "pattern"), [*product((repairs.SINK, repairs.WANDA), ("unstructured", "2:4"))])
def test_a_cell_is_the_method_of_that_name_with_errors_of_plain_text(bench: Bench, mask: str, pattern: str) -> None:
    found = Calibrations(bench, 1)
    method, target = repairs.masks(bench.model, noised=FEW)[mask], Target(0.5, pattern)
    errors_of = found.hessians_of(FEW)
    ranking = [method, repairs.masks(bench.model, noised=FEW)[repairs.CONTROL]]
    own = [found.statistics_of(each) for each in ranking]
    weights = repairs.repaired(bench.model, ranking, target, own, errors_of)[0]
    for repair in REPAIRS:
        with pruner.restored(bench.model) as model:
            chosen = methods.repaired(method, repair)
            pruner.prune_with_(model, chosen, target, found.statistics_of(method), errors_of=errors_of)
            for layer, weight in zip(model.layers, weights[repair], strict=True):
                assert torch.equal(layer.module.weight != 0, weight != 0)
                torch.testing.assert_close(layer.module.weight, weight, atol=1e-5, rtol=1e-4)  # solved with another's mask
                assert repair in ("refit", "swaps, refit") or torch.equal(layer.module.weight, weight)


def test_a_refit_lowers_the_error_of_every_layer(bench: Bench) -> None:
    found = Calibrations(bench, 0)
    method = repairs.masks(bench.model, noised=FEW)[repairs.SINK]
    errors_of = found.hessians_of(FEW)
    weights = repairs.repaired(bench.model, [method], Target(0.5), [found.statistics_of(method)], errors_of)[0]
    for index, layer in enumerate(bench.model.layers):
        role = {"k": "q", "v": "q", "up": "gate"}.get(layer.role, layer.role)
        hessian = errors_of[layer.block][role].hessian().double()  # type: ignore[index]
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
        change = {repair: (weights[repair][index] - layer.module.weight).double() for repair in REPAIRS}
        error = {repair: float(torch.einsum("ri,ij,rj->", each, hessian, each)) for repair, each in change.items()}
        assert error["swaps, refit"] < error["swaps"] and error["refit"] < error["mask alone"]


def test_tables_name_what_they_compare(bench: Bench, outcomes: list[Outcome]) -> None:
    table = repairs.loss_table(outcomes, seed=0)
    assert len(table) == 16 and bool(table["loss"].notna().all())
    gains = repairs.gain_table(outcomes, seed=0)
    assert len(gains) == 12 and set(gains["seeds"]) == {2}
    assert all(adjusted >= raw for adjusted, raw in zip(gains["p (Holm)"], gains["p"], strict=True))
    first, second = ([o.loss for o in outcomes if o.method == f"{mask} + refit"] for mask in (repairs.SINK, repairs.CONTROL))
    row = gains[gains["comparison"] == f"{repairs.SINK} + refit - {repairs.CONTROL} + refit"].iloc[0]
    assert row["gain"] == pytest.approx(float((torch.stack(second) - torch.stack(first)).mean()))
    assert row["low"] <= row["gain"] <= row["high"]
    weaker = repairs.weaker_gain(outcomes, model=bench.model.name, repair="refit", seed=0)
    both = gains[gains["comparison"].str.startswith(f"{repairs.SINK} + refit - ")].iloc[:2]
    assert weaker.interval[0] == pytest.approx(both["low"].min()) and weaker.p_value == pytest.approx(both["p"].max())
    effects = repairs.repair_table(outcomes, seed=0)
    assert len(effects) == 12 and f"{repairs.SINK} + swaps - {repairs.SINK}" in set(effects["comparison"])


def test_alps_stands_beside_the_repairs_with_a_row_of_its_own(outcomes: list[Outcome]) -> None:
    alps = [replace(found, method=repairs.ALPS, loss=found.loss - 1.0) for found in outcomes if found.method == repairs.WANDA]
    table = repairs.loss_table([*outcomes, *alps], seed=0)
    row = table[table["mask"] == repairs.ALPS].iloc[0]
    own = table[(table["mask"] == repairs.WANDA) & (table["repair"] == repairs.ALONE)].iloc[0]
    assert len(table) == 17 and row["repair"] == "its own" and row["increase"] == pytest.approx(own["increase"] - 1.0)
    assert len(repairs.repair_table([*outcomes, *alps], seed=0)) == 16
    assert not len(repairs.loss_table([], seed=0)) and not len(repairs.gain_table([], seed=0))


def test_some_repairs_alone_give_their_rows_alone(bench: Bench) -> None:
    found = repairs.measure(bench, methods.pattern_target("2:4"), seeds=[0], noised=FEW, repairs=["mask alone", "swaps, refit"])
    assert len(found) == 8
    gains = repairs.gain_table(found, seed=0)
    assert len(gains) == 6 and all(str(name).endswith("2:4") for name in gains["comparison"])
    with pytest.raises(InputError, match="repairs must be of mask alone, swaps, refit"):
        repairs.measure(bench, Target(0.5), seeds=[0], repairs=["refitting"])


def test_an_autoregressive_model_reads_clean_text(tmp_path: pytest.TempPathFactory) -> None:
    model: LanguageModel = tiny.model(tmp_path, causal=True)  # type: ignore[arg-type]
    bench = Bench(model, tiny.ids(12, 16, seed=3), tiny.ids(4, 16, seed=4), 4, 3, 11, 16)
    assert all(method.inputs == CLEAN for method in repairs.masks(model).values())
    found = repairs.measure(bench, Target(0.5), seeds=[0], repairs=["mask alone", "refit"])
    assert len(found) == 6 and len(repairs.gain_table(found, seed=0)) == 4
    assert not any("noised" in each.method for each in found)  # it says what was done
    table = repairs.loss_table([runs.dense(bench), *found], seed=0)
    assert table["mask"].unique().tolist() == [repairs.CLEAN_RIVAL, repairs.SINK, repairs.CONTROL]
    assert set(repairs.MASKS) <= set(sink_figures.REPAIRED)
    better = [replace(each, loss=each.loss - 3.0) if each.method.startswith(repairs.CLEAN_RIVAL) else each for each in found]
    assert repairs.weaker_gain(better, model=model.name, repair="refit", seed=0).estimate < -2.0  # no weights are a rival too


def test_controls_are_told_from_rivals_and_every_cell_says_what_it_took(outcomes: list[Outcome]) -> None:
    gains = repairs.gain_table(outcomes, seed=0)
    controls = gains["comparison"].str.contains(f" - {repairs.CONTROL}", regex=False)
    assert (gains["against"] == "control").tolist() == controls.tolist() and 0 < int(controls.sum()) < len(gains)
    seconds = {found.method: found.effort.seconds for found in outcomes[1:17]}
    for mask in (repairs.WANDA, repairs.SINK):
        alone, swaps, refit, both = (seconds[repairs.name_of(mask, repair)] for repair in REPAIRS)
        assert 0 < alone < min(swaps, refit) and max(swaps, refit) < both
    assert len({found.effort.peak for found in outcomes[1:17]}) == 1  # of all cells of a calibration together
