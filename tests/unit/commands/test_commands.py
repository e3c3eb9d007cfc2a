"""`sinks trace`, `evaluate`, `decode` and `compare` on tiny checkpoints, the words of all commands, and bars in a log file."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lib import decoding
from lib.commands import command, decode, session, terminal, words
from lib.core.environment import ROOT
from lib.core.errors import InputError
from tests.unit.commands.conftest import answer

RESULT = str(ROOT / "results" / "full" / "01_sink_traces.json")


@pytest.mark.parametrize("name", ["llada", "llama"])
def test_trace_writes_a_figure_an_animation_and_a_table_of_every_step(
    name: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "Title: Water", "--tokens", 6, "--steps", 3, "--top", 2, "-o", "out"]
    said = answer(capsys, "trace", checkpoints / name, *words)
    assert said["output"] == str(tmp_path / "out")
    assert all((tmp_path / "out" / file).stat().st_size for file in said["files"])
    table = pd.read_csv(tmp_path / "out" / "sinks_by_step.csv")
    assert table.groupby(["prompt", "step"]).size().tolist() == [2, 2, 2]
    assert (table.loc[table["rank"] == 1, "mass"].to_numpy() >= table.loc[table["rank"] == 2, "mass"].to_numpy()).all()
    assert len(said["sinks"]) == 6


def test_trace_goes_to_runs_unless_it_is_told_otherwise(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINKS_OUTPUT", "here")
    said = answer(capsys, "trace", checkpoints / "llada", "--prompt", "a b", "--tokens", 4)
    assert said["output"] == str(tmp_path / "here" / "runs" / "sinks-trace-llada")


def test_several_models_are_compared_on_the_same_documents(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [checkpoints / "llada", checkpoints / "llama"]
    said = answer(capsys, "evaluate", *both, "--tasks", "tiny_topic", "--limit", 4, "--draws", 2, "-o", "both.json")
    marks = [said["results"][name]["tiny_topic"]["correct"] for name in ("llada", "llama")]
    (row,) = said["pairs"]
    assert row["difference"] == pytest.approx((sum(marks[0]) - sum(marks[1])) / 4)
    assert (row["models"], row["n"], row["p_holm"]) == ("llada - llama", 4, row["p"])
    for name, file in (("llada", "a.json"), ("llama", "b.json")):
        alone = {**said, "results": {name: said["results"][name]}}
        (tmp_path / file).write_text(json.dumps(alone))
    found = answer(capsys, "compare", "a.json", "b.json")
    assert found["rows"] == [row]


def test_losses_are_paired_by_window_and_refused_for_other_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [1.0, 2.0, 3.0]
    for name, after, start in (
        ("a", [1.5, 2.5, 3.7], before),
        ("b", [1.1, 2.3, 3.3], before),
        ("c", [1.0, 2.0, 3.0], [1.0, 2.0, 9.0]),
    ):
        losses = {"losses_before": start, "losses_after": after, "loss_before": sum(start) / 3, "loss_after": sum(after) / 3}
        (tmp_path / f"{name}.json").write_text(json.dumps({**losses, "loss_text": "articles"}))
    (row,) = answer(capsys, "compare", "a.json", "b.json")["rows"]
    assert row["difference"] == pytest.approx(1.0 / 3)
    assert (row["n"], row["p"]) == (3, 0.25), "all signs alike: 2 of 8 patterns"
    assert command.main(["compare", "a.json", "c.json"]) == 2
    assert "of one dense model on the same windows, got 2.0000 and 4.0000 before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"length": 64}, "length 32 and 64"),
        ({"seed": 1, "text": "c4"}, "seed 0 and 1, text articles and c4"),
        ({"dense model": "b"}, "dense model a and b"),
    ],
)
def test_losses_measured_in_two_ways_are_not_paired(
    changed: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses of the dense models agree, so that nothing but the settings can tell them apart."""
    settings = {"text": "articles", "windows": 3, "length": 32, "masks": 16, "seed": 0, "dtype": "float32", "dense model": "a"}
    losses = {"losses_before": [1.0, 2.0], "losses_after": [1.5, 2.5], "loss_before": 1.5, "loss_after": 2.0}
    (tmp_path / "a.json").write_text(json.dumps({**losses, "loss_settings": settings}))
    (tmp_path / "b.json").write_text(json.dumps({**losses, "loss_settings": {**settings, **changed}}))
    assert command.main(["compare", "a.json", "b.json"]) == 2
    assert f"two losses must be measured with equal settings to be paired, got {said}: " in capsys.readouterr().err


@pytest.mark.parametrize(("key", "refused"), [("draws", True), ("seed", True), ("batch_size", False)])
def test_tasks_asked_in_two_ways_are_not_paired(
    key: str, refused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"draws": 2, "seed": 0, "batch_size": 32}
    for name, told in (("a", settings), ("b", {**settings, key: 7})):
        found = {"tiny_sums": {"correct": [True, False, True], "metric": "exact", "settings": told}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"models": [], "limit": 3, "results": {name: found}}))
    assert command.main(["compare", "a.json", "b.json"]) == (2 if refused else 0)
    said = f"results of tiny_sums must be measured with equal settings to be paired, got {key} {settings[key]} and 7: "
    assert (said in capsys.readouterr().err) == refused


def test_claims_of_a_notebook_are_shown_with_the_settings_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((ROOT / "results" / "full" / "01_sink_traces.json").read_text())
    result["config"]["sink_traces"]["prompts"] = 7
    result["config"]["timing"]["repeats"] = 99  # of another notebook
    (tmp_path / "other.json").write_text(json.dumps(result))
    found = answer(capsys, "compare", ROOT / "results" / "full" / "01_sink_traces.json", "other.json")
    assert found["settings_that_differ"] == ["sink_traces.prompts 48 and 7"]


def test_a_task_that_is_none_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "open_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert command.main(["evaluate", "dlm", "--tasks", "tiny_topic,mmul"]) == 2


def test_a_number_that_is_none_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_json({"loss": float("nan"), "losses": [1.0, float("-inf")], "n": 3, "name": None})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "losses": [1.0, None], "n": 3, "name": None}


@pytest.mark.parametrize(
    ("given", "error", "remedy"),
    [
        (["evaluate", "dlm", "--tasks", "tiny_topic"], "CUDA out of memory. Tried to allocate 2 GiB", "use --batch 16, "),
        (["evaluate", "dlm", "--tasks", "tiny_topic", "--batch", "1"], "CUDA out of memory.", "use --dtype bfloat16"),
        (["trace", "dlm"], "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", "use --dtype"),
        (["trace", "dlm", "--dtype", "bfloat16"], "out of memory", "close other programs"),
    ],
)
def test_too_little_memory_is_one_line_with_what_this_command_can_do(
    given: list[str], error: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{error}\nSee documentation for the allocator")

    monkeypatch.setattr(session, "open_model", fail)
    assert command.main(given) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"got {error}: {remedy}" in said
    assert "--batch" in said or "--batch" not in remedy


@pytest.mark.parametrize("words", [["--help"], ["prune", "--help"], ["compare", RESULT, RESULT]])
def test_a_reader_that_went_away_ends_a_command_quietly(words: list[str]) -> None:
    """As in `sinks ... | head`: the pipe is closed before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-P", str(ROOT / "sink_aware_pruning_command.py"), *words]
    done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_claims_of_a_notebook_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    result = ROOT / "results" / "full" / "01_sink_traces.json"
    rows = answer(capsys, "compare", result, result)["rows"]
    assert len(rows) == len(json.loads(result.read_text())["claims"])
    assert all(row["first"] == row["second"] for row in rows)


@pytest.mark.parametrize("decoder", ["threshold=.5", "dual+threshold", "prefix+steps=2+suffix=1", "adaptive=.5+threshold+stop"])
def test_decoders_are_read_and_run(decoder: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "Title: Water", "--tokens", 8, "--block", 4, "--decoder", decoder]
    said = answer(capsys, "decode", checkpoints / "llada", *words)
    assert 1 <= said["forwards"] <= 16 and said["decoder"] == decoder and isinstance(said["text"], str)


@pytest.mark.parametrize(("tokens", "block"), [(20, 10), (23, 12), (16, 16)])
def test_blocks_are_even_where_none_is_asked_for(
    tokens: int, block: int, checkpoints: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is over is cut off: 23 tokens are written as two blocks of 12."""
    asked, real = [], decoding.decode

    def keep(*given: Any, **options: Any) -> Any:
        asked.append((options["new_tokens"], options["block_length"]))
        return real(*given, **options)

    monkeypatch.setattr(decoding, "decode", keep)
    said = answer(capsys, "decode", checkpoints / "llada", "--prompt", "Title: Water", "--tokens", tokens)
    assert said["tokens"] == tokens and asked == [(-(-tokens // block) * block, block)]


def test_an_autoregressive_model_decodes_one_token_a_pass(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(capsys, "decode", checkpoints / "llama", "--prompt", "Title: Water", "--tokens", 5)
    assert (said["forwards"], said["decoder"]) == (5, "greedy, one token a pass")


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        ("tripple", "--decoder must be words of"),
        ("steps=two", "must have a number in 'steps=two'"),
        ("steps=inf", "must have a number in 'steps=inf'"),
        ("suffix=nan", "must have a number in 'suffix=nan'"),
        ("steps=1.9", "must have a number in 'steps=1.9'"),
        ("steps", "must have a number"),
        ("dual+prefix", "must have one of none, prefix, dual, adaptive, got dual and prefix: leave one of them out"),
        ("none+adaptive=.5", "got none and adaptive=.5"),
        ("threshold=.5+steps=2", "must have one of threshold, steps, got threshold=.5 and steps=2"),
        ("dual+dual", "got dual and dual"),
        ("suffix=1+threshold+suffix=2", "must have one of suffix, got suffix=1 and suffix=2"),
        ("dual=3", "must have no number in dual, got 'dual=3': write dual"),
        ("threshold+stop=", "must have no number in stop, got 'stop='"),
    ],
)
def test_a_decoder_that_is_none_is_said_in_one_line(decoder: str, expected: str) -> None:
    with pytest.raises(words.UsageError, match=expected):
        decode.plan_of(decoder)
    with pytest.raises(InputError, match="late_share must be a share"):
        decode.plan_of("threshold+late=2")


NO_RESULT = str(ROOT / "models" / "reference" / "dlm" / "config.json")
WRONG = [
    ([], "the following arguments are required: COMMAND"),
    (["prun", "dlm", "-o", "x"], "invalid choice: 'prun'"),
    (["prune", "dlm"], "the following arguments are required: -o/--output: sinks prune --help lists what is known"),
    (["prune", "dlm", "-o", "x", "--sparsity", "50"], "it must be in [0, 1), got '50' (a fraction, not per cent: use 0.5)"),
    (["prune", "dlm", "-o", "x", "--sparsity", "half"], "it must be in [0, 1), got 'half'"),
    (["prune", "dlm", "-o", "x", "--method", "wandb"], "--method must be one of sink-wanda, "),
    (["prune", "dlm", "-o", "x", "--pattern", "4"], "it must be N:M with 0 < N < M, got '4', such as 2:4"),
    (["prune", "dlm", "-o", "x", "--pattern", "2:4", "--sparsity", "0.7"], "--sparsity must be 0.5 as 2:4 says, got 0.7"),
    (["prune", "nowhere", "-o", "x"], "a model must be a folder, HUB/ID@REVISION, or one of dlm, udlm, bd, ar, "),
    (["prune", "GSAI-ML/LLaDA-8B-Base", "-o", "x"], "a hub id must have a pinned revision"),
    (["prune", "GSAI-ML/none@0f2787f", "-o", "x"], "GSAI-ML/none@0f2787f must be cached or reachable"),
    (["prune", "dlm", "-o", "."], "the output must be a new folder or file, got "),
    (["prune", "dlm", "-o", "x", "--length", "100000"], "--length must be in [2, 256] for dlm, got 100000"),
    (["prune", "dlm", "-o", "x", "--windows", "0"], "it must be a whole number from 1, got '0'"),
    (["prune", "dlm", "-o", "x", "--windows", "99999"], "windows must be at most"),
    (["prune", "dlm", "-o", "x", "--calibration", "no.txt"], "a text must be one of wikitext2, c4, articles or a file"),
    (["prune", "dlm", "-o", "x", "--device", "tpu"], "invalid choice: 'tpu'"),
    (["prune", "dlm", "-o", "x", "--device", "cuda"], "device cuda must have a GPU that torch sees, got none"),
    (["prune", "dlm", "-o", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["prune", "dlm", "-o", "x", "--seed", "-1"], "it must be a whole number from 0, got '-1'"),
    (["quantize", "dlm", "-o", "x", "--bits", "5"], "invalid choice: 5"),
    (["quantize", "dlm", "-o", "x", "--bits", "4", "--group", "7"], "group_size must divide"),
    (["quantize", "dlm", "-o", "x", "--bits", "4", "--sparsity", "0.5"], "--sparsity and --pattern must go with --prune"),
    (["export", "dlm", "--as", "onnx", "-o", "x"], "invalid choice: 'onnx'"),
    (["export", "dlm", "--as", "gguf", "-o", "x"], "a GGUF must be a file that ends in .gguf, got 'x'"),
    (["export", "dlm", "--as", "packed", "-o", "x"], "--as packed must be of a folder with codes"),
    (["export", "dlm", "--as", "dream", "-o", "x"], "the layout of dream must hold a qwen2 diffusion model"),
    (["evaluate", "dlm"], "the following arguments are required: --tasks"),
    (["evaluate", "dlm", "--tasks", "mmul"], "a task must be one of"),
    (["evaluate", "dlm", "--tasks", ","], "--tasks must name a task, got none"),
    (["evaluate", "dlm", "nowhere", "--tasks", "tiny_sums"], "got 'nowhere' and no such folder"),
    (["decode", "dlm"], "the following arguments are required: --prompt"),
    (["decode", "dlm", "--prompt", "a", "--decoder", "fast"], "--decoder must be words of"),
    (["decode", "dlm", "--prompt", "a", "--tokens", "63", "--block", "16"], "block_length must divide new_tokens"),
    (["decode", "dlm", "--prompt", "a", "--tokens", "9999"], "must have at most 256 positions"),
    (["decode", "ar", "--prompt", "a", "--tokens", "9999"], "must have at most 256 positions, got 1000"),  # before any token
    (["decode", "ar", "--prompt", "a", "--decoder", "dual"], "--decoder must be left out for an autoregressive model, got ar"),
    (["decode", "ar", "--prompt", "a", "--decoder", "none", "--block", "4"], "--decoder and --block must be left out"),
    (["trace", "dlm", "--prompt", "a", "--articles", "2"], "not allowed with argument --prompt"),
    (["trace", "dlm", "--prompt", "water " * 300], "--prompt must have 1 to 254 tokens for dlm, got "),
    (["prune", "dlm", "-o", "x", "--calibration", NO_RESULT, "--loss-text", NO_RESULT], "--loss-text must be another text than"),
    (["quantize", "dlm", "-o", "x", "--bits", "4", "--calibration", NO_RESULT, "--loss-text", NO_RESULT], "is not held out"),
    (["trace", "dlm", "--tokens", "999"], "--tokens must be at most 240 for dlm and this prompt, got 999"),
    (["trace", "dlm", "--articles", "99999"], "prompts must be at most"),
    (["compare", "no.json", "no.json"], "a result must be a JSON file, got "),
    (["compare", NO_RESULT, NO_RESULT], "a result must be of sinks evaluate, prune or quantize, or of a notebook"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), WRONG, ids=[" ".join(given)[:60] for given, _ in WRONG])
def test_a_wrong_call_is_one_line_and_leaves_nothing(
    given: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(given) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and expected in said.err, said.err
    assert list(tmp_path.iterdir()) == []


def test_bars_become_lines_in_a_file_once_in_half_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    file = io.StringIO()
    stream = terminal.LogLines(file)
    for second in range(65):
        now = float(second)
        stream.write(f"\rpruning:  {second}%")
        stream.write("\n\x1b[A")
    stream.write("\r          \r")
    stream.write("error: x\n")
    assert file.getvalue() == "pruning:  30%\npruning:  60%\nerror: x\n"
    assert stream.isatty()


def test_help_answers_at_once_without_any_package() -> None:
    """Only the standard library may be needed before a wrong word is answered; half a second is ten times what it takes."""
    begun = time.monotonic()
    command = [sys.executable, "-S", "-E", str(ROOT / "sink_aware_pruning_command.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 5
    for name in ("trace", "prune", "quantize", "export", "evaluate", "decode", "compare"):
        assert name in done.stdout
