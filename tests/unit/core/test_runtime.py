"""Device choice and random streams."""

import dataclasses
import hashlib

import pytest
import torch

from lib.core import config, runtime
from lib.core.errors import InputError

BASE = config.load("quick")


def draw(*stream: str | int, seed: int = 0) -> list[int]:
    return torch.randint(2**31, (4,), generator=runtime.generator(seed, *stream)).tolist()


def test_a_stream_repeats_and_differs_from_every_other() -> None:
    assert draw("masking", 1) == draw("masking", 1)
    streams = [("masking", 1), ("masking", 2), ("sampling", 1), ("masking", "1"), ("masking1",), ("masking",), ()]
    assert len({tuple(draw(*stream)) for stream in streams}) == len(streams)
    assert draw("masking") != draw("masking", seed=1)


def test_streams_are_the_same_on_every_machine() -> None:
    """A pin: another hash or another generator would change every recorded number."""
    assert runtime.generator(0, "masking").initial_seed() == int.from_bytes(hashlib.sha256(b"(0, 'masking')").digest()[:7], "big")


@pytest.mark.parametrize(
    ("device", "dtype", "gpu", "expected"),
    [
        ("auto", "auto", False, ("cpu", torch.float32)),
        ("auto", "auto", True, ("cuda", torch.bfloat16)),
        ("cpu", "auto", True, ("cpu", torch.float32)),
        ("cpu", "bfloat16", False, ("cpu", torch.bfloat16)),
        ("cuda", "float32", True, ("cuda", torch.float32)),
    ],
)
def test_device_and_dtype(
    device: str, dtype: str, gpu: bool, expected: tuple[str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    choice = runtime.choose_device(dataclasses.replace(BASE, device=device, dtype=dtype))
    assert (choice.device.type, choice.dtype) == expected
    assert choice.reason


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device cuda must have a GPU that torch sees, got none"):
        runtime.choose_device(dataclasses.replace(BASE, device="cuda"))


def test_the_description_names_no_machine() -> None:
    assert runtime.describe_device(runtime.Device(torch.device("cpu"), torch.float32, "")) == "CPU, float32"


@pytest.mark.parametrize(("text", "threads"), [("3", 3), ("0", None), ("many", None), ("", None)])
def test_threads_follow_the_environment(text: str, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    try:
        assert runtime.set_threads() == (threads or before)
    finally:
        torch.set_num_threads(before)
