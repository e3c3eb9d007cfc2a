"""Rewritings leave the function as it is, at any share of masks; scales are searched as a loop would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lib.calibration.statistics import CalibrationSet
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel
from lib.quantization import folding
from lib.quantization.rounding import Grid, round_to_nearest
from tests import tiny

KINDS: dict[str, dict[str, Any]] = {
    "heads": {"kv_heads": 4},
    "groups": {"kv_heads": 2},
    "biases": {"family": "qwen2", "kv_heads": 4},
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    made = tiny.model(tmp_path, causal=False, **KINDS[request.param])
    stream = torch.Generator().manual_seed(1)
    for parameter in made.network.parameters():  # norms of 1 and biases of 0 would hide a mistake
        if parameter.dim() == 1:
            parameter.data += 0.5 * torch.rand(parameter.shape, generator=stream)
    return made


def logits(model: LanguageModel) -> Tensor:
    """Of one sample at each of five mask ratios."""
    ids = tiny.ids(5, 20)
    for row, ratio in enumerate((1.0, 0.75, 0.5, 0.25, 0.0)):
        ids[row, torch.rand(20, generator=torch.Generator().manual_seed(row)) < ratio] = tiny.MASK
    with torch.no_grad():
        return cast(Any, model.network)(input_ids=ids, use_cache=False).logits


def scales(model: LanguageModel) -> folding.Scales:
    stream, widths = torch.Generator().manual_seed(2), {"down": 40}
    return {
        (block, role): 0.3 + 3 * torch.rand(widths.get(role, 32), generator=stream)
        for block in (0, 1)
        for role in folding.scalable(model)
    }


def rotate(model: LanguageModel) -> None:
    folding.rotate_(model, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("rewrite", [lambda model: folding.scale_(model, scales(model)), folding.rotate_, rotate])
def test_the_function_stays_and_the_weights_come_back(model: LanguageModel, rewrite: Callable[[LanguageModel], None]) -> None:
    expected, before = logits(model), [layer.module.weight.clone() for layer in model.layers]
    with folding.folded(model):
        rewrite(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        changed = [not torch.equal(layer.module.weight, old) for layer, old in zip(model.layers, before, strict=True)]
        is_scaled_alone = [layer.role == "o" and "o" not in folding.scalable(model) for layer in model.layers]
        assert all(now or left for now, left in zip(changed, is_scaled_alone, strict=True))
        broken = model.layers[0].module.weight.data.clone()
        model.layers[0].module.weight.data.mul_(1.3)
        assert (logits(model) - expected).abs().max() > 1e-2  # the test would see it
        model.layers[0].module.weight.data.copy_(broken)
    assert all(torch.equal(layer.module.weight, old) for layer, old in zip(model.layers, before, strict=True))
    assert torch.equal(logits(model), expected)


def test_rotations_spread_a_channel_and_keep_lengths_of_tokens(tmp_path: Path) -> None:
    """An outlier channel of the residual stream is gone; the token that is an outlier is as long as before."""
    model = tiny.model(tmp_path, causal=False)
    embedding = cast(Tensor, model.network.get_input_embeddings().weight)
    embedding.data[:, 5] += 20.0
    embedding.data[3] *= 30.0
    lengths, before = embedding.norm(dim=1), embedding.clone()
    folding.rotate_(model)
    torch.testing.assert_close(embedding.norm(dim=1), lengths, atol=1e-3, rtol=1e-4)
    share = [each[:3].abs().amax(1) / each[:3].norm(dim=1) for each in (before, embedding)]
    assert bool((share[0] > 0.9).all()) and bool((share[1] < 0.5).all())


class OneDevice(TorchDispatchMode):
    """Refuse what a GPU refuses: an operation on tensors of two devices, unless it copies or takes a single number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {each.device for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.dim()}
        assert len(devices) < 2 or "copy" in str(func), f"{func} on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rewrite", [lambda model: folding.scale_(model, scales(model)), folding.rotate_, rotate])
def test_a_model_on_another_device_is_rewritten_there(model: LanguageModel, rewrite: Callable[[LanguageModel], None]) -> None:
    cast(Any, model.network).to("meta")
    with OneDevice():
        rewrite(model)


@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_hadamard_is_orthogonal_and_flat(width: int) -> None:
    for stream in (None, torch.Generator().manual_seed(0)):
        matrix = folding.hadamard(width, generator=stream)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double())
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, width**-0.5))


def test_what_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a rotated width must be a power of two, got 24"):
        folding.hadamard(24)
    with pytest.raises(InputError, match="a rotated model must have a head of its own, got tied"):
        folding.rotate_(tiny.model(tmp_path / "tied", causal=False, tie=True))
    grouped = tiny.model(tmp_path / "grouped", causal=False, kv_heads=2)
    with pytest.raises(InputError, match="scales of o must have a value head for each query head"):
        folding.scale_(grouped, {(0, "o"): torch.ones(32)})
    with pytest.raises(InputError, match="scales must be positive, got 0"):
        folding.scale_(grouped, {(0, "q"): torch.zeros(32)})


# --- AWQ -----------------------------------------------------------------------------------------------------------------


def test_mean_sizes_are_those_of_what_is_read_and_leave_weighted_tokens_out(tmp_path: Path) -> None:
    model, ids = tiny.model(tmp_path, causal=False), tiny.ids(5, 9)
    omega = (torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.6).float()
    for weight in (None, omega, torch.stack([omega, 1 - omega])):
        got = folding.mean_sizes(model, CalibrationSet(ids, weight), batch_size=2)
        assert set(got) == {(block, role) for block in (0, 1) for role in folding.GROUPS}
        for layer in model.layers:
            if layer.role not in folding.GROUPS:
                continue
            read: list[Tensor] = []
            keep: Any = lambda _, given, kept=read: kept.append(given[0].double().abs())  # noqa: E731
            handle = layer.module.register_forward_pre_hook(keep)
            cast(Any, model.network)(input_ids=ids)
            handle.remove()
            own = torch.ones(5, 9) if weight is None else weight if weight.dim() == 2 else weight[layer.block]
            tokens = [read[0][row, at] for row in range(5) for at in range(9) if own[row, at] == 1]
            expected = torch.stack(tokens).mean(0).float()
            torch.testing.assert_close(got[layer.block, layer.role], expected, atol=1e-5, rtol=1e-4)


def test_scales_are_those_of_the_smallest_output_error() -> None:
    stream = torch.Generator().manual_seed(4)
    inputs = torch.randn(50, 16, generator=stream) * torch.logspace(-1, 1.2, 16)
    weights = [torch.randn(rows, 16, generator=stream) for rows in (6, 9)]
    sizes, hessian, grid = inputs.abs().mean(0), 2 * inputs.T @ inputs / 50, Grid(3, group_size=8)
    got, ratio = folding.best_scales(weights, sizes, hessian, grid=grid)
    errors = {}
    for power in folding.RATIOS:
        scale = sizes**power / ((sizes**power).max() * (sizes**power).min()).sqrt()
        rounded = [round_to_nearest(weight * scale, grid).dequantize() / scale for weight in weights]
        errors[power] = sum(float((inputs @ (a - b).T).square().sum()) for a, b in zip(rounded, weights, strict=True))
    best = min(errors, key=lambda power: errors[power])
    assert ratio == best > 0 and errors[best] < 0.97 * errors[0.0]
    torch.testing.assert_close(got, sizes**best / ((sizes**best).max() * (sizes**best).min()).sqrt())
