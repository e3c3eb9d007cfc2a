"""Structured pruning: the smaller network is the dense one with the removed structures silenced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lib.calibration import one_shot, sets
from lib.calibration.statistics import CalibrationSet
from lib.calibration.token_weights import Weighting
from lib.core.errors import InputError
from lib.models import loading
from lib.models.language_model import LanguageModel
from lib.models.layers import attention
from lib.pruning import repairs, shrink, structured
from tests import tiny
from tests.unit import slow_pruning as slow

ATOL = 1e-5


def silenced(model: LanguageModel, groups: list[torch.Tensor], channels: list[torch.Tensor]) -> LanguageModel:
    """Zero the columns of o and down that belong to removed structures, one head and channel at a time."""
    shape = shrink.head_shape(model)
    for layer in model.layers:
        with torch.no_grad():
            if layer.role == "o":
                for head in range(shape.heads):
                    if head // (shape.heads // shape.kv_heads) not in groups[layer.block].tolist():
                        layer.module.weight[:, head * shape.width : (head + 1) * shape.width] = 0
            if layer.role == "down":
                for channel in range(layer.module.in_features):
                    if channel not in channels[layer.block].tolist():
                        layer.module.weight[:, channel] = 0
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_smaller_network_computes_what_the_silenced_one_does_and_reloads(tmp_path: Path, family: str) -> None:
    model = tiny.model(tmp_path / "dense", family=family, causal=False, kv_heads=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.network.parameters():  # biases of a fresh network are all 0 and would hide a mistake
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.rand(parameter.shape, generator=generator)
    ids = tiny.ids(2, 10)
    groups, channels = [torch.tensor([1]), torch.tensor([0])], [torch.tensor([0, 3, 17]), torch.tensor([5, 6, 39])]
    small = shrink.shrunk(model, groups, channels)
    expected = silenced(model, groups, channels).network(input_ids=ids).logits
    torch.testing.assert_close(small.network(input_ids=ids).logits, expected, atol=ATOL, rtol=0)
    assert small.num_parameters < model.num_parameters
    assert {tuple(layer.module.weight.shape) for layer in small.layers if layer.role == "gate"} == {(3, 32)}
    small.network.save_pretrained(tmp_path / "small")
    again = loading.load(tmp_path / "small")
    torch.testing.assert_close(again.network(input_ids=ids).logits, expected, atol=ATOL, rtol=0)


def test_magnitude_and_wanda_choose_by_what_is_written(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=False, kv_heads=2)
    norms = {
        (layer.block, layer.role): torch.ones(layer.module.in_features) for layer in model.layers if layer.role in ("o", "down")
    }
    plain, weighted = shrink.choose(model, sparsity=0.5), shrink.choose(model, sparsity=0.5, input_norms=norms)
    assert all(torch.equal(a, b) for one, other in zip(plain, weighted, strict=True) for a, b in zip(one, other, strict=True))
    assert [len(kept) for kept in plain[0]] == [1, 1] and [len(kept) for kept in plain[1]] == [20, 20]
    norms[0, "down"][:20] = 0.0  # channels that are never read must go first
    assert shrink.choose(model, sparsity=0.5, input_norms=norms)[1][0].tolist() == list(range(20, 40))
    for layer in model.layers:
        if layer.role == "down":
            energy = [float(layer.module.weight[:, channel].norm()) for channel in range(40)]
            assert plain[1][layer.block].tolist() == sorted(sorted(range(40), key=energy.__getitem__)[20:])


@pytest.mark.parametrize("causal", [False, True], ids=["diffusion", "causal"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_alone_reads_the_smaller_network(tmp_path: Path, family: str, causal: bool) -> None:
    """The head size is no longer hidden size / heads, and a bidirectional network stays one."""
    model = tiny.model(tmp_path / "dense", family=family, causal=causal, kv_heads=2)
    small = shrink.shrunk(model, *shrink.choose(model, sparsity=0.5))
    small.network.save_pretrained(tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert plain.config.head_dim == 8 and plain.config.num_attention_heads == 2 and plain.config.intermediate_size == 20
    ids = tiny.ids(2, 10)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % tiny.MASK
    with torch.no_grad(), attention.without_products(small.network):
        expected = small.network(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=ATOL, rtol=0)
        moved = (plain(input_ids=changed).logits - expected)[:, 0].abs().max()
    assert bool(moved < ATOL) == causal  # whether the first position sees the last


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_bfloat16_network_is_cut_as_exactly_as_it_reloads(tmp_path: Path, family: str) -> None:
    """Rotary frequencies stay in float32: rounded ones would turn far positions by a visible angle."""
    folder = tiny.folder(tmp_path / "dense", family=family, causal=False, dtype=torch.bfloat16)
    model = loading.load(folder, dtype=torch.bfloat16)
    small = shrink.shrunk(model, *shrink.choose(model, sparsity=0.5)).network
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    small.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    frequencies = (network.model.rotary_emb.inv_freq for network in (small, loaded, model.network))
    first, second, third = frequencies
    assert first.dtype == torch.float32 and torch.equal(first, second) and torch.equal(first, third)
    ids = tiny.ids(2, 60, seed=1)
    with torch.no_grad():
        assert torch.equal(small(input_ids=ids).logits, loaded(input_ids=ids).logits)


def norms_of(model: LanguageModel, given: CalibrationSet) -> dict[tuple[int, str], Tensor]:
    found = one_shot.dense_statistics(model, given)
    roles = ("o", "down")
    return {(block, role): found[block][role].input_norm("sum_of_norms")[0] for block in range(len(found)) for role in roles}


@pytest.mark.parametrize("level", ["aggregate", "layer", "head"])
def test_sink_weighted_norms_change_the_choice_to_what_a_loop_says(tmp_path: Path, level: str) -> None:
    """Heads by their squared importance summed over the group, channels by their importance."""
    model = tiny.model(tmp_path, causal=False, kv_heads=4, seed=2)
    windows = tiny.ids(4, 24)
    weighting = Weighting(level=level, margin=0.5)  # type: ignore[arg-type]
    weighted = sets.build(model, windows, weighting=weighting, seed=0)
    plain = shrink.choose(model, sparsity=0.5, input_norms=norms_of(model, CalibrationSet(windows)))
    groups, channels = shrink.choose(model, sparsity=0.5, input_norms=norms_of(model, weighted))
    assert any(not torch.equal(a, b) for a, b in zip(plain[1], channels, strict=True))
    inputs, weight = slow.captured(model, windows), weighted.token_weight
    assert weight is not None
    for layer in model.layers:
        omega = weight[layer.block] if weight.dim() > 2 else weight
        by_head = omega if omega.dim() == 3 else omega[:, None].expand(-1, 4, -1)
        norm = slow.statistics_by_head(inputs[layer.name], by_head, layer.role, kv_heads=4)["norms"][0]
        columns = [float(layer.module.weight[:, index].double().norm() * norm[index]) for index in range(len(norm))]
        if layer.role == "o":
            units = [sum(value**2 for value in columns[8 * head : 8 * head + 8]) for head in range(4)]
            assert groups[layer.block].tolist() == [unit for unit in range(4) if unit not in slow.smallest(units, 2)]
        if layer.role == "down":
            assert channels[layer.block].tolist() == [unit for unit in range(40) if unit not in slow.smallest(columns, 20)]


def test_weights_that_count_one_token_decide_which_head_stays(tmp_path: Path) -> None:
    """What is left of a head whose tokens count nothing is nothing, so that it goes first."""
    model, windows = tiny.model(tmp_path, causal=False, kv_heads=4), tiny.ids(2, 12)
    for head in range(4):
        weight = torch.ones(2, 2, 4, 12)
        weight[:, :, head] = 0.0
        kept = shrink.choose(model, sparsity=0.25, input_norms=norms_of(model, CalibrationSet(windows, weight)))[0]
        assert all(groups.tolist() == [other for other in range(4) if other != head] for groups in kept)


def test_the_dense_model_is_left_as_it_is(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=False, kv_heads=2)
    before, config = slow.state_of(model), model.network.config.to_dict()
    small = shrink.shrunk(model, *shrink.choose(model, sparsity=0.5))
    for parameter in small.network.parameters():
        parameter.data.zero_()
    assert slow.same_state(model, before) and model.network.config.to_dict() == config
    assert small.fingerprint == "" and not small.is_causal and small.mask_token_id == tiny.MASK


def test_groups_share_a_key_value_head() -> None:
    shape = structured.HeadShape(heads=4, kv_heads=2, width=3)
    assert structured.query_rows(torch.tensor([1]), shape=shape).tolist() == [6, 7, 8, 9, 10, 11]
    assert structured.key_rows(torch.tensor([1]), shape=shape).tolist() == [3, 4, 5]


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=False, kv_heads=2)
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\), got 30 \(a fraction"):
        shrink.choose(model, sparsity=30)
    with pytest.raises(InputError, match="every block must keep as many"):
        shrink.shrunk(model, [torch.tensor([0]), torch.tensor([0, 1])], [torch.tensor([0])] * 2)
    with pytest.raises(InputError, match="must leave a unit"):
        structured.kept_units(torch.ones(0), sparsity=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model = tiny.model(tmp_path, causal=False, kv_heads=2)
    norms = norms_of(model, CalibrationSet(tiny.ids(2, 8)))
    norms[1, "down"][3] = value
    with pytest.raises(InputError, match=r"importances of model\.layers\.1\.mlp\.down_proj\.weight must be finite"):
        shrink.choose(model, sparsity=0.5, input_norms=norms)
    model.layers[3].module.weight[0, 0] = value
    with pytest.raises(InputError, match=r"weights of model\.layers\.0\.self_attn\.o_proj\.weight must be finite"):
        shrink.choose(model, sparsity=0.5)


# --- what is done for what stays -----------------------------------------------------------------------------------------


def reader(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix and its inputs, whose mean is far from 0 and whose features are correlated."""
    stream = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 12, generator=stream).double() @ torch.randn(12, 12, generator=stream).double()
    return torch.randn(5, 12, generator=stream).double(), inputs + torch.linspace(-3, 3, 12).double()


def test_restored_columns_are_the_refit_of_one_mask_and_the_least_squares_solution() -> None:
    weight, inputs = reader()
    hessian, kept = 2 * inputs.T @ inputs / len(inputs), torch.tensor([0, 3, 4, 7, 11])
    mask = torch.zeros(5, 12, dtype=torch.bool)
    mask[:, kept] = True
    got = structured.restored(weight, kept, hessian)
    torch.testing.assert_close(got, repairs.refit(weight, mask, hessian)[:, kept], atol=1e-9, rtol=1e-9)
    exact = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.T, driver="gelsd").solution.T
    torch.testing.assert_close(structured.restored(weight, kept, hessian, damping=0.0), exact, atol=1e-8, rtol=1e-8)


def test_columns_and_bias_together_are_the_least_squares_solution_with_an_intercept() -> None:
    weight, inputs = reader(1)
    kept, mean = torch.tensor([1, 2, 8]), inputs.mean(0)
    about = 2 * (inputs - mean).T @ (inputs - mean) / len(inputs)
    new = structured.restored(weight, kept, about, damping=0.0)
    bias = structured.lost_mean(weight, new, kept, mean)
    design = torch.cat([inputs[:, kept], torch.ones(len(inputs), 1).double()], 1)
    exact = torch.linalg.lstsq(design, inputs @ weight.T, driver="gelsd").solution.T
    torch.testing.assert_close(torch.cat([new, bias[:, None]], 1), exact, atol=1e-8, rtol=1e-8)
    alone = structured.lost_mean(weight, weight[:, kept], kept, mean)  # FLAP's: columns as they were
    others = [column for column in range(12) if column not in kept.tolist()]
    torch.testing.assert_close(alone, weight[:, others] @ mean[others])


def test_moments_are_those_of_what_the_layers_read(tmp_path: Path) -> None:
    model = tiny.model(tmp_path, causal=False, kv_heads=2)
    ids = tiny.ids(5, 9)
    got = one_shot.dense_moments(model, ids, ("o", "down"), batch_size=2)
    assert set(got) == {(block, role) for block in (0, 1) for role in ("o", "down")}
    for layer in model.layers:
        if layer.role in ("o", "down"):
            read: list[Tensor] = []
            keep: Any = lambda _, given, kept=read: kept.append(given[0].flatten(0, 1))  # noqa: E731
            handle = layer.module.register_forward_pre_hook(keep)
            model.network(input_ids=ids)
            handle.remove()
            moments = got[layer.block, layer.role]
            torch.testing.assert_close(moments.mean, read[0].double().mean(0), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(moments.deviation, read[0].double().std(0, correction=0), atol=1e-6, rtol=1e-4)


def test_a_bias_is_in_the_checkpoint_and_what_is_always_the_same_can_be_cut_without_a_trace(tmp_path: Path) -> None:
    """Channels whose output never changes: FLAP takes them first, and the bias replaces them exactly."""
    model = tiny.model(tmp_path / "dense", causal=False, kv_heads=2)
    ids = tiny.ids(4, 10)
    groups = [torch.tensor([0, 1])] * 2
    kept = [torch.arange(10, 40), torch.arange(30)]
    inputs: dict[int, Tensor] = {}
    for layer in model.layers:
        if layer.role == "down":
            change: Any = lambda _, given, block=layer.block: (constant(given[0], kept[block], inputs, block),)  # noqa: E731
            layer.module.register_forward_pre_hook(change)
    expected = model.network(input_ids=ids).logits
    moments = {(block, "down"): values.flatten(0, 1).double() for block, values in inputs.items()}
    means = {place: values.mean(0) for place, values in moments.items()} | {(b, "o"): torch.zeros(32) for b in (0, 1)}
    norms = {place: values.std(0, correction=0).float() for place, values in moments.items()}
    norms |= {(b, "o"): torch.ones(32) for b in (0, 1)}
    assert [each.tolist() for each in shrink.choose(model, sparsity=0.25, input_norms=norms)[1]] == [
        each.tolist() for each in kept
    ]
    replaced = shrink.compensated(model, groups, kept, means=means)
    small = shrink.shrunk(model, groups, kept, replaced=replaced)
    torch.testing.assert_close(small.network(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
    small.network.save_pretrained(tmp_path / "small")
    again = loading.load(tmp_path / "small")
    assert again.network.config.attention_bias and again.network.config.mlp_bias
    torch.testing.assert_close(again.network(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
    qwen = tiny.model(tmp_path / "qwen", family="qwen2", causal=False, kv_heads=2)
    with pytest.raises(InputError, match="a bias must go with a layout that has the flag"):
        shrink.shrunk(qwen, groups, kept, replaced=shrink.compensated(qwen, groups, kept, means=means))


def constant(given: Tensor, kept: Tensor, inputs: dict[int, Tensor], block: int) -> Tensor:
    """Make the channels that will go always the same, and remember what was read."""
    changed = given.clone()
    gone = [channel for channel in range(40) if channel not in kept.tolist()]
    changed[..., gone] = torch.linspace(-1, 1, len(gone))
    inputs[block] = changed
    return changed
