"""Record what torchao 0.18.0 makes of the test matrices: install it, then `python -m tests.parity.torchao_records.record`.

torchao is not in the lock: transformers imports it in every process when it is there, which takes time and prints warnings.
"""

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib.quantization.rounding import Grid, group_scales
from tests.unit.quantization.matrices import CODED, GROUPS, KINDS, MAPPINGS, matrix, relative_error

FOLDER = Path(__file__).parent


def rounded(weight: Tensor, bits: int, group_size: int | None, mapping: str) -> Tensor:
    """The dequantized weights of torchao's weight-only configuration."""
    api: Any = importlib.import_module("torchao.quantization")
    mappings: Any = importlib.import_module("torchao.quantization.quant_primitives").MappingType
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    granularity = api.PerAxis(0) if group_size is None else api.PerGroup(group_size)
    code, kind = getattr(torch, f"int{bits}"), getattr(mappings, mapping)
    api.quantize_(layer, api.IntxWeightOnlyConfig(weight_dtype=code, granularity=granularity, mapping_type=kind))
    return layer.weight.dequantize().detach()


def codes(weight: Tensor, bits: int) -> Tensor:
    """Its codes under our scales of groups of 64."""
    tensors: Any = importlib.import_module("torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor")
    scales = group_scales(weight, Grid(bits, 64)).float()
    options = {"custom_scale": scales, "custom_zero_point": torch.zeros(scales.shape, dtype=torch.int8)}
    made = tensors.IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, 64), getattr(torch, f"int{bits}"), intx_choose_qparams_algorithm=None, **options
    )
    return made.qdata


def main() -> None:
    """Write errors and codes beside this file."""
    errors = {}
    for bits, size, kind, mapping in itertools.product(CODED, GROUPS, KINDS, MAPPINGS.values()):
        weight = matrix(kind)
        theirs = rounded(weight, bits, size, mapping)
        errors[f"{bits} {size} {kind} {mapping}"] = relative_error(theirs, weight)
        assert bool((theirs[weight == 0] == 0).all())
    (FOLDER / "errors.json").write_text(json.dumps(errors, indent=1) + "\n", encoding="utf-8")
    save_file({str(bits): codes(matrix("heavy"), bits) for bits in CODED}, FOLDER / "codes.safetensors")


if __name__ == "__main__":
    main()
