"""The tensors of a checkpoint folder under their plain names: wrappers' prefixes off, packed ones unpacked, adapters merged."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int8, UInt8
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from lib.checkpoints import adapters, files, refusals
from lib.checkpoints.gguf import conversion, headers
from lib.core.errors import InputError, require

# What wraps a module anywhere in a network leaves its name in every path through it.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIXES = ("module.", "base_model.model.")
FREQUENCIES = "rotary_emb.inv_freq"
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16, "torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16}
PARTS = ("mask", "values", "codes", "scales")


def folder_of(path: Path) -> Path:
    """Return the folder in safetensors whose configuration a checkpoint has: its own, its base's, or a converted GGUF's.

    Args:
        path: a folder or GGUF file that was checked.
    """
    if adapters.is_adapter(path):
        return folder_of(adapters.read(path).base)
    file = headers.find(path)
    return path if file is None else conversion.folder_of(file)


def configuration(folder: Path) -> dict[str, Any]:
    """Read config.json without what says how others would load the weights: code, and a quantization that is undone here."""
    raw = files.read_json(folder / "config.json")
    return {key: value for key, value in raw.items() if key not in ("auto_map", "quantization_config", "compression_config")}


def text_folder(path: Path) -> Path:
    """Return the folder with a checkpoint's tokenizer: an adapter's own where it has one, as trainers write it."""
    is_own = not adapters.is_adapter(path) or files.lacks_tokenizer(path) is None
    return path if is_own and path.is_dir() and headers.find(path) is None else folder_of(path)


def places(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return where each tensor of a folder lies, the file and its name there, by plain name.

    Raises:
        InputError: a prefix that some tensors have and others lack, or LoRA matrices that are not merged.
    """
    where = files.shard_of(folder / files.INDEX) if files.exists(folder / files.INDEX) else {}
    shards = {file: files.check_safetensors(file) for file in files.weight_files(folder)}
    # a tensor that a second shard has, too, is the one that the index names
    found = {name: (file, name) for file, names in shards.items() for name in names if where.get(name, file.name) == file.name}
    loose = next((name for name in found if ".lora_A." in name), None)
    require(loose is None, f"{folder} must hold a model", f"LoRA beside its base, {loose}", adapters.MERGE)
    plain = plain_names(found, folder)
    return {plain[name]: place for name, place in found.items()}


def plain_names(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Return the plain name of each tensor: what DDP, torch.compile, FSDP and PEFT put before or between goes.

    Args:
        names: as they are stored.
        folder: of the checkpoint, for errors.

    Raises:
        InputError: a prefix that some have and others lack, or two tensors of one plain name.

    >>> plain_names(["module._orig_mod.model.norm.weight"], Path("x"))
    {'module._orig_mod.model.norm.weight': 'model.norm.weight'}
    """
    plain = {name: WRAPPERS.sub("", name) for name in names}
    while prefix := next((each for each in PREFIXES if any(name.startswith(each) for name in plain.values())), None):
        without = [name for name in plain.values() if not name.startswith(prefix)]
        rule = f"all tensors in {folder} must begin with {prefix} or none"
        require(not without, rule, f"{without[:1]} without it", "save the model unwrapped")
        plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    twice = sorted({name for name in plain.values() if list(plain.values()).count(name) > 1}) if _repeats(plain) else []
    require(not twice, f"every tensor in {folder} must have one name", f"two for {twice[:1]}", "save the model unwrapped")
    return plain


def _repeats(plain: Mapping[str, str]) -> bool:
    return len(set(plain.values())) < len(plain)


def is_sparse(folder: Path) -> bool:
    """Tell whether a folder is a container that `save_sparse` wrote."""
    return files.exists(folder / files.SPARSE) and not files.exists(folder / files.SINGLE)


def check_streamable(path: Path) -> None:
    """Refuse what has to be computed before it can be used, so that it cannot be read a matrix at a time.

    Raises:
        InputError: an adapter, or weights packed by `save_packed` or `save_sparse`.
    """
    kinds = {"a LoRA adapter": adapters.is_adapter(path), "a sparse container": path.is_dir() and is_sparse(path)}
    if path.is_dir() and files.exists(path / "config.json"):
        kinds["packed weights"] = refusals.is_packed(files.read_json(path / "config.json"))
    found = next((kind for kind, holds in kinds.items() if holds), None)
    rule, remedy = "a streamed checkpoint must hold plain floats", "load it whole and write it with export.save_plain first"
    require(found is None, rule, f"{found} in {path}", remedy)


def tensors(path: Path, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint under its plain name.

    Args:
        path: a folder, a GGUF file, or an adapter, whose base is read and changed.
        dtype: that matrices get which an adapter changed; others are as they are stored.

    Raises:
        InputError: see `places`, `adapters.merge_`, and packed weights of another kind than ours.
    """
    if adapters.is_adapter(path):
        adapter = adapters.read(path)
        weights = tensors(adapter.base, dtype=dtype)
        adapters.merge_(weights, adapter, dtype=dtype)
        return weights
    folder = folder_of(path)
    if is_sparse(folder):
        return read_sparse(folder)
    weights: dict[str, Tensor] = {}
    by_file: dict[Path, dict[str, str]] = {}
    for name, (file, key) in places(folder).items():
        by_file.setdefault(file, {})[name] = key
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            weights |= {name: opened.get_tensor(key) for name, key in names.items()}
    return _unpacked_all(weights, files.read_json(folder / "config.json"))


def dtypes(path: Path) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor of a checkpoint by its plain name: half precisions as they are, others float32.

    Rotary frequencies are no weights and are left out.

    Args:
        path: a folder or a GGUF file; of an adapter, those of its base.
    """
    folder = folder_of(path)
    if is_sparse(folder) or refusals.is_packed(files.read_json(folder / "config.json")):
        found = {name: str(value.dtype) for name, value in tensors(folder, dtype=torch.float32).items()}
    else:
        headers_of = {file: files.check_safetensors(file) for file in files.weight_files(folder)}
        found = {name: headers_of[file][key]["dtype"] for name, (file, key) in places(folder).items()}
    return {name: HALVES.get(dtype, torch.float32) for name, dtype in found.items() if not name.endswith(FREQUENCIES)}


def _unpacked_all(weights: dict[str, Tensor], raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Put matrices of `save_packed` together; everything else is returned as it is."""
    packed = [name for name in weights if name.endswith(".weight_packed")]
    if not packed:
        return weights
    rule = "packed weights must be those of save_packed"
    require(refusals.is_packed(raw), rule, "another scheme", refusals.UNQUANTIZED)
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."))
    for module, codes, scales in _unpacked(weights, packed, raw):
        weights[f"{module}.weight"] = _scaled(codes, scales, dtype)
    return weights


def packed_parts(folder: Path) -> dict[str, tuple[Int8[Tensor, "out_feature in_feature"], Tensor]]:
    """Read codes and scales of a folder that `save_packed` wrote, by the name of the weight.

    Args:
        folder: whose configuration says so.

    Raises:
        InputError: damaged files.
    """
    stored: dict[str, Tensor] = {}
    for name, (file, key) in places(folder).items():
        if name.endswith((".weight_packed", ".weight_scale", ".weight_shape")):
            with safe_open(file, framework="pt") as opened:
                stored[name] = opened.get_tensor(key)
    packed = [name for name in stored if name.endswith(".weight_packed")]
    raw = files.read_json(folder / "config.json")
    return {f"{module}.weight": (codes.to(torch.int8), scales) for module, codes, scales in _unpacked(stored, packed, raw)}


def _unpacked(weights: dict[str, Tensor], packed: list[str], raw: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Take the parts of packed matrices out of a dictionary, and yield module, codes and scales of each."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    for name in packed:
        module = name.removesuffix(".weight_packed")
        parts = [weights.pop(f"{module}.weight_{part}", None) for part in ("packed", "scale", "shape")]
        codes, scales, shape = parts
        if codes is None or scales is None or shape is None:
            raise InputError(f"{module} must have weight_packed, weight_scale and weight_shape, got fewer: fetch it again")
        yield module, unpack_from_int32(codes, bits_of(module, raw["quantization_config"]), torch.Size(shape.tolist())), scales


def bits_of(module: str, config: Mapping[str, Any]) -> int:
    """Return the bits of a packed module's codes.

    Args:
        module: its name.
        config: the checkpoint's quantization_config.

    Raises:
        InputError: no group of the configuration means it.

    Source: compressed-tensors' `match_targets`: a name goes before a pattern (`re:...`), a pattern before the class.

    >>> group = {"targets": ["re:.*down_proj$"], "weights": {"num_bits": 8}}
    >>> bits_of("layers.0.down_proj", {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4}}, "b": group}})
    8
    """
    groups = config["config_groups"].values()
    said = [(str(name), int(group["weights"]["num_bits"])) for group in groups for name in group["targets"]]
    ways: tuple[Callable[[str], Any], ...] = (
        lambda name: name == module,
        lambda name: name.startswith("re:") and re.match(name.removeprefix("re:"), module),
        lambda name: name == "Linear",
    )
    found = next((bits for way in ways for name, bits in said if way(name)), None)
    if found is None:
        got = [name for name, _ in said][:3]
        raise InputError(f"config_groups must say the bits of {module}, got those of {got}: restore config.json")
    return found


def _scaled(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes * scales as a loader computes them in the dtype of the network."""
    return codes.to(dtype) * scales.to(dtype).repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)


def read_sparse(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a container that `save_sparse` wrote, zeros put back.

    Raises:
        InputError: no such container.
    """
    rule = f"a sparse container must hold {files.SPARSE}"
    require(files.exists(folder / files.SPARSE), rule, f"none in {folder}", "name a folder of save_sparse")
    with safe_open(folder / files.SPARSE, framework="pt") as file:
        layers = json.loads((file.metadata() or {}).get("layers", "{}"))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    for name, stored in layers.items():
        found = [part for part in PARTS if f"{name}.{part}" in weights]
        weights[name] = expanded({part: weights.pop(f"{name}.{part}") for part in found}, **stored)
    return weights


def expanded(parts: Mapping[str, Tensor], *, shape: list[int], bits: int | None, count: int, dtype: str) -> Tensor:
    """Put a matrix of `save_sparse` together again.

    Args:
        parts: its mask, and its values or its codes and scales.
        shape: of the matrix.
        bits: of its codes; None for values.
        count: codes that are stored.
        dtype: of the matrix.
    """
    values = parts["values"] if bits is None else _codes(parts["codes"], bits, count)
    if "mask" in parts:
        dense = values.new_zeros(shape)
        dense[torch.from_numpy(np.unpackbits(parts["mask"].numpy(), count=dense.numel())).bool().reshape(shape)] = values
    else:
        dense = values.reshape(shape)
    return dense if bits is None else _scaled(dense, parts["scales"], getattr(torch, dtype))


def _codes(stored: UInt8[Tensor, "byte"], bits: int, count: int) -> Int8[Tensor, "kept"]:
    """Unpack codes that stand one after the other."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    words = torch.nn.functional.pad(stored, (0, -len(stored) % 4)).view(torch.int32)
    return unpack_from_int32(words[None], bits, torch.Size([1, count]))[0]


def without_frequencies(weights: Mapping[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """Leave out the rotary frequencies that old checkpoints store; they must be those that the configuration gives.

    Args:
        weights: by name; frequencies are named `rotary_emb.inv_freq`.
        config: of the network.

    Raises:
        InputError: others, so that the network was trained with another base or scaling than the configuration says.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    stored = {name: value for name, value in weights.items() if name.endswith(FREQUENCIES)}
    if not stored:
        return dict(weights)
    expected = LlamaRotaryEmbedding(config).inv_freq  # type: ignore[arg-type]
    for name, value in stored.items():
        rounded = expected.to(value.dtype).float()
        tolerance = 8 * torch.finfo(value.dtype).eps
        same = value.shape == expected.shape and torch.allclose(value.float(), rounded, rtol=tolerance, atol=0)
        rule, remedy = f"{name} must be what config.json gives", "set the rope_theta that the model was trained with"
        require(same, rule, "other frequencies", remedy)
    return {name: value for name, value in weights.items() if name not in stored}


def notes(path: Path) -> tuple[str, ...]:
    """Return what is to be said about how a checkpoint was read: an adapter merged, a quantization stated in vain."""
    if adapters.is_adapter(path):
        adapter = adapters.read(path)
        return (adapters.describe(adapter), *notes(adapter.base))
    if headers.find(path) is not None or not files.exists(path / "config.json"):
        return ()
    entries = {name: entry["dtype"] for file in files.weight_files(path) for name, entry in files.check_safetensors(file).items()}
    ignored = refusals.left_over(files.read_json(path / "config.json"), entries)
    return (f"quantization_config of {ignored} ignored, weights are plain floats",) if ignored else ()
