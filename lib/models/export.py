"""Write compressed models as checkpoints that load without this project: plain floats, or packed codes and scales.

Writers make a new folder in one step; what a killed export leaves is a hidden `.NAME.PID.partial` beside it, safe to delete.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from jaxtyping import Float, Int, Int8
from torch import Tensor

from lib.checkpoints import facts
from lib.checkpoints.files import local_path, read_json
from lib.core.config import typed_path
from lib.core.errors import InputError, require
from lib.core.provenance import PARTIAL, write_json, write_text
from lib.models.language_model import LanguageModel
from lib.models.layers.anatomy import anatomy_of, require_decoder

BITS = range(2, 9)  # what compressed-tensors packs, without the one bit that a symmetric code cannot use
# How transformers found a tokenizer here, and code that is never written here: its writer would keep them.
LOADING_SETTINGS = ("is_local", "local_files_only", "auto_map")
KEPT_FILE = "kept.json"  # not safetensors: servers load every such file of a folder as weights


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix as whole numbers: `codes * scale`, one scale for `group_size` neighbours of a row, zero always exact."""

    codes: Int8[Tensor, "out_feature in_feature"]
    scales: Float[Tensor, "out_feature group"]
    bits: int
    group_size: int

    def dequantize(self, *, dtype: torch.dtype) -> Float[Tensor, "out_feature in_feature"]:
        """Return the weights as a loader computes them, in the dtype of the network.

        >>> weight = QuantizedWeight(torch.tensor([[1, 0, -2, 3]]).to(torch.int8), torch.tensor([[0.5, 2.0]]), 3, 2)
        >>> weight.dequantize(dtype=torch.float32).tolist()
        [[0.5, 0.0, -4.0, 6.0]]
        """
        return self.codes.to(dtype) * self.scales.to(dtype).repeat_interleave(self.group_size, dim=1)

    def stored_scales(self, dtype: torch.dtype) -> Float[Tensor, "out_feature group"]:
        """Return the scales in their own dtype, or in that of the network where that is narrower."""
        return self.scales if self.scales.itemsize <= dtype.itemsize else self.scales.to(dtype)


@dataclass(frozen=True)
class Kept:
    """What structured pruning left of the dense network: key-value groups and MLP channels by block, in ascending order."""

    groups: Sequence[Int[Tensor, "_group"]]
    channels: Sequence[Int[Tensor, "_channel"]]


def save_plain(model: LanguageModel, folder: Path | str, *, kept: Kept | None = None) -> Path:
    """Write a checkpoint of ordinary floats that `AutoModelForCausalLM.from_pretrained` loads bit for bit.

    It fits every model here, whatever the bits of its weights: zeros and rounded weights take as many bytes as others.

    Args:
        model: a pruned, fake-quantized or smaller model.
        folder: a new folder.
        kept: for a structurally pruned model, written beside the weights.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists, or `kept` is not what the model has.
    """
    check_kept(model, kept)
    with new_folder(folder) as partial:
        write_beside(model, partial, kept=kept)
        save_torch_state_dict(state(model), partial, metadata={"format": "pt"})
    return Path(folder)


def save_packed(
    model: LanguageModel, folder: Path | str, *, quantized: Mapping[str, QuantizedWeight], kept: Kept | None = None
) -> Path:
    """Write a `pack-quantized` checkpoint that transformers loads bit for bit when compressed-tensors is installed.

    Codes take `bits` each, zeros among them, and each row is filled up to a whole 32-bit word. transformers unpacks them into
    floats at the first forward pass; servers with kernels for the format (vLLM, SGLang) take 4 and 8 bits only.

    Args:
        model: the fake-quantized model; its weights must be what the codes say.
        folder: a new folder.
        quantized: by the name of the weight, as in `model.layers`; other layers stay as they are.
        kept: for a structurally pruned model, written beside the weights.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists, an unknown name, shapes or bits that do not fit, scales that the dtype of the network
            cannot hold, weights that are not what the codes say, or a mixture of experts: transformers 5.23 stacks their
            matrices and leaves those of a packed file at random, without a word.

    Source: compressed-tensors 0.20.0, `compressors/pack_quantized`. Whatever dtype scales have in the file, they are read in the
        dtype of the network, so they must be exact in it: bfloat16 ones are in float32 and bfloat16 networks.
        Loading with another dtype than the checkpoint's changes weights, as it does for any checkpoint.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    check_quantized(model, quantized)
    check_kept(model, kept)
    remedy = "transformers cannot unpack experts, use save_sparse or save_plain"
    require(not model.has_experts, "a packed checkpoint must be of a dense model", f"the experts of {model.name}", remedy)
    require_decoder(model.network, "a packed checkpoint", name=model.name, instead="use save_plain")
    weights = state(model)
    for name, weight in quantized.items():
        del weights[name]
        weights[f"{name}_packed"] = pack_to_int32(weight.codes, weight.bits)
        weights[f"{name}_scale"] = weight.stored_scales(model.network.dtype)
        weights[f"{name}_shape"] = torch.tensor(weight.codes.shape)
    with new_folder(folder) as partial:
        write_beside(model, partial, kept=kept, quantization=_quantization_config(model, quantized))
        save_torch_state_dict(weights, partial, metadata={"format": "pt"})
    return Path(folder)


def read_kept(folder: Path | str) -> Kept:
    """Read which groups and channels of the dense network an exported model has; `shrink.shrunk` takes them.

    Raises:
        InputError: the checkpoint was exported without them.
    """
    path = local_path(str(folder)) / KEPT_FILE
    if not path.exists():
        raise InputError(f"a structurally pruned export must hold {KEPT_FILE}, got none in {folder}: export it with kept=...")
    read = read_json(path)
    return Kept(*([torch.tensor(block) for block in read[part]] for part in ("groups", "channels")))


@contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """Give a hidden folder beside the wanted one, and rename it when the block ends without an error.

    A relative folder starts where the command was typed, as those that are read do.
    """
    folder = typed_path(Path(folder).expanduser())
    if folder.exists():
        raise InputError(f"an export must go to a new folder, got {folder}, which exists: name another one or delete it")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):  # a tokenizer may have a folder of templates
            if path.is_file():
                with path.open("rb+") as handle:
                    os.fsync(handle.fileno())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_beside(
    model: LanguageModel, folder: Path, *, kept: Kept | None = None, quantization: dict[str, Any] | None = None
) -> None:
    """Write configuration, settings of generation, tokenizer and kept indices."""
    config: Any = copy.deepcopy(model.network.config)
    config.architectures, config.dtype = [type(model.network).__name__], model.network.dtype
    facts.remember_(config, model)
    if quantization is not None:
        config.quantization_config = quantization
    config.save_pretrained(folder)
    if model.generation:  # as it is: transformers' own writer refuses what it takes for a contradiction
        write_json(folder / facts.GENERATION, dict(model.generation))
    if model.tokenizer is not None:
        tokenizer = copy.deepcopy(model.tokenizer)
        for name in LOADING_SETTINGS:
            tokenizer.init_kwargs.pop(name, None)
        tokenizer.save_pretrained(folder)
    if kept is not None:
        parts = {"groups": kept.groups, "channels": kept.channels}
        write_text(
            folder / KEPT_FILE, json.dumps({name: [block.tolist() for block in part] for name, part in parts.items()}) + "\n"
        )


def state(model: LanguageModel) -> dict[str, Tensor]:
    """Return the tensors of the network by name, without the LM head when it is the embedding.

    Matrices of experts are copies: they are parts of one storage, which writers of files refuse.
    """
    weights = {name: _whole(tensor.detach()) for name, tensor in model.network.state_dict().items()}
    if model.network.config.tie_word_embeddings:
        weights.pop(anatomy_of(model.network.config).head, None)
    return weights


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is all of its storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _quantization_config(model: LanguageModel, quantized: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
    """Describe the codes as compressed-tensors does: one group of layers for each pair of bits and group size."""
    members: dict[tuple[int, int], list[str]] = {}
    for name, weight in quantized.items():
        members.setdefault((weight.bits, weight.group_size), []).append(name.removesuffix(".weight"))
    uniform = len(members) == 1 and len(quantized) == len(model.layers)
    groups = {}
    for index, ((bits, size), names) in enumerate(members.items()):
        scheme = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": size, "dynamic": False}
        # Servers fuse q, k and v into one module whose name no list of names holds, so the class is named where it can be.
        groups[f"group_{index}"] = {"targets": ["Linear"] if uniform else names, "weights": scheme, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def check_kept(model: LanguageModel, kept: Kept | None) -> None:
    """Check that kept indices are those of the model.

    Raises:
        InputError: blocks that keep different numbers, or numbers that are not the model's.
    """
    if kept is None:
        return
    config = model.network.config
    for what, blocks, width in (
        ("groups", kept.groups, config.num_key_value_heads),
        ("channels", kept.channels, config.intermediate_size),
    ):
        widths = sorted({len(block) for block in blocks})
        if len(widths) > 1:
            raise InputError(
                f"every block must keep as many {what}, got {widths}: from_pretrained cannot load blocks of different width, "
                "prune all blocks alike"
            )
        if widths != [width] or len(blocks) != config.num_hidden_layers:
            raise InputError(
                f"kept {what} must be {width} in each of {config.num_hidden_layers} blocks as the model has, got {widths} in "
                f"{len(blocks)}: give the lists that made this model"
            )
        if any(torch.any(block.diff() <= 0) for block in blocks):
            raise InputError(f"kept {what} must ascend without repetition, got another order: sort them as shrink.choose does")


def check_quantized(model: LanguageModel, quantized: Mapping[str, QuantizedWeight]) -> None:
    """Check that codes and scales stand for the weights that the model computes with.

    Raises:
        InputError: as in `save_packed`.
    """
    weights = {layer.name: layer.module.weight.detach() for layer in model.layers}
    unknown = sorted(quantized.keys() - weights.keys())
    if unknown:
        raise InputError(f"quantized layers must be among the model's, got {unknown[0]!r}: use the names of model.layers")
    for name, weight in quantized.items():
        _check_layer(name, weight, weights[name])


def _check_layer(name: str, quantized: QuantizedWeight, weight: Tensor) -> None:
    """Check one layer against the weight of the network."""
    codes, scales, bits, size = quantized.codes, quantized.scales, quantized.bits, quantized.group_size
    if bits not in BITS:
        raise InputError(
            f"bits of {name} must be {BITS.start} to {BITS.stop - 1}, got {bits}: leave the layer out to keep its floats"
        )
    if codes.shape != weight.shape:
        raise InputError(
            f"codes of {name} must have shape {tuple(weight.shape)}, got {tuple(codes.shape)}: give those of this model"
        )
    rows, columns = codes.shape
    if size < 1 or columns % size:
        raise InputError(f"group_size of {name} must divide its {columns} inputs, got {size}: choose a divisor")
    if scales.shape != (rows, columns // size):
        raise InputError(f"scales of {name} must have shape {(rows, columns // size)}, got {tuple(scales.shape)}: one a group")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if codes.min() < low or codes.max() > high:
        got = f"{int(codes.min())} to {int(codes.max())}"
        raise InputError(f"codes of {name} must be {low} to {high} for {bits} bits, got {got}: name the bits they were made with")
    if not (torch.isfinite(scales).all() and torch.equal(scales.to(weight.dtype).to(scales.dtype), scales)):
        dtypes = f"{str(scales.dtype).removeprefix('torch.')} that {str(weight.dtype).removeprefix('torch.')} cannot hold"
        raise InputError(
            f"scales of {name} must be finite and exact in the dtype of the network, got {dtypes}: round the scales to it first, "
            "then the weights"
        )
    if not torch.equal(quantized.dequantize(dtype=weight.dtype).to(weight.device), weight):
        raise InputError(f"weights of {name} must be codes * scales, got others: put dequantize() into the network first")
