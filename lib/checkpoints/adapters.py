"""LoRA adapters as PEFT writes them: a folder of small matrices that are added to those of a base model."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lib.checkpoints import files
from lib.core.errors import InputError, require

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
# Ways to begin that leave the base as it was; others (PiSSA, OLoRA, CorDA, LoftQ) train beside a changed one.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
OPTIONS: Mapping[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "lora_bias": "LoRA with biases",
    "fan_in_fan_out": "transposed weights",
    "megatron_config": "Megatron layers",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "repeated layers",
    "target_parameters": "LoRA of parameters",
}
# Embeddings and heads in all layouts; a base without a head of its own has the embedding in its place.
TABLES = ("embed_tokens.weight", "word_embeddings.weight", "transformer.wte.weight")
HEADS = ("lm_head.weight", "diffusion_head.weight", "vocab_projector.weight", "transformer.ff_out.weight")
MERGE = "merge it where it was trained (merge_and_unload, then save_pretrained) and load that folder"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter folder.

    Attributes:
        folder: of the adapter.
        base: folder or GGUF of the model that it changes.
        settings: its adapter_config.json.
    """

    folder: Path
    base: Path
    settings: Mapping[str, Any]


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter instead of a model; trainers put the configuration of the base beside it.

    Raises:
        InputError: the weights of both are there, and loaders differ in which they take.
    """
    if not (folder.is_dir() and files.exists(folder / CONFIG)):
        return False
    whole = next((name for name in (files.SINGLE, files.INDEX, files.SPARSE) if files.exists(folder / name)), None)
    both = whole is not None and files.exists(folder / WEIGHTS)
    rule, remedy = f"{folder} must hold a model or an adapter", f"delete {WEIGHTS} if it was merged, else {whole}"
    require(not both, rule, f"{whole} and {WEIGHTS}", remedy)
    return not files.exists(folder / "config.json") or (whole is None and files.exists(folder / WEIGHTS))


def read(folder: Path) -> Adapter:
    """Check an adapter by its settings and headers, and find its base; reads no weights.

    Args:
        folder: one for which `is_adapter` holds.

    Raises:
        InputError: another kind of adapter, pickled weights, or a base that is neither here nor in the hub's cache.
    """
    settings = check_kind(folder)
    if not files.exists(folder / WEIGHTS):
        pickled = any(files.exists(folder / name) for name in ("adapter_model.bin", "adapter_model.pt"))
        got = f"adapter_model.bin alone, and {files.NO_PICKLE}," if pickled else "none"
        remedy = "save it again with PEFT, which writes safetensors" if pickled else "fetch the file"
        raise InputError(f"an adapter must hold {WEIGHTS}, got {got} in {folder}: {remedy}")
    files.check_safetensors(folder / WEIGHTS)
    return Adapter(folder, _base_of(settings, folder), settings)


def check_kind(folder: Path) -> Mapping[str, Any]:
    """Refuse what is more than `W + scale * B A`, by the settings alone.

    Args:
        folder: of the adapter.

    Returns:
        The settings.

    Raises:
        InputError: another kind of adapter.
    """
    settings = files.read_json(folder / CONFIG)
    kind = settings.get("peft_type")
    require(kind == "LORA", "an adapter must be a LoRA", f"{kind} in {folder}", MERGE)
    asked = [name for key, name in OPTIONS.items() if settings.get(key)]
    require(not asked, "an adapter must be a plain LoRA", f"{asked[:1]} in {folder}", MERGE)
    start = settings.get("init_lora_weights", True)
    rule = "an adapter must leave its base as it is"
    require(start in PLAIN_STARTS, rule, f"init_lora_weights {start!r} in {folder}", f"convert it as PEFT describes, or {MERGE}")
    return settings


def _base_of(settings: Mapping[str, Any], folder: Path) -> Path:
    """Return where the base lies: the folder that the adapter names, or the hub's cache."""
    name = str(settings.get("base_model_name_or_path") or "")
    require(bool(name), f"{folder / CONFIG} must name its base", "no base_model_name_or_path", "add the base's folder or hub id")
    beside = folder / name
    for path in (files.local_path(name), beside):
        if files.exists(path):
            return path
    cached = _cached(name, settings.get("revision")) if HUB_NAME.fullmatch(name) else []
    remedy = f"fetch it, or name its folder in {folder / CONFIG} as base_model_name_or_path"
    rule = f"the base {name!r} of {folder.name} must be a folder here or in the hub's cache"
    require(bool(cached), rule, "neither", remedy)
    require(len(cached) == 1, f"{rule}, in one revision", ", ".join(path.name[:7] for path in cached), remedy)
    return cached[0]


def _cached(name: str, revision: str | None) -> list[Path]:
    """Return the snapshots of a model in the hub's cache, the wanted one where a revision is named."""
    from huggingface_hub import constants

    kept = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    snapshots = sorted(kept.glob("snapshots/*/config.json"))
    if revision and revision != "main":
        return [path.parent for path in snapshots if path.parent.name.startswith(revision)]
    main = kept / "refs" / "main"
    if len(snapshots) > 1 and main.is_file():
        return [path.parent for path in snapshots if path.parent.name == main.read_text().strip()]
    return [path.parent for path in snapshots]


def merge_(weights: dict[str, Tensor], adapter: Adapter, *, dtype: torch.dtype) -> None:
    """Add an adapter to the weights of its base in place: W + scale * B A.

    Args:
        weights: of the base, under the names that its checkpoint has.
        adapter: from `read`.
        dtype: that the merged matrices get; the sum is made in float32 at least.

    Raises:
        InputError: a matrix that the base does not have, half a pair, or shapes that do not fit.

    Source: PEFT's `LoraLayer.get_delta_weight`. scale = lora_alpha / r, with `use_rslora` lora_alpha / sqrt(r); `rank_pattern`
        and `alpha_pattern` give r and lora_alpha of single modules.
    """
    stored = {name.removeprefix(PREFIX): value for name, value in load_file(adapter.folder / WEIGHTS).items()}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in stored.items():
        found = KEY.fullmatch(name)
        if found:
            pairs.setdefault(found["module"], {})[f"{found['table'] or ''}{found['side']}"] = value
        else:
            _replace_(weights, name, value, adapter)
    require(bool(stored), f"{adapter.folder / WEIGHTS} must hold an adapter", "no tensors", MERGE)
    changed = [*(f"{module}.weight" for module in pairs), *(name for name in stored if name in weights)]
    _check_tied(weights, changed, adapter)
    for module, pair in pairs.items():
        name = f"{module}.weight"
        rule = f"{adapter.folder} must change matrices of its base {adapter.base.name}"
        require(name in weights, rule, f"{name}, which it does not have", "name the base that it was trained on")
        wide = torch.promote_types(torch.float32, dtype)
        change = _change(module, {side: value.to(wide) for side, value in pair.items()}, adapter)
        fits = change.shape == weights[name].shape
        got = f"{tuple(change.shape)} for {tuple(weights[name].shape)}"
        require(fits, f"the change of {name} must have its shape", got, "name the base that it was trained on")
        weights[name] = (weights[name].to(wide) + change).to(dtype)


def _check_tied(weights: Mapping[str, Tensor], changed: Iterable[str], adapter: Adapter) -> None:
    """Refuse a changed embedding that is the base's head, too: PEFT trains beside the old head, and merging would change it.

    Source: PEFT's `ensure_weight_tying`, which trains both as one.
    """
    if adapter.settings.get("ensure_weight_tying") or any(name.endswith(HEADS) for name in weights):
        return
    table = next((name for name in changed if name.endswith(TABLES)), None)
    rule = f"an adapter must leave the embedding of {adapter.base.name} as it is, which is its head, too"
    require(table is None, rule, f"a change of {table}", "untie the base (tie_word_embeddings: false and a stored head) first")


def _replace_(weights: dict[str, Tensor], name: str, value: Tensor, adapter: Adapter) -> None:
    """Put a whole trained module (`modules_to_save`, trained biases) into the place of the base's."""
    known = name in weights and value.shape == weights[name].shape
    rule = f"{adapter.folder / WEIGHTS} must hold pairs lora_A, lora_B, or tensors of its base in their shape"
    require(known, rule, name, f"name the base that it was trained on, or {MERGE}")
    weights[name] = value


def _change(module: str, pair: Mapping[str, Tensor], adapter: Adapter) -> Tensor:
    """Return scale * B A of one module."""
    is_table = "embedding_A" in pair or "embedding_B" in pair
    sides = ("embedding_A", "embedding_B") if is_table else ("A", "B")
    require(set(pair) == set(sides), f"{module} must have lora_A and lora_B", str(sorted(pair)), "fetch the adapter again")
    first, second = pair[sides[0]], pair[sides[1]]
    settings, rank = adapter.settings, first.shape[0]
    stated = _pattern(settings.get("rank_pattern") or {}, module, settings.get("r"))
    fits = second.ndim == first.ndim == 2 and second.shape[1] == rank == stated
    got = f"{tuple(first.shape)} and {tuple(second.shape)}"
    require(fits, f"lora_A and lora_B of {module} must have rank {stated}", got, "restore adapter_config.json")
    alpha = float(_pattern(settings.get("alpha_pattern") or {}, module, settings.get("lora_alpha", 8)))
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    change = scale * (second @ first)
    return change.T if is_table else change


def _pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that names a module or the end of its path.

    >>> _pattern({"q_proj": 4}, "layers.0.self_attn.q_proj", 8), _pattern({"q": 4}, "layers.0.self_attn.q_proj", 8)
    (4, 8)
    """
    names: Iterable[str] = patterns
    found = (key for key in names if re.match(rf"(.*\.)?({key})$", module))
    return next((patterns[key] for key in found), otherwise)


def describe(adapter: Adapter) -> str:
    """Return what a result says about the adapter."""
    return f"LoRA {adapter.folder.name} merged into {adapter.base.name}"
