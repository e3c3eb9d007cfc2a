"""A profile file becomes frozen dataclasses; every setting is checked before any work starts."""

import difflib
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from lib.core.errors import InputError, require
from lib.core.sections import (
    Grid,
    JointQuantization,
    ModelSource,
    PruningBaselines,
    SinkAwarePruning,
    SinkTraces,
    Timing,
    VarianceAnalysis,
    between,
    one_of,
)

__all__ = ["PROFILES", "ROOT", "Config", "InputError", "ModelSource", "load", "notebooks", "output_root", "to_dict"]

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("quick", "full", "paper", "rehearsal")


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    profile: str = field(metadata=one_of(*PROFILES))
    seed: int = field(metadata=between(0, 2**31 - 1))
    device: str = field(metadata=one_of("auto", "cpu", "cuda"))
    dtype: str = field(metadata=one_of("auto", "float32", "bfloat16"))
    models: dict[str, ModelSource]
    sink_traces: SinkTraces
    variance_analysis: VarianceAnalysis
    pruning_baselines: PruningBaselines
    sink_aware_pruning: SinkAwarePruning
    joint_quantization: JointQuantization
    timing: Timing
    grid: Grid | None = None

    def __post_init__(self) -> None:
        named = {
            "variance_analysis.answering_models": self.variance_analysis.answering_models,
            "pruning_baselines.models": self.pruning_baselines.models,
            "sink_aware_pruning.models": self.sink_aware_pruning.models,
            "joint_quantization.models": self.joint_quantization.models,
            "timing.models": self.timing.models,
        }
        for name, chosen in named.items():
            require(
                set(chosen) <= set(self.models),
                f"{name} must be among {', '.join(self.models) or 'no models'}",
                str(list(chosen)),
                "models from elsewhere go to extra_models",
            )


def load(profile: str, *, seed: int | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """Read `configs/<profile>.yaml`, put the overrides in, and check every value.

    Args:
        profile: `quick`, `full`, `paper` or `rehearsal`.
        seed: replaces the seed of the file.
        overrides: dotted key to value, such as `{"sink_traces.prompts": 4}`; a string is read as YAML, as on the command line.

    Returns:
        The checked settings.

    Raises:
        InputError: unknown profile or key, wrong type, or value out of range.

    >>> load("quick", overrides={"sink_traces.prompts": "4"}).sink_traces.prompts
    4
    """
    if profile not in PROFILES:
        raise InputError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}{_nearest(profile, PROFILES)}")
    raw = _read_yaml(ROOT / "configs" / f"{profile}.yaml")
    if raw.get("profile") != profile:
        raise InputError(f"configs/{profile}.yaml must say profile: {profile}, got {raw.get('profile')!r}: restore the file")
    for key, value in (overrides or {}).items():
        if key == "profile":
            raise InputError(f"profile must be chosen by name, got an override profile={value}: run that profile instead")
        _override_(raw, key, _parse_scalar(value, key) if isinstance(value, str) else value)
    if seed is not None:
        raw["seed"] = seed
    return typing.cast(Config, _build(Config, raw, ""))


def to_dict(config: Config) -> dict[str, object]:
    """Return the settings as plain dicts and lists, ready for JSON; a profile without a grid has no such group."""
    return {key: _plain(value) for key, value in asdict(config).items() if value is not None}


def output_root() -> Path:
    """Return the folder that `figures/`, `results/` and `runs/` go to: the project, or the folder named by SINKS_OUTPUT."""
    return Path(os.environ.get("SINKS_OUTPUT") or ROOT).resolve()


def notebooks(root: Path = ROOT) -> dict[str, Path]:
    """Return the numbered notebooks that exist, by number."""
    return {path.name[:2]: path for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"


def _read_yaml(path: Path) -> dict[str, typing.Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"configs/{path.name} must be a readable YAML file, got {message}: restore or mend it") from error
    if not isinstance(raw, dict):
        raise InputError(f"configs/{path.name} must hold settings by name, got {type(raw).__name__}: restore or mend it")
    return raw


def _parse_scalar(text: str, key: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"the value of {key} must be YAML, got {text!r}: quote it") from error


def _override_(raw: dict[str, typing.Any], key: str, value: object) -> None:
    """Set a dotted key in place; the section must exist, models may be added."""
    *sections, last = key.split(".")
    target: typing.Any = raw
    for depth, name in enumerate(sections):
        if sections[:depth] == ["models"]:
            target.setdefault(name, {})
        if not isinstance(target, dict) or name not in target:
            known = list(target) if isinstance(target, dict) else []
            raise InputError(f"setting {key!r} must name an existing section, got {name!r}{_nearest(name, known)}")
        target = target[name]
    if not isinstance(target, dict):
        raise InputError(f"setting {key!r} must name one value, got more dots than there are sections: remove .{last}")
    target[last] = value


def _build(cls: type, raw: object, where: str) -> object:
    """Turn a mapping into the dataclass `cls`, refusing missing, unknown and mistyped keys."""
    if not isinstance(raw, dict):
        raise InputError(f"{where or 'the file'} must be a group of settings, got {raw!r}: see configs/quick.yaml")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    for key in raw:
        if key not in hints:
            raise InputError(f"settings must be known ones, got {prefix + str(key)!r}{_nearest(str(key), hints)}")
    values = {}
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name in raw:
            values[item.name] = _convert(hints[item.name], raw[item.name], prefix + item.name)
            _check_range(values[item.name], item.metadata, prefix + item.name)
        elif item.default is MISSING:
            raise InputError(f"configuration must be complete, got no {prefix + item.name}: add it to the file")
    return cls(**values)


def _convert(hint: typing.Any, value: object, where: str) -> object:
    """Check `value` against a type hint and return it (int where a float is wanted becomes float)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, where) for item in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool):
        return value
    name = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, "a list or group")
    raise InputError(f"{where} must be {name}, got {value!r} ({type(value).__name__}): see configs/quick.yaml for an example")


def _check_range(value: object, metadata: Mapping[str, typing.Any], where: str) -> None:
    if value is None or not metadata:
        return
    if isinstance(value, tuple):
        for item in value:
            _check_range(item, metadata, f"every value of {where}")
        return
    if "choices" in metadata and value not in metadata["choices"]:
        raise InputError(f"{where} must be one of {', '.join(metadata['choices'])}, got {value!r}: choose one of them")
    if "low" in metadata and not metadata["low"] <= value <= metadata["high"]:
        raise InputError(f"{where} must be in [{metadata['low']}, {metadata['high']}], got {value!r}: choose a value inside")
