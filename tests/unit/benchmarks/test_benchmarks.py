"""The benchmarks run at a toy size; what they measure is never asserted."""

import pytest

from benchmarks import attention_recorder, pruning_methods, streaming


@pytest.mark.parametrize("direction", [[], ["--causal"]])
def test_the_recorder_benchmark_prints_every_length_and_way(direction: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--layers", "1", "--width", "16", "--heads", "2", "--mlp", "16", "--repeats", "1", "--lengths", "8", "16"]
    attention_recorder.main([*small, *direction])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [length, way] for length in ("8", "16") for way in ("plain", "recorder", "output_attentions")
    ]
    for line in lines[1:]:
        assert all(float(value) >= 0 for value in line.split()[2:])


def test_the_pruning_benchmark_prints_every_method_and_checks_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--layers", "1", "--width", "16", "--heads", "2", "--mlp", "16", "--repeats", "1", "--positions", "16"]
    pruning_methods.main([*small, "--windows", "2", "--levels", "2", "--batch-size", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].strip() for line in lines[1:-1]] == [
        "reference, two passes",
        "Wanda",
        "SparseGPT",
        "sink-aware (SparseGPT)",
        "sink-aware (Wanda)",
    ]
    for line in lines[1:-1]:
        assert all(float(value) >= 0 for value in line[24:].split())
    assert lines[-1] == "reference and library remove the same weights: True"


def test_the_streaming_benchmark_prints_both_paths(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--blocks", "2", "--hidden", "16", "--mlp", "32", "--heads", "2", "--vocab", "32", "--windows", "2"]
    streaming.main([*small, "--positions", "8", "--methods", "Wanda"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:35].split() for line in lines[1:]] == [["streamed", "Wanda"], ["in", "memory", "Wanda"]]
    for line in lines[1:]:
        assert len(line[35:].split()) == 6 and all(float(value) >= 0 for value in line[35:].split())
