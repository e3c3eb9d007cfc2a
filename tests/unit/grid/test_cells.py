"""The grid: which cells there are, what decides their identity, and what is refused before anything runs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lib.core import config
from lib.core.config import ROOT, Config
from lib.core.errors import InputError
from lib.grid import cells, costs
from lib.grid.cells import DENSE, LOSS, STRUCTURED_PATTERN, Variant
from tests import tiny


def paper(**changes: Any) -> Config:
    loaded = config.load("paper")
    assert loaded.grid is not None
    return dataclasses.replace(loaded, grid=dataclasses.replace(loaded.grid, **changes))


def variants(loaded: Config) -> list[Variant]:
    return list(cells.groups(cells.expand(loaded)))


@pytest.fixture(scope="module")
def whole() -> list[Variant]:
    return variants(paper())


def test_the_paper_grid_is_what_the_paper_compares(whole: list[Variant]) -> None:
    assert {one.model for one in whole} == {"llada-8b", "llada-1.5", "dream-7b", "mmada-8b", "qwen2.5-7b", "llama-3.1-8b"}
    own = [one for one in whole if one.model == "llada-8b"]
    assert sum(one.method == DENSE for one in own) == 1
    plain = {(one.method, one.sparsity) for one in own if one.pattern == "unstructured" and one.method != DENSE}
    assert {sparsity for _, sparsity in plain} == {0.25, 0.5, 0.75} and len({method for method, _ in plain}) == 8
    assert {(one.pattern, one.sparsity) for one in own} >= {("2:4", 0.5), ("4:8", 0.5), (STRUCTURED_PATTERN, 0.3)}
    texts = {(one.calibration.corpus, one.calibration.positions) for one in own if one.calibration is not None}
    assert texts == {("wikitext2", 2048), ("wikitext2", 4096), ("c4", 2048)}
    assert all(one.calibration is None or one.calibration.windows == 128 for one in own)


def test_methods_that_read_nothing_have_no_calibration(whole: list[Variant]) -> None:
    for one in whole:
        assert (one.calibration is None) == (one.options is None or not one.options.needs_calibration)


def test_references_read_no_noise(whole: list[Variant]) -> None:
    for one in whole:
        noised = one.options is not None and one.options.inputs.kind != "clean"
        assert not (one.is_causal and noised)
    assert any(one.options is not None and one.options.inputs.kind == "noised" for one in whole)


def test_what_only_noise_tells_apart_is_pruned_once_where_there_is_no_noise(whole: list[Variant]) -> None:
    for model in ("llada-8b", "qwen2.5-7b"):
        own = [one for one in whole if one.model == model and one.pattern == "2:4"]
        assert len({one.options for one in own}) == len(own)
        assert ("DWANDA" in {one.method for one in own}) is (model == "llada-8b") and "Wanda" in {one.method for one in own}


def test_tasks_have_the_settings_of_their_family() -> None:
    found = cells.expand(paper(limit=20))
    by_name = {(cell.variant.model, cell.task): cell for cell in found if cell.variant.method == DENSE}
    arc = by_name["llada-8b", "arc_challenge"].settings["evaluation"]
    assert (arc["cfg_scale"], arc["draws"], arc["max_length"]) == (0.5, 128, 4096) and "batch_size" not in arc
    assert by_name["dream-7b", "arc_challenge"].settings["evaluation"]["cfg_scale"] == 0.0
    assert by_name["llama-3.1-8b", "arc_challenge"].settings["evaluation"]["cfg_scale"] == 0.0
    assert ("dream-7b", "gsm8k_cot") in by_name and ("llada-8b", "gsm8k") in by_name and ("dream-7b", "gsm8k") not in by_name
    assert by_name["llada-8b", "gsm8k"].settings["evaluation"]["gen_length"] == 1024
    assert all(cell.settings["limit"] == (None if cell.task == LOSS else 20) for cell in found)
    fewer = {cell.task: cell for cell in cells.expand(paper(draws=2, gen_length=16)) if cell.variant.model == "llada-8b"}
    assert fewer["arc_challenge"].settings["evaluation"]["draws"] == 2
    assert fewer["gsm8k"].settings["evaluation"]["steps"] == 16


def test_chat_models_are_asked_through_their_template_where_they_generate() -> None:
    found = cells.expand(paper())
    asked = {(cell.variant.model, cell.task): cell.settings["evaluation"] for cell in found if cell.task != LOSS}
    assert {key for key, settings in asked.items() if settings["chat_template"]} == {
        ("llada-1.5", "gsm8k"),
        ("mmada-8b", "gsm8k"),
    }
    chat, base = asked["llada-1.5", "gsm8k"], asked["llada-8b", "gsm8k"]
    assert (chat["gen_length"], chat["steps"], chat["block_length"]) == (256, 256, 16)
    assert (base["gen_length"], base["steps"], base["block_length"]) == (1024, 1024, 1024)
    assert asked["llada-1.5", "piqa"] == asked["llada-8b", "piqa"]
    short = {
        cell.variant.model: cell.settings["evaluation"] for cell in cells.expand(paper(gen_length=24)) if cell.task == "gsm8k"
    }
    assert (short["llada-1.5"]["gen_length"], short["llada-1.5"]["block_length"]) == (24, 12)  # 16 does not divide 24
    assert short["llada-8b"]["block_length"] == 24


def test_seeds_repeat_what_draws_something() -> None:
    found = [one for one in variants(paper(seeds=3)) if one.model == "llada-8b" and one.sparsity == 0.25]
    count = {name: sum(one.method == name for one in found) for name in ("random", "magnitude", "Wanda")}
    assert count == {"random": 3, "magnitude": 1, "Wanda": 3}
    assert len({cells.variant_key(one, code="c") for one in found}) == len(found)


def specs(loaded: Config) -> set[str]:
    return {json.dumps(cell.spec(code="c"), sort_keys=True) for cell in cells.expand(loaded)}


def test_what_changes_no_result_changes_no_cell() -> None:
    same = specs(paper())
    assert specs(paper(batch_size=1, keep_weights=False, weights="streamed", teraflops=5.0)) == same
    assert len(same) == len(cells.expand(paper()))


@pytest.mark.parametrize(
    "changes",
    [{"limit": 5}, {"draws": 3}, {"loss_draws": 9}, {"loss_positions": 512}, {"other_sparsity": 0.6}, {"gen_length": 32}],
)
def test_what_changes_a_result_changes_cells(changes: dict[str, Any]) -> None:
    assert specs(paper(**changes)) - specs(paper())


def test_a_local_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    from lib.core.config import ModelSource

    first, second, other = (
        tiny.folder(tmp_path / name, causal=False, seed=seed) for name, seed in zip("abc", (0, 0, 1), strict=True)
    )
    small: dict[str, Any] = {"references": {}, "families": {}}
    found = [specs(paper(**small, models={"m": ModelSource(str(path))})) for path in (first, second, other)]
    assert found[0] == found[1] and not found[0] & found[2]
    assert str(tmp_path) not in "".join(found[0])


def test_variants_go_through_json() -> None:
    for one in variants(paper()):
        assert cells.from_plain(json.loads(json.dumps(cells.to_plain(one))), source=one.source) == one


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt"],
)
def test_a_tokenizer_decides_a_cell_too(tmp_path: Path, name: str) -> None:
    folder = tiny.folder(tmp_path / "model", causal=False)
    loaded = paper(models={"mine": config.ModelSource(str(folder))}, references={}, families={})
    seen = {frozenset(specs(loaded))}
    for content in ("{}", '{"a": 1}'):
        (folder / name).write_text(content)
        seen.add(frozenset(specs(loaded)))
    assert len(seen) == 3
    (folder / "README.md").write_text("text for people")
    assert frozenset(specs(loaded)) in seen


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers"])
def test_versions_that_compute_a_cell_are_part_of_its_code(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    before, known = cells.code_version(ROOT), cells.metadata.version
    monkeypatch.setattr(cells.metadata, "version", lambda name: "0.1" if name == package else known(name))
    assert (cells.code_version(ROOT) != before) is (package != "tokenizers")


def test_local_rows_count_by_their_content(tmp_path: Path) -> None:
    for name in ("wikitext2", "c4", "piqa"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("{}\n")
    small: dict[str, Any] = {"rows": str(tmp_path), "task_names": ("piqa",), "references": {}}
    before = specs(paper(**small))
    assert specs(paper(**small)) == before
    (tmp_path / "piqa" / "train.jsonl").write_text('{"a": 1}\n')
    after = specs(paper(**small))
    assert all('"task": "nelbo"' in spec for spec in before & after) and before & after and before - after
    with pytest.raises(InputError, match=r"local rows must lie in a folder named after them, got no .*race"):
        cells.expand(paper(**{**small, "task_names": ("race",)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("wanda",)}, "grid.methods must be among .*, got 'wanda'"),
        ({"structured_methods": ("SparseGPT",)}, "grid.structured_methods must be among"),
        ({"task_names": ("mmlu-pro",)}, "grid.task_names must be among"),
        ({"patterns": ("2of4",)}, "2of4"),
    ],
)
def test_names_that_nothing_goes_by_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cells.expand(paper(**changes))


def test_a_profile_without_a_grid_is_refused() -> None:
    with pytest.raises(InputError, match="a profile must have a grid to sweep, got none in quick"):
        cells.expand(config.load("quick"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": {"dream": "dream"}}, r"grid\.families must name models among llada-8b, .*, got dream:"),
        (
            {"families": {"dream-7b": "dreams"}},
            r"grid\.families\.dream-7b must be one of llada, llada-chat, dream, got 'dreams':",
        ),
        ({"references": {"llada-8b": config.ModelSource("a/b", "c")}}, "different names, got llada-8b"),
        ({"calibrations": {}}, r"grid\.calibrations must hold at least one"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cells.expand(paper(**changes))


# What it costs


def cost(task: str, **changes: Any) -> costs.Cost:
    model = changes.pop("model", "llada-8b")
    found = [cell for cell in cells.expand(paper(**changes)) if cell.variant.method == DENSE and cell.variant.model == model]
    return costs.measuring(next(cell for cell in found if cell.task == task))


def test_rows_of_a_task_are_documents_times_answers_times_masks_times_guidance() -> None:
    assert cost("piqa").rows == 1838 * 2 * 128 * 2
    assert cost("piqa", limit=10).rows == 10 * 2 * 128 * 2
    assert cost("piqa", model="dream-7b").rows == 1838 * 2 * 128
    assert cost("piqa", model="llama-3.1-8b").rows == 1838 * 2
    assert cost("mmlu").rows == 14042
    assert cost("gsm8k", limit=5).rows == 5 * 1024 and cost("gsm8k", limit=5).tokens == 5 * 1024 * (900 + 1024)
    assert cost("gsm8k", limit=5, model="llama-3.1-8b").tokens == 5 * (900 + 1024)
    assert cost(LOSS).rows == 128 * 8 and cost(LOSS).tokens == 128 * 8 * 1024
    assert cost(LOSS, model="llama-3.1-8b").rows == 128


def test_pruning_reads_every_window_at_every_level(whole: list[Variant]) -> None:
    own = {one.method: one for one in whole if (one.model, one.sparsity, one.pattern) == ("llada-8b", 0.25, "unstructured")}
    rows = {name: costs.pruning(one).rows for name, one in own.items()}
    assert rows["magnitude"] == rows["random"] == 0
    assert rows["Wanda"] == 2 * 128 and rows["sink-aware (Wanda)"] == 10 * 128
    assert rows["sink-aware (SparseGPT)"] == (2 + 10) * 128 and rows["DWANDA"] == 2 * 8 * 128


def test_known_shapes_have_the_published_numbers_of_weights() -> None:
    llada, dream = costs.SHAPES["GSAI-ML/LLaDA-8B-Base"], costs.SHAPES["Dream-org/Dream-v0-Base-7B"]
    assert llada.layers * llada.block_weights == 6_979_321_856
    assert dream.layers * dream.block_weights == 6_525_288_448
    assert llada.weights == pytest.approx(8_015_581_184, rel=1e-3)
    assert dream.weights == pytest.approx(7_615_616_512, rel=1e-3)


def test_the_shape_of_a_folder_is_its_own(tmp_path: Path) -> None:
    from lib.core.config import ModelSource

    found = costs.shape_of(ModelSource(str(tiny.folder(tmp_path / "m", causal=False))))
    assert found == costs.Shape(32, 2, 4, 2, 40, tiny.VOCAB)
    assert costs.shape_of(ModelSource("GSAI-ML/LLaDA-8B-Base", "0" * 40)) == costs.SHAPES["GSAI-ML/LLaDA-8B-Base"]
    assert costs.shape_of(ModelSource("no/such", "0" * 40)) is None


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_the_shape_of_a_mixture_counts_all_experts_and_those_that_a_token_meets(family: str, tmp_path: Path) -> None:
    """Against the network itself, whose heads are not hidden / heads wide and whose shared expert is two wide."""
    from lib.core.config import ModelSource

    more = {"n_shared_experts": 2} if family == "glm4_moe" else {}
    model = tiny.mixture(family, head_dim=16, **more)
    model.network.config.save_pretrained(tmp_path)
    shape = costs.shape_of(ModelSource(str(tmp_path)))
    assert shape is not None and shape.head_dim == 16
    sizes = {layer.name: layer.module.weight.numel() for layer in model.layers}
    assert shape.linear_weights == sum(sizes.values())
    assert shape.weights == sum(value.numel() for value in model.network.parameters() if value.dim() == 2)
    routed = sum(sizes[layer.name] for layer in model.layers if isinstance(layer.expert, int))
    assert shape.expert_weights == routed
    assert shape.active_weights == sum(sizes.values()) - routed * 6 // 8
    assert shape.block_weights == sum(sizes[layer.name] for layer in model.by_block[2])
    assert shape.active_mlp == max(40, 2 * 16 + (32 if more else 0))
    assert shape.widest_reader == 40
    assert costs.Cost(1, 1e12).seconds(shape, teraflops=2.0) == pytest.approx(shape.active_weights)


def test_files_of_a_mixture_shrink_by_its_experts_alone(whole: list[Variant]) -> None:
    shape = costs.Shape(32, 3, 4, 2, 40, 31, experts=costs.Experts(8, 2, 16, dense_blocks=1))
    cut = next(one for one in whole if one.pattern == STRUCTURED_PATTERN)
    gone = costs.kept_bytes(next(one for one in whole if one.method == DENSE), shape, itemsize=2)
    gone -= costs.kept_bytes(cut, shape, itemsize=2)
    assert gone == pytest.approx(2 * cut.sparsity * shape.expert_weights, abs=2)
    sparse = next(one for one in whole if one.method == "SparseGPT" and one.pattern == "unstructured")
    given = {"batch_size": 1, "weights": "memory", "itemsize": 2}
    host, device = (costs.memory_bytes(sparse, shape, states=states, **given) for states in ("cpu", "device"))
    assert device - host == 2 * costs.states_bytes(sparse, shape, itemsize=2) + 4 * 3 * 32**2


def test_memory_grows_with_what_is_kept(whole: list[Variant]) -> None:
    shape = costs.SHAPES["GSAI-ML/LLaDA-8B-Base"]
    own = {one.method: one for one in whole if (one.model, one.sparsity, one.pattern) == ("llada-8b", 0.5, "unstructured")}

    def peak(name: str, *, streamed: bool = False) -> float:
        weights = "streamed" if streamed else "memory"
        given = {"batch_size": 32, "weights": weights, "states": "device", "itemsize": 2}
        return costs.memory_bytes(own[name], shape, **given) / 1e9

    assert 16 < peak("magnitude") < peak("Wanda") < peak("SparseGPT") < 40
    assert peak("Wanda") - peak("Wanda", streamed=True) == pytest.approx(2 * 29 * shape.block_weights / 1e9)


def test_hours_are_two_operations_a_weight_and_token() -> None:
    shape = costs.Shape(hidden=4, layers=3, heads=2, kv_heads=1, mlp=8, vocab=10)
    assert shape.block_weights == 2 * 4 * 4 + 2 * 4 * 2 - 0 + 3 * 4 * 8
    assert costs.Cost(1, 1e12).seconds(shape, teraflops=2.0) == pytest.approx(3 * shape.block_weights)


def test_a_block_is_measured() -> None:
    import torch

    shape = costs.Shape(hidden=64, layers=3, heads=2, kv_heads=1, mlp=128, vocab=10)
    found = costs.measured_teraflops(shape, device=torch.device("cpu"), dtype=torch.float32, tokens=64)
    assert 1e-6 < found < 100
