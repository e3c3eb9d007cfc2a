"""Read nodes and tensors of an ONNX file: the part of its protobuf that says which stored numbers go where."""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lib.core.errors import InputError, require

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # kinds of a protobuf field
KINDS = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64}
Field = tuple[int, int | memoryview]


@dataclass(frozen=True)
class Node:
    """One operation: its kind, the names that it reads and writes, and its whole-number attributes."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """The operations of a file in their order, and its stored tensors by name."""

    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]


def read(data: bytes) -> Graph:
    """Read an ONNX file.

    Args:
        data: all of it; weights outside the file are not read.

    Raises:
        InputError: no ONNX file, or one that is cut short.

    Source: onnx.proto3 (ModelProto.graph 7; GraphProto.node 1, .initializer 5).
    """
    try:
        bodies = [body for number, body in _fields(memoryview(data)) if number == 7 and isinstance(body, memoryview)]
        parts = [part for body in bodies for part in _fields(body)]
        nodes = tuple(_node(body) for number, body in parts if number == 1 and isinstance(body, memoryview))
        tensors = dict(_tensor(body) for number, body in parts if number == 5 and isinstance(body, memoryview))
    except (IndexError, ValueError, struct.error) as error:
        raise InputError(f"an ONNX file must be whole, got {error}: fetch it again") from error
    require(bool(nodes), "an ONNX file must hold a graph with operations", "none", "check which file it is")
    return Graph(nodes, tensors)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read seven bits a byte, lowest first, until a byte below 128; return the number and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _fields(data: memoryview) -> Iterator[Field]:
    """Yield number and content of each field of a message: a whole number, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind not in (EIGHT_BYTES, FOUR_BYTES, LENGTH):
            raise ValueError(f"a field of kind {kind}")
        size, at = _varint(data, at) if kind == LENGTH else ((8 if kind == EIGHT_BYTES else 4), at)
        if at + size > len(data):
            raise ValueError(f"{len(data) - at} bytes where {size} are announced")
        yield number, data[at : at + size]
        at += size


def _text(value: int | memoryview) -> str:
    return bytes(value).decode() if isinstance(value, memoryview) else str(value)


def _signed(value: int) -> int:
    """Read 64 bits in two's complement."""
    return value - 2**64 if value >= 2**63 else value


def _node(body: memoryview) -> Node:
    """Read a NodeProto: input 1, output 2, op_type 4, attribute 5."""
    texts: dict[int, list[str]] = {1: [], 2: [], 4: []}
    numbers: dict[str, int] = {}
    for number, value in _fields(body):
        if number in texts:
            texts[number].append(_text(value))
        elif number == 5 and isinstance(value, memoryview):
            said = dict(_fields(value))  # AttributeProto: name 1, i 3
            if isinstance(said.get(3), int):
                numbers[_text(said[1])] = _signed(int(said[3]))  # type: ignore[arg-type]
    return Node("".join(texts[4]), tuple(texts[1]), tuple(texts[2]), numbers)


def _tensor(body: memoryview) -> tuple[str, Tensor]:
    """Read a TensorProto: dims 1, data_type 2, float_data 4, int32_data 5, int64_data 7, name 8, raw_data 9."""
    dims: list[int] = []
    typed: list[int | float] = []
    raw, kind, name = b"", 0, ""
    for number, value in _fields(body):
        if number in (1, 5, 7):
            found = [value] if isinstance(value, int) else list(_varints(value))
            (dims if number == 1 else typed).extend(map(_signed, found))
        elif number == 4 and isinstance(value, memoryview):
            typed += struct.unpack(f"<{len(value) // 4}f", value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = bytes(value)  # type: ignore[arg-type]
    if kind not in KINDS:
        raise ValueError(f"numbers of kind {kind} in {name}")
    made = np.frombuffer(raw, KINDS[kind]) if raw else np.array(typed).astype(KINDS[kind])
    if made.size != math.prod(dims):
        raise ValueError(f"{made.size} numbers in {name} of shape {dims}")
    return name, torch.from_numpy(made.reshape(dims).copy())


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value
