"""Both streams against whole forward passes of the dense model and of the one that is half done."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.calibration import statistics, two_streams
from lib.calibration.reads import READS
from lib.calibration.statistics import CalibrationSet
from lib.calibration.sums import InputStatistics
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel, Role
from tests import tiny


def read_by(network: Any, ids: Tensor, name: str) -> Tensor:
    found: list[Tensor] = []
    module = network.get_submodule(name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().double()))
    network(input_ids=ids, use_cache=False)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_products_are_those_of_the_dense_and_of_the_half_done_model(tmp_path: Path, weighted: bool) -> None:
    model, ids = tiny.model(tmp_path, causal=False, kv_heads=2), tiny.ids(5, 9)
    omega = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) if weighted else None
    dense = copy.deepcopy(model.network)
    seen: list[int] = []

    def visit(block: int, found: dict[Role, InputStatistics], crosses: two_streams.Crosses) -> None:
        now = copy.deepcopy(model.network)
        for layer in model.layers:
            if layer.block == block and READS[layer.role] == layer.role:
                first, second = (read_by(network, ids, layer.name) for network in (dense, now))
                weight = torch.ones(5, 9, 1).double() if omega is None else omega.double()[..., None]
                first, second = (first * weight).flatten(0, 1), (second * weight).flatten(0, 1)
                torch.testing.assert_close(crosses[layer.role].double(), 2 * first.T @ second / 5, atol=1e-3, rtol=1e-4)
                torch.testing.assert_close(found[layer.role].hessian().double(), 2 * second.T @ second / 5, atol=1e-3, rtol=1e-4)
                is_same = torch.allclose(crosses[layer.role], found[layer.role].hessian(), atol=1e-3)
                assert is_same == (block == 0)  # nothing was changed before the first block
        seen.append(block)
        for layer in model.layers:
            if layer.block == block:
                layer.module.weight.data.mul_(0.7)

    two_streams.stream(model, CalibrationSet(ids, omega), visit, batch_size=2)
    assert seen == [0, 1]


def test_statistics_are_those_of_the_sequential_walk(tmp_path: Path) -> None:
    """Where nothing is changed both walks see the same."""
    model, ids = tiny.model(tmp_path, causal=False), tiny.ids(4, 9)
    one: list[Tensor] = []
    two: list[Tensor] = []
    statistics.stream(model, CalibrationSet(ids), lambda _, found: one.append(found["down"].hessian()), hessian=True)
    two_streams.stream(model, CalibrationSet(ids), lambda _, found, __: two.append(found["down"].hessian()))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and len(one) == 2


def test_weights_by_head_are_refused(tmp_path: Path) -> None:
    model: LanguageModel = tiny.model(tmp_path, causal=False)
    with pytest.raises(InputError, match="two streams must weigh tokens alike in all heads"):
        two_streams.stream(model, CalibrationSet(tiny.ids(2, 5), torch.ones(2, 2, 4, 5)), lambda *_: None)
