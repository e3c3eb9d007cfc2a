"""The experiment grid: from settings to cells, each one number of one pruned model, grouped by the weights they share."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from lib.calibration.sets import Inputs
from lib.calibration.token_weights import Weighting
from lib.checkpoints import lookup
from lib.checkpoints.files import local_path
from lib.core import provenance, python_code
from lib.core.config import Config, ModelSource, cells_root
from lib.core.errors import InputError, require
from lib.core.runtime import choose_device
from lib.core.settings.grid import CalibrationText, Grid
from lib.evaluation import tasks
from lib.evaluation.scoring import EvaluationSettings
from lib.grid.store import Store, cell_id
from lib.pruning.importances import UNSTRUCTURED
from lib.pruning.methods import METHODS, RELEASE, Method, pattern_target, without_noise
from lib.texts import corpora

DENSE, LOSS, STRUCTURED_PATTERN = "dense", "nelbo", "structured"
Family = Literal["llada", "llada-chat", "dream"]
# Chat models get the likelihood settings of their base, and their own for generation: LLaDA-1.5 is published with blocks of 16.
PUBLISHED: Mapping[Family, tasks.Family] = MappingProxyType({"llada": "llada", "llada-chat": "llada", "dream": "dream"})
CHAT_TOKENS, CHAT_BLOCK = 256, 16
# Which heads and channels go; names as in notebook 03, whose table has the authors' numbers beside.
STRUCTURED: Mapping[str, Method] = MappingProxyType({
    "magnitude": METHODS["magnitude"],
    "Wanda": Method("wanda", sequential=False),
    "no sink weights": replace(RELEASE["sink_wanda"], weighting=None),
    "sink-aware (Wanda)": RELEASE["sink_wanda"],
})  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What decides the weights of one pruned model, and so all numbers that are measured on them.

    Attributes:
        model: short name; what it is stands in `source`.
        source: checkpoint.
        content: fingerprint of a local checkpoint and its tokenizer; empty for one on the hub, which its revision names.
        is_causal: an autoregressive reference.
        family: whose published settings its evaluation follows; `"llada-chat"` generates behind a chat template.
        method: name in `methods.METHODS` or `STRUCTURED`; `"dense"` is the model as it is.
        options: the method's own; None for the dense model.
        sparsity, pattern: as in `methods.Target`, or the pattern `"structured"`.
        calibration: windows that the method reads; None when it reads none.
        seed: of the calibration.
    """

    model: str
    source: ModelSource
    content: str
    is_causal: bool
    family: Family
    method: str = DENSE
    options: Method | None = None
    sparsity: float = 0.0
    pattern: str = UNSTRUCTURED
    calibration: CalibrationText | None = None
    seed: int = 0

    @property
    def published(self) -> tasks.Family:
        """Under which name the settings of its tasks stand in `tasks.OFFICIAL`."""
        return PUBLISHED[self.family]

    @property
    def label(self) -> str:
        """One phrase for progress lines."""
        what = "" if self.method == DENSE else f" {self.sparsity:.0%}" if self.pattern == UNSTRUCTURED else f" {self.pattern}"
        return f"{self.model}, {self.method}{what}"


@dataclass(frozen=True)
class Cell:
    """One measurement: a task, or the loss, of one variant; its settings decide the result, whatever machine runs it."""

    variant: Variant
    task: str
    settings: Mapping[str, Any] = field(repr=False, hash=False)
    data: str = field(repr=False)

    def spec(self, *, code: str) -> dict[str, Any]:
        """Return what the store and the workers take: plain JSON values, the `id` of the cell among them."""
        settings = {**to_plain(self.variant), "task": self.task, **self.settings}
        return {"id": cell_id(settings, code=code, data=self.data), "settings": settings, "code": code, "data": self.data}


def expand(config: Config) -> list[Cell]:
    """Return every cell of a profile's grid, model by model, cheap variants first.

    Args:
        config: a profile with a grid.

    Raises:
        InputError: no grid, an unknown method, task or pattern, or rows that are missing.
    """
    grid = config.grid
    if grid is None:
        raise InputError(f"a profile must have a grid to sweep, got none in {config.profile}: use the paper profile")
    check(grid)
    cells = []
    for name, source, is_causal in _models(grid):
        dense = dense_variant(name, source, grid, is_causal=is_causal)
        for variant in (dense, *_variants(dense, grid, seed=config.seed)):
            cells += [measurement(variant, task, grid, config) for task in _tasks(grid, dense.published)]
    return cells


def check(grid: Grid) -> None:
    """Refuse names that nothing goes by, and settings that do not go together, before anything is read.

    Raises:
        InputError: see above.
    """
    known_tasks = (*tasks.OFFICIAL["llada"], *tasks.OFFICIAL["dream"], *tasks.local_names())
    for what, chosen, known in (
        ("methods", (*grid.methods, *grid.other_methods), METHODS),
        ("structured_methods", grid.structured_methods, STRUCTURED),
        ("task_names", grid.task_names, known_tasks),
    ):
        for name in chosen:
            require(name in known, f"grid.{what} must be among {', '.join(known)}", repr(name), "use one of these")
    for pattern in grid.patterns:
        pattern_target(pattern)
    require(len(grid.calibrations) > 0, "grid.calibrations must hold at least one", "none", "name one such as wikitext2")
    both = sorted(set(grid.models) & set(grid.references))
    require(not both, "grid.models and grid.references must have different names", ", ".join(both), "rename one")
    strange = sorted(set(grid.families) - set(grid.models))
    require(not strange, f"grid.families must name models among {', '.join(grid.models)}", ", ".join(strange), "leave it out")
    for name, family in grid.families.items():
        rule = f"grid.families.{name} must be one of {', '.join(PUBLISHED)}"
        require(family in PUBLISHED, rule, repr(family), "use one of these")


def groups(cells: Sequence[Cell]) -> dict[Variant, list[Cell]]:
    """Group cells by the weights they share, in the order of their first cell."""
    found: dict[Variant, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.variant, []).append(cell)
    return found


def variant_key(variant: Variant, *, code: str) -> str:
    """Return the name of a variant's weights in the store: a hash of what decides them."""
    text = json.dumps([to_plain(variant), code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def store_of(config: Config) -> Store:
    """Return the store of a profile's cells, `results/PROFILE/cells/`."""
    return Store(cells_root() / "results" / config.profile / "cells")


def code_version(root: Path) -> str:
    """Hash what computes a cell, whatever folder the clone lies in: the modules that it reaches, torch and transformers."""
    code = provenance.code_hash(python_code.modules_reached("import lib.grid.work", root / "lib"), root)
    return _digest([code, *(metadata.version(name) for name in ("torch", "transformers"))])


def dense_variant(name: str, source: ModelSource, grid: Grid, *, is_causal: bool = False) -> Variant:
    """Return a model of the grid as it is."""
    return Variant(name, source, _content(source), is_causal, cast(Family, grid.families.get(name, "llada")))


def _models(grid: Grid) -> Iterator[tuple[str, ModelSource, bool]]:
    for is_causal, models in ((False, grid.models), (True, grid.references)):
        for name, source in models.items():
            yield name, source, is_causal


def _content(source: ModelSource) -> str:
    """Return the fingerprint of a local checkpoint and its tokenizer; reading 16 GB takes some seconds."""
    if not lookup.is_local(source):
        return ""
    folder = lookup.local_path(source)
    return _digest([lookup.fingerprint(folder), lookup.text_fingerprint(folder)])


def _variants(dense: Variant, grid: Grid, *, seed: int) -> Iterator[Variant]:
    """Yield the pruned variants of one model: the main calibration's, then those of the others."""
    main, *others = grid.calibrations.values()
    for name, method in _distinct(grid.methods, METHODS, dense):
        for sparsity, pattern in _targets(grid):
            yield from _seeded(dense, name, method, sparsity, pattern, main, grid, seed=seed)
    for name, method in _distinct(grid.structured_methods, STRUCTURED, dense):
        for sparsity in grid.structured_sparsities:
            yield from _seeded(dense, name, method, sparsity, STRUCTURED_PATTERN, main, grid, seed=seed)
    for calibration in others:
        for name, method in _distinct(grid.other_methods, METHODS, dense):
            yield from _seeded(dense, name, method, grid.other_sparsity, UNSTRUCTURED, calibration, grid, seed=seed)


def _distinct(names: Sequence[str], known: Mapping[str, Method], dense: Variant) -> Iterator[tuple[str, Method]]:
    """Yield methods as a model can run them; one that only noise tells from another is left out where there is no noise."""
    seen: list[Method] = []
    for name in names:
        method = without_noise(known[name]) if dense.is_causal else known[name]
        if method not in seen:
            seen.append(method)
            yield name, method


def _targets(grid: Grid) -> list[tuple[float, str]]:
    plain = [(sparsity, UNSTRUCTURED) for sparsity in grid.sparsities]
    return plain + [(pattern_target(pattern).sparsity, pattern) for pattern in grid.patterns]


def _seeded(
    dense: Variant, name: str, method: Method, sparsity: float, pattern: str, text: CalibrationText, grid: Grid, *, seed: int
) -> Iterator[Variant]:
    """Yield a variant for every seed that can change it."""
    seeds = range(seed, seed + (grid.seeds if method.needs_calibration or method.importance == "random" else 1))
    read = text if method.needs_calibration else None
    for one in seeds:
        yield replace(dense, method=name, options=method, sparsity=sparsity, pattern=pattern, calibration=read, seed=one)


def _tasks(grid: Grid, family: tasks.Family) -> Iterator[str]:
    """Yield what is measured, the loss first; GSM8K goes by another name where chains of thought are asked for."""
    if grid.loss_windows:
        yield LOSS
    for name in grid.task_names:
        yield name if name in tasks.OFFICIAL[family] or name in tasks.local_names() else OTHER_NAME[name]


OTHER_NAME = {"gsm8k": "gsm8k_cot", "gsm8k_cot": "gsm8k"}


def measurement(variant: Variant, task: str, grid: Grid, config: Config) -> Cell:
    """Describe one measurement: a task, or the loss, of a variant with the grid's settings."""
    dtype = str(choose_device(config).dtype).removeprefix("torch.")
    seen = {"dtype": dtype, "seed of masks": config.seed}
    corpus = "" if variant.calibration is None else _corpus(variant.calibration.corpus, grid)
    if task == LOSS:
        loss = {"windows": grid.loss_windows, "positions": grid.loss_positions, "draws": grid.loss_draws}
        return Cell(variant, task, {**seen, "loss": loss, "limit": None}, _digest([corpus, _corpus("wikitext2", grid)]))
    settings = _evaluation(task, variant, grid, config)
    read = _engine() if grid.rows is None else _rows_hash(rows_folder(grid), task)
    return Cell(variant, task, {**seen, "evaluation": settings, "limit": grid.limit}, _digest([corpus, read]))


@functools.cache
def _engine() -> str:
    """Name what holds the prompts of the official tasks."""
    return f"lm_eval {metadata.version('lm_eval')}"


def _evaluation(task: str, variant: Variant, grid: Grid, config: Config) -> dict[str, Any]:
    """Return the published settings of a task, without the batch size, which changes no result."""
    base = EvaluationSettings(seed=config.seed)
    settings = tasks.published_settings(task, base, family=variant.published)
    if _is_chat(variant, task):
        settings = _generating(settings, CHAT_TOKENS, block=CHAT_BLOCK)
    if grid.draws is not None:
        settings = replace(settings, draws=grid.draws)
    if grid.gen_length is not None:
        settings = _generating(settings, grid.gen_length, block=settings.block_length)
    if variant.is_causal:
        settings = replace(settings, cfg_scale=0.0)
    plain = {key: value for key, value in asdict(settings).items() if key != "batch_size"}
    return {**plain, "chat_template": _is_chat(variant, task)}


def _generating(settings: EvaluationSettings, tokens: int, *, block: int) -> EvaluationSettings:
    """Set how many tokens are generated, one a step, in blocks as near to `block` as divides them."""
    block = next(size for size in range(min(block, tokens), 0, -1) if tokens % size == 0)
    return replace(settings, gen_length=tokens, steps=tokens, block_length=block)


def _is_chat(variant: Variant, task: str) -> bool:
    """Tell whether a task is one of generation, and the model one that its authors ask through a chat template."""
    official = tasks.OFFICIAL[variant.published].get(task)
    return variant.family == "llada-chat" and official is not None and official.draws is None


def _corpus(corpus: Literal["wikitext2", "c4", "articles"] | str, grid: Grid) -> str:
    """Name a corpus by its revision, or by the content of local rows."""
    if grid.rows is not None and corpus in corpora.SOURCES:
        return _rows_hash(rows_folder(grid), corpus)
    return corpora.identity(corpus)  # type: ignore[arg-type]


def rows_folder(grid: Grid) -> Path:
    """Return the folder of local rows; a relative one is looked for as `files.local_path` does."""
    return local_path(grid.rows or "")


def _rows_hash(rows: Path, name: str) -> str:
    """Hash the local rows of a task or corpus.

    Raises:
        InputError: there are none.
    """
    files = provenance.files_below(rows / name)
    require(bool(files), "local rows must lie in a folder named after them", f"no {rows / name}", "add it, or set rows: null")
    return provenance.folder_hash(files, rows)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def to_plain(variant: Variant) -> dict[str, Any]:
    """Return a variant as JSON values, without the place of a local checkpoint, which its content names."""
    made = json.loads(json.dumps(asdict(variant)))
    if made["content"]:
        made["source"] = None
    return made


def from_plain(made: Mapping[str, Any], *, source: ModelSource) -> Variant:
    """Return the variant that `to_plain` was given; `source` is its checkpoint here."""
    options, text = made["options"], made["calibration"]
    if options is not None:
        weighting = options["weighting"]
        weighting = None if weighting is None else Weighting(**weighting)
        options = Method(**{**options, "inputs": Inputs(**options["inputs"]), "weighting": weighting})
    calibration = None if text is None else CalibrationText(**text)
    return Variant(**{**made, "source": source, "options": options, "calibration": calibration})
