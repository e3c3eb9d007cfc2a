"""Weights that are not plain floats: which format they have by configuration and headers, and how to get what can be read."""

from collections.abc import Iterable, Mapping
from typing import Any

from lib.core.errors import InputError

CODES = ("F8", "F6_", "F4", "I8", "U8", "I16", "U16", "I32", "U32")  # dtypes of quantized weights; others are of buffers
FLOATS = ("F16", "BF16", "F32", "F64")  # of matrices that are read
PACKED = "pack-quantized"
NAMES = {
    "bitsandbytes": "bitsandbytes",
    "bnb": "bitsandbytes",
    "gptq": "GPTQ",
    "gptqmodel": "GPTQ",
    "awq": "AWQ",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mlx": "MLX",
}
# Ends of names beside a quantized weight, the telling ones first: GPTQ has AWQ's names and one more.
MARKS = {
    "bitsandbytes": (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".SCB"),
    "GPTQ": (".g_idx",),
    "AWQ": (".qweight", ".qzeros"),
    "fp8": (".weight_scale_inv", ".input_scale"),
    "compressed-tensors": (".weight_packed", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
    "MLX": (".scales", ".biases"),
    "quantized": (".weight_scale", ".weight_scale_2", ".qscale", "._data", "._scale"),
}
UNQUANTIZED = "use the repository of the unquantized model"
DEQUANTIZE = f"{UNQUANTIZED}, or load this one with transformers where its kernels run, dequantize() it and save_pretrained(NEW)"
REMEDIES = {
    "MLX": f"{UNQUANTIZED}, or mlx_lm.convert --dequantize (or mlx_lm.fuse --dequantize) writes full weights",
    "AWQ": UNQUANTIZED,
    "GPTQ": UNQUANTIZED,
}


def method(raw: Mapping[str, Any]) -> str | None:
    """Return the name of the quantization that a configuration states, None where it states none.

    >>> method({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    'bitsandbytes'
    >>> method({"quantization": {"group_size": 64, "bits": 4}})
    'MLX'
    """
    stated = raw.get("quantization_config") or raw.get("compression_config")
    if not isinstance(stated, Mapping):
        return "MLX" if isinstance(raw.get("quantization"), Mapping) else None
    said = str(stated.get("quant_method") or "").lower()
    if not said:
        mlx = {"group_size", "bits"} <= stated.keys() and "quantization" in raw
        said = "mlx" if mlx else "bitsandbytes" if any("load_in" in key for key in stated) else "unnamed"
    return NAMES.get(said, said)


def is_packed(raw: Mapping[str, Any]) -> bool:
    """Tell whether a configuration states the format of `export.save_packed`: whole numbers, symmetric, scales by group."""
    stated = raw.get("quantization_config")
    if not isinstance(stated, Mapping) or method(raw) != "compressed-tensors" or stated.get("format") != PACKED:
        return False
    schemes = [group.get("weights") or {} for group in (stated.get("config_groups") or {}).values()]
    wanted = {"type": "int", "symmetric": True, "strategy": "group"}
    return bool(schemes) and all({key: scheme.get(key) for key in wanted} == wanted for scheme in schemes)


def stored(entries: Mapping[str, str]) -> str | None:
    """Return the quantization that the tensors of a checkpoint have by names and kinds; None for plain floats.

    Args:
        entries: the dtype, as safetensors writes it, by the name of the tensor.
    """
    for kind, ends in MARKS.items():
        if any(name.endswith(ends) for name in entries):
            return kind
    kinds = {
        kind for name, kind in entries.items() if kind.startswith(CODES) or (name.endswith(".weight") and kind not in FLOATS)
    }
    if not kinds:
        return None
    return "fp8" if any(kind.startswith("F8") for kind in kinds) else "quantized"


def check_stored(raw: Mapping[str, Any], entries: Mapping[str, str], where: object) -> None:
    """Refuse quantized weights that are not read here.

    Args:
        raw: the configuration.
        entries: as in `stored`.
        where: of the checkpoint, for the error.

    Raises:
        InputError: such weights, by name, with the way to full ones.
    """
    found = stored(entries)
    if found is None or (is_packed(raw) and found == "compressed-tensors"):
        return
    said = method(raw)
    raise _refused(said if said and said != "unnamed" else found, where)


def check_stated(raw: Mapping[str, Any], names: Iterable[str] | None, where: object) -> None:
    """Refuse a quantized checkpoint by its configuration, before its weights are fetched.

    Args:
        raw: the configuration.
        names: of its tensors, from the index, where there is one: a configuration is left over beside names of plain weights.
        where: of the checkpoint, for the error.

    Raises:
        InputError: as `check_stored`.
    """
    said = method(raw)
    if said is None or is_packed(raw):
        return
    if names is not None and said != "fp8" and stored(dict.fromkeys(names, "F32")) is None:
        return
    raise _refused(said, where)


def left_over(raw: Mapping[str, Any], entries: Mapping[str, str]) -> str | None:
    """Return the quantization that a configuration states although the weights are plain floats, which is ignored."""
    return method(raw) if stored(entries) is None else None


def _refused(kind: str, where: object) -> InputError:
    got = kind if kind in ("quantized",) else f"{kind} quantization"
    remedy = REMEDIES.get(kind, DEQUANTIZE)
    return InputError(f"weights must be plain floats, or packed as save_packed does, got {got} in {where}: {remedy}")
