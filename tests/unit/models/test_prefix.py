"""Passes that skip unchanged blocks: the same numbers bit for bit, whichever block was changed, and other passes refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from lib.core.errors import InputError
from lib.models import prefix
from lib.models.language_model import LanguageModel
from lib.pruning import pruner
from lib.studies.variance.sink_effect import text_loss
from tests import tiny

WINDOWS = tiny.ids(3, 12)
SIZES = {"draws": 7, "seed": 1}  # 21 rows: two passes, the second one shorter


@pytest.fixture(params=[True, False], ids=["causal", "diffusion"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LanguageModel]:
    loaded = tiny.model(tmp_path, causal=request.param)
    with pruner.restored(loaded):
        yield loaded


def change_(model: LanguageModel, block: int) -> None:
    for layer in model.layers:
        if layer.block == block:
            layer.module.weight.data.mul_(0.5)


@pytest.mark.parametrize("block", [0, 1])
def test_losses_are_those_of_whole_passes_bit_for_bit(model: LanguageModel, block: int) -> None:
    with prefix.recorded(model) as kept:
        dense = text_loss(model, WINDOWS, **SIZES)
    change_(model, block)
    whole = text_loss(model, WINDOWS, **SIZES)
    with prefix.reused(model, kept, first=block):
        again = text_loss(model, WINDOWS, **SIZES)
    assert torch.equal(again, whole) and not torch.equal(whole, dense)
    assert torch.equal(text_loss(model, WINDOWS, **SIZES), whole), "the network is whole again"


def test_blocks_before_the_changed_one_compute_nothing(model: LanguageModel) -> None:
    with prefix.recorded(model) as kept:
        text_loss(model, WINDOWS, **SIZES)
    calls = []
    for layer in model.layers:
        if layer.role == "q":
            layer.module.register_forward_hook(lambda *_, block=layer.block: calls.append(block))
    with prefix.reused(model, kept, first=1):
        text_loss(model, WINDOWS, **SIZES)
    assert set(calls) == {1}


def test_too_much_is_not_kept_and_nothing_skipped(model: LanguageModel) -> None:
    with prefix.recorded(model, limit=100) as kept:
        dense = text_loss(model, WINDOWS, **SIZES)
    assert not kept.is_whole and not kept._reads
    change_(model, 0)
    whole = text_loss(model, WINDOWS, **SIZES)
    with prefix.reused(model, kept, first=1):
        assert torch.equal(text_loss(model, WINDOWS, **SIZES), whole) and not torch.equal(whole, dense)


@pytest.mark.parametrize("other", [tiny.ids(3, 13), tiny.ids(60, 12)], ids=["longer", "more"])
def test_other_passes_are_refused(model: LanguageModel, other: torch.Tensor) -> None:
    with prefix.recorded(model) as kept:
        text_loss(model, WINDOWS, **SIZES)
    before = text_loss(model, WINDOWS, **SIZES)
    with pytest.raises(InputError, match="passes must be those that were recorded"), prefix.reused(model, kept, first=1):
        text_loss(model, other, **SIZES)
    assert torch.equal(text_loss(model, WINDOWS, **SIZES), before)


def test_what_moves_data_between_devices_is_back_afterwards(model: LanguageModel) -> None:
    """accelerate puts a forward of its own on each block; the network must not lose it."""
    moves: list[str] = []

    class Hook(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            moves.append("in")
            return args, kwargs

    add_hook_to_module(cast(Any, model.network.get_decoder()).layers[0], Hook())
    with prefix.recorded(model) as kept:
        dense = text_loss(model, WINDOWS, **SIZES)
    passes = len(moves)
    with prefix.reused(model, kept, first=1):
        assert torch.equal(text_loss(model, WINDOWS, **SIZES), dense)
    assert len(moves) == passes > 0, "skipped"
    assert torch.equal(text_loss(model, WINDOWS, **SIZES), dense)
    assert len(moves) == 2 * passes
