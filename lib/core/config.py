"""A profile file becomes frozen settings; every one is checked before any work starts."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import StrictInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from lib.core.errors import InputError, require
from lib.core.sections import (
    JointQuantization,
    ModelSource,
    PruningBaselines,
    Section,
    SinkAwarePruning,
    SinkTraces,
    Timing,
    VarianceAnalysis,
    between,
)
from lib.core.settings.grid import Grid

__all__ = ["PROFILES", "ROOT", "Config", "InputError", "ModelSource", "load", "notebooks", "output_root", "to_dict", "typed_path"]

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ("quick", "full", "laptop", "paper", "rehearsal")
KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "literal_error": "text",
    "bool_type": "true or false",
    "dataclass_type": "a group of settings",
}


class _Loader(yaml.SafeLoader):
    """YAML whose plain words mean what people mean: `010` is ten, `1e-3` a number; `2:4`, `yes` and a date are text."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0].endswith((":null", ":merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern, _read in (
    ("bool", "true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    ("int", r"[-+]?\d+(_\d+)*", int),
    ("float", r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?", float),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"({_pattern})$", re.ASCII), None)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", lambda _, node, read=_read: read(str(node.value)))


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """All settings of one run."""

    profile: Literal["quick", "full", "laptop", "paper", "rehearsal"]
    seed: Annotated[StrictInt, between(0, 2**31 - 1)]
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]
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
            "pruning_baselines.decisive_models": self.pruning_baselines.decisive_models,
            "pruning_baselines.stronger_models": self.pruning_baselines.stronger_models,
            "sink_aware_pruning.models": self.sink_aware_pruning.models,
            "sink_aware_pruning.stronger_models": self.sink_aware_pruning.stronger_models,
            "sink_aware_pruning.deciding_only": self.sink_aware_pruning.deciding_only,
            "joint_quantization.models": self.joint_quantization.models,
            "joint_quantization.stronger_models": self.joint_quantization.stronger_models,
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
        profile: one of PROFILES.
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
    try:
        return TypeAdapter(Config).validate_python(raw)
    except ValidationError as error:
        raise _refused(error.errors()[0]) from error


def to_dict(config: Config) -> dict[str, object]:
    """Return the settings as plain dicts and lists, ready for JSON; a profile without a grid has no such group."""
    return {key: _plain(value) for key, value in asdict(config).items() if value is not None}


def output_root() -> Path:
    """Return the folder that `figures/`, `results/` and `runs/` go to: the project, or the folder named by SINKS_OUTPUT.

    Raises:
        InputError: `~` where there is no home folder.
    """
    return typed_path(os.environ.get("SINKS_OUTPUT") or ROOT).resolve()


def cells_root() -> Path:
    """Return the folder that holds the grid: that of the outputs, unless the launcher keeps it.

    The cells in its `results/PROFILE/cells/` and the weights in its `runs/PROFILE/weights/` are named by all that they come from,
    so runs with other settings share them and cannot spoil them.
    """
    return Path(os.environ.get("SINKS_CELLS") or output_root())


def custom_root(settings: Config, *, overrides: Mapping[str, object]) -> Path | None:
    """Return the folder of a run that is not the profile as it stands: `runs/custom-HASH/`, one for each choice of settings.

    Args:
        settings: of the run.
        overrides: as in `load`.

    Returns:
        None for a profile as it stands, whose results are the repository's.
    """
    plain = load(settings.profile)
    if not overrides and settings.seed == plain.seed:
        return None
    said = json.dumps([settings.profile, settings.seed, {key: str(value) for key, value in overrides.items()}], sort_keys=True)
    return ROOT / "runs" / f"custom-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def typed_path(path: str | Path) -> Path:
    """Return what a path means that somebody wrote: a relative one starts where the command was typed.

    That is the working folder, or the one that the launcher remembers in SINKS_CWD: its notebooks and workers run elsewhere.
    `~` is the home folder.

    Raises:
        InputError: there is no home folder.

    >>> typed_path("/models/mine").as_posix()
    '/models/mine'
    """
    try:
        return Path(os.environ.get("SINKS_CWD") or Path.cwd()) / Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"~ must stand for a home folder, got {str(path)!r}: write the whole path") from error


def notebooks(root: Path = ROOT) -> dict[str, Path]:
    """Return the numbered notebooks that exist, by number."""
    return {path.name[:2]: path for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"configs/{path.name} must be a readable YAML file, got {message}: restore or mend it") from error
    if not isinstance(raw, dict):
        raise InputError(f"configs/{path.name} must hold settings by name, got {type(raw).__name__}: restore or mend it")
    return raw


def _parse_scalar(text: str, key: str) -> object:
    try:
        return yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"the value of {key} must be YAML, got {text!r}: quote it") from error


def _override_(raw: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key in place; the section must exist, models may be added."""
    *sections, last = key.split(".")
    target: Any = raw
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


def _refused(error: ErrorDetails) -> InputError:
    """Say what pydantic found as rule, got and remedy, in one line."""
    names = [name for name in error["loc"] if isinstance(name, str) and name != "[key]"]
    where, kind, value, found = ".".join(names), error["type"], error["input"], error.get("ctx", {})
    prefix = f"{where}." if where else ""
    if kind == "value_error":  # a rule between settings, with its three clauses
        return InputError(f"{prefix}{found['error']}")
    if kind == "unknown":
        key = str(found["key"])
        return InputError(f"settings must be known ones, got {prefix + key!r}{_nearest(key, found['known'])}")
    if kind == "missing":
        return InputError(f"configuration must be complete, got no {where}: add it to the file")
    part = "name" if "[key]" in error["loc"] else "value"
    subject = where if len(names) == len(error["loc"]) else f"every {part} of {where}"
    if kind == "range":
        return InputError(
            f"{subject} must be in [{found['low']}, {found['high']}], got {found['value']!r}: choose a value inside"
        )
    if kind == "literal_error" and isinstance(value, str):
        choices = found["expected"].replace("'", "").replace(" or ", ", ")
        return InputError(f"{subject} must be one of {choices}, got {value!r}: choose one of them")
    rule, given = KINDS.get(kind, "a list or group"), f"{value!r} ({type(value).__name__})"
    remedy = "put it in quotes" if rule == "text" else "see configs/quick.yaml for an example"
    return InputError(f"{subject} must be {rule}, got {given}: {remedy}")
