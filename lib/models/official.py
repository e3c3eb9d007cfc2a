"""Write a changed model as its family's own code reads it: the files, names, dtypes and settings of the checkpoint it came from.

What `export.save_plain` writes is for transformers' classes; this is for those who run LLaDA's or Dream's own code.
"""

import json
import shutil
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.checkpoints import contents, lookup, recognition, refusals, renaming
from lib.checkpoints.files import INDEX, TEXT_FILES, names_of, read_json, weight_files
from lib.checkpoints.gguf import headers
from lib.checkpoints.renaming import LLADA_BLOCK, LLADA_TOP
from lib.core.config import ModelSource, typed_path
from lib.core.errors import InputError, require
from lib.core.provenance import write_json, write_text
from lib.models import export, loading, streaming
from lib.models.language_model import LanguageModel
from lib.models.layers.anatomy import anatomy_of

Layout = Literal["llada", "dream"]
# What goes along: settings, tokenizer, code, licence. Numbers and pictures of the base would be untrue of the changed model.
COPIED = ("*config*.json", *TEXT_FILES, "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
AS_TRANSFORMERS = "write it as transformers"
FACTS = (
    "is_causal",
    "stop_token_ids",
    "mask_token_id",
    "logit_shift",
    "attention_kind",
    "block_length",
    "block_origin",
    "family",
)
# LLaDA's own settings that a Llama has no name for, with the values that make LLaDA's code compute one.
LLADA_SETTINGS: Mapping[str, Any] = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "block_type": "llama", "activation_type": "silu",
    "layer_norm_type": "rms", "layer_norm_with_affine": True, "bias_for_layer_norm": False, "include_bias": False,
    "include_qkv_bias": False, "rope": True, "rope_full_precision": True, "alibi": False, "alibi_bias_max": 8.0,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "input_emb_norm": False, "scale_logits": False,
    "attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0, "block_group_size": 1, "flash_attention": False,
    "init_device": "cpu", "init_fn": "normal", "init_std": 0.02, "multi_query_attention": None, "use_cache": False,
}  # fmt: skip


def other_layout(source: Path) -> str:
    """Return why a checkpoint's layout cannot be written again, empty where it can.

    Args:
        source: as `lookup.resolve` returns it.
    """
    if headers.find(source) is not None:
        return "a GGUF file"
    if source.is_dir() and contents.is_sparse(source):
        return "a sparse container"
    files = contents.folder_of(source)
    if refusals.is_packed(read_json(files / "config.json")):
        return "packed weights"
    return "experts in stacks" if any(map(renaming.STACKED.fullmatch, contents.places(files))) else ""


def stored_dtypes(source: Path) -> tuple[torch.dtype, ...]:
    """Return the dtypes of the tensors in a checkpoint, the commonest first.

    Args:
        source: as `lookup.resolve` returns it.
    """
    stored = list(contents.dtypes(source).values())
    return tuple(sorted(set(stored), key=lambda dtype: (-stored.count(dtype), str(dtype))))


def load_as_stored(source: ModelSource) -> LanguageModel:
    """Load a model onto the CPU with every tensor in its own dtype, to be written and not to compute with.

    One dtype for all would round what is stored in a wider one, such as a router in float32 beside bfloat16 matrices.

    Args:
        source: as in `models.load`.

    Raises:
        InputError: as in `models.load`.
    """
    folder = lookup.resolve(source)
    stored = contents.dtypes(folder)
    model = loading.load(source, dtype=reduce(torch.promote_types, stored.values()))
    found = loading.opened(folder)
    made = renaming.unstacked(renaming.plan(stored, found.family, found.config, folder=found.files))
    for name, tensor in model.network.state_dict(keep_vars=True).items():
        if name in made:  # a tied head has no tensor of its own
            tensor.data = tensor.data.to(reduce(torch.promote_types, (stored[piece.key] for piece in made[name])))
    return model


def save_as_read(model: LanguageModel, folder: Path | str) -> Path:
    """Write a model in the layout of the checkpoint that it was loaded from, each tensor in its stored dtype, bit for bit.

    Names lose what trainers put before them (`module.`), a LoRA is merged into its base, and what the network has no use for (the
    images of LLaDA-V) is copied. Code that lies in a local folder is copied and not run; that of the hub is named by its place.

    Args:
        model: of the shapes it was loaded with: pruned, or rounded.
        folder: a new folder.

    Returns:
        The folder; `models.load` and the family's own code read it.

    Raises:
        InputError: the folder exists, packed weights or a GGUF, or tensors of another shape or number than those that were read.
    """
    source = lookup.resolve(model.source)
    why = other_layout(source)
    require(not why, "a layout to be written again must be of plain floats", why, "write it with export.save_plain")
    found = loading.opened(source)
    own = model.network.state_dict()
    parts: dict[tuple[Path, str], list[tuple[tuple[int, int], str]]] = {}
    for name, place in streaming.stored_tensors(found).items():
        parts.setdefault((place.file, place.key), []).append((place.rows or (0, 0), name))
    _check_same(model, parts, own)
    plain = {key: name for name, (_, key) in contents.places(found.files).items()}
    with export.new_folder(folder) as partial:
        _copy_beside(found, source, partial)
        write_json(partial / "config.json", _settings(model, found))
        if not lookup.is_local(model.source):
            _place_code(partial, model.source.source)
        for file in weight_files(found.files):
            with safe_open(file, framework="pt") as stored:
                tensors = {
                    plain[key]: _tensor(stored.get_tensor(key), parts.get((file, key), []), own)
                    for key in stored.keys()  # noqa: SIM118 (not a mapping)
                }
            save_file(tensors, partial / file.name, metadata={"format": "pt"})
        if (found.files / INDEX).exists():
            index = read_json(found.files / INDEX)
            write_json(partial / INDEX, {**index, "weight_map": {plain[key]: at for key, at in index["weight_map"].items()}})
    return typed_path(Path(folder).expanduser())


def save_as(model: LanguageModel, folder: Path | str, *, layout: Layout) -> Path:
    """Write a diffusion model of transformers' classes with LLaDA's or Dream's names and settings.

    Args:
        model: a Llama that looks both ways without a shift, for `llada`; a Qwen2 with one, for `dream`.
        folder: a new folder.
        layout: whose.

    Returns:
        The folder; weights are in the dtype of the network.

    Raises:
        InputError: the folder exists, or a network that the family's own code cannot express.
    """
    _check_expressible(model, layout)
    weights = export.state(model)
    if layout == "llada":
        biased = [name for name in weights if name.endswith(".bias")]
        require(not biased, "a LLaDA must have no biases", str(biased[:1]), AS_TRANSFORMERS)
        weights = {llada_key(name): tensor for name, tensor in weights.items()}
    with export.new_folder(folder) as partial:
        export.write_beside(model, partial)
        settings = _llada_settings(model) if layout == "llada" else _dream_settings(model, read_json(partial / "config.json"))
        write_json(partial / "config.json", settings)
        save_torch_state_dict(weights, partial, metadata={"format": "pt"})
    return typed_path(Path(folder).expanduser())


def _check_expressible(model: LanguageModel, layout: Layout) -> None:
    """Refuse a network that the code of a layout's family would compute otherwise."""
    config: Any = model.network.config
    kind, shift = {"llada": ("llama", 0), "dream": ("qwen2", 1)}[layout]
    rule = f"the layout of {layout} must hold a {kind} diffusion model with logit shift {shift}"
    got = f"{config.model_type}, {model.attention} attention, logit shift {model.logit_shift}"
    fits = (config.model_type, model.attention, model.logit_shift) == (kind, "full", shift)
    require(fits, rule, got, AS_TRANSFORMERS)
    rule = f"the layout of {layout} must hold a model of masked noise"
    require(model.noise.is_masked, rule, f"{model.noise} noise", AS_TRANSFORMERS)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    whole = head * config.num_attention_heads == config.hidden_size
    require(whole, f"heads of {layout} must make up the width", f"{config.num_attention_heads} of {head}", AS_TRANSFORMERS)
    scaled = config.rope_parameters.get("rope_type", "default") != "default"
    require(not scaled, f"positions of {layout} must be rotated without scaling", str(config.rope_parameters), AS_TRANSFORMERS)
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    require(not windows, f"every layer of {layout} must see all positions", "sliding windows", AS_TRANSFORMERS)
    silu = layout == "dream" or config.hidden_act == "silu"  # LLaDA's code has one activation, Dream's names it as Qwen2's
    require(silu, f"the activation of {layout} must be silu", config.hidden_act, AS_TRANSFORMERS)


def llada_key(name: str) -> str:
    """Return LLaDA's name of a Llama's tensor.

    >>> llada_key("model.layers.3.self_attn.o_proj.weight")
    'model.transformer.blocks.3.attn_out.weight'
    """
    module = name.removesuffix(".weight")
    top = {own: short for short, own in LLADA_TOP.items()}
    if module in top:
        return f"model.transformer.{top[module]}.weight"
    _, _, block, rest = module.split(".", 3)
    return f"model.transformer.blocks.{block}.{ {own: short for short, own in LLADA_BLOCK.items()}[rest] }.weight"


def _check_same(model: LanguageModel, parts: Mapping[Any, list[tuple[Any, str]]], own: Mapping[str, Tensor]) -> None:
    """Refuse a network with other tensors than its checkpoint."""
    names = {name for of_key in parts.values() for _, name in of_key}
    odd = sorted(
        names ^ own.keys() - ({anatomy_of(model.network.config).head} if model.network.config.tie_word_embeddings else set())
    )
    rule = f"a model to be written as it was read must have the tensors of {model.source.source}"
    require(not odd, rule, f"{odd[:1]} more or less", "write it with export.save_plain")


def _tensor(old: Tensor, parts: list[tuple[tuple[int, int], str]], own: Mapping[str, Tensor]) -> Tensor:
    """Return a stored tensor with the weights of the network; as it was where the network has no use for it."""
    if not parts:
        return old
    new = torch.cat([own[name].detach() for _, name in sorted(parts)]) if len(parts) > 1 else own[parts[0][1]].detach()
    if new.shape != old.shape:
        raise InputError(
            f"{parts[0][1]} must have shape {tuple(old.shape)} as it was read, got {tuple(new.shape)}: use export.save_plain"
        )
    new = new.cpu()
    # A weight that was not changed keeps what was stored, also where the network computes with fewer digits.
    return torch.where(new == old.to(new.dtype), old, new.to(old.dtype)).contiguous()


def _copy_beside(found: loading.Opened, source: Path, partial: Path) -> None:
    """Copy all that goes along; an adapter's tokenizer is its own, where it has one."""
    for folder in dict.fromkeys((found.files, contents.text_folder(source))):
        for file in (file for pattern in COPIED for file in folder.glob(pattern) if file.is_file()):
            target = partial / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            if not file.name.startswith("adapter_"):
                shutil.copyfile(file, target)


def _settings(model: LanguageModel, found: loading.Opened) -> dict[str, Any]:
    """Return config.json as it was, with what tells the model apart from others where its folder's name does not any more."""
    raw = read_json(found.files / "config.json")
    names = [*([] if lookup.is_local(model.source) else [model.source.source]), *names_of(found.files)]
    telling = [name for name in names if recognition.tells(found.family, name)]
    if telling or "_name_or_path" not in raw:  # a family or blocks that are known by a name alone must keep it
        raw["_name_or_path"] = (telling or names)[0]
    if found.family.layout == "plain":  # the card's loop reads them
        raw |= {key: getattr(found.config, key) for key in FACTS if hasattr(found.config, key)}
    return raw


def _place_code(folder: Path, place: str) -> None:
    """Let all settings in a folder, those of the tokenizer too, name the code of the hub by its place: it was not fetched."""
    for file in folder.glob("*config*.json"):
        settings = read_json(file)
        if isinstance(settings.get("auto_map"), dict):
            settings["auto_map"] = {key: _placed(value, place) for key, value in settings["auto_map"].items()}
            write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _placed(code: Any, place: str) -> Any:
    """Name the hub's checkpoint before a class of its code, or before each of several, as transformers writes it."""
    if isinstance(code, list):
        return [_placed(each, place) for each in code]
    return f"{place}--{code}" if isinstance(code, str) and "--" not in code else code


def _llada_settings(model: LanguageModel) -> dict[str, Any]:
    """Translate a Llama's configuration to LLaDA's."""
    config: Any = model.network.config
    return {
        **LLADA_SETTINGS,
        "d_model": config.hidden_size,
        "mlp_hidden_size": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "max_sequence_length": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "weight_tying": config.tie_word_embeddings,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "mask_token_id": model.mask_token_id,
        "stop_token_ids": list(model.stop_token_ids),  # else it would get those of LLaDA's vocabulary
        **({"seen_token_ids": list(model.seen_token_ids)} if model.seen_token_ids else {}),
        "torch_dtype": str(model.network.dtype).removeprefix("torch."),
    }


def _dream_settings(model: LanguageModel, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a Qwen2's configuration to Dream's, which has the same names but for the rotations."""
    dropped = ("rope_parameters", "layer_types", "is_causal", "logit_shift", "attention_kind", "block_length", "block_origin")
    kept = {key: value for key, value in raw.items() if key not in (*dropped, "family", "dtype")}
    config: Any = model.network.config
    base = {"rope_theta": config.rope_parameters["rope_theta"], "rope_scaling": None, "mask_token_id": model.mask_token_id}
    dtype = str(model.network.dtype).removeprefix("torch.")
    return {**kept, **base, "architectures": ["DreamModel"], "model_type": "Dream", "torch_dtype": dtype}
