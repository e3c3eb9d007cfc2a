"""What a worker of the grid does: make the weights of one variant, then measure them, cell by cell."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from filelock import FileLock

from lib.calibration import one_shot, sets
from lib.calibration.hidden_states import States
from lib.checkpoints import integrity, lookup
from lib.checkpoints.lookup import read_json
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.core.provenance import write_json
from lib.core.runtime import use_processor
from lib.core.wheels import UnavailableError
from lib.evaluation import model_card, standins, tasks
from lib.evaluation.harness import BatchedHarness
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.sums import share_interval
from lib.grid.cells import LOSS, STRUCTURED_PATTERN, Variant, from_plain, to_plain
from lib.grid.core import answering
from lib.grid.core.racing import Race
from lib.models import language_model, loading, streaming
from lib.models.language_model import LanguageModel
from lib.pruning import expert_removal, pruner, shrink
from lib.pruning.methods import Method, Target
from lib.studies.variance.sink_effect import text_loss
from lib.texts import corpora

MEASURED = "measured.json"
REFUSALS = (UnavailableError, InputError)
SAMPLES_AT_ONCE = 4  # calibration windows of a forward pass, at most; they are longer than the texts of tasks


@dataclass(frozen=True)
class Place:
    """Where and how this run computes; none of it changes a result.

    Attributes:
        source: checkpoint here.
        device, dtype: of the network.
        kept: folder that keeps the pruned weights, or None.
        weights: all in memory, spread over the GPUs of the process, or read from their files when they are used; a model that
            gets smaller is cut in memory.
        states: where hidden states lie between blocks while calibrating; off the device, one Hessian exists at a time.
        rows: folder of local rows instead of the hub's, or None.
    """

    source: ModelSource
    device: str
    dtype: torch.dtype
    kept: Path | None
    weights: Literal["memory", "spread", "streamed"]
    states: States
    rows: Path | None


def work(
    shared: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], *, batch_size: int
) -> Iterator[tuple[str, dict[str, Any] | Exception]]:
    """Compute the cells of one variant.

    Args:
        shared: `variant` as `cells.to_plain` gives it, and `place`: the fields of a `Place` as JSON values.
        cells: what is missing, each with its `id` and `settings`.
        batch_size: rows of a forward pass.

    Yields:
        (cell id, result), as soon as each is known; an error in its place where a checkpoint or a data set cannot be fetched, or
        settings do not fit the model, so that the other cells go on.
    """
    use_processor()
    place = _place(shared["place"])
    variant = from_plain(shared["variant"], source=place.source)
    try:
        model, made = weights(variant, place, batch_size=batch_size)
        made = {"measured_sparsity": made.pop("sparsity"), **made}
    except REFUSALS as error:
        yield from ((cell["id"], error) for cell in cells)
        return
    for cell in cells:
        settings = cell["settings"]
        measure = loss if settings["task"] == LOSS else accuracy
        try:
            found = measure(model, variant, settings, place, batch_size=batch_size)
        except REFUSALS as error:
            yield cell["id"], error
        else:
            yield cell["id"], {**made, **found}


def weights(variant: Variant, place: Place, *, batch_size: int = 32) -> tuple[LanguageModel, dict[str, Any]]:
    """Return a variant's model and what was measured on its weights; kept weights are read, new ones kept.

    Returns:
        The model; `sparsity`, the share of its linear weights that is gone; of a mixture also `fallbacks`, see `pruned`.

    Raises:
        UnavailableError: the checkpoint or the calibration text cannot be fetched.
        InputError: a method that does not fit the model, or a file that is not what its hash says.
    """
    if place.kept is not None and (place.kept / MEASURED).exists():
        known = read_json(place.kept / MEASURED)
        del known["variant"]
        return _loaded(ModelSource(str(place.kept)), variant, place), known
    model = _loaded(place.source, variant, place)
    before = _linear_weights(model)
    if variant.options is None:
        return model, {"sparsity": 0.0}
    model, fallen = pruned(model, variant, place, batch_size=min(SAMPLES_AT_ONCE, batch_size))
    left = sum(int(layer.module.weight.count_nonzero()) for layer in model.layers)
    found = {"sparsity": round(1 - left / before, 6), **({"fallbacks": fallen} if model.has_experts else {})}
    if place.kept is not None:
        _keep(model, variant, place, found=found)
    return model, found


def _loaded(source: ModelSource, variant: Variant, place: Place) -> LanguageModel:
    """Load a checkpoint as the place says, its files checked against their index and hashes first."""
    integrity.check(lookup.resolve(source))
    given: dict[str, Any] = {"name": variant.model, "dtype": place.dtype}
    if place.weights == "spread":
        return loading.load(source, **given, device_map="auto")
    streamed = place.weights == "streamed" and variant.pattern != STRUCTURED_PATTERN
    return (streaming.load if streamed else loading.load)(source, **given, device=place.device)


def _keep(model: LanguageModel, variant: Variant, place: Place, *, found: Mapping[str, Any]) -> None:
    """Write pruned weights with card and hashes, unless another run has; `MEASURED` comes last and says that all is there."""
    text, method, folder = variant.calibration, cast(Method, variant.options), cast(Path, place.kept)
    is_cut = variant.pattern == STRUCTURED_PATTERN
    target = Target(variant.sparsity) if is_cut else Target(variant.sparsity, variant.pattern)
    reading = None
    if text is not None:
        read = f"local rows in place of {text.corpus}" if place.rows else corpora.identity(cast(corpora.Corpus, text.corpus))
        reading = model_card.Reading(read, text.windows, text.positions, variant.seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / MEASURED).exists():
            return
        shutil.rmtree(folder, ignore_errors=True)  # of a worker killed before it had written MEASURED
        streaming.save(model, folder)
        if model.tokenizer is not None:
            cut = found["sparsity"] if is_cut else None
            model_card.write(folder, model=model, method=method, target=target, reading=reading, cut=cut)
        integrity.write_hashes(folder)
        write_json(folder / MEASURED, {**found, "variant": to_plain(variant)})


def pruned(model: LanguageModel, variant: Variant, place: Place, *, batch_size: int) -> tuple[LanguageModel, int]:
    """Prune a dense model as a variant says, in place unless it becomes smaller.

    Returns:
        The model, and how many matrices of experts used the statistics of their layer, see `pruner.prune_`.

    Raises:
        UnavailableError: the calibration text cannot be fetched.
        InputError: a method that does not fit the model.
    """
    method, text, windows = variant.options, variant.calibration, None
    if method is None:
        return model, 0
    if text is not None:
        sizes: dict[str, Any] = {"count": text.windows, "length": text.positions, "seed": variant.seed}
        tokenizer = language_model.tokenizer_of(model)
        windows = corpora.windows(cast(corpora.Corpus, text.corpus), tokenizer, **sizes, rows=place.rows)
    if variant.pattern != STRUCTURED_PATTERN:
        given: dict[str, Any] = {"windows": windows, "seed": variant.seed, "batch_size": batch_size}
        by_role = place.states != "device"  # memory is short then; `costs.memory_bytes` counts the Hessians so
        target = Target(variant.sparsity, variant.pattern)
        fallen = pruner.prune_(model, method, target, **given, states=place.states, by_role=by_role)
        return model, len(fallen)
    norms = None
    if windows is not None:
        given = {"inputs": method.inputs, "weighting": method.weighting, "seed": variant.seed, "batch_size": batch_size}
        calibration = sets.build(model, windows, **given)
        if model.has_experts:
            given = {"sparsity": variant.sparsity, "batch_size": batch_size}
            return expert_removal.by_routed_mass(model, method, calibration, **given), 0
        statistics = one_shot.dense_statistics(model, calibration, batch_size=batch_size, states=place.states)
        norms = {
            (block, role): found[role].input_norm(method.aggregate)[0]
            for block, found in enumerate(statistics)
            for role in ("o", "down")
        }
    return shrink.shrunk(model, *shrink.choose(model, sparsity=variant.sparsity, input_norms=norms)), 0


def loss(model: LanguageModel, _: Variant, settings: Mapping[str, Any], place: Place, *, batch_size: int) -> dict[str, Any]:
    """Measure the NELBO (the exact loss of an autoregressive model) on WikiText-2 test windows, in nats per token of each."""
    del batch_size  # one text at a time, its masks together
    size, tokenizer = settings["loss"], language_model.tokenizer_of(model)
    seed, given = settings["seed of masks"], {"count": size["windows"], "length": size["positions"]}
    windows = corpora.windows("wikitext2", tokenizer, **given, seed=seed, rows=place.rows, split="test")
    values = text_loss(model, windows, draws=size["draws"], seed=seed)
    return {"nats per token": [round(float(value), 6) for value in values]}


def accuracy(
    model: LanguageModel, variant: Variant, settings: Mapping[str, Any], place: Place, *, batch_size: int
) -> dict[str, Any]:
    """Answer a task; what is kept is right or wrong, document by document, so that variants can be compared in pairs."""
    name = settings["task"]
    asked = dict(settings["evaluation"])
    chat_template = asked.pop("chat_template")
    known = EvaluationSettings(**asked, batch_size=batch_size)
    if place.rows is None or name in tasks.local_names():
        task = tasks.load_tasks([name], family=variant.published)[name]
    else:
        task = standins.load(name, place.rows, family=variant.published)
    if "core" in settings:
        return _of_core(model, task, settings["core"], settings=known, chat_template=chat_template)
    asking: dict[str, Any] = {"limit": settings["limit"], "chat_template": chat_template, "adapter": BatchedHarness}
    return _marked(tasks.evaluate(model, {name: task}, settings=known, **asking)[name])


def _of_core(
    model: LanguageModel, task: tasks.LoadedTask, own: Mapping[str, Any], *, settings: EvaluationSettings, chat_template: bool
) -> dict[str, Any]:
    """Answer a task as the core does; kept besides is what audited documents were in the end, and what the race drew."""
    rule = Race(**own["race"]) if "race" in own else None
    given: dict[str, Any] = {"rule": rule, "cache": own.get("cache", "none"), "documents": own["documents"]}
    found = answering.answer(model, task, settings=settings, chat_template=chat_template, **given)
    result = {**_marked(found.shown), "asked of": found.asked, "rows": found.rows}
    if found.race is not None:
        counts = {name: getattr(found.race, name) for name in ("draws", "all_draws", "stopped", "audited")}
        result |= {"race": counts, "final": _marks(found.final)}
    return result


def _marked(found: tasks.TaskResult) -> dict[str, Any]:
    """Return what is kept of a task."""
    low, high = share_interval(sum(found.correct), len(found.correct))
    return {
        "metric": found.metric,
        "documents": len(found.correct),
        "accuracy": round(found.accuracy, 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "chance": found.chance,
        "truncated": found.truncated,
        "merged": found.merged,
        "scores": _marks(found),
    }


def _marks(found: tasks.TaskResult) -> dict[str, str]:
    """Write every score document by document."""
    return {score: "".join("01"[mark] for mark in marks) for score, marks in found.scores.items()}


def _place(made: Mapping[str, Any]) -> Place:
    folders = {name: None if made[name] is None else Path(made[name]) for name in ("kept", "rows")}
    named = {"source": ModelSource(**made["source"]), "dtype": getattr(torch, made["dtype"])}
    return Place(**{**made, **named, **folders})


def _linear_weights(model: LanguageModel) -> int:
    return sum(layer.module.weight.numel() for layer in model.layers)
