"""Tables of decoder runs on made-up runs whose numbers are known."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from lib.core.errors import InputError
from lib.decoding.late_steps import LateExamples, LateStep
from lib.decoding.systems import fast_plan
from lib.studies.timing import tables as decoding_tables
from lib.studies.timing.runs import PLAIN, DecoderRun
from tests import tiny

FAST = fast_plan(threshold=0.5)
PLANS: dict[str, Any] = {"plain": PLAIN, "fast": FAST}
TEXT = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 7, 7, 7]])
IS_TEXT = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])


def run(name: str, plan: Any, *, seconds: list[float], new: torch.Tensor = TEXT, nats: list[float] | None = None) -> DecoderRun:
    likelihood = None if nats is None else torch.tensor(nats, dtype=torch.float64)
    return DecoderRun(name, plan, new, IS_TEXT, 12, 99, torch.tensor(seconds, dtype=torch.float64), 120, likelihood)


def test_a_row_says_what_changed_against_the_plain_sampler() -> None:
    """The plain text has 4, 2 and 4 tokens; what follows an end token agrees or not without counting."""
    other = TEXT.clone()
    other[0, 1], other[1, 3], other[2] = 9, 9, torch.tensor([7, 1, 2, 3])
    # Most rounds say 2, though the machine became slower; the ratio of the median seconds would say 10.
    plain = run("plain", PLAIN, seconds=[2.0, 2.0, 20.0, 20.0, 20.0], nats=[2.0, 3.0, 1.0])
    fast = run("fast", FAST, seconds=[1.0, 1.0, 10.0, 10.0, 2.0], new=other, nats=[2.5, 3.5, 3.0])
    table = decoding_tables.table([fast, plain], seed=0).set_index("decoder")
    assert table.loc["fast", ["speed_up", "speed_up_q1", "speed_up_q3"]].tolist() == [2.0, 2.0, 2.0]
    assert table.loc["fast", ["tokens/s", "tokens/s low", "tokens/s high"]].tolist() == [60.0, 12.0, 120.0]
    assert table.loc["fast", "agreement"] == pytest.approx((3 / 4 + 1 + 1 / 4) / 3)
    assert table.loc["fast", "nats"] == 3.0 and table.loc["fast", "nats difference"] == pytest.approx(1.0)
    assert table.loc["fast", "distinct"] == pytest.approx(1.0)
    assert table.loc["fast", "distinct difference"] == pytest.approx((0 + 0 + 0.75) / 3)
    for name in ("agreement", "nats difference", "distinct difference"):
        key = name.removesuffix(" difference")
        low, high = (table.loc["fast", f"{name} {end}"] for end in ("low", "high"))
        assert low <= table.loc["fast", name if "difference" in name else key] <= high and low < high
    same = table.loc["plain"]
    assert (same["speed_up"], same["agreement"], same["nats difference"], same["distinct difference"]) == (1.0, 1.0, 0.0, 0.0)
    assert same[["forwards", "computed tokens", "prompts"]].tolist() == [12, 99, 3]


def test_without_a_judge_there_are_no_nats() -> None:
    table = decoding_tables.table([run("plain", PLAIN, seconds=[1.0])], seed=0)
    assert all(math.isnan(table.loc[0, name]) for name in ("nats", "nats difference", "nats difference low"))


def grid(both: list[float]) -> dict[tuple[str, str], DecoderRun]:
    """Rounds 1 and 2 at different speeds of the machine; weights twice, the decoder three times as fast."""
    return {
        ("dense", "plain"): run("a", PLAIN, seconds=[12.0, 60.0], nats=[1.0, 1.0, 1.0]),
        ("dense", "fast"): run("b", FAST, seconds=[4.0, 20.0], nats=[1.5, 1.5, 1.5]),
        ("small", "plain"): run("c", PLAIN, seconds=[6.0, 30.0], nats=[2.0, 2.0, 2.0]),
        ("small", "fast"): run("d", FAST, seconds=both, nats=[2.5, 2.5, 2.5]),
    }


def test_speed_ups_that_multiply_are_predicted_round_by_round() -> None:
    table = decoding_tables.composition(grid([2.0, 10.0]), dense="dense").set_index(["format", "decoder"])
    assert table["predicted"].to_dict() == {
        ("dense", "plain"): 1.0,
        ("dense", "fast"): 3.0,
        ("small", "plain"): 2.0,
        ("small", "fast"): 6.0,
    }
    assert table["measured / predicted"].tolist() == pytest.approx([1.0] * 4)
    assert table["speed-up"].tolist() == pytest.approx([1.0, 3.0, 2.0, 6.0])
    assert table["tokens/s"].tolist() == pytest.approx([6.0, 18.0, 12.0, 36.0])  # 10 and 2 in the rounds of the first pair
    # (small, plain) is slower and worse than (dense, fast); each of the others is the best at its speed
    assert table["best at its speed"].tolist() == [True, True, False, True]


def test_speed_ups_that_do_not_multiply_show_it() -> None:
    row = decoding_tables.composition(grid([4.0, 20.0]), dense="dense").iloc[3]
    assert (row["speed-up"], row["predicted"]) == (3.0, 6.0)
    assert row["measured / predicted"] == pytest.approx(0.5)
    assert math.isinf(row["measured / predicted low"]), "two rounds bound no median"


@pytest.mark.parametrize("formats", [["small"], ["small", "other"]])
def test_pairs_that_are_searched_for_the_worst_have_intervals_for_all_of_them(formats: list[str]) -> None:
    """The measured time of the pair of interest rises from round to round; of one pair 6 of 20 lie outside on each side."""
    still, ratios = [1.0] * 20, [1.0 / (1.0 + rank / 100) for rank in range(20)]
    runs = {(kind, name): run("", plan, seconds=still) for kind in ("dense", *formats) for name, plan in PLANS.items()}
    runs["small", "fast"] = run("", FAST, seconds=ratios)
    row = decoding_tables.composition(runs, dense="dense").set_index(["format", "decoder"]).loc["small", "fast"]
    outside = {1: 6, 2: 5}[len(formats)]
    ends = (1.0 + (outside - 1) / 100, 1.0 + (20 - outside) / 100)
    assert row[["measured / predicted low", "measured / predicted high"]].tolist() == pytest.approx(list(ends))


def claimed(composed: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the claims of notebook 06 about one model's composition."""
    path = next((Path(__file__).resolve().parents[4] / "notebooks").glob("06_*.ipynb"))
    sources = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    (source,) = [source for source in sources if '"speed-ups-multiply"' in source]
    found: list[dict[str, Any]] = []
    told = SimpleNamespace(claim=lambda _, **claim: found.append(claim))
    exec(source, {"grids": {"a": None}, "run": told, "composed": composed, "settings": SimpleNamespace(decoding_repeats=20)})
    return found


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ([(0.95, 1.05), (0.91, 1.0)], "reproduced"),
        ([(0.95, 1.05), (0.7, 0.8)], "not reproduced"),
        ([(0.95, 1.2), (0.91, 0.96)], "inconclusive"),  # the estimate that lies nearer to 1 has an end outside
        ([(0.95, 1.05), (-math.inf, math.inf)], "inconclusive"),
        ([], None),
    ],
)
def test_speed_ups_multiply_where_all_pairs_do(ends: list[tuple[float, float]], verdict: str | None) -> None:
    """With no format but the dense one there is no pair, and no claim."""
    pairs = [
        ("small", f"fast {number}", (max(low, 0.5) + min(high, 1.1)) / 2, low, high) for number, (low, high) in enumerate(ends)
    ]
    names = ["format", "decoder", *(f"measured / predicted{end}" for end in ("", " low", " high"))]
    rows = [("dense", "plain sampler", 1.0, 1.0, 1.0), *pairs]
    found = claimed(pd.DataFrame(rows, columns=pd.Index(names)).assign(model="a"))
    assert [claim["verdict"] for claim in found] == ([verdict] if verdict else [])


def test_without_a_judge_no_pair_is_the_best() -> None:
    runs = {key: dataclasses.replace(one, nats=None) for key, one in grid([2.0, 10.0]).items()}
    assert decoding_tables.composition(runs, dense="dense")["best at its speed"].tolist() == [False] * 4


def test_incomplete_runs_are_refused() -> None:
    runs = grid([2.0, 10.0])
    with pytest.raises(InputError, match="runs must hold the plain sampler once, to compare with, got 0"):
        decoding_tables.table([runs["dense", "fast"]], seed=0)
    with pytest.raises(InputError, match="formats must hold quick, got dense, small"):
        decoding_tables.composition(runs, dense="quick")
    del runs["small", "fast"]
    with pytest.raises(InputError, match=r"every decoder, got none of small \+ fast: measure the whole grid"):
        decoding_tables.composition(runs, dense="dense")


def test_predictors_of_late_tokens_are_compared_prompt_by_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {0: [0.5, 0.0, 1.0], 1: [1.0, 0.5, 1.0], 2: [0.0, 0.0, 0.5]}

    def agreement(_: Any, __: Any, step: LateStep | None) -> torch.Tensor:
        return torch.tensor(shares[0 if step is None else step.neighbours], dtype=torch.float64)

    monkeypatch.setattr(decoding_tables.late_steps, "agreement", agreement)
    one, many, ids = torch.ones(1), torch.ones(1, 1), torch.tensor([3])
    good, bad = (LateStep("nearest", one, one, many, many, one, number) for number in (1, 2))
    examples = LateExamples(many, ids, ids, many, ids, ids)
    steps = {"control": None, "good": good, "bad": bad}
    model = tiny.model(tmp_path, causal=False)
    table = decoding_tables.late_table(model, examples, steps, seed=0).set_index("predictor")
    assert table["agreement"].tolist() == pytest.approx([0.5, 2.5 / 3, 0.5 / 3]) and table["prompts"].tolist() == [3, 3, 3]
    assert table["difference"].tolist() == pytest.approx([0.0, 1 / 3, -1 / 3])
    lows, highs = table["low"].tolist(), table["high"].tolist()
    assert all(low <= middle <= high for low, middle, high in zip(lows, table["difference"].tolist(), highs, strict=True))
    assert lows[1] >= 0 and highs[2] <= 0
