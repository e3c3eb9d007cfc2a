"""The benchmarks run at a toy size; what they measure is never asserted."""

import pytest

from benchmarks import attention_recorder


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
