"""The benchmarks run at a toy size; what they measure is never asserted."""

import pytest
import torch

from benchmarks import attention_recorder, plan_speed, pruning_methods, references, streaming, training
from lib.diffusion import sampler


@pytest.mark.parametrize("direction", [[], ["--causal"]])
def test_the_recorder_benchmark_prints_every_length_and_way(direction: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--layers", "1", "--width", "16", "--heads", "2", "--mlp", "16", "--repeats", "1", "--lengths", "8", "16"]
    attention_recorder.main([*small, *direction])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        [length, way] for length in ("8", "16") for way in ("plain", "SDPA", "recorder", "output_attentions")
    ]
    for line in lines[2:]:
        assert all(float(value) >= 0 for value in line.split()[2:])


METHODS = ("sink-aware (Wanda)", "Wanda", "SparseGPT", "sink-aware (SparseGPT)")
SMALL = ["--layers", "1", "--width", "16", "--heads", "2", "--mlp", "16", "--positions", "16", "--windows", "2", "--levels", "2"]


def test_the_pruning_benchmark_prints_every_call_and_checks_the_references(capsys: pytest.CaptureFixture[str]) -> None:
    pruning_methods.main([*SMALL, "--batch-size", "3", "--prompt", "4", "--new-tokens", "8", "--block", "4", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    pruned = [f"{prefix}{name}" for name in METHODS for prefix in ("reference: ", "")]
    written = ["reference: generation", "generation", "generation, prefix cache", "generation, dual cache"]
    assert [line[:36].strip() for line in lines[2:14]] == pruned + written
    for line in lines[2:14]:
        assert all(float(value) >= 0 for value in line[36:].split())
    shares = {line.partition(":")[0]: float(line.partition(": ")[2].partition("%")[0]) for line in lines[14:]}
    assert list(shares) == list(METHODS)
    assert shares["sink-aware (Wanda)"] == shares["Wanda"] == 100
    assert min(shares.values()) > 98  # SparseGPT's sweeps turn rounding into other masks


def test_the_plain_generation_is_the_samplers() -> None:
    model = attention_recorder.build(layers=2, width=16, heads=2, mlp=16, positions=16, causal=False, device="cpu")
    prompt = torch.arange(5, 9)[None]
    written = references.generate(model, prompt, new_tokens=8, steps=8)
    assert torch.equal(written, sampler.sample(model, prompt, new_tokens=8, steps=8))


def test_the_least_operations_are_those_of_the_products() -> None:
    """Two for each weight and token, and for each query and key twice (scores and values) two for each feature."""
    model = attention_recorder.build(layers=2, width=16, heads=2, mlp=24, positions=32, causal=False, device="cpu")
    weights = 2 * (4 * 16 * 16 + 3 * 16 * 24)
    expected = 10 * 2 * weights + 10 * 32 * 2 * 2 * 16 * 2
    assert pruning_methods.pass_operations(model, tokens=10, positions=32) == expected


def test_the_streaming_benchmark_prints_both_paths(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--blocks", "2", "--hidden", "16", "--mlp", "32", "--heads", "2", "--vocab", "32", "--windows", "2"]
    streaming.main([*small, "--positions", "8", "--methods", "Wanda"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:35].split() for line in lines[1:]] == [["streamed", "Wanda"], ["in", "memory", "Wanda"]]
    for line in lines[1:]:
        assert len(line[35:].split()) == 6 and all(float(value) >= 0 for value in line[35:].split())


def test_the_plans_speed_is_measured_beside_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--device",
        "cpu",
        "--hidden",
        "16",
        "--layers",
        "1",
        "--heads",
        "2",
        "--mlp",
        "32",
        "--longest",
        "8",
        "--repeats",
        "1",
    ]
    plan_speed.main([*small, "--teraflops", "0.001"])
    lines = capsys.readouterr().out.splitlines()
    names = [line[:22].strip() for line in lines[1:-1]]
    assert names == [
        "calibration", "nelbo", "mmlu", "arc_challenge", "piqa", "winogrande", "gsm8k, all", "gsm8k, block", "gpqa_main_n_shot",
        "race", "hellaswag",
    ]  # fmt: skip
    for line in lines[1:-1]:
        predicted, measured, _, ratio = (float(word) for word in line.split()[-4:])
        assert measured > 0 and ratio == pytest.approx(measured / predicted, rel=0.05, abs=0.01)
    assert lines[-1].startswith("the core with a network of this shape: ") and lines[-1].endswith("as measured")


def test_the_training_benchmark_prints_every_way(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.shutil, "which", lambda _: None)  # compiling takes minutes
    threads = torch.get_num_threads()
    training.main(["--layers", "1", "--text-rows", "1", "--repeats", "1", "--member", "bd"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines] == ["a step of bd", "float32", "bfloat16", "not compiled"]
    assert all(float(value) > 0 for line in lines[1:3] for value in line[22:].split())
    assert lines[1].endswith("1.00")
