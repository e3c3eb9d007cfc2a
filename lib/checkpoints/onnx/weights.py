"""The floating-point weights of an ONNX file, under the names that the exported PyTorch network had."""

import torch
from torch import Tensor

from lib.checkpoints.onnx.graph import Graph, Node
from lib.core.errors import require

MATRIX_OUTPUT = "/MatMul_output_0"
EMBEDDING = ".weight_DequantizeLinear_Output"


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, axis: int) -> Tensor:
    """Return (codes - zero_point) * scale, with one scale for all or one for each index of an axis.

    Args:
        codes: whole numbers.
        scale: one number, or one for each index of the axis.
        zero_point: code of 0, of the scale's shape; None for 0.
        axis: that scales belong to.

    Raises:
        InputError: scales of another number than the axis has indices.

    Source: ONNX operator DequantizeLinear, without blocks.

    >>> dequantized(torch.tensor([[1, 3], [1, 3]]), torch.tensor([2.0, 10.0]), torch.tensor([1, 1]), axis=0).tolist()
    [[0.0, 4.0], [0.0, 20.0]]
    """
    if scale.numel() > 1:
        fits = -codes.dim() <= axis < codes.dim() and scale.shape == (codes.shape[axis],)
        got = f"{tuple(scale.shape)} for axis {axis} of {tuple(codes.shape)}"
        require(fits, "scales must be one, or one for each index of their axis", got, "scales of blocks are not read")
    shape = [1] * codes.dim()
    shape[axis] = scale.numel() if codes.dim() else 1
    zero = torch.zeros(()) if zero_point is None else zero_point.float().view(shape)
    return (codes.float() - zero) * scale.float().view(shape)


def stored(graph: Graph) -> dict[str, Tensor]:
    """Return every stored tensor of floats, and every one that the graph itself dequantizes under the name of the result."""
    found = {name: value for name, value in graph.tensors.items() if value.is_floating_point()}
    for node in graph.nodes:
        if node.kind == "DequantizeLinear" and node.inputs[0] in graph.tensors:
            codes, scale, *zero = (graph.tensors[name] for name in node.inputs)
            axis = node.numbers.get("axis", 1)
            found[node.outputs[0]] = dequantized(codes, scale, zero[0] if zero else None, axis=axis if codes.dim() > 1 else 0)
    return found


def named(graph: Graph, *, prefix: str) -> dict[str, Tensor]:
    """Return the weights of an exported network under its own names.

    Biases, norms and embeddings keep their names in such a file. A matrix does not: it is stored transposed under a number, and
    the product that reads it is named after its module.

    Args:
        graph: of the file.
        prefix: of the names that are wanted, such as `distilbert.`.
    """
    values = stored(graph)
    found = {}
    for name, value in values.items():
        if name.startswith(prefix) and name.endswith(EMBEDDING):
            found[name.removesuffix(EMBEDDING) + ".weight"] = value
        elif name.startswith(prefix) and name.endswith((".weight", ".bias")):
            found[name] = value
    for node in graph.nodes:
        module = _module(node)
        if module.startswith(prefix) and node.inputs[1] in values:
            found[f"{module}.weight"] = values[node.inputs[1]].T.contiguous()
    return found


def _module(node: Node) -> str:
    """Return the module whose product this is, with dots; empty for any other operation."""
    if node.kind != "MatMul" or not node.outputs[0].endswith(MATRIX_OUTPUT):
        return ""
    return node.outputs[0].removesuffix(MATRIX_OUTPUT).strip("/").replace("/", ".")
