"""Tables of experts: counts by hand, and a null that planted routing leaves and random routing does not."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.calibration import one_shot
from lib.calibration.reads import fell_back
from lib.calibration.routes import Routes, routes
from lib.calibration.statistics import CalibrationSet
from lib.core.errors import InputError
from lib.pruning.methods import METHODS
from lib.studies.pruning import expert_tables
from lib.studies.pruning.runs import Bench, Calibrations
from tests import tiny
from tests.unit import slow_experts

SINKS = METHODS["sink-aware (Wanda)"]


def calibrations(model: tiny.LanguageModel) -> Calibrations:
    return Calibrations(Bench(model, tiny.ids(8, 12, seed=3), tiny.ids(3, 12, seed=4), 2, 2, 5), seed=1)


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_counts_are_those_of_tokens_routed_by_hand(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.mixture(family)
    found, ids = calibrations(model), tiny.ids(3, 12)
    weight = torch.ones(3, 12)
    weight[:, 0] = weight[1, 5] = 0.1
    monkeypatch.setattr(found, "set_of", lambda method: CalibrationSet(ids, weight))
    table = expert_tables.expert_table(found, SINKS)
    marks = slow_experts.statistics(model, ids, (weight < 0.5).float())
    for row in table.to_dict("records"):
        own = marks[row["layer"], "gate", row["expert"]]
        assert row["tokens"] == own["rows"]
        assert row["share, %"] == pytest.approx(100 * own["rows"] / (36 * 2))
        assert row["sink share, %"] == pytest.approx(100 * own["tokens"] / (4 * 2))
        assert row["fallbacks, norms"] == (3 if own["rows"] == 0 else 0)
        assert row["fallbacks, Hessians"] == 2 * (own["rows"] < 32) + (own["rows"] < 16)
    assert len(table) == 2 * 8
    routing = expert_tables.sink_routing_table(found, SINKS, seed=0, permutations=99)
    assert routing["sinks"].tolist() == [4, 4] and routing["tokens"].tolist() == [36, 36]
    assert min(routing["p"].tolist()) >= 0.01


@pytest.mark.parametrize("hessian", [False, True])
def test_fallbacks_are_those_of_the_statistics(hessian: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert whose tokens all weigh nothing has no statistics of its own, however many went to it."""
    model = tiny.mixture("qwen3_moe")
    found, ids = calibrations(model), tiny.ids(16, 12)
    chosen = routes(model, ids)[0].chosen
    weight = torch.where((chosen == chosen[0, 0]).any(1), 0.0, 1.0).view(16, 12)
    monkeypatch.setattr(found, "set_of", lambda method: CalibrationSet(ids, weight))
    table = expert_tables.expert_table(found, SINKS)
    statistics = one_shot.dense_statistics(model, CalibrationSet(ids, weight), hessian=hessian)
    fallen = Counter[tuple[int, object]]()
    for layer in (layer for layer in model.layers if layer.expert is not None):
        fallen[layer.block, layer.expert] += fell_back(statistics[layer.block], layer)
    column = "fallbacks, Hessians" if hessian else "fallbacks, norms"
    assert {(row["layer"], row["expert"]): row[column] for row in table.to_dict("records")} == fallen
    assert {0, 3} <= set(fallen.values())  # some do and some do not


def routed(chosen: Tensor) -> Routes:
    return Routes(chosen, torch.ones(chosen.shape), 8)


def test_planted_sinks_leave_the_null_and_others_do_not() -> None:
    random = torch.Generator().manual_seed(0)
    marked = torch.zeros(10, 40, dtype=torch.bool)
    marked[:, :3] = True
    chosen = torch.rand(400, 8, generator=random).topk(2).indices
    distance, null = expert_tables.distances(routed(chosen), marked, seed=0, permutations=199)
    assert null.quantile(0.025) < distance < null.quantile(0.975)
    assert distance > 0.05  # far from 0 by chance alone
    chosen[marked.flatten(), 0] = 7
    distance, null = expert_tables.distances(routed(chosen), marked, seed=0, permutations=199)
    assert distance > null.max()


def test_marks_are_shuffled_inside_samples() -> None:
    """One sample goes to expert 0 alone and holds all sinks: inside it any tokens do the same, so nothing is special."""
    marked = torch.zeros(2, 20, dtype=torch.bool)
    marked[0, :4] = True
    chosen = torch.tensor([[0]] * 20 + [[1]] * 20)
    distance, null = expert_tables.distances(routed(chosen), marked, seed=0, permutations=50)
    assert distance == 0.5 and (null == 0.5).all()


def test_a_model_without_experts_or_sinks_gives_a_note(tmp_path: Path) -> None:
    found = calibrations(tiny.model(tmp_path / "dense", causal=False))
    assert expert_tables.note(found) == "no experts in dense: nothing is routed"
    assert expert_tables.expert_table(found, SINKS).empty
    assert expert_tables.sink_routing_table(found, SINKS, seed=0).empty
    mixed = calibrations(tiny.mixture("qwen3_moe"))
    assert expert_tables.note(mixed) is None
    with pytest.raises(InputError, match="sinks must be told"):
        expert_tables.expert_table(mixed, METHODS["Wanda"])
