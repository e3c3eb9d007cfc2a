"""Pruned weights against the authors' release."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.calibration import measured_weights, one_shot
from lib.calibration.statistics import CalibrationSet
from lib.models import loading
from lib.models.language_model import Role
from lib.pruning import pruner, shrink
from lib.pruning.methods import RELEASE, SINKS, Target

WEIGHTS_ATOL = 1e-4


def recorded_weights(release: SimpleNamespace, name: str, folder: Path) -> dict[str, Tensor]:
    """The recorded weights under the names of the loaded network: written as a checkpoint and read as one."""
    prefix = f"{name}.weights."
    changed = {key.removeprefix(prefix): value for key, value in release.expected.items() if key.startswith(prefix)}
    assert changed
    tensors = {**load_file(release.folder / "model.safetensors"), **changed}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((release.folder / "config.json").read_text())
    return {layer.name: layer.module.weight for layer in loading.load(folder).layers}


def pruned(release: SimpleNamespace, name: str, *, pattern: str, samples: CalibrationSet | None) -> dict[str, Tensor]:
    model = loading.load(release.folder)
    target = Target(0.5, pattern)
    if samples is None or not RELEASE[name].needs_calibration:
        pruner.prune_(model, RELEASE[name], target)
    else:
        pruner.prune_on_(model, RELEASE[name], target, samples, batch_size=1)
    return {layer.name: layer.module.weight for layer in model.layers}


def same_zeros_and_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        assert torch.equal(got[name] == 0, weight == 0), name
        torch.testing.assert_close(got[name], weight, atol=WEIGHTS_ATOL, rtol=0)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_baselines_remove_what_the_release_removes(release: SimpleNamespace, name: str, pattern: str, tmp_path: Path) -> None:
    record = f"{name}_{'50' if pattern == 'unstructured' else '2_4'}"
    if not any(key.startswith(f"{record}.weights.") for key in release.expected):
        pytest.fail(f"{record} is not recorded")
    samples = CalibrationSet(release.expected["calibration.input_ids"])
    same_zeros_and_weights(pruned(release, name, pattern=pattern, samples=samples), recorded_weights(release, record, tmp_path))


def test_sink_wanda_removes_what_the_release_removes(release: SimpleNamespace, tmp_path: Path) -> None:
    ids = release.expected["sink_wanda_50.noisy_input_ids"].flatten(0, 1)
    samples = CalibrationSet(ids, measured_weights.measure(release.model, ids, SINKS, batch_size=1))
    got = pruned(release, "sink_wanda", pattern="unstructured", samples=samples)
    same_zeros_and_weights(got, recorded_weights(release, "sink_wanda_50", tmp_path))


def test_sink_sparsegpt_removes_what_the_release_removes(release: SimpleNamespace, tmp_path: Path) -> None:
    noised = release.expected["sink_sparsegpt_50.noisy_input_ids"]
    weights = measured_weights.measure(release.model, noised.flatten(0, 1), SINKS, batch_size=1).view(noised.shape).mean(1)
    samples = CalibrationSet(release.expected["calibration.input_ids"], weights)
    got = pruned(release, "sink_sparsegpt", pattern="unstructured", samples=samples)
    same_zeros_and_weights(got, recorded_weights(release, "sink_sparsegpt_50", tmp_path))


def test_the_recorded_layouts_can_be_shrunk(release: SimpleNamespace) -> None:
    small = shrink.shrunk(release.model, *shrink.choose(release.model, sparsity=0.5))
    before, after = release.model.network.config, small.network.config
    assert after.num_key_value_heads * 2 == before.num_key_value_heads and after.intermediate_size * 2 == before.intermediate_size
    assert small.mask_token_id == release.model.mask_token_id and not small.is_causal


@pytest.mark.parametrize("budget", [0, 2**30], ids=["two passes", "one pass"])
def test_one_pass_gives_the_recorded_norms(release: SimpleNamespace, budget: int) -> None:
    ids = release.expected["sink_wanda_50.noisy_input_ids"].flatten(0, 1)
    found = one_shot.one_shot_statistics(release.model, ids, measured_weights.weigher(SINKS), batch_size=4, memory_budget=budget)
    prefix = "sink_wanda_50.input_norm_sum."
    recorded = {key.removeprefix(prefix): value for key, value in release.expected.items() if key.startswith(prefix)}
    names: dict[str, Role] = {
        "q_proj": "q",
        "attn_out": "o",
        "o_proj": "o",
        "ff_proj": "gate",
        "gate_proj": "gate",
        "ff_out": "down",
        "down_proj": "down",
    }
    compared = 0
    for name, norms in recorded.items():
        block, last = int(name.split(".layers.")[-1].split(".blocks.")[-1].split(".")[0]), name.rsplit(".", 1)[-1]
        if last in names:
            torch.testing.assert_close(found[block][names[last]].norms[0], norms, atol=1e-4, rtol=1e-5)
            compared += 1
    assert compared == 8


def test_one_pass_and_two_passes_agree_to_rounding(release: SimpleNamespace) -> None:
    ids = release.expected["sink_wanda_50.noisy_input_ids"].flatten(0, 1)
    one, two = (
        one_shot.one_shot_statistics(release.model, ids, measured_weights.weigher(SINKS), batch_size=batch, memory_budget=budget)
        for batch, budget in ((5, 2**30), (2, 0))
    )
    for first, second in zip(one, two, strict=True):
        for role in first:
            torch.testing.assert_close(first[role].norms, second[role].norms, atol=0, rtol=1e-6)
            torch.testing.assert_close(first[role].squares, second[role].squares, atol=0, rtol=2e-6)
