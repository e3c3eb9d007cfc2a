"""The README.md of a pruned or rounded checkpoint: what was done to which model, what was measured, and how to load it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lib.checkpoints import lookup
from lib.checkpoints.files import local_path
from lib.core import provenance
from lib.core.errors import require
from lib.evaluation import card_programs
from lib.evaluation.tasks import TaskResult
from lib.models import containers, official
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.pruning import pruner
from lib.pruning.methods import METHODS, Method, Target

DISTRIBUTION = "sink-aware-pruning-replication"
FILE = "README.md"
ZEROED = """\
setting weights to zero, without any training afterwards. Zeros are stored as
ordinary floats: the files are as large as the dense ones, and nothing is faster without kernels for sparse weights.
"""
CUT = """\
cutting whole attention heads and MLP channels out, without any training afterwards.
What is left is a smaller dense network, which takes less memory and time as it is.
"""


WITHOUT_EXPERTS = """\
removing whole experts with their rows of the router, without any training afterwards; a token is given to as many as before.
What is left is a smaller network of the same kind.
"""
ROUNDED = """\
{what} to {bits} bits, without any training afterwards.
The files hold codes and scales; they become floats when the checkpoint is loaded, so it is small on disk, and on servers with
kernels for such codes.
"""


@dataclass(frozen=True)
class Rounding:
    """How weights were rounded.

    Attributes:
        bits: of a code.
        group: neighbours in a row that share a scale; 0 for a whole row.
        way: `"gptq"` or `"nearest"`.
        order: of pruning and rounding, as recipes name it; "" where nothing was pruned.
    """

    bits: int
    group: int
    way: str
    order: str

    @property
    def needs_calibration(self) -> bool:
        """Tell whether it read text."""
        return self.way != "nearest"


@dataclass(frozen=True)
class Reading:
    """What a calibration read.

    Attributes:
        corpus: its name and where it comes from, such as `wikitext-2-raw-v1 (train)`.
        windows: number of windows.
        positions: tokens of a window.
        seed: of windows, noise and random choices.
        revision: of the corpus, when it has one.
    """

    corpus: str
    windows: int
    positions: int
    seed: int
    revision: str | None = None


@dataclass(frozen=True)
class Measure:
    """One number that was measured on the checkpoint.

    Attributes:
        name: of the task or the loss, and of the score.
        value: the number.
        interval: 95 %.
        documents: how many it comes from.
        dense: the same of the dense model.
        settings: how it was measured, in words.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    documents: int | None = None
    dense: float | None = None
    settings: str = ""


def measures(results: Mapping[str, TaskResult], *, dense: Mapping[str, TaskResult] | None = None) -> list[Measure]:
    """Turn results of tasks into rows of a card.

    Args:
        results: of the pruned model, by task.
        dense: of the dense model, where there are any.
    """
    found = []
    for name, result in results.items():
        before = (dense or {}).get(name)
        used = result.settings
        settings = f"{used.draws} draws, guidance {used.cfg_scale:g}, at most {used.gen_length} new tokens, seed {used.seed}"
        value = None if before is None else before.accuracy
        row = Measure(f"{name} ({result.metric})", result.accuracy, result.interval, len(result.correct), value, settings)
        found.append(row)
    return found


def size_measures(model: LanguageModel, folder: Path | str, *, dense_bits: int) -> list[Measure]:
    """Measure what a rounded checkpoint takes on disk.

    Args:
        model: as it was read back.
        folder: as `export.save_packed` or `containers.save_sparse` wrote it.
        dense_bits: of a weight of the dense checkpoint.

    Returns:
        Bits a weight of the matrices of the blocks, and megabytes of the weight files; those of the dense model follow from its
        number of parameters and `dense_bits`.
    """
    kinds = containers.bytes_by_kind(folder)
    weights = sum(layer.module.weight.numel() for layer in model.layers)
    rounded = sum(kinds[kind] for kind in set(containers.KINDS.values()))
    whole = sum(size for kind, size in kinds.items() if kind != "other files")
    return [
        Measure(
            "bits a weight", 8 * rounded / weights, dense=dense_bits, settings="matrices of the blocks, scales and masks too"
        ),
        Measure("weight files, MB", whole / 1e6, dense=model.num_parameters * dense_bits / 8e6, settings="on disk"),
    ]


def write(
    folder: Path | str,
    *,
    model: LanguageModel,
    method: Method,
    target: Target,
    reading: Reading | None = None,
    measured: Sequence[Measure] = (),
    cut: float | None = None,
    rounding: Rounding | None = None,
    license_id: str = "other",
) -> Path:
    """Write the card of an exported checkpoint.

    Args:
        folder: the export, as a function of `export`, `official` or `containers` wrote it.
        model: the compressed model, whose source and fingerprint are those of the dense checkpoint.
        method: how it was pruned; it is not named where weights were rounded and none was to go.
        target: how much was asked for.
        reading: what the calibration read; None where neither method nor rounding has one.
        measured: numbers to show.
        cut: share of the block weights that went with whole heads and channels; None for a model whose weights were set to zero.
        rounding: how weights were rounded, if they were.
        license_id: the hub's name for the licence of the base model, which holds for the pruned weights too.

    Returns:
        `FOLDER/README.md`, with front matter for the hub; the same facts give the same text.

    Raises:
        InputError: no checkpoint in the folder, no tokenizer, or a calibration that nothing read (or that is missing).
    """
    folder = local_path(str(folder))
    lookup.check_folder(folder)
    tokenizer_of(model)
    pruned = rounding is None or target != Target(0.0)
    needed = (pruned and method.needs_calibration) or (rounding is not None and rounding.needs_calibration)
    steps = f"{method.importance} pruning" + (f" and rounding ({rounding.way})" if rounding is not None else "")
    rule = f"{steps} must come {'with' if needed else 'without'} a calibration"
    require((reading is not None) == needed, rule, str(reading), "describe what was read, or leave it out")
    got = f"{pruner.measured_sparsity(model) if cut is None else cut:.2%}"
    gone = [f"{got} of its block weights pruned"] if pruned else []
    name = ", ".join([_base_name(model), *gone, *([] if rounding is None else [f"{rounding.bits} bits"])])
    done = [*_origin(model, folder, rounding), *(_how(method) if pruned else ()), *_rounded(rounding)]
    done += [*(_how_much(model, target, got, cut) if pruned else ()), *_read(reading), _code()]
    parts = [
        f"---\n{_front_matter(model, license_id, pruned=pruned, rounding=rounding)}\n---\n\n# {name}\n",
        f"Made from `{_base_name(model)}` by {_how_made(model, cut, rounding, pruned=pruned)}",
        "## What was done\n",
        _table(("", ""), done),
        "## What was measured\n",
        _measured(measured),
        "## How to load it\n",
        *card_programs.how_to_load(model, folder),
    ]
    provenance.write_text(folder / FILE, "\n".join(parts))
    return folder / FILE


def _how_made(model: LanguageModel, cut: float | None, rounding: Rounding | None, *, pruned: bool) -> str:
    if rounding is None:
        return ZEROED if cut is None else WITHOUT_EXPERTS if model.has_experts else CUT
    what = "setting weights to zero and rounding the others" if pruned else "rounding the weights of its blocks"
    return ROUNDED.format(what=what, bits=rounding.bits)


def _front_matter(model: LanguageModel, license_id: str, *, pruned: bool, rounding: Rounding | None) -> str:
    """Write what the hub reads; a base model is named where it has an id there."""
    source = model.source.source
    on_hub = bool(lookup.HUB_ID.fullmatch(source)) and not lookup.is_local(model.source)
    what = [*(["pruned", "sparse"] if pruned else []), *([] if rounding is None else ["quantized", f"{rounding.bits}-bit"])]
    kind = "autoregressive" if model.is_causal else f"{model.noise.kind}-diffusion"
    return ModelCardData(
        base_model=source if on_hub else None,
        library_name="transformers",
        license=license_id,
        pipeline_tag="text-generation",
        tags=[*what, "sink-aware-pruning", kind],
    ).to_yaml()


def _base_name(model: LanguageModel) -> str:
    """Return the id of the base model, or the name of its folder (a path of this machine is nobody's business)."""
    source = model.source.source
    return source.rstrip("/").rsplit("/", 1)[-1] if lookup.is_local(model.source) else source


def _origin(model: LanguageModel, folder: Path, rounding: Rounding | None) -> Iterator[tuple[str, str]]:
    yield "base checkpoint", f"`{_base_name(model)}`"
    yield "its revision", f"`{model.source.revision}`" if model.source.revision else "a local folder, no revision"
    yield "its fingerprint (SHA-256)", f"`{model.fingerprint}`" if model.fingerprint else "not recorded"
    yield "this checkpoint's fingerprint", f"`{lookup.fingerprint(folder)}`"
    if rounding is not None:
        yield "parameters", f"{model.num_parameters:,}"
        return
    dtypes = " and ".join(str(dtype).removeprefix("torch.") for dtype in official.stored_dtypes(folder))
    yield "parameters, dtype", f"{model.num_parameters:,}, {dtypes}"


def _rounded(rounding: Rounding | None) -> Iterator[tuple[str, str]]:
    if rounding is not None:
        group = f"{rounding.group} neighbours share" if rounding.group else "a row shares"
        yield "rounding", f"{rounding.bits} bits, symmetric, {group} a scale"
        yield "rounded by", {"gptq": "GPTQ", "nearest": "rounding to the nearest"}[rounding.way]
        if rounding.order:
            yield "order", rounding.order


def _how(method: Method) -> Iterator[tuple[str, str]]:
    named = [name for name, known in METHODS.items() if known == method]
    yield "method", named[0] if named else f"{method.importance} with the options below"
    for name, value in _flat(asdict(method)):
        yield f"`{name}`", f"`{value}`"


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _how_much(model: LanguageModel, target: Target, got: str, cut: float | None) -> Iterator[tuple[str, str]]:
    if cut is not None:
        what = "experts of every block that has them" if model.has_experts else "key-value groups and MLP channels of every block"
        yield "asked for", f"{target.sparsity:.1%} of the {what}, rounded down"
        yield "measured", f"{got} of the weights of the blocks gone; embedding, norms and head are dense"
        return
    exact = "" if target.removed is None else ", exact numbers by layer"
    yield "sparsity asked for", f"{target.sparsity:.1%} of every matrix of a block{exact}"
    others = "embedding, norms, routers and head" if model.has_experts else "embedding, norms and head"
    yield "sparsity measured", f"{got} exact zeros in these matrices; {others} are dense"
    yield "pattern", target.pattern


def _read(reading: Reading | None) -> Iterator[tuple[str, str]]:
    if reading is None:
        yield "calibration", "none"
        return
    yield "calibration corpus", reading.corpus + (f", revision `{reading.revision}`" if reading.revision else "")
    yield "calibration windows", f"{reading.windows} of {reading.positions} tokens, seed {reading.seed}"


def _code() -> tuple[str, str]:
    """Name the code by its version and the hash of all its modules, and the libraries that can change a number."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        version = "not installed"
    code = provenance.folder_hash(provenance.LIB.rglob("*.py"), provenance.LIB)[:16]
    libraries = ", ".join(f"{name} {found}" for name, found in provenance.versions().items())
    return "code", f"{DISTRIBUTION} {version} (modules `{code}`); {libraries}"


def _measured(measured: Sequence[Measure]) -> str:
    if not measured:
        return "Nothing yet.\n"
    rows = []
    for row in measured:
        interval = "" if row.interval is None else f"{row.interval[0]:.4g} to {row.interval[1]:.4g}"
        documents, dense = ("" if value is None else f"{value:.4g}" for value in (row.documents, row.dense))
        rows.append((row.name, f"{row.value:.4g}", interval, documents, dense, row.settings))
    return _table(("", "value", "95 % interval", "documents", "dense model", "settings"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
