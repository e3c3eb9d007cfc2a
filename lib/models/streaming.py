"""Load a checkpoint whose matrices are read from their files when they are used, so that a model larger than memory is pruned.

Linear layers of the decoder and the LM head of a streamed model keep no weights. Reading `module.weight` fetches the tensor; a
budget bounds how many bytes of them exist at one time, and those used least recently go first. A tensor that was changed in place
is kept in a scratch file when it goes. Embedding, norms and biases stay in memory. All other code takes a streamed model for an
ordinary one: a walk through the blocks reads each block once, a whole forward pass reads the whole checkpoint.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lib.checkpoints import contents, lookup, renaming
from lib.checkpoints.files import check_safetensors
from lib.core.config import ModelSource
from lib.core.errors import require
from lib.core.provenance import write_json
from lib.models import experts, export, loading
from lib.models.language_model import LanguageModel, linear_layers
from lib.models.layers import attention
from lib.models.layers.anatomy import require_decoder
from lib.models.weight_store import StoredTensor, StreamedLinear, WeightStore, mapped, read

SHARD_BYTES = 2**29  # about one block of an 8B model in bfloat16


def load(
    source: ModelSource | str | Path,
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    budget: int | None = None,
    scratch: Path | str | None = None,
) -> LanguageModel:
    """Load a checkpoint as `models.load` does, but leave the matrices in their files until they are used.

    Change its weights in place, through `layer.module.weight`. It cannot be copied or moved to another device.

    Args:
        source: as in `models.load`.
        name: short name for tables and figures; the last part of the source when None.
        dtype: dtype of the weights.
        device: where they go when they are read.
        budget: bytes of matrices in memory at one time; those of one block when None, which a walk through the blocks needs to
            read each of them once. The tensor in use is there whatever the budget.
        scratch: where to make a folder for changed matrices, up to all of them in size; that of the system when None. The folder
            is removed with the model.

    Returns:
        The model in evaluation mode, its attention set to SDPA; equal to the one that `models.load` gives.

    Raises:
        InputError: as in `models.load`, known from the headers before any weight is read; or a negative budget.
        UnavailableError: it lies elsewhere and cannot be fetched.
    """
    require(budget is None or budget >= 0, "budget must be a number of bytes from 0", str(budget), "leave it out for one block")
    if not isinstance(source, ModelSource):
        source = lookup.parse(str(source))
    folder = lookup.resolve(source)
    contents.check_streamable(folder)
    found = loading.opened(folder)
    stored = stored_tensors(found)
    require_decoder(found, "a streamed model", name=folder.name, instead="load it whole with models.load")
    network = _network(found.config, stored, dtype=dtype, device=torch.device(device), budget=budget, scratch=scratch)
    return loading.described(network, found, source=source, name=name)


def stored_tensors(found: loading.Opened) -> dict[str, StoredTensor]:
    """Read from the headers of a checkpoint where each tensor of its network lies, by the name it has there.

    Args:
        found: the checkpoint; its configuration is changed where a stored head differs from the embedding it should be.

    Raises:
        InputError: a tensor has a name outside the layout, or is put together from several stored ones.
    """
    headers = {path: check_safetensors(path) for path in lookup.weight_files(found.files)}
    where = {
        name: StoredTensor(path, key, tuple(headers[path][key]["shape"]))
        for name, (path, key) in contents.places(found.files).items()
    }
    rotary = {name: _as_stored(where.pop(name)) for name in list(where) if name.endswith(contents.FREQUENCIES)}
    contents.without_frequencies(rotary, found.config)
    made = renaming.unstacked(renaming.plan(where, found.family, found.config, folder=found.files))
    loading.untie_(found.config, made, lambda key: mapped(where[key]))
    for name, pieces in made.items():
        rule, remedy = "a streamed matrix must lie in one piece", "load the model whole"
        require(len(pieces) == 1, rule, f"{len(pieces)} pieces of {name}", remedy)
    shapes = {key: place.shape for key, place in where.items()}
    return {
        name: replace(where[pieces[0].key], shape=renaming.shape(pieces, shapes), rows=pieces[0].rows)
        for name, pieces in made.items()
    }


def _network(
    config: PretrainedConfig,
    stored: dict[str, StoredTensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    budget: int | None,
    scratch: Path | str | None,
) -> PreTrainedModel:
    """Build the network without weights, read those that stay, and let the others be fetched."""
    with init_empty_weights(include_buffers=False), loading.buildable(config):
        network = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME))
        experts.as_linears_(network)
    network.eval().requires_grad_(False)
    loading.check_shapes(network, {name: place.shape for name, place in stored.items()})
    names = _streamed_names(network)
    own = {name: tensor.dtype for name, tensor in network.state_dict().items()}  # some stay in float32
    kept = {name: read(place, dtype=own[name], device=device) for name, place in stored.items() if name not in names}
    network.load_state_dict(kept, strict=False, assign=True)
    network.requires_grad_(False).tie_weights()
    for module in network.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)
    streamed = {name: stored[name] for name in names}
    room = _largest_block(network, dtype) if budget is None else budget
    store = WeightStore(streamed, dtype=dtype, device=device, budget=room, scratch=Path(scratch) if scratch else None)
    for name in names:
        module = network.get_submodule(name.removesuffix(".weight"))
        module.__class__ = StreamedLinear
        module.store, module.key = store, name  # type: ignore[assignment]
    return network


def _as_stored(place: StoredTensor) -> Tensor:
    """Read a small tensor in its own dtype."""
    with safe_open(place.file, framework="pt") as file:
        return file.get_tensor(place.key)


def _streamed_names(network: PreTrainedModel) -> list[str]:
    """Return the names of the matrices that are fetched: all prunable ones, and an LM head of its own."""
    head = [] if network.config.tie_word_embeddings else ["lm_head.weight"]
    return [layer.name for layer in linear_layers(network)] + head


def _largest_block(network: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return the bytes of the matrices of the largest block."""
    sizes: dict[int, int] = {}
    for layer in linear_layers(network):
        sizes[layer.block] = sizes.get(layer.block, 0) + layer.module.weight.numel() * dtype.itemsize
    return max(sizes.values())


def save(model: LanguageModel, folder: Path | str, *, max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a model as a plain checkpoint that `AutoModelForCausalLM.from_pretrained` loads bit for bit, a shard at a time.

    Args:
        model: a pruned model, streamed or not.
        folder: a new folder.
        max_shard_bytes: bytes of a shard, which is in memory while it is written; a larger tensor has a shard of its own.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists, or shards without room.
    """
    require(max_shard_bytes > 0, "max_shard_bytes must be positive", str(max_shard_bytes), f"the default is {SHARD_BYTES}")
    # a tied head is there once, streamed matrices without values
    tensors = {**dict(model.network.named_parameters()), **kept_buffers(model.network)}
    plan = split_torch_state_dict_into_shards(cast(Any, tensors), max_shard_size=max_shard_bytes)
    with export.new_folder(folder) as partial:
        export.write_beside(model, partial)
        for file, names in plan.filename_to_tensors.items():
            save_file({name: _value(model, name) for name in names}, partial / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_json(partial / "model.safetensors.index.json", index)
    return Path(folder)


def kept_buffers(network: PreTrainedModel) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint holds, such as the biases of a router, by name."""
    return {
        f"{name}.{key}": buffer
        for name, module in network.named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set
    }


def _value(model: LanguageModel, name: str) -> Tensor:
    """Return a tensor of the network with its values, reading it when it is streamed."""
    owner, _, kind = name.rpartition(".")
    return getattr(model.network.get_submodule(owner), kind).detach().cpu().contiguous()
