"""A container for pruned weights that does not store zeros, and what each kind of content takes on disk."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from jaxtyping import Int8, UInt8
from safetensors.torch import save_file
from torch import Tensor

from lib.checkpoints import contents, refusals
from lib.checkpoints.files import SPARSE, local_path, read_json
from lib.core.config import ModelSource
from lib.models import export, loading
from lib.models.language_model import LanguageModel

KINDS = {
    "weight_packed": "codes",
    "codes": "codes",
    "weight_scale": "scales",
    "scales": "scales",
    "mask": "masks",
    "values": "kept values",
}


def save_sparse(
    model: LanguageModel,
    folder: Path | str,
    *,
    quantized: Mapping[str, export.QuantizedWeight] | None = None,
    kept: export.Kept | None = None,
) -> Path:
    """Write a container that stores of each pruned matrix one bit a weight and the kept weights, so that zeros cost nothing more.

    Quantized layers store their kept codes, `bits` each, and their scales. A matrix for which the bits of the mask cost more
    than its zeros is stored without a mask. `load_sparse` and `unpack_sparse` read it; nothing else does.

    Args:
        model: a pruned model.
        folder: a new folder.
        quantized: by the name of the weight, as in `save_packed`.
        kept: for a structurally pruned model, written beside the weights.

    Returns:
        The folder.

    Raises:
        InputError: as in `save_packed`.
    """
    quantized = quantized or {}
    export.check_quantized(model, quantized)
    export.check_kept(model, kept)
    weights, layers = export.state(model), {}
    for layer in model.layers:
        stored = _stored_sparse(weights[layer.name], quantized.get(layer.name))
        if stored is not None:
            parts, layers[layer.name] = stored
            del weights[layer.name]
            weights |= {f"{layer.name}.{part}": tensor for part, tensor in parts.items()}
    with export.new_folder(folder) as partial:
        export.write_beside(model, partial, kept=kept)
        save_file({name: value.contiguous() for name, value in weights.items()}, partial / SPARSE, {"layers": json.dumps(layers)})
    return Path(folder)


def unpack_sparse(source: Path | str, folder: Path | str) -> Path:
    """Turn a container of `save_sparse` into a plain checkpoint.

    Args:
        source: the container.
        folder: a new folder.

    Returns:
        The folder.

    Raises:
        InputError: no container there, or the folder exists.
    """
    source = local_path(str(source))
    tensors = contents.read_sparse(source)
    with export.new_folder(folder) as partial:
        for path in source.iterdir():
            if path.name != SPARSE:
                shutil.copy(path, partial)
        save_torch_state_dict(tensors, partial, metadata={"format": "pt"})
    return Path(folder)


def load_sparse(folder: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LanguageModel:
    """Load a container of `save_sparse`; needs room for a plain copy in the system's temporary folder while it reads.

    Args:
        folder: the container.
        dtype: dtype of the weights.
        device: where they go.

    Returns:
        The model, its fingerprint that of the plain checkpoint.

    Raises:
        InputError: no container there, or damaged files.
    """
    folder = local_path(str(folder))
    with tempfile.TemporaryDirectory() as temporary:
        plain = unpack_sparse(folder, Path(temporary) / folder.name)
        return replace(loading.load(plain, dtype=dtype, device=device), source=ModelSource(str(folder)))


def read_codes(folder: Path) -> dict[str, export.QuantizedWeight]:
    """Read the codes and scales of a checkpoint that `save_packed` wrote, by the name of the weight as in `model.layers`.

    Args:
        folder: as `lookup.resolve` returns it; another checkpoint has none.

    Raises:
        InputError: damaged files.
    """
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not refusals.is_packed(raw):
        return {}
    codes = {}
    for name, parts in contents.packed_parts(folder).items():
        module = name.removesuffix(".weight")
        whole, scales = parts
        bits = contents.bits_of(module, raw["quantization_config"])
        codes[name] = export.QuantizedWeight(whole, scales, bits, whole.shape[1] // scales.shape[1])
    return codes


def bytes_by_kind(folder: Path | str) -> dict[str, int]:
    """Count what an exported model takes on disk; the numbers add up to the sizes of its files.

    Args:
        folder: any folder that a function here wrote, or another safetensors checkpoint.

    Returns:
        Bytes of: `codes`, `scales`, `masks`, `kept values`, `linear weights` (stored as floats), `embeddings` (LM head included),
        `other tensors`, `headers` of safetensors files, `other files` (configuration, tokenizer, kept indices).
    """
    kinds = dict.fromkeys((*KINDS.values(), "linear weights", "embeddings", "other tensors", "headers", "other files"), 0)
    for path in local_path(str(folder)).rglob("*"):
        if path.suffix == ".safetensors":
            for name, size in _tensor_bytes(path).items():
                kinds[_kind(name)] += size
                kinds["headers"] -= size
            kinds["headers"] += path.stat().st_size
        elif path.is_file():
            kinds["other files"] += path.stat().st_size
    return kinds


def _kind(name: str) -> str:
    """Name the kind of a stored tensor."""
    *path, last = name.split(".")
    if last in KINDS:
        return KINDS[last]
    if "embed_tokens" in path or "lm_head" in path:
        return "embeddings"
    return "linear weights" if last == "weight" and path[-1].endswith("_proj") else "other tensors"


def _tensor_bytes(path: Path) -> dict[str, int]:
    """Read the size of each tensor from the header of a safetensors file."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    ends = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - start for name, (start, end) in ends.items()}


def _stored_sparse(
    weight: Tensor, quantized: export.QuantizedWeight | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the parts of a matrix and what is needed to put them together, or None to store it as it is."""
    dense = weight if quantized is None else quantized.codes
    bits = None if quantized is None else quantized.bits
    kept = dense != 0
    masked = int((~kept).sum()) * (bits or 8 * weight.itemsize) > kept.numel()
    if quantized is None and not masked:
        return None
    parts = {"mask": torch.from_numpy(np.packbits(kept.cpu().numpy()))} if masked else {}
    values = dense[kept] if masked else dense.flatten()
    if quantized is None:
        parts["values"] = values
    else:
        parts |= {"codes": _packed(values, quantized.bits), "scales": quantized.stored_scales(weight.dtype)}
    dtype = str(weight.dtype).removeprefix("torch.")
    return parts, {"shape": list(weight.shape), "bits": bits, "count": values.numel(), "dtype": dtype}


def _packed(codes: Int8[Tensor, "kept"], bits: int) -> UInt8[Tensor, "byte"]:
    """Pack codes one after the other into as few bytes as hold them."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    words = pack_to_int32(codes[None], bits)[0].cpu()
    return words.view(torch.uint8)[: -(-len(codes) * bits // 8)].clone()
