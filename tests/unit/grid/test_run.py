"""The grid of a profile from settings to store: planned, computed on tiny checkpoints by real processes, and resumed."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.checkpoints import integrity
from lib.core import config
from lib.core.config import Config, ModelSource
from lib.core.errors import InputError
from lib.core.settings.grid import CalibrationText
from lib.core.wheels import UnavailableError
from lib.evaluation import tasks
from lib.evaluation.harness import BatchedHarness
from lib.grid import cells, costs, plan, run, work
from lib.grid.availability import Found
from lib.grid.cells import DENSE, LOSS
from lib.models import language_model, loading
from lib.pruning import pruner
from recipes import rehearsal
from recipes.pages import values

KEPT = "wikitext2"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rehearsal.write(tmp_path_factory.mktemp("grid") / "rehearsal")


def tiny_grid(files: Path, **changes: Any) -> Config:
    """One diffusion model and one reference, three methods, two tasks."""
    loaded = config.load("rehearsal")
    assert loaded.grid is not None
    small: dict[str, Any] = {
        "models": {"llada": ModelSource(str(files / "models" / "llada"))},
        "references": {"llama": ModelSource(str(files / "models" / "llama"))},
        "core": None,
        "families": {},
        "calibrations": {KEPT: CalibrationText("wikitext2", 2, 32)},
        "methods": ("magnitude", "sink-aware (Wanda)"),
        "patterns": (),
        "other_methods": (),
        "task_names": ("piqa", "arc_easy"),
        "rows": str(files / "rows"),
        "loss_windows": 2,
        "loss_positions": 32,
        **changes,
    }
    return dataclasses.replace(loaded, grid=dataclasses.replace(loaded.grid, **small))


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SINKS_OUTPUT", str(tmp_path))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.json"))}


@pytest.mark.usefixtures("ray_folder")
def test_a_grid_is_computed_once_and_again_byte_for_byte(files: Path, output: Path) -> None:
    loaded, said = tiny_grid(files, methods=("sink-aware (Wanda)",), task_names=("piqa",), references={}), []
    done = run.run(loaded, run.Engine(jobs=2), say=said.append)
    expected = len(cells.expand(loaded))
    # dense, sink-aware, and sink-aware structured, in a task and the loss
    assert (done.cells, done.computed, done.failed, done.not_tested) == (expected, expected, (), ()) and expected == 3 * 2
    folder = cells.store_of(loaded).folder
    first = contents(folder)
    assert len(first) == expected and folder == output / "results" / "rehearsal" / "cells"
    again = run.run(loaded, run.Engine(jobs=2), say=said.append)
    assert again.computed == 0 and contents(folder) == first
    victim = sorted(folder.glob("*.json"))[3]
    victim.unlink()
    assert run.run(loaded, run.Engine(jobs=1), say=said.append).computed == 1
    assert contents(folder) == first


def records(files: Path, **changes: Any) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Results of every cell, computed in this process."""
    loaded = tiny_grid(files, **changes)
    found = {}
    for group in run.groups(loaded, run.settings(loaded)):
        for name, result in work.work(group.shared, group.cells, batch_size=4):
            assert isinstance(result, dict), result
            settings = next(cell["settings"] for cell in group.cells if cell["id"] == name)
            assert json.loads(json.dumps(result)) == result
            found[settings["model"], f"{settings['method']} {settings['pattern']}", settings["task"]] = result
    return found


def test_results_are_those_of_the_library(files: Path, output: Path) -> None:
    found = records(files, keep_weights=False)
    model = loading.load(files / "models" / "llada")
    sparsities = {method: result["measured_sparsity"] for (name, method, task), result in found.items() if name == "llada"}
    assert sparsities[f"{DENSE} unstructured"] == 0
    assert sparsities["magnitude unstructured"] == pytest.approx(0.5, abs=0.01)
    assert sparsities["sink-aware (Wanda) structured"] == pytest.approx(0.5, abs=0.2)
    tokenizer = language_model.tokenizer_of(model)
    from lib.pruning import methods
    from lib.studies.variance.sink_effect import text_loss
    from lib.texts import corpora

    sizes: dict[str, Any] = {"count": 2, "length": 32, "rows": files / "rows"}
    windows = corpora.windows("wikitext2", tokenizer, **sizes, seed=0)
    pruner.prune_(model, methods.METHODS["sink-aware (Wanda)"], methods.Target(0.5), windows=windows, seed=0, batch_size=4)
    held_out = corpora.windows("wikitext2", tokenizer, **sizes, seed=0, split="test")
    expected = [round(float(value), 6) for value in text_loss(model, held_out, draws=2, seed=0)]
    assert found["llada", "sink-aware (Wanda) unstructured", LOSS]["nats per token"] == expected
    dense = found["llada", f"{DENSE} unstructured", LOSS]["nats per token"]
    assert dense != expected
    answers = found["llama", "magnitude unstructured", "piqa"]
    assert answers["documents"] == 2 and set(answers["scores"]) == {"acc", "acc_norm"}
    assert answers["accuracy"] == pytest.approx(answers["scores"]["acc"].count("1") / 2)
    assert answers["low"] <= answers["accuracy"] <= answers["high"] and answers["chance"] == 0.5


def test_kept_weights_are_read_again_and_give_the_same(files: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = records(files)
    kept = sorted((output / "runs" / "rehearsal" / "weights").glob("*/measured.json"))
    assert len(kept) == 2 * 3
    monkeypatch.setattr(work, "pruned", lambda *_, **__: pytest.fail("pruned again"))
    assert records(files) == first
    half = kept[0].parent
    kept[0].unlink()  # as a worker leaves it that was killed while it wrote
    monkeypatch.undo()
    monkeypatch.setenv("SINKS_OUTPUT", str(output))
    assert records(files) == first and (half / "measured.json").exists()


def test_weights_that_another_run_has_kept_meanwhile_stay(files: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = records(files)
    measured = min((output / "runs" / "rehearsal" / "weights").glob("*/measured.json"))
    known, written = measured.read_bytes(), next(measured.parent.glob("*.safetensors")).stat().st_mtime_ns
    measured.unlink()
    prune = work.pruned

    def beaten(*given: Any, **options: Any) -> Any:
        found = prune(*given, **options)
        measured.write_bytes(known)  # the other run ends first; someone may be reading its weights by now
        return found

    monkeypatch.setattr(work, "pruned", beaten)
    assert records(files) == first
    assert next(measured.parent.glob("*.safetensors")).stat().st_mtime_ns == written


@pytest.mark.parametrize("how", [{"weights": "streamed", "states": "disk"}, {"weights": "spread"}, {"states": "cpu"}], ids=str)
def test_where_weights_and_states_lie_changes_no_result(files: Path, output: Path, how: dict[str, Any]) -> None:
    chosen: dict[str, Any] = {"methods": ("SparseGPT", "sink-aware (Wanda)"), "references": {}, "keep_weights": False}
    assert records(files, **chosen, **how) == records(files, **chosen)


def test_runs_with_settings_of_their_own_share_kept_weights(
    files: Path, output: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the launcher sets it for --set grid.keep_weights=true, which is a setting of one's own."""
    shared = tmp_path_factory.mktemp("project")
    monkeypatch.setenv("SINKS_CELLS", str(shared))
    loaded = tiny_grid(files, references={}, task_names=(), keep_weights=True)
    kept = {Path(group.shared["place"]["kept"]).parent for group in run.groups(loaded, run.settings(loaded))}
    assert kept == {shared / "runs" / "rehearsal" / "weights"} and output not in (shared, *shared.parents)


def test_kept_weights_have_a_card_and_hashes(files: Path, output: Path) -> None:
    loaded = tiny_grid(files, references={}, task_names=(), keep_weights=True)
    made = {one["shared"]["variant"]["method"] + " " + one["shared"]["variant"]["pattern"]: one for one in map(vars, run.groups(
        loaded, run.settings(loaded)))}  # fmt: skip
    for group in made.values():
        assert all(isinstance(result, dict) for _, result in work.work(group["shared"], group["cells"], batch_size=4))
    folders = {name: Path(group["shared"]["place"]["kept"]) for name, group in made.items()}
    assert not folders[f"{DENSE} unstructured"].exists()
    card = (folders["sink-aware (Wanda) unstructured"] / "README.md").read_text()
    assert "| method | sink-aware (Wanda) |" in card and "local rows in place of wikitext2" in card
    assert "a smaller dense network" in (folders["sink-aware (Wanda) structured"] / "README.md").read_text()
    kept = folders["magnitude unstructured"]
    integrity.check(kept)
    weights = next(kept.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    group = made["magnitude unstructured"]
    (_, refused), *_ = work.work(group["shared"], group["cells"], batch_size=4)
    assert isinstance(refused, InputError) and "must have SHA-256" in str(refused)


def test_a_damaged_checkpoint_is_refused_before_it_is_read(files: Path, output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(files / "models" / "llada", tmp_path / "llada"))
    integrity.write_hashes(copy)
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    loaded = tiny_grid(files, models={"llada": ModelSource(str(copy))}, references={}, task_names=())
    (group, *_) = run.groups(loaded, run.settings(loaded))
    found = dict(work.work(group.shared, group.cells, batch_size=4))
    assert found and all("must have SHA-256" in str(error) for error in found.values())


def test_chat_models_generate_through_their_template(files: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models_used = {"chat": ModelSource(str(files / "models" / "llada-1.5")), "base": ModelSource(str(files / "models" / "llada"))}
    changes: dict[str, Any] = {"models": models_used, "families": {"chat": "llada-chat"}, "references": {}, "methods": ()}
    changes |= {"structured_methods": (), "task_names": ("gsm8k", "piqa"), "loss_windows": 0, "keep_weights": False}
    seen = []
    real = tasks.evaluate

    def watched(model: Any, asked: Any, **given: Any) -> Any:
        assert given["adapter"] is BatchedHarness
        seen.extend((model.name, name, given["chat_template"]) for name in asked)
        return real(model, asked, **given)

    monkeypatch.setattr(tasks, "evaluate", watched)
    records(files, **changes)
    assert sorted(seen) == [
        ("base", "gsm8k", False), ("base", "piqa", False), ("chat", "gsm8k", True), ("chat", "piqa", False)
    ]  # fmt: skip


def test_the_batch_changes_no_answer(files: Path, output: Path) -> None:
    loaded = tiny_grid(files, keep_weights=False, references={}, methods=())
    (group, *_) = run.groups(loaded, run.settings(loaded))
    found = [dict(work.work(group.shared, group.cells, batch_size=size)) for size in (1, 8)]
    assert found[0] == found[1]


def test_a_checkpoint_that_cannot_be_had_fails_every_cell_with_its_reason(files: Path, output: Path) -> None:
    loaded = tiny_grid(files, references={}, models={"far": ModelSource("no/such", "0" * 40)}, methods=())
    group = run.groups(loaded, run.settings(loaded))[0]
    found = dict(work.work(group.shared, group.cells, batch_size=4))
    assert set(found) == {cell["id"] for cell in group.cells}
    assert all(isinstance(error, UnavailableError) and "no/such" in str(error) for error in found.values())


def test_data_that_cannot_be_had_costs_its_own_cells(files: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_grid(files, references={}, methods=(), keep_weights=False)
    (group, *_) = run.groups(loaded, run.settings(loaded))

    def load(name: str, *args: Any, **options: Any) -> Any:
        if name == "piqa":
            raise UnavailableError("the data of piqa must be fetchable, got: 401: log in")
        return standins_load(name, *args, **options)

    standins_load = work.standins.load
    monkeypatch.setattr(work.standins, "load", load)
    found = dict(work.work(group.shared, group.cells, batch_size=4))
    kinds = {cell["settings"]["task"]: type(found[cell["id"]]) for cell in group.cells}
    assert kinds == {LOSS: dict, "piqa": UnavailableError, "arc_easy": dict}


# The plan


def test_the_plan_says_what_there_is_and_what_is_missing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = config.load("paper", overrides={"grid.teraflops": 300.0, "grid.limit": 100, "grid.core": None})
    lines: list[str] = []
    run.show(loaded, say=lines.append)
    text = "\n".join(lines)
    found = cells.expand(loaded)
    assert f"{len(found)} cells on {len(cells.groups(found))} variants of 6 models: 0 finished, {len(found)} to compute" in text
    assert "300 TFLOP/s, as grid.teraflops says" in text
    for name in ("llada-8b", "llada-1.5", "dream-7b", "mmada-8b", "qwen2.5-7b", "llama-3.1-8b"):
        assert f"recorded as not tested: {name} (" in text
    assert "recorded as not tested: gpqa_main_n_shot (Idavidrein/gpqa" in text
    assert "recorded as not tested: wikitext2 (Salesforce/wikitext" in text and "not tested: c4 (allenai/c4" in text
    rows = {line.split()[0]: line.split() for line in reversed(lines) if line.split()}  # the table of data comes last
    assert rows["piqa"][2] == f"{100 * 2 * 128 * 2:,}" and rows["gsm8k_cot"][2] == f"{100 * 256:,}"
    assert rows["mmlu"][2] == f"{57 * 100:,}"  # a limit counts for each subject
    assert rows["piqa"][3] == f"{100 * 2 * 128 * 2 // 32:,}" and rows["mmlu"][3] == "179"  # 5700 / 32, rounded up
    assert rows["mmlu"][0:2] == ["mmlu", str(332)]
    assert not (output / "results").exists()


@pytest.mark.usefixtures("ray_folder")
def test_finished_cells_are_counted(files: Path, output: Path) -> None:
    loaded = tiny_grid(files, references={}, methods=(), structured_methods=())
    lines: list[str] = []
    run.show(loaded, say=lines.append)
    assert lines[0].endswith("0 finished, 3 to compute")
    run.run(loaded, run.Engine(), say=lines.append)
    lines.clear()
    run.show(loaded, say=lines.append)
    assert lines[0] == "3 cells on 1 variants of 1 models: 3 finished, 0 to compute"
    assert not any("not tested" in line for line in lines)


def test_the_hours_of_a_plan_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = config.load("paper", overrides={"grid.teraflops": 100.0, "grid.limit": 10})
    settings = run.settings(loaded)
    made = plan.make(loaded, code="c", finished=(), grid=settings)
    table = plan.by_model(made, settings).set_index("model")
    llada = [cell for cell in cells.expand(loaded) if cell.variant.model == "llada-8b"]
    shape = costs.SHAPES["GSAI-ML/LLaDA-8B-Base"]
    seconds = sum(costs.measuring(cell).seconds(shape, teraflops=100.0) for cell in llada)
    seconds += sum(costs.pruning(one).seconds(shape, teraflops=100.0) for one in cells.groups(llada))
    assert float(table.loc["llada-8b", "hours"].replace(",", "")) == pytest.approx(seconds / 3600, rel=0.01)  # pyright: ignore
    assert table.loc["llada-8b", "cells"] == len(llada)


def priced(**overrides: Any) -> tuple[plan.Plan, Any]:
    loaded = config.load("paper", overrides={"grid.teraflops": 100.0, "grid.limit": 10, **overrides})
    return plan.make(loaded, code="c", finished=(), grid=run.settings(loaded)), run.settings(loaded)


def test_forwards_are_those_of_measuring_and_of_calibration() -> None:
    made, settings = priced(**{"grid.batch_size": 7})
    own = [cell for cell in made.cells.values() if cell.variant.model == "llada-8b"]
    measured = sum(-(-costs.measuring(cell).rows // 7) for cell in own)
    calibrated = sum(-(-costs.pruning(one).rows // 4) for one in cells.groups(own))  # windows are longer: four at a time
    table = plan.by_model(made, settings).set_index("model")
    shown = float(str(table.loc["llada-8b", "million forwards"]).replace(",", ""))
    assert shown == pytest.approx((measured + calibrated) / 1e6, rel=0.005)
    by_method = plan.by_method(made, settings, itemsize=2, gpus=1).set_index("method")
    assert by_method.loc["Wanda", "forwards"] == "64"  # 128 windows of two passes
    one_by_one = plan.by_method(*priced(**{"grid.batch_size": 1}), itemsize=2, gpus=1).set_index("method")
    assert one_by_one.loc["Wanda", "forwards"] == "256"


def test_memory_follows_where_weights_and_states_are() -> None:
    made, _ = priced(**{"grid.methods": ["SparseGPT"], "grid.structured_methods": []})
    shape = costs.SHAPES["GSAI-ML/LLaDA-8B-Base"]
    one = next(variant for variant in cells.groups(list(made.cells.values())) if variant.method == "SparseGPT")

    def bytes_of(weights: str, states: str, gpus: float = 1, variant: Any = one) -> int:
        return costs.memory_bytes(variant, shape, batch_size=32, weights=weights, states=states, itemsize=2, gpus=gpus)

    whole = bytes_of("memory", "device")
    assert whole - bytes_of("spread", "device", 4) == 2 * shape.weights * 3 // 4
    assert bytes_of("spread", "device") == bytes_of("memory", "device", 4) == whole
    kept = 2 * shape.block_weights * 3 + 2 * 2 * shape.hidden * shape.vocab
    assert whole - bytes_of("streamed", "device") == 2 * shape.weights - kept
    states, hessians = 2 * 128 * 2048 * shape.hidden, 4 * 3 * shape.hidden**2
    assert costs.states_bytes(one, shape, itemsize=2) == states
    assert whole - bytes_of("memory", "cpu") == whole - bytes_of("memory", "disk") == states + hessians
    structured = dataclasses.replace(one, pattern=cells.STRUCTURED_PATTERN, sparsity=0.5)
    assert bytes_of("streamed", "device", variant=structured) == bytes_of("memory", "device", variant=structured)
    dense = dataclasses.replace(one, options=None, calibration=None)
    assert costs.states_bytes(dense, shape, itemsize=2) == 0
    assert costs.kept_bytes(one, shape, itemsize=2) == 2 * shape.weights
    assert 2 * shape.weights - costs.kept_bytes(structured, shape, itemsize=2) == shape.layers * shape.block_weights


def test_columns_of_memory_say_what_they_are() -> None:
    made, settings = priced(**{"grid.weights": "spread", "grid.states": "cpu", "grid.keep_weights": True})
    table = plan.by_memory(made, settings, itemsize=2, gpus=4).set_index("model")
    shape, variants = costs.SHAPES["GSAI-ML/LLaDA-8B-Base"], plan._of(made, "llada-8b")
    kept = sum(costs.kept_bytes(one, shape, itemsize=2) for one in variants if one.options is not None)
    row: Any = table.loc["llada-8b"]
    assert (row["checkpoint"], row["GB to fetch"], row["GB of checkpoint"]) == ("cannot be had", "0", "16")
    assert row["GB of kept variants"] == plan._gigabytes(kept)
    largest = max(costs.states_bytes(one, shape, itemsize=2) for one in variants)
    assert row["GB of states (cpu)"] == plan._gigabytes(largest) and "GB on each of 4 GPUs" in table
    plain = plan.by_memory(*priced(), itemsize=2, gpus=1).set_index("model")
    assert plain.loc["llada-8b", "GB of kept variants"] == "0" and "GB on the device" in plain


def test_memory_and_files_of_a_cell_stand_beside_its_method() -> None:
    made, settings = priced()
    table = plan.by_method(made, settings, itemsize=2, gpus=1).set_index("method")
    shape = costs.SHAPES["GSAI-ML/LLaDA-8B-Base"]
    gpt = max(
        costs.memory_bytes(one, shape, batch_size=32, weights="memory", states="device", itemsize=2)
        for one in plan._of(made, "llada-8b")
        if one.method == "SparseGPT" and one.calibration is not None and one.calibration.positions == 4096
    )
    assert table.loc["SparseGPT", ["GB on the device", "GB of its files"]].tolist() == [plan._gigabytes(gpt), "16"]
    assert table.loc["dense", "GB of its files"] == "0"  # its files are the checkpoint's
    cut = 2 * (0.7 * shape.layers * shape.block_weights + 2 * shape.hidden * shape.vocab)  # 30 % of the blocks are gone
    assert table.loc["sink-aware (Wanda), structured", "GB of its files"] == plan._gigabytes(cut)


def test_the_page_prices_the_whole_grid_as_the_plan_does() -> None:
    said: list[str] = []
    run.show(config.load("paper", overrides={"grid.teraflops": 300.0, "grid.core": None}), say=said.append)
    count, hours = said[0].split()[0], said[1].split("; ")[1].split()[0]
    assert (values.value("grid.cells"), values.value("grid.hours")) == (f"{int(count):,}", hours)


def test_a_machine_without_a_gpu_prices_large_models_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.costs, "measured_teraflops", lambda *_, **__: pytest.fail("a block of 8B on a CPU tells nothing"))
    said: list[str] = []
    run.show(config.load("paper", overrides={"grid.core": None}), say=said.append)
    stated: list[str] = []
    run.show(config.load("paper", overrides={"grid.teraflops": 300.0, "grid.core": None}), say=stated.append)
    assert said[1].startswith("speed: 300 TFLOP/s, assumed for a GPU of 80 GB, as this machine has none")
    assert said[2:] == stated[2:] and said[1].split("; ")[1] == stated[1].split("; ")[1]  # hours and memory of a GPU in bfloat16


def test_a_machine_without_a_gpu_measures_small_models(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setattr(plan.costs, "measured_teraflops", lambda *_, **__: 0.25)
    said: list[str] = []
    run.show(tiny_grid(files, other_methods=("Wanda",)), say=said.append)
    assert said[1].startswith("speed: 0.25 TFLOP/s, measured with a block of")


def test_the_page_says_the_plans_memory() -> None:
    whole, lean = (
        plan.by_memory(*priced(**{"grid.limit": None, "grid.states": states}), itemsize=2, gpus=1).set_index("model")
        for states in ("device", "cpu")
    )
    peaks = [f"{float(str(table.loc['llada-8b', 'GB on the device'])):.0f}" for table in (lean, whole)]
    assert [values.value(f"grid.gigabytes_on_{where}") for where in ("disk", "device")] == peaks


def test_what_is_to_be_fetched_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"GSAI-ML/LLaDA-8B-Base": Found("to be fetched", size=20 * 10**9, missing=5 * 10**9)}
    monkeypatch.setattr(plan.availability, "checkpoint", lambda source: found.get(source.source, Found("to be fetched")))
    table = plan.by_memory(*priced(), itemsize=2, gpus=1).set_index("model")
    assert list(table.loc["llada-8b", ["GB to fetch", "GB of checkpoint"]]) == ["5", "20"]
    assert list(table.loc["llada-1.5", ["GB to fetch", "GB of checkpoint"]]) == ["16", "16"]  # of its shape, as nobody said


def test_corpora_are_looked_for_also_with_local_rows(files: Path) -> None:
    loaded = tiny_grid(files, other_methods=("Wanda",), calibrations={KEPT: CalibrationText("articles", 2, 32)})
    made = plan.make(loaded, code="c", finished=(), grid=run.settings(loaded))
    assert {name: found.state for name, found in made.data.items()} == dict.fromkeys(
        ("articles", "wikitext2", "piqa", "arc_easy"), "here"
    )
    assert made.missing == {} and {found.state for found in made.models.values()} == {"here"}


def test_a_profile_without_a_grid_is_refused() -> None:
    with pytest.raises(InputError, match="a profile must have a grid for this, got quick without one"):
        run.show(config.load("quick"), say=print)


# GPUs


def test_no_gpus_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = config.load("rehearsal", overrides={"device": "cpu"})
    monkeypatch.setattr(run, "_gpus", lambda: 4)
    assert run.gpus_per_cell(loaded, run.Engine()) == 0


@pytest.mark.parametrize(
    ("weights", "asked", "ray", "gpus"),
    [
        ("memory", None, None, 1),
        ("memory", 2, None, 2),
        ("memory", 0.5, None, 0.5),
        ("memory", 5, None, 5),
        ("spread", None, None, 5),
        ("spread", 2, None, 2),
        ("spread", None, "auto", 1),
        ("memory", 0.5, "auto", 0.5),
        ("memory", 8, "auto", 8),  # of another machine
    ],
)
def test_what_is_asked_for_reaches_the_engine(
    monkeypatch: pytest.MonkeyPatch, output: Path, weights: str, asked: float | None, ray: str | None, gpus: float
) -> None:
    monkeypatch.setattr(run, "_gpus", lambda: 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded, given = config.load("paper", overrides={"grid.weights": weights}), {}
    nothing = run.Summary(0, 0, (), ())
    monkeypatch.setattr(run.engine, "run", lambda _, **options: given.update(options) or nothing)
    monkeypatch.setattr(run, "groups", lambda *_: [])
    run.run(loaded, run.Engine(gpus_per_cell=asked, ray=ray), say=[].append)
    assert (given["gpus_per_group"], given["jobs"], given["address"], given["keep_failed"]) == (gpus, None, ray, True)
    run.run(loaded, run.Engine(gpus_per_cell=asked, ray=ray, jobs=3, retry=True), say=[].append)
    assert (given["jobs"], given["keep_failed"]) == (3, False)


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_gpus", lambda: 5)
    with pytest.raises(InputError, match="at most the 5 of this machine, got 6: lower --gpus-per-cell, or name a cluster"):
        run.gpus_per_cell(config.load("paper"), run.Engine(gpus_per_cell=6))
