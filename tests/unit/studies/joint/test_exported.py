"""Compressed models as checkpoints: what transformers loads is what was measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib.models import export
from lib.models.language_model import LanguageModel
from lib.pruning.methods import Target
from lib.quantization.rounding import Grid
from lib.studies.joint import exported
from lib.studies.joint.runs import Recipe
from lib.studies.pruning.runs import Bench, Calibrations
from tests import tiny

IDS = tiny.ids(2, 12, seed=8)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Calibrations:
    model = tiny.model(tmp_path_factory.mktemp("export"), causal=False)
    return Calibrations(Bench(model, tiny.ids(8, 16, seed=3), tiny.ids(3, 16, seed=4), 4, 2, 5), seed=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compressed_copy_reloads_bit_for_bit(found: Calibrations, tmp_path: Path, dtype: torch.dtype) -> None:
    before = [layer.module.weight.clone() for layer in found.bench.model.layers]
    ready = exported.exportable(found, Recipe(Grid(4, group_size=8), Target(0.5)), dtype=dtype)
    assert all(torch.equal(old, new.module.weight) for old, new in zip(before, found.bench.model.layers, strict=True))
    assert sorted(ready.quantized) == sorted(layer.name for layer in ready.model.layers)
    assert all(float((layer.module.weight == 0).float().mean()) >= 0.5 for layer in ready.model.layers)
    plain = export.save_plain(ready.model, tmp_path / "plain")
    packed = export.save_packed(ready.model, tmp_path / "packed", quantized=ready.quantized)
    assert exported.reloads(ready.model, plain, IDS) and exported.reloads(ready.model, packed, IDS)


def test_another_model_is_told_apart(found: Calibrations, tmp_path: Path) -> None:
    ready = exported.exportable(found, Recipe(target=Target(0.5)), dtype=torch.float32)
    assert not ready.quantized
    dense: LanguageModel = replace(found.bench.model)
    assert not exported.reloads(dense, export.save_plain(ready.model, tmp_path / "pruned"), IDS)
