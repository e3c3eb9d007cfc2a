"""The choice of float32 kernels: by what the processor is, and never one that rounds."""

import pytest
import torch

from lib.core import config, processor, runtime


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    vendor: str = "AuthenticAMD",
    capability: str = "AVX512",
    amx: bool = False,
    gpu: bool = False,
) -> None:
    monkeypatch.setattr(processor, "vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"vendor": "GenuineIntel"}, "Intel's"),
        ({"capability": "AVX2"}, "offers avx2"),
        ({"capability": "DEFAULT"}, "offers default"),
        ({"amx": True}, "AMX"),
        ({"gpu": True}, "TF32"),
    ],
)
def test_mkl_stays_where_it_is_fast_or_the_other_might_round(
    facts: dict[str, object], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **facts)  # type: ignore[arg-type]
    monkeypatch.setattr(processor, "relative_error", lambda: 0.0)
    torch.set_float32_matmul_precision("medium")
    found = processor.use_products()
    assert (found.kernels, torch.get_float32_matmul_precision()) == ("MKL", "highest")
    assert not torch.backends.cuda.matmul.allow_tf32  # "medium" allows it
    assert why in found.reason


@pytest.mark.parametrize(("error", "kernels"), [(3e-7, "oneDNN"), (3e-3, "MKL"), (float("nan"), "MKL")])
def test_a_product_is_checked_before_the_choice(error: float, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    precisions = []

    def relative_error() -> float:
        precisions.append(torch.get_float32_matmul_precision())
        return error

    monkeypatch.setattr(processor, "relative_error", relative_error)
    assert processor.use_products().kernels == kernels
    assert precisions == ["medium"]  # of the kernels that are judged
    assert torch.get_float32_matmul_precision() == ("medium" if kernels == "oneDNN" else "highest")


def test_the_error_tells_float32_from_rounded_products() -> None:
    torch.set_float32_matmul_precision("highest")
    assert processor.relative_error() < processor.TOLERANCE
    stream = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 64, generator=stream), torch.randn(64, 64, generator=stream)
    exact = left.double() @ right.double()
    rounded = left.bfloat16().double() @ right.bfloat16().double()
    assert float((rounded - exact).norm() / exact.norm()) > 1000 * processor.TOLERANCE


def test_products_keep_their_precision_whatever_is_chosen_here() -> None:
    runtime.use_processor()
    assert processor.relative_error() < processor.TOLERANCE


def test_the_choice_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = runtime.choose_device(config.load("quick", overrides={"device": "cpu"}))
    torch.set_float32_matmul_precision("highest")
    assert runtime.describe_device(choice) == "CPU, float32"
    torch.set_float32_matmul_precision("medium")
    assert runtime.describe_device(choice) == "CPU, float32 by oneDNN"


@pytest.mark.parametrize(("half", "single", "faster"), [(1.0, 2.0, True), (0.9, 1.0, False), (2.0, 1.0, False)])
def test_bfloat16_is_measured(half: float, single: float, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([single, half])
    monkeypatch.setattr(processor, "_seconds", lambda call: next(seconds))
    processor.is_bfloat16_faster.cache_clear()
    before = torch.get_rng_state()
    assert processor.is_bfloat16_faster() is faster
    assert torch.equal(torch.get_rng_state(), before), "a measurement moves no draws of its caller"
    processor.is_bfloat16_faster.cache_clear()
