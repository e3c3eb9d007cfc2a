"""Tell which family a checkpoint is of from its configuration, the names of its tensors and its own name; refuse the others.

Reads no files: `lookup.family_of` brings what lies on disk. A plain Llama or Qwen folder that looks like a diffusion model and
does not say whether it is one is refused, because reading it as an autoregressive model would be wrong without a word.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lib.checkpoints.families import DIFFUSION, ENCODERS, FAMILIES, NO_WINDOW, PLAIN, Attention, Family
from lib.core.errors import InputError, require

TABLE = "README's table lists the families that are"
# What architectures[0], model_type or the checkpoint's name say -> what it is, and why no class of transformers computes it.
REFUSED = {
    r"llada2\.2|llada22": "LLaDA 2.2, whose blocks are routed to experts as a whole and whose tokens are deleted and inserted",
    r"bd3lm": "a BD3-LM, a DiT with cross attention",
    r"^mdlm$|mdlmfor": "an MDLM, a DiT with adaptive norms",
    r"^duo$|duomodel|sdllm": "a Duo model, a DiT that reads the time",
    r"gidd": "a GIDD model, which has a key and a value bias a head and soft-capped logits",
    r"wedlm": "a WeDLM, which moves known tokens to the front of a causal window",
    r"arclm": "an arcLM, whose linear attention stays causal",
    r"lfm2": "an LFM2, whose convolutions look both ways in LFM2.5-Encoder-Diffusion and back only in transformers",
    r"steerling": "a Steerling, which decomposes states into concepts",
    r"diffusion_?gemma": "a DiffusionGemma, which reads prompt and canvas in two passes",
    r"diffencodermodel": "a Nemotron-Diffusion-Research, whose layout is not known here",
    r"dreamreasoner": "a DreamReasoner, a Qwen3 whose logit shift and block grid are not known here",
}
ROUTED = re.compile(r"block.*rout|rout.*block|(delete|insert)_token")
SIGNS = ("mask_token_id", "logit_shift", "attention_kind", "block_length", "noise")
BLOCKS_IN_NAME = re.compile(r"-b(\d+)(?![\w.])")


def recognise(raw: Mapping[str, Any], *, keys: Collection[str] = (), name: str = "", mask_token: str | None = None) -> Family:
    """Return the family of a checkpoint, `architectures[0]` first, `model_type` second.

    Args:
        raw: its config.json.
        keys: names of its tensors; empty when they are not there yet.
        name: its own, as far as it is known.
        mask_token: the mask token of its tokenizer's configuration.

    Returns:
        The record, with block length and attention as this checkpoint's configuration or name says.

    Raises:
        InputError: another family, a variant that the network class cannot express, or a folder that does not say what it is.
    """
    architecture, model_type = _said(raw)
    _refuse_known(architecture, model_type, name, raw=raw, keys=keys)
    family = _by_class(raw, architecture, model_type, keys, name)
    if family in PLAIN:
        family = _told_apart(family, raw, name=name, mask_token=mask_token)
    _check_options(family, raw)
    return _with_blocks(family, raw, name)


def _said(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Return the first architecture and the model type, empty where the configuration has none."""
    architectures = raw.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else architectures
    return str(first or ""), str(raw.get("model_type") or "")


def _refuse_known(architecture: str, model_type: str, name: str, *, raw: Mapping[str, Any], keys: Collection[str]) -> None:
    """Refuse families whose code is known and computes something else than any class of transformers."""
    found = f"architectures {architecture!r} and model_type {model_type!r}"
    for pattern, what in REFUSED.items():
        hit = any(re.search(pattern, said.lower()) for said in (architecture, model_type))
        if pattern.startswith("llada2"):  # same class as 2.0 and 2.1
            hit |= bool(re.search(pattern, name.lower())) or any(ROUTED.search(key) for key in raw)
        if hit and not architecture.startswith("A2D"):
            raise InputError(f"a checkpoint must be of a family in the registry, got {what} ({found}): {TABLE}")
    if "linear_attention" in (raw.get("layer_types") or ()) or any(".linear_attn." in key for key in keys):
        raise InputError(
            f"attention of a diffusion model must look both ways, got causal linear attention as in arcLM ({found}): {TABLE}"
        )


def _by_class(raw: Mapping[str, Any], architecture: str, model_type: str, keys: Collection[str], name: str) -> Family:
    """Return the record that fits, before a plain folder is looked at closely."""
    everything = (*DIFFUSION, *PLAIN, *ENCODERS)
    candidates = [each for each in everything if architecture in each.architectures]
    if candidates and candidates[0] in PLAIN and model_type not in ("", candidates[0].name):  # a2d-llama may say LlamaForCausalLM
        candidates = []
    if not candidates:
        candidates = [each for each in everything if model_type in each.model_types]
        fitting = [each for each in candidates if all(field in raw for field in each.fields)] or candidates[:1]
        most = max((len(each.fields) for each in fitting), default=0)
        candidates = [each for each in fitting if len(each.fields) == most]
    called = [each for each in candidates if each.called and re.search(each.called, name.lower())]
    candidates = called or [each for each in candidates if not each.called]
    if not candidates:
        raise InputError(
            f"a checkpoint must be of a family in the registry, got architectures {architecture or None!r} and model_type "
            f"{model_type or None!r}: {_closest(architecture, model_type, keys)}; {TABLE}"
        )
    family = candidates[0]
    if family.network == "Qwen2" and any(key.endswith(".q_norm.weight") for key in keys):
        raise InputError(
            f"a checkpoint of {family.name} must have no norms of queries, got q_norm.weight as in a Qwen3 (DreamReasoner has "
            f"them, and its logit shift and block grid are not known here): {TABLE}"
        )
    return family


def tells(family: Family, name: str) -> bool:
    """Tell whether a checkpoint's name says what its configuration may not: which family it is of, or how long its blocks are.

    >>> tells(FAMILIES["sdar"], "JetLM/SDAR-8B-Chat-b32"), tells(FAMILIES["sdar"], "JetLM/SDAR-8B-Chat")
    (True, False)
    """
    called = bool(family.called) and bool(re.search(family.called, name.lower()))
    return called or (bool(family.block_field) and bool(BLOCKS_IN_NAME.search(name)))


def _closest(architecture: str, model_type: str, keys: Collection[str]) -> str:
    """Say which known family an unknown checkpoint looks like most, by its names and its tensors."""
    names = {_stem(said): each.name for each in FAMILIES.values() for said in (*each.architectures, *each.model_types, each.name)}
    asked = [_stem(said) for said in (architecture, model_type) if said]
    close = [match for said in asked for match in difflib.get_close_matches(said, names, n=1, cutoff=0.7)]
    if close:
        return f"the closest is {names[close[0]]}"
    if any("transformer.blocks." in key for key in keys):
        return "its tensors are named as llada's"
    if any(key.endswith("query_key_value.weight") for key in keys):
        return "its tensors are named as llada2's"
    if any(key.endswith("self_attn.q_norm.weight") for key in keys):
        return "its tensors are named as qwen3's"
    if any(key.endswith("self_attn.q_proj.weight") for key in keys):
        return "its tensors are named as llama's"
    return "none is close"


def _stem(said: str) -> str:
    """Leave out what most names of classes end with."""
    return re.sub(r"(forcausallm|modellm|lmheadmodel|model)$", "", said.lower())


def _told_apart(family: Family, raw: Mapping[str, Any], *, name: str, mask_token: str | None) -> Family:
    """Return what a folder of a plain class is: autoregressive, a diffusion model that says so, or one known by its name."""
    if raw.get("is_causal") is False:
        known = FAMILIES.get(str(raw.get("family")), family)
        kind = raw.get("attention_kind") or (known.attention if known.attention != "causal" else "full")
        kinds = ("full", "block-causal", "context-causal")
        require(kind in kinds, f"attention_kind must be one of {', '.join(kinds)}", repr(kind), "mend config.json")
        blocks = known.block_length if kind != "full" else None
        shift = 0 if known in PLAIN else known.logit_shift
        told = replace(family, name=known.name, attention=kind, logit_shift=shift, block_length=blocks, sampler=known.sampler)
        # where attention goes by blocks a ready mask takes the place of windows; Ministral3 has no switch for its own
        windows = NO_WINDOW | ({"sliding_window": (None,)} if family.network == "Ministral3" else {})
        told = told if kind == "full" else replace(told, options=windows)
        return replace(told, mask_token_id=known.mask_token_id, block_origin=known.block_origin, state=known.state)
    if raw.get("is_causal") is True:
        return family
    mute = [each for each in DIFFUSION if each.called and each.network == family.network and each.layout == "copy"]
    found = next((each for each in mute if re.search(each.called, name.lower()) or raw.get("family") == each.name), None)
    if found:
        return found
    signs = _signs(family, raw, mask_token)
    rule = f"a {family.name} folder that looks like a diffusion model must say whether it is one"
    remedy = "add is_causal: false to config.json (and mask_token_id, and logit_shift: 1 where logits are shifted), else true"
    require(not signs, rule, ", ".join(signs), remedy)
    return family


def _signs(family: Family, raw: Mapping[str, Any], mask_token: str | None) -> list[str]:
    """List what makes a plain folder look like a diffusion model or like code of its own."""
    architecture, _ = _said(raw)
    signs = [f"{key} {raw[key]!r}" for key in SIGNS if raw.get(key) is not None]
    foreign = architecture and architecture not in family.architectures
    signs += [f"architectures {architecture!r}"] if foreign else []
    auto_map = raw.get("auto_map")
    own = [key for key in auto_map if key.startswith("AutoModel")] if isinstance(auto_map, dict) else []
    signs += [f"auto_map with {own[0]}"] if own else []
    return signs + ([f"mask token {mask_token!r} in its tokenizer"] if mask_token else [])


def _check_options(family: Family, raw: Mapping[str, Any]) -> None:
    """Refuse settings that the family's code takes and the network class cannot express, and those that its code ignores."""
    for key, allowed in family.options.items():
        got = raw.get(key, allowed[0])
        if any(item not in allowed for item in (got if isinstance(got, list) else [got])):
            raise InputError(
                f"a checkpoint of {family.name} must have {key}: {allowed[0]}, got {got!r}: this variant is not supported"
            )
    if family.layout == "plain":
        return
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = (scaling.get("rope_type") or scaling.get("type") or "default") if isinstance(scaling, dict) else scaling
    if kind not in family.rope_types:
        raise InputError(
            f"rope_scaling of {family.name} must be {' or '.join(family.rope_types)}, got {kind!r}: the family's own code "
            "ignores it or reads it otherwise"
        )


def _with_blocks(family: Family, raw: Mapping[str, Any], name: str) -> Family:
    """Return the record with the block length that the configuration or the name of a release says."""
    fields = [key for key in ("block_length", family.block_field) if key and raw.get(key) is not None]
    named = BLOCKS_IN_NAME.search(name) if family.block_field and family.attention == "block-causal" else None
    length = raw[fields[0]] if fields else int(named[1]) if named else family.block_length
    valid = length is None or (isinstance(length, int) and not isinstance(length, bool) and length > 0)
    require(valid, "a block length must be a positive whole number", repr(length), "mend config.json")
    attention: Attention = family.attention
    if family.name.startswith("a2d-"):
        attention = "block-causal" if length else "full"
        rule, remedy = "a BD3-LM of dllm must say its block length", "add block_size to config.json, as it was trained"
        require(bool(length) or "bd3lm" not in name.lower(), rule, f"none in {name}", remedy)
    if attention in ("full", "causal"):
        return replace(family, attention=attention, block_length=None, block_origin="prompt")
    require(length is not None, "attention by blocks must have a block length", "none", "add block_length to config.json")
    origin = raw.get("block_origin") or family.block_origin
    require(origin in ("start", "prompt"), "block_origin must be start or prompt", repr(origin), "mend config.json")
    return replace(family, attention=attention, block_length=length, block_origin=origin)
