"""Runs, tables, claims and result files."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lib.core import config, provenance, runtime
from lib.core.errors import InputError
from lib.report import claims, notebook, results, tables
from lib.report.claims import claims_table
from tests.reporting import CLAIM, MODEL, NAME, TITLE, begin, line_figure, record_everything


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> notebook.Run:
    return begin(monkeypatch, tmp_path)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Rounding


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 3, "0"), (-0.0, 3, "0"), (1.0, 3, "1.00"), (0.5, 3, "0.500"), (1234.5, 3, "1230"), (999.96, 3, "1000"),
        (9.996, 3, "10.0"), (-0.012345, 3, "-0.0123"), (1e-4, 3, "0.000100"), (9.99e-5, 3, "9.99e-05"), (999499.0, 3, "999000"),
        (1e6, 3, "1.00e+06"), (2.5, 1, "2"), (math.nan, 3, "NaN"), (math.inf, 3, "inf"), (-math.inf, 3, "-inf"),
    ],
)  # fmt: skip
def test_significant_digits(value: float, digits: int, text: str) -> None:
    assert tables.significant(value, digits) == text


def test_table_rounds_fractions_only() -> None:
    frame = pd.DataFrame(
        {
            "layer": [1, 1234567], "word": ["3.14159", "x"], "share": [1 / 3, math.nan],
            "single": np.array([0.1, 2], dtype=np.float32),
            "mixed": [0.12345, "none"], "flag": [True, False], "maybe": pd.Series([7, None], dtype="Int64"), "gone": ["a", None],
        }
    )  # fmt: skip
    shown = tables.display_table(frame)
    assert shown["layer"].tolist() == [1, 1234567]
    assert shown["word"].tolist() == ["3.14159", "x"]
    assert shown["share"].tolist() == ["0.333", "NaN"]
    assert shown["single"].tolist() == ["0.100", "2.00"]
    assert shown["mixed"].tolist() == ["0.123", "none"]
    assert shown["flag"].tolist() == [True, False]
    assert shown["maybe"].tolist() == [7, "NaN"]
    assert shown["gone"].tolist() == ["a", "NaN"]


def test_table_shows_long_cells_whole_in_text_and_html() -> None:
    words = "a sentence that is longer than what pandas shows in a cell by default, and then some more words"
    shown = tables.display_table(pd.DataFrame({"rule": [words] * 80}))
    assert repr(shown).count(words) == 80
    html = shown._repr_html_()
    assert html.count(words) == 80
    assert "<th>0</th>" not in html


def test_a_long_table_shows_its_first_rows_and_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(monkeypatch, tmp_path)
    whole, cut = (
        run.table(f"rows_{count}", pd.DataFrame({"unit": [f"u{row}." for row in range(count)]}), "All.") for count in (100, 101)
    )
    for text in (repr(whole), whole._repr_html_()):
        assert "u99." in text and "of 100 rows" not in text
    for text in (repr(cut), cut._repr_html_()):
        assert text.count("u") >= 30 and "u29." in text and "u30." not in text
        assert "30 of 101 rows; all of them: results/quick/01_rows_101.csv" in text
    assert len((tmp_path / cut.file).read_text().splitlines()) == 102 and len(cut) == 101
    assert cut.loc[[100]].file == cut.file and "u100." in repr(cut.loc[[100]])


def test_a_table_without_rows_says_so_in_text_and_html() -> None:
    shown = tables.display_table(pd.DataFrame({"model": []}))
    assert repr(shown) == tables.NO_ROWS and tables.NO_ROWS in shown._repr_html_()


def test_csv_keeps_six_digits_and_integers() -> None:
    frame = pd.DataFrame({"n": [10000001, 2], "x": [1 / 3, math.nan], "word": ["a,b", "0.123456789"], "zero": [-0.0, 1e-9]})
    assert tables.csv_text(frame) == 'n,x,word,zero\n10000001,0.333333,"a,b",0\n2,NaN,0.123456789,1e-09\n'


def test_named_index_and_two_level_columns_become_plain_columns() -> None:
    frame = pd.DataFrame(
        [[1, 2]], index=pd.Index(["dlm"], name="model"), columns=pd.MultiIndex.from_product([["share"], [25, 50]])
    )
    assert tables.csv_text(frame) == "model,share 25,share 50\ndlm,1,2\n"


def test_row_numbers_are_left_out_and_words_of_an_index_are_kept() -> None:
    frame = pd.DataFrame({"a": [1]})
    assert tables.csv_text(pd.concat([frame, frame])) == "a\n1\n1\n"
    assert tables.csv_text(frame.set_axis(["dlm"], axis="index")) == "index,a\ndlm,1\n"
    assert tables.csv_text(frame.rename_axis("step")) == "step,a\n0,1\n"


@pytest.mark.parametrize("frame", [pd.DataFrame(), pd.DataFrame([[1, 2]], columns=["a", "a"])])
def test_table_refuses_unusable_columns(frame: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="different names"):
        tables.csv_text(frame)


def test_plain_values_for_json() -> None:
    value = {"a": np.float64(1 / 3), "b": [np.int64(3), math.inf, None], 1: (True, Path("x/y")), "c": {"z", "b"}}
    assert tables.plain(value) == {"a": 0.333333, "b": [3, None, None], "1": [True, "x/y"], "c": ["b", "z"]}
    with pytest.raises(InputError, match="got object"):
        tables.plain(object())


# Intervals and verdicts


def test_bootstrap_of_equal_values_has_no_width() -> None:
    assert claims.bootstrap_mean([0.1] * 7, generator=runtime.generator(0)) == pytest.approx((0.1, 0.1, 0.1), abs=1e-15)


def test_bootstrap_matches_the_closed_form_of_a_binary_mean() -> None:
    # The mean of n zeros and ones, drawn again, is binomial: its 95 % range is known without any drawing.
    values = np.repeat([0.0, 1.0], [60, 40])
    mean, low, high = claims.bootstrap_mean(values, generator=runtime.generator(1), resamples=20_000)
    assert mean == pytest.approx(0.4, abs=1e-12)
    assert (low, high) == pytest.approx((0.31, 0.50), abs=0.0101)


def test_bootstrap_covers_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(400, 40))
    ends = [claims.bootstrap_mean(row, generator=runtime.generator(i), resamples=400)[1:] for i, row in enumerate(draws)]
    covered = np.mean([low <= 0 <= high for low, high in ends])
    assert 0.90 <= covered <= 0.97


def test_bootstrap_level_widens_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=30)
    narrow = claims.bootstrap_mean(values, generator=runtime.generator(0), level=0.5)
    wide = claims.bootstrap_mean(values, generator=runtime.generator(0), level=0.99)
    assert wide[1] < narrow[1] < narrow[0] < narrow[2] < wide[2]


def test_one_value_bounds_nothing() -> None:
    mean, low, high = claims.bootstrap_mean([3.0], generator=runtime.generator(0))
    assert (mean, low, high) == (3.0, -math.inf, math.inf)
    assert claims.verdict((low, high), threshold=0, direction="above") == "inconclusive"


def test_a_mean_is_judged_without_the_values_that_were_not_measured() -> None:
    stream = runtime.generator(0, "bootstrap", "judged")
    parts = claims.mean_verdict([1.0, float("nan"), 3.0, 5.0], threshold=0.5, direction="above", generator=stream)
    mean, low, high = claims.bootstrap_mean([1.0, 3.0, 5.0], generator=runtime.generator(0, "bootstrap", "judged"))
    assert parts == {"estimate": mean, "interval": (low, high), "n": 3, "verdict": "reproduced"} and mean == 3.0
    stream = runtime.generator(0, "bootstrap", "judged")
    assert claims.mean_verdict([1.0, 3.0, 5.0], threshold=2.0, direction="below", generator=stream)["verdict"] == "inconclusive"


def test_a_mean_of_nothing_is_inconclusive_and_can_be_recorded() -> None:
    stream = runtime.generator(0, "bootstrap", "nothing")
    parts = claims.mean_verdict([float("nan")], threshold=0.0, direction="above", generator=stream)
    assert parts == {"estimate": None, "interval": None, "n": 0, "verdict": "inconclusive"}


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_bootstrap_refuses_what_is_not_finite(values: list[float]) -> None:
    with pytest.raises(InputError, match="finite"):
        claims.bootstrap_mean(values, generator=runtime.generator(0))


@pytest.mark.parametrize(
    ("interval", "above", "below"),
    [
        ((1.1, 2.0), "reproduced", "not reproduced"),
        ((0.0, 0.9), "not reproduced", "reproduced"),
        ((0.5, 1.5), "inconclusive", "inconclusive"),
        ((1.0, 2.0), "inconclusive", "inconclusive"),
        ((0.0, 1.0), "inconclusive", "inconclusive"),
        ((1.0, 1.0), "inconclusive", "inconclusive"),
        ((2.0, 2.0), "reproduced", "not reproduced"),
        ((-math.inf, math.inf), "inconclusive", "inconclusive"),
        ((2.0, math.inf), "reproduced", "not reproduced"),
    ],
)
def test_verdict_edges(interval: tuple[float, float], above: str, below: str) -> None:
    assert claims.verdict(interval, threshold=1, direction="above") == above
    assert claims.verdict(interval, threshold=1, direction="below") == below


@pytest.mark.parametrize(
    ("interval", "direction", "alone", "expected"),
    [
        ((1.1, 2.0), "above", 1.05, "reproduced"),
        ((1.1, 2.0), "above", 1.1, "reproduced, not beyond the mask"),  # touching is not beyond
        ((1.1, 2.0), "above", 3.0, "reproduced, not beyond the mask"),
        ((0.2, 0.5), "below", 0.6, "reproduced"),
        ((0.2, 0.5), "below", 0.4, "reproduced, not beyond the mask"),
        ((0.2, 0.5), "below", -1.0, "reproduced, not beyond the mask"),
        ((0.2, 0.5), "above", -1.0, "not reproduced"),  # what is not reproduced stays so, whatever the mask gives
        ((0.5, 1.5), "above", 3.0, "inconclusive"),
    ],
)
def test_a_verdict_that_the_mask_alone_gives_says_so(
    interval: tuple[float, float], direction: claims.Direction, alone: float, expected: str
) -> None:
    assert claims.verdict(interval, threshold=1.0, direction=direction, mask_alone=alone) == expected


@pytest.mark.parametrize("interval", [(2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_verdict_refuses_a_pair_without_order(interval: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="low <= high"):
        claims.verdict(interval, threshold=0, direction="above")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "confirmed"}, "must be one of reproduced"),
        ({"interval": (2.1, 2.5)}, "must hold its estimate"),
        ({"interval": (2.5, 1.5)}, "low <= high"),
        ({"estimate": math.nan}, "must be finite"),
        ({"estimate": None, "interval": None}, "must give an estimate"),
        ({"estimate": None, "verdict": "inconclusive"}, "must give an estimate"),
        ({"verdict": "not tested", "estimate": None, "interval": None}, "why it was not tested"),
        ({"verdict": "not tested", "note": "no file"}, "no estimate when not tested"),
        ({"n": 0}, "must count the values"),
        ({"n": -1, "verdict": "inconclusive"}, "must count the values"),
        ({"rule": " "}, "must say its rule"),
        ({"source": ""}, "must say its source"),
    ],
)
def test_claims_that_contradict_themselves_are_refused(run: notebook.Run, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run.claim("sinks-move", **{**CLAIM, **change})


def test_claim_key_is_checked(run: notebook.Run) -> None:
    with pytest.raises(InputError, match="lower-case"):
        run.claim("Sinks Move", **CLAIM)


def test_failed_claims_are_results(run: notebook.Run) -> None:
    claim = run.claim("sinks-move", **{**CLAIM, "verdict": "not reproduced"})
    assert claim.verdict == "not reproduced"
    untested = {"verdict": "not tested", "estimate": None, "interval": None, "n": 0, "note": "no file"}
    run.claim("sinks-move", **{**CLAIM, **untested, "model": "smollm2"})
    table = run.finish()
    assert table["verdict"].tolist() == ["not reproduced", "not tested"]
    assert table["estimate [95 % interval]"].tolist() == ["2.00 [1.50, 2.50]", "-"]


def test_claim_with_one_value_says_unbounded(run: notebook.Run) -> None:
    claim = run.claim("sinks-move", **{**CLAIM, "interval": (-math.inf, math.inf), "n": 1, "verdict": "inconclusive"})
    assert claims_table([claim])["estimate [95 % interval]"].tolist() == ["2.00 [unbounded, unbounded]"]
    run.finish()
    assert json.loads(result_path().read_text())["claims"][0]["interval"] == [None, None]


# Runs and result files


def result_path(profile: str = "quick") -> Path:
    return config.output_root() / "results" / profile / f"{NAME}.json"


def test_run_writes_what_the_result_file_names(run: notebook.Run, tmp_path: Path) -> None:
    record_everything(run)
    result = results.read_result(result_path())
    assert result["title"] == TITLE
    assert result["fingerprint"] == provenance.fingerprint(config.notebooks()["01"], config=config.to_dict(run.config))
    assert result["models"] == [{**dict.fromkeys(results.MODEL_FIELDS), **MODEL}]
    assert set(result["outputs"]) == {
        "results/quick/01_top.csv", "figures/quick/01_line.png", "figures/quick/01_line.csv", "figures/quick/01_map.gif",
        "figures/quick/01_map.png",
    }  # fmt: skip
    assert result["tables"][0]["columns"] == ["token", "count", "share"]
    assert result["tables"][0]["text"] == ["token"]
    assert (tmp_path / "figures/quick/01_line.csv").read_text() == "mask_ratio,mass\n1,1\n0.5,0.333333\n0,2\n"


def test_two_runs_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record_everything(begin(monkeypatch, tmp_path))
    first = snapshot(tmp_path)
    for name in ("results", "figures"):
        shutil.rmtree(tmp_path / name)
    record_everything(begin(monkeypatch, tmp_path))
    assert snapshot(tmp_path) == first
    assert len(first) == 8  # with the notebook and the list of files


def test_same_name_replaces(run: notebook.Run) -> None:
    run.table("top", pd.DataFrame({"a": [1]}), caption="old")
    run.table("top", pd.DataFrame({"a": [2]}), caption="new")
    run.claim("sinks-move", **CLAIM)
    run.claim("sinks-move", **{**CLAIM, "estimate": 2.25})
    assert len(run.finish()) == 1
    result = results.read_result(result_path())
    assert [entry["caption"] for entry in result["tables"]] == ["new"]
    assert result["claims"][0]["estimate"] == 2.25


def test_outdated_files_are_removed_and_others_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record_everything(begin(monkeypatch, tmp_path))
    own = tmp_path / "results/quick/01_mine.csv"
    own.write_text("kept")
    run = begin(monkeypatch, tmp_path)
    run.table("other", pd.DataFrame({"a": [1]}), caption="new")
    run.finish()
    names = {path.name for path in tmp_path.glob("*/quick/*") if path.parent.parent.name != "runs"}
    assert names == {"01_other.csv", "01_mine.csv", f"{NAME}.json"}


def test_damaged_record_cannot_remove_foreign_files(run: notebook.Run, tmp_path: Path) -> None:
    record_everything(run)
    foreign = [tmp_path / name for name in ("results/quick/02_other.csv", "quick/01_a.csv", "notebooks/01_x.csv")]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("kept")
    record = json.loads(result_path().read_text())
    names = ("results/quick/02_other.csv", "results/../quick/01_a.csv", "notebooks/01_x.csv")
    record["outputs"] = dict.fromkeys(names, "")
    result_path().write_text(json.dumps(record))
    run.finish()
    assert all(path.exists() for path in foreign)


def test_footer_names_profile_seed_models_and_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path, seed=3, overrides={"sink_traces.prompts": 4})
    run.models_used([MODEL])
    fig, data = line_figure(width=9)
    run.figure("line", fig, data, caption="Mass.")
    assert [text.get_text() for text in fig.texts] == [
        "notebook 01  |  profile quick  |  seed 3  |  model dlm (9 M)  |  set sink_traces.prompts=4"
    ]
    fig, data = line_figure()
    run.figure("example", fig, data, caption="A worked example.", models=[])
    assert "model" not in fig.texts[0].get_text()


def test_footer_names_the_models_that_the_data_speak_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = begin(monkeypatch, tmp_path)
    run.models_used([{**MODEL, "name": name} for name in ("dlm", "bd", "ar")])
    for name, shown, wanted in (
        ("some", ["ar", "dlm"], "models dlm (9 M), ar (9 M)"),
        ("one", ["bd", "bd"], "model bd (9 M)"),
        ("others", ["planted", "random"], "models dlm (9 M), bd (9 M), ar (9 M)"),
    ):
        fig, data = line_figure(width=9)
        run.figure(name, fig, data.iloc[:2].assign(model=shown), caption="Mass.")
        assert fig.texts[0].get_text().split("  |  ")[-1] == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [({"profile": "fast"}, "profile must be one of"), ({"overrides": {"sink_traces.promts": 4}}, "did you mean 'prompts'")],
)
def test_bad_settings_stop_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        begin(monkeypatch, tmp_path, **options)


@pytest.mark.parametrize("name", ["01_other", "02_sink_traces", "sinks", "01_Sink"])
def test_run_bears_the_name_of_a_notebook(run: notebook.Run, name: str) -> None:
    with pytest.raises(InputError, match="known are 01_sink_traces"):
        notebook.start(name)


def test_names_and_captions_are_checked(run: notebook.Run) -> None:
    frame = pd.DataFrame({"a": [1]})
    with pytest.raises(InputError, match="lower-case"):
        run.table("../top", frame, caption="x")
    with pytest.raises(InputError, match="must have a caption"):
        run.table("top", frame, caption="  ")
    with pytest.raises(InputError, match="a model must be given by"):
        run.models_used([{"name": "dlm", "path": "x"}])


def test_unwritable_folder_is_one_clear_line(run: notebook.Run, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file where a folder should be")
    with pytest.raises(InputError, match="must be a folder to write to"):
        run.table("top", pd.DataFrame({"a": [1]}), caption="x")
    with pytest.raises(InputError, match="must be a folder to write to"):
        run.finish()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("claims"), "complete, with 'claims'"),
        (lambda r: r.update(schema_version=99), "schema version 1"),
        (lambda r: r["claims"][0].update(verdict="yes"), "using a verdict among"),
        (lambda r: r["tables"][0].pop("file"), "file in each of its tables"),
    ],
)
def test_damaged_results_are_named(run: notebook.Run, damage: Any, message: str) -> None:
    record_everything(run)
    record = json.loads(result_path().read_text())
    damage(record)
    result_path().write_text(json.dumps(record))
    with pytest.raises(InputError, match=message) as caught:
        results.load_results("quick")
    assert str(result_path()) in str(caught.value)
