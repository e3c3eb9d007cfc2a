"""What each format of a linear layer takes to store, and why it may be unable to run: numbers and reasons only, no weights."""

import importlib.util
import math
from dataclasses import dataclass
from typing import Literal

import torch

from lib.core.errors import require
from lib.pruning import importances
from lib.timing import roofline

GROUP_SIZE = 128  # torchao's own for int4
TILE_INPUTS, TILE_OUTPUTS = 1024, 8  # what torchao pads int4 matrices to
TILE_24 = (32, 64)  # out and in features of 2:4 must be multiples: CUTLASS's rule, stricter than that of cuSPARSELt
ONE_SCALE = 8  # bytes of one float32 scale and one int32 zero point


@dataclass(frozen=True)
class LayerShape:
    """A linear layer's matrix, and how structured pruning cuts it.

    Attributes:
        out_features: rows of the matrix.
        in_features: columns of the matrix.
        cut: which side gets shorter: outputs of q, k, v, gate and up, inputs of o and down.
        unit: neighbouring channels of that side that go together, such as all of a head.
    """

    out_features: int
    in_features: int
    cut: Literal["outputs", "inputs"] = "outputs"
    unit: int = 1

    def __post_init__(self) -> None:
        sound = min(self.out_features, self.in_features, self.unit) >= 1 and self.cut_features % self.unit == 0
        require(sound, "features must be positive and unit divide those that are cut", str(self), "give those of the layer")

    @property
    def cut_features(self) -> int:
        """Channels of the side that structured pruning shortens."""
        return self.out_features if self.cut == "outputs" else self.in_features


def dense_bytes(shape: LayerShape, dtype: torch.dtype) -> float:
    """Return the bytes of all numbers, zeros as well."""
    return roofline.weight_bytes(shape.in_features, shape.out_features, weight_bits=8 * dtype.itemsize)


def one_scale_bytes(shape: LayerShape, dtype: torch.dtype) -> float:
    """Return the bytes of 8-bit codes with one scale; sums of rows that a library adds are left out."""
    return float(shape.out_features * shape.in_features + ONE_SCALE)


def csr_bytes(shape: LayerShape, dtype: torch.dtype) -> float:
    """Return the bytes of a value and a 4-byte column for each kept weight, and one place more than there are rows."""
    kept = shape.out_features * (shape.in_features - importances.removed_count(shape.in_features, 0.5))
    return float(kept * (dtype.itemsize + 4) + 4 * (shape.out_features + 1))


def semi_structured_bytes(shape: LayerShape, dtype: torch.dtype) -> float:
    """Return the bytes of half the numbers, with 2 bits for the place of each."""
    bits = 8 * dtype.itemsize
    return roofline.weight_bytes(shape.in_features, shape.out_features, weight_bits=bits, kept=0.5, index_bits=2)


def int8_bytes(shape: LayerShape, dtype: torch.dtype) -> float:
    """Return the bytes of 8-bit codes with a float32 scale and an 8-bit zero point for each output, as torchao keeps them."""
    group = shape.in_features
    return roofline.weight_bytes(shape.in_features, shape.out_features, weight_bits=8, group_size=group, scale_bits=40)


def int4_bytes(shape: LayerShape, dtype: torch.dtype) -> float:
    """Return the bytes of 4-bit codes, padding included, with a scale and a zero point in 16 bits for each group."""
    inputs = TILE_INPUTS * math.ceil(shape.in_features / TILE_INPUTS)
    outputs = TILE_OUTPUTS * math.ceil(shape.out_features / TILE_OUTPUTS)
    return roofline.weight_bytes(inputs, outputs, weight_bits=4, group_size=GROUP_SIZE, scale_bits=32)


def csr_refusal(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why CSR cannot run: torch multiplies it on CPUs in full precision only."""
    slim = device.type == "cpu" and dtype not in (torch.float32, torch.float64)
    return f"needs float32 or float64 on a CPU, got {_name(dtype)}" if slim else None


def _gpu_refusal(device: torch.device) -> str | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return "needs CUDA"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"needs compute capability 8.0, got {capability[0]}.{capability[1]}"


def semi_structured_refusal(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why 2:4 cannot run."""
    if reason := _gpu_refusal(device):
        return reason
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, got {_name(dtype)}"
    fits = shape.out_features % TILE_24[0] == 0 and shape.in_features % TILE_24[1] == 0
    got = f"{shape.out_features} x {shape.in_features}"
    return None if fits else f"needs multiples of {TILE_24[0]} outputs and {TILE_24[1]} inputs, got {got}"


def dynamic_refusal(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why int8 dynamic cannot run; torch has announced that it will remove it."""
    if getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None) is None:
        return "torch.ao.quantization.quantize_dynamic is missing"
    if device.type != "cpu":
        return "needs a CPU"
    if torch.backends.quantized.engine not in ("x86", "fbgemm", "onednn", "qnnpack"):
        return f"needs an engine for int8 products, torch has {torch.backends.quantized.engine}"
    return None if dtype == torch.float32 else f"needs float32 activations, got {_name(dtype)}"


def torchao_refusal(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why torchao's int8 weights cannot run."""
    if reason := _gpu_refusal(device):
        return reason
    return None if importlib.util.find_spec("torchao") else "torchao is not installed"


def int4_refusal(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why torchao's int4 weights cannot run; it would leave a width that does not fit dense without a word."""
    if reason := torchao_refusal(shape, device, dtype):
        return reason
    if dtype != torch.bfloat16:
        return f"needs bfloat16, got {_name(dtype)}"
    fits = shape.in_features % GROUP_SIZE == 0
    return None if fits else f"needs a multiple of {GROUP_SIZE} inputs, got {shape.in_features}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
