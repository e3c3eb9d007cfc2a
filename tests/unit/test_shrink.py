"""Structured pruning: the smaller network is the dense one with the removed structures silenced."""

from pathlib import Path

import pytest
import torch

from lib import models, shrink, structured
from lib.config import InputError
from lib.models import LanguageModel
from tests import tiny

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
    again = models.load(tmp_path / "small")
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
