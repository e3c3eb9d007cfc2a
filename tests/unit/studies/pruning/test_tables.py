"""Tables of pruned models: increases in pairs, the authors' numbers as printed, and nothing where nothing was measured."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from lib.evaluation.paired import paired_difference
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.tasks import TaskResult
from lib.studies.pruning import tables
from lib.studies.pruning.runs import DENSE, STRUCTURED, Outcome

WINDOWS = 10
BASE = torch.linspace(1.0, 9.0, WINDOWS, dtype=torch.float64)  # windows differ by more than methods do
LLADA = {  # paper.md section 1.4
    "dense": (57.93, 65.97, 43.00, 74.10, 69.30, 69.29, 72.70),
    "Wanda": (52.70, 61.43, 39.08, 72.63, 64.56, 57.01, 67.52),
    "sink-aware (Wanda)": (53.18, 62.16, 41.38, 73.18, 65.27, 55.88, 67.18),
    "SparseGPT": (52.34, 60.97, 39.68, 72.20, 64.64, 53.53, 66.90),
    "sink-aware (SparseGPT)": (52.36, 60.79, 39.59, 72.95, 65.82, 52.11, 67.35),
}
STRUCTURED_ROWS = {
    (0.3, "Baseline"): (0.6834, 0.6630, 0.6907, 0.3780),
    (0.3, "Sink-Aware"): (0.6955, 0.6740, 0.7175, 0.3820),
    (0.5, "Baseline"): (0.5898, 0.5572, 0.4853, 0.2039),
    (0.5, "Sink-Aware"): (0.6037, 0.5724, 0.5279, 0.2362),
}
DIGEST = [  # paper.md section 1.7: method, pruned, GSM8K, speed-up
    ("dense", 0.0, 78.5, 1.0),
    ("random", 30.0, 65.2, 1.4),
    ("magnitude", 30.0, 70.1, 1.4),
    ("AR sink-preserve", 30.0, 72.3, 1.4),
    ("sink-aware (Wanda)", 30.0, 75.8, 1.4),
    ("sink-aware (Wanda)", 50.0, 73.2, 1.8),
]


def own(*shape: int, draw: int) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(draw), dtype=torch.float64)


def outcomes(
    method: str,
    shift: float,
    *,
    model: str = "m",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    seeds: int = 2,
    draw: int = 0,
) -> list[Outcome]:
    """Losses of the windows, shifted, and a measured sparsity that misses the asked one by seed."""
    values = BASE + shift + own(seeds, WINDOWS, draw=draw)
    rows = enumerate(values)
    return [Outcome(model, method, sparsity, pattern, seed, sparsity + 0.01 * (seed + 1), row) for seed, row in rows]


def dense(model: str = "m", level: float = 0.0) -> list[Outcome]:
    return [Outcome(model, DENSE, 0.0, "unstructured", 0, 0.0, BASE + level)]


def everything(model: str = "m", level: float = 0.0) -> list[Outcome]:
    """What the paper's and the digest's tables need, each method with a shift of its own."""
    found = dense(model, level)
    for index, name in enumerate(["Wanda", "SparseGPT", "sink-aware (Wanda)", "sink-aware (SparseGPT)"]):
        found += outcomes(name, level + 0.5 + 0.1 * index, model=model, draw=index)
    for index, name in enumerate(["random", "magnitude", "AR sink-preserve", "sink-aware (Wanda)"]):
        found += outcomes(name, level + 0.1 + 0.05 * index, model=model, sparsity=0.3, draw=9 + index)
    return found


def answers(right: int, documents: int = 40, *, chance: float = 0.25) -> TaskResult:
    correct = tuple(index < right for index in range(documents))
    return TaskResult("t", "acc", correct, {"acc": correct}, chance, 0, EvaluationSettings())


def shift_of(found: list[Outcome], method: str, sparsity: float, level: float = 0.0) -> float:
    """Mean increase over the dense model, seed by seed and window by window."""
    rows = [one for one in found if (one.method, one.sparsity, one.pattern) == (method, sparsity, "unstructured")]
    differences = [float(value) - float(base) - level for one in rows for value, base in zip(one.loss, BASE, strict=True)]
    return sum(differences) / len(differences)


# --- losses --------------------------------------------------------------------------------------------------------------


def test_losses_of_one_condition_are_stacked_seed_by_seed() -> None:
    found = outcomes("a", 0.1, draw=1) + outcomes("b", 0.2) + outcomes("a", 0.3, sparsity=0.7)
    found += outcomes("a", 0.4, pattern="2:4", draw=4) + outcomes("a", 0.5, model="n")
    stacked = tables.losses(found, model="m", method="a", sparsity=0.5)
    assert torch.equal(stacked, torch.stack([found[0].loss, found[1].loss]))
    two_four = tables.losses(found, model="m", method="a", sparsity=0.5, pattern="2:4")
    assert torch.equal(two_four, torch.stack([one.loss for one in found if one.pattern == "2:4"]))
    with pytest.raises(KeyError, match=r"no outcome of \('m', 'a', 0.3, 'unstructured'\)"):
        tables.losses(found, model="m", method="a", sparsity=0.3)


def test_conditions_are_listed_once_in_the_order_of_measurement() -> None:
    found = dense() + outcomes("b", 0.1) + outcomes("a", 0.1, pattern=STRUCTURED) + outcomes("b", 0.1, sparsity=0.3)
    wanted = [("m", DENSE, "unstructured", 0.0), ("m", "b", "unstructured", 0.5), ("m", "a", STRUCTURED, 0.5)]
    assert tables.conditions(found + found) == [*wanted, ("m", "b", "unstructured", 0.3)]


def test_increases_are_paired_with_the_dense_model_window_by_window() -> None:
    """Windows differ by 8 nats and the increase by 0.05: unpaired, its interval would be a hundred times as wide."""
    found = dense() + dense("n", level=4.0) + outcomes("a", 0.3, draw=1) + outcomes("a", 4.1, model="n", seeds=3, draw=2)
    found += outcomes("a", 0.7, pattern=STRUCTURED, draw=3)
    table = tables.loss_table(found, seed=5)
    keys = ["model", "method", "pattern", "sparsity"]
    assert [tuple(row) for row in table[keys].to_numpy()] == tables.conditions(found)
    assert table["increase"].tolist() == pytest.approx([0.0, 0.0, 0.3, 0.1, 0.7], abs=0.03)
    assert table["seeds"].tolist() == [1, 1, 2, 3, 2]
    assert table["measured sparsity"].tolist() == pytest.approx([0.0, 0.0, 0.515, 0.52, 0.515])
    for row in table.to_dict("records"):
        mine = [one for one in found if (one.model, one.method, one.pattern) == (row["model"], row["method"], row["pattern"])]
        base = BASE + (4.0 if row["model"] == "n" else 0.0)
        values = [float(value) for one in mine for value in one.loss]
        assert row["loss"] == pytest.approx(sum(values) / len(values))
        assert row["increase"] == pytest.approx(sum(values) / len(values) - float(base.mean()))
        result = paired_difference(torch.stack([one.loss for one in mine]), base[None], seed=5)
        assert (row["low"], row["high"]) == result.interval
        assert row["low"] <= row["increase"] <= row["high"] and row["high"] - row["low"] < 0.15


def test_losses_per_character_stand_beside_those_per_token() -> None:
    found = dense() + dense("n", level=4.0) + outcomes("a", 0.3)
    weights = {"m": torch.arange(WINDOWS).double() / 7, "n": torch.full_like(BASE, 0.01)}
    table: Any = tables.loss_table(found, seed=0, weights=weights)
    assert list(table.columns).index("loss per character") == list(table.columns).index("loss") + 1
    for row in table.to_dict("records"):
        mine = [one.loss.double() for one in found if (one.model, one.method) == (row["model"], row["method"])]
        wanted = sum(float((loss * weights[row["model"]]).sum()) for loss in mine) / len(mine)
        assert row["loss per character"] == pytest.approx(wanted)
    assert tables.loss_table(found, seed=0).equals(table.drop(columns="loss per character"))
    assert list(tables.loss_columns(found, ("m", "b", "2:4", 0.5), seed=0, weights=weights))[1] == "loss per character"


def test_a_model_without_its_dense_row_has_no_increase() -> None:
    with pytest.raises(KeyError, match="no outcome of the dense m"):
        tables.loss_table(dense("n") + outcomes("a", 0.1), seed=0)


# --- accuracies ----------------------------------------------------------------------------------------------------------


def wilson(right: int, documents: int) -> tuple[float, float]:
    z, share = float(norm.ppf(0.975)), right / documents
    middle = (share + z * z / (2 * documents)) / (1 + z * z / documents)
    half = z / (1 + z * z / documents) * math.sqrt(share * (1 - share) / documents + z * z / (4 * documents**2))
    return middle - half, middle + half


def test_a_task_is_usable_when_the_dense_interval_lies_above_chance() -> None:
    """Of 40: 16 are above chance 0.25 but their interval begins at 0.264; 15 begin at 0.242. Other methods do not matter."""
    assert wilson(16, 40)[0] > 0.25 > wilson(15, 40)[0]
    results = {
        ("m", DENSE, 0.0, "yes"): answers(16), ("m", DENSE, 0.0, "no"): answers(15),
        ("m", DENSE, 0.0, "halves"): answers(25, chance=0.5), ("m", DENSE, 0.0, "free"): answers(4, chance=0.0),
        ("m", "Wanda", 0.5, "no"): answers(40), ("n", "Wanda", 0.5, "yes"): answers(40), ("m", "Wanda", 0.5, "yes"): answers(1),
    }  # fmt: skip
    assert wilson(25, 40)[0] < 0.5
    assert tables.usable_tasks(results) == {("m", "yes"), ("m", "free")}
    table = tables.accuracy_table(results)
    assert table["usable"].tolist() == [True, False, False, True, False, False, True]


def test_accuracies_are_per_cent_with_their_wilson_interval() -> None:
    results = {("m", DENSE, 0.0, "t"): answers(30), ("m", "Wanda", 0.5, "t"): answers(3, 8, chance=0.5)}
    table = tables.accuracy_table(results)
    assert table[["model", "task", "method", "sparsity"]].to_numpy().tolist() == [
        ["m", "t", DENSE, 0.0],
        ["m", "t", "Wanda", 0.5],
    ]
    assert table["accuracy"].tolist() == [75.0, 37.5] and table["chance"].tolist() == [25.0, 50.0]
    assert table["documents"].tolist() == [40, 8]
    for row, (right, documents) in zip(table.to_dict("records"), ((30, 40), (3, 8)), strict=True):
        assert (row["low"], row["high"]) == pytest.approx(tuple(100 * end for end in wilson(right, documents)))


# --- the authors' tables -------------------------------------------------------------------------------------------------


def paper_columns(row: Mapping[str, object]) -> tuple[float, ...]:
    return tuple(float(str(value)) for name, value in row.items() if name.startswith("paper "))


def test_the_authors_llada_table_stands_beside_ours() -> None:
    found = everything() + everything("n", level=4.0) + outcomes("Wanda", 9.0, pattern="2:4")
    results = {
        ("m", DENSE, 0.0, "t"): answers(30), ("m", "Wanda", 0.5, "t"): answers(20), ("m", "Wanda", 0.3, "t"): answers(1),
        ("n", "SparseGPT", 0.5, "t"): answers(2), ("m", "SparseGPT", 0.5, "u"): answers(10),
    }  # fmt: skip
    table = tables.paper_table(found, results, model="m", seed=0)
    names = ["Avg", "MMLU", "ARC-C", "PIQA", "WinoG", "GSM8K", "HellaSwag"]
    assert [name for name in table.columns if name.startswith("paper ")] == [f"paper {name}" for name in names]
    assert table["method"].tolist() == list(LLADA)
    for row in table.to_dict("records"):
        assert paper_columns(row) == LLADA[row["method"]]
        sparsity = 0.0 if row["method"] == DENSE else 0.5
        assert row["our loss, nats per token"] == pytest.approx(
            float(BASE.mean()) + shift_of(found[:17], row["method"], sparsity)
        )
    assert table.set_index("method")["our t, %"].to_dict() == pytest.approx(
        {"dense": 75.0, "Wanda": 50.0, **dict.fromkeys(list(LLADA)[2:], math.nan)}, nan_ok=True
    )
    assert table["our u, %"].isna().tolist() == [True, True, True, False, True]


def test_the_authors_structured_table_stands_beside_ours_with_nothing_where_nothing_was_measured() -> None:
    """The baseline is the same calibration without weights; losses of the same names but unstructured do not count."""
    found = (
        dense() + outcomes("no sink weights", 0.4, pattern=STRUCTURED, draw=1) + outcomes("no sink weights", 0.9, sparsity=0.3)
    )
    found += outcomes("sink-aware (Wanda)", 0.2, pattern=STRUCTURED, sparsity=0.3, draw=2)
    found += outcomes("sink-aware (Wanda)", 0.6, model="n", pattern=STRUCTURED)
    table = tables.paper_structured_table(found, model="m", seed=3)
    assert [name for name in table.columns if name.startswith("paper ")] == [
        "paper PIQA",
        "paper WinoG",
        "paper ARC-E",
        "paper ARC-C",
    ]
    assert [(row["ratio"], row["method"]) for row in table.to_dict("records")] == list(STRUCTURED_ROWS)
    for row in table.to_dict("records"):
        assert paper_columns(row) == STRUCTURED_ROWS[row["ratio"], row["method"]]
        assert row["our method"] == {"Baseline": "no sink weights", "Sink-Aware": "sink-aware (Wanda)"}[row["method"]]
    ours = ["our loss", "our increase", "low", "high"]
    assert [[math.isnan(row[name]) for name in ours] for row in table.to_dict("records")] == [
        [one] * 4 for one in (True, False, False, True)
    ]
    for index, method, ratio, shift in ((1, "sink-aware (Wanda)", 0.3, 0.2), (2, "no sink weights", 0.5, 0.4)):
        row = table.iloc[index]
        mine = [
            one.loss for one in found if (one.model, one.method, one.sparsity, one.pattern) == ("m", method, ratio, STRUCTURED)
        ]
        result = paired_difference(torch.stack(mine), BASE[None], seed=3)
        assert row["our loss"] == pytest.approx(float(torch.stack(mine).mean()))
        assert (row["our increase"], row["low"], row["high"]) == (result.estimate, *result.interval)
        assert row["our increase"] == pytest.approx(shift, abs=0.03)


def test_what_was_not_measured_stands_as_nan() -> None:
    found = dense() + outcomes("Wanda", 0.4)
    table = tables.paper_table(found, {}, model="m", seed=0).set_index("method")["our loss, nats per token"]
    assert table.isna().to_dict() == {name: name not in (DENSE, "Wanda") for name in LLADA}
    digest = tables.digest_table(found, {}, {"m": {("unstructured", 0.3): (1.5, 1.4, 1.6)}}, seed=0)
    assert digest["increase of the loss"].isna().tolist() == [False, *[True] * 5]
    assert digest["speed-up, zeros"].tolist() == pytest.approx([1.0, *[1.5] * 4, math.nan], nan_ok=True)
    assert digest["speed-up, smaller"].tolist() == pytest.approx([1.0, *[math.nan] * 5], nan_ok=True)


def test_the_digest_is_regenerated_model_by_model() -> None:
    found = everything() + everything("n", level=4.0)
    results = {
        ("m", DENSE, 0.0, "t"): answers(30), ("m", "magnitude", 0.3, "t"): answers(20), ("m", "magnitude", 0.5, "t"): answers(1),
        ("m", "sink-aware (Wanda)", 0.5, "t"): answers(10), ("m", DENSE, 0.0, "poor"): answers(5),
        ("m", "magnitude", 0.3, "poor"): answers(40), ("n", DENSE, 0.0, "other"): answers(40),
        ("n", DENSE, 0.0, "t"): answers(5),  # usable on the other model alone
    }  # fmt: skip
    speeds = {
        "m": {("unstructured", 0.3): (1.1, 1.0, 1.2), ("unstructured", 0.5): (1.2, 0.9, 1.3), (STRUCTURED, 0.3): (1.5, 1.4, 1.6),
              (STRUCTURED, 0.5): (1.9, 1.8, 2.0)},
        "n": {("unstructured", 0.3): (0.7, 0.6, 0.8), ("unstructured", 0.5): (0.8, 0.6, 0.9), (STRUCTURED, 0.3): (2.1, 2.0, 2.2),
              (STRUCTURED, 0.5): (2.2, 2.0, 2.4)},
    }  # fmt: skip
    table = tables.digest_table(found, results, speeds, seed=6)
    columns = ["method", "pruned, %", "digest GSM8K, %", "digest speed-up"]
    assert [tuple(row) for row in table[columns].to_numpy()] == DIGEST * 2
    assert table["model"].tolist() == ["m"] * 6 + ["n"] * 6
    assert table["speed-up, zeros"].tolist() == [1.0, 1.1, 1.1, 1.1, 1.1, 1.2, 1.0, 0.7, 0.7, 0.7, 0.7, 0.8]
    assert table["speed-up, smaller"].tolist() == [1.0, 1.5, 1.5, 1.5, 1.5, 1.9, 1.0, 2.1, 2.1, 2.1, 2.1, 2.2]
    quartiles = [f"{kind}, quartile {number}" for kind in ("zeros", "smaller") for number in (1, 3)]
    assert [tuple(row) for row in table[quartiles].to_numpy()[[0, 3, 5, 11]]] == [
        (1.0, 1.0, 1.0, 1.0), (1.0, 1.2, 1.4, 1.6), (0.9, 1.3, 1.8, 2.0), (0.6, 0.9, 2.0, 2.4),
    ]  # fmt: skip
    for index, row in enumerate(table.to_dict("records")):
        model, base = row["model"], BASE + (4.0 if index > 5 else 0.0)
        key = (model, row["method"], DIGEST[index % 6][1] / 100, "unstructured")
        mine = torch.stack([one.loss for one in found if (one.model, one.method, one.sparsity, one.pattern) == key])
        result = paired_difference(mine, base[None], seed=6)
        assert (row["increase of the loss"], row["low"], row["high"]) == (result.estimate, *result.interval)
    missing = math.nan
    assert table["t, %"].tolist() == pytest.approx([75.0, missing, 50.0, missing, missing, 25.0, *[missing] * 6], nan_ok=True)
    assert table["other, %"].tolist() == pytest.approx([*[missing] * 6, 100.0, *[missing] * 5], nan_ok=True)
    assert "poor, %" not in table.columns  # the dense model does no better there than by chance
