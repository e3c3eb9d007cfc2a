"""Cards of pruned checkpoints: every fact against the files, and the printed code run where this project is not."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lib.checkpoints import lookup
from lib.core import provenance
from lib.core.config import ModelSource
from lib.core.errors import InputError
from lib.diffusion import block_sampler, sampler
from lib.evaluation import model_card
from lib.evaluation.model_card import Measure, Reading, Rounding
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.sums import share_interval
from lib.evaluation.tasks import TaskResult
from lib.models import containers, export, language_model, loading
from lib.models.language_model import LanguageModel
from lib.pruning import pruner, shrink
from lib.pruning.methods import METHODS, Method, Target, without_noise
from lib.quantization.rounding import Grid
from lib.studies.joint import exported
from lib.studies.joint.runs import Recipe
from lib.studies.pruning.bench import Bench, Calibrations
from recipes import rehearsal
from tests import tiny

READ = Reading("invented tokens (none)", windows=2, positions=16, seed=3, revision="abc")
FAMILIES = ("llada", "mmada", "dream", "llama")
SINK = "sink-aware (Wanda)"
PROMPT = "Water boils at"


def pruned(folder: Path, *, target: Target | None = None) -> tuple[LanguageModel, Method, Target]:
    """Load a stand-in and prune it, sinks taken into account."""
    model = loading.load(folder, dtype=torch.bfloat16)
    method = without_noise(METHODS[SINK]) if model.is_causal else METHODS[SINK]
    target = target or Target(0.5)
    pruner.prune_(model, method, target, windows=tiny.ids(2, 16, vocab=1024), seed=3)
    return model, method, target


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rehearsal.write(tmp_path_factory.mktemp("rehearsal") / "dense") / "models"


@pytest.fixture(scope="module")
def cards(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[LanguageModel, Path]]:
    """Each family pruned, exported, with its card."""
    made = {}
    for name in FAMILIES:
        model, method, target = pruned(dense / name)
        folder = export.save_plain(model, tmp_path_factory.mktemp("pruned") / name)
        model_card.write(folder, model=model, method=method, target=target, reading=READ, license_id="mit")
        made[name] = model, folder
    return made


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def facts(folder: Path) -> dict[str, str]:
    """The table of what was done, names to values, without the marks of code."""
    table = text_of(folder).split("## What was done")[1].split("##")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("|")]
    return {cells[0].strip().strip("`"): cells[1].strip().replace("`", "") for cells in rows[2:]}


def front_matter(folder: Path) -> dict[str, Any]:
    return yaml.safe_load(text_of(folder).split("---\n")[1])


def by_hand(model: LanguageModel, ids: Tensor) -> list[int]:
    """What the printed code must write, by the project's own code."""
    if model.is_causal:
        return sampler.continue_text(model, ids, new_tokens=8)[0].tolist()
    return sampler.sample(model, ids, new_tokens=8, steps=8)[0].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_facts_are_those_of_the_files(cards: dict[str, tuple[LanguageModel, Path]], dense: Path, name: str) -> None:
    model, folder = cards[name]
    found = facts(folder)
    assert found["base checkpoint"] == name
    assert found["its fingerprint (SHA-256)"] == lookup.fingerprint(dense / name)
    assert found["this checkpoint's fingerprint"] == lookup.fingerprint(folder)
    weights = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    blocks = [weights[layer.name] for layer in model.layers]
    assert len(blocks) == 14
    zeros = sum(int((weight == 0).sum()) for weight in blocks) / sum(weight.numel() for weight in blocks)
    assert found["sparsity measured"].startswith(f"{zeros:.2%} exact zeros")
    assert found["sparsity asked for"].startswith("50.0% of every matrix")
    assert found["parameters, dtype"] == f"{sum(value.numel() for value in weights.values()):,}, bfloat16"
    assert found["calibration corpus"] == "invented tokens (none), revision abc"
    assert found["calibration windows"] == "2 of 16 tokens, seed 3"
    assert found["pattern"] == "unstructured"


def test_every_option_of_the_method_is_there(cards: dict[str, tuple[LanguageModel, Path]]) -> None:
    found = facts(cards["dream"][1])
    assert found["method"] == SINK
    method = asdict(METHODS[SINK])
    nested = {f"{part}.{key}": value for part in ("inputs", "weighting") for key, value in method.pop(part).items()}
    assert {key: found[key] for key in (*method, *nested)} == {key: str(value) for key, value in {**method, **nested}.items()}
    own = facts(cards["llama"][1])  # without noise it is none of the named methods
    assert (own["method"], own["inputs.kind"]) == ("wanda with the options below", "clean")


def test_code_and_libraries_are_named(cards: dict[str, tuple[LanguageModel, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    code = facts(cards["llada"][1])["code"]
    assert code.startswith("sink-aware-pruning-replication ")
    for name, version in provenance.versions().items():
        assert f"{name} {version}" in code
    monkeypatch.setattr(model_card, "DISTRIBUTION", "no-such-distribution")
    assert model_card._code()[1].startswith("no-such-distribution not installed (modules ")


def test_the_code_of_a_card_is_that_of_all_rooms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A change in any module shows, however deep it lies."""
    (tmp_path / "pruning" / "deeper").mkdir(parents=True)
    for name in ("__init__.py", "pruning/methods.py", "pruning/deeper/x.py"):
        (tmp_path / name).write_text("a = 1\n")
    monkeypatch.setattr(provenance, "LIB", tmp_path)
    said = [model_card._code()[1]]
    for name in ("pruning/methods.py", "pruning/deeper/x.py"):
        (tmp_path / name).write_text("a = 2\n")
        said.append(model_card._code()[1])
    assert len(set(said)) == 3


def test_the_front_matter_is_the_hubs(cards: dict[str, tuple[LanguageModel, Path]], tmp_path: Path) -> None:
    model, folder = cards["dream"]
    found = front_matter(folder)
    assert (found["license"], found["library_name"], found["pipeline_tag"]) == ("mit", "transformers", "text-generation")
    assert "masked-diffusion" in found["tags"] and "base_model" not in found  # a local folder is no id
    assert "autoregressive" in front_matter(cards["llama"][1])["tags"]
    fetched = replace(model, source=ModelSource("Dream-org/Dream-v0-Base-7B", "0123abc"))
    again = export.save_plain(fetched, tmp_path / "again")
    model_card.write(again, model=fetched, method=METHODS[SINK], target=Target(0.5), reading=READ)
    assert front_matter(again)["base_model"] == "Dream-org/Dream-v0-Base-7B"
    assert facts(again)["its revision"] == "0123abc"
    assert text_of(again).count("Dream-org/Dream-v0-Base-7B") == 4


def test_no_path_of_this_machine_is_told(cards: dict[str, tuple[LanguageModel, Path]], dense: Path) -> None:
    for _, folder in cards.values():
        assert str(dense.parent) not in text_of(folder) and str(folder.parent) not in text_of(folder)


def run_printed_code(folder: Path) -> tuple[list[int], list[str]]:
    """What the code of a card writes, and the modules of this project that it imports, where the project is not."""
    code = text_of(folder).split("```python\n")[1].split("```")[0]
    report = "import json, sys\nprint(json.dumps([ids[0].tolist(), sorted(m for m in sys.modules if m.split('.')[0] == 'lib')]))"
    outside = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and not (Path(path) / "lib").is_dir()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(outside), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code + report], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_printed_code_runs_without_this_project(cards: dict[str, tuple[LanguageModel, Path]], name: str) -> None:
    """The same tokens as this project's sampler writes, from the pruned weights."""
    model, folder = cards[name]
    written, modules = run_printed_code(folder)
    ids = language_model.tokenizer_of(model)(PROMPT, return_tensors="pt")["input_ids"]
    assert written == by_hand(model, ids)  # type: ignore[arg-type]
    assert modules == []
    assert len(set(written[-8:])) > 1
    config = json.loads((folder / "config.json").read_text())
    if not model.is_causal:
        text = text_of(folder)
        assert (config["is_causal"], config["mask_token_id"]) == (False, model.mask_token_id)
        assert f"the mask token {config['mask_token_id']} " in text
        assert f"`logit_shift: {config['logit_shift']}`" in text


def test_the_printed_code_of_a_packed_model_runs_without_this_project(dense: Path, tmp_path: Path) -> None:
    """transformers unpacks the codes; the text is the one of the rounded weights, which differs from the dense model's."""
    model = loading.load(dense / "dream")
    windows = tiny.ids(2, 16, vocab=1024)
    found = Calibrations(Bench(model, windows, windows, 2, 1, 0), 0)
    ready = exported.exportable(found, Recipe(Grid(2, 32, "search"), rounding="nearest"), dtype=torch.bfloat16)
    folder = export.save_packed(ready.model, tmp_path / "packed", quantized=ready.quantized)
    rounded = loading.load(folder, dtype=torch.bfloat16)
    rounding = Rounding(2, 32, "nearest", "")
    model_card.write(folder, model=rounded, method=METHODS["magnitude"], target=Target(0.0), rounding=rounding)
    ids: Any = language_model.tokenizer_of(model)(PROMPT, return_tensors="pt")["input_ids"]
    assert run_printed_code(folder) == [by_hand(rounded, ids), []]
    assert by_hand(rounded, ids) != by_hand(model, ids)


def test_the_card_of_a_container_names_this_project_alone(tmp_path: Path) -> None:
    model = tiny.of_network(
        tiny.stacked("qwen3_moe", num_hidden_layers=2, num_experts=4, mlp_only_layers=[]), tokenizer=tiny.words()
    )
    folder = containers.save_sparse(model, tmp_path / "sparse")
    model_card.write(folder, model=model, method=METHODS["magnitude"], target=Target(0.5))
    assert "this project alone reads" in text_of(folder) and "from transformers" not in text_of(folder)


BLOCKS = {
    "sdar": "a token sees its whole block of 3 tokens and all before it (blocks are counted from the first token)",
    "fast_dllm_v2": "a token sees its whole block of 3 tokens and all before it (blocks are counted from the first",
    "nemotron_labs_diffusion": "a token sees what stands before it and, in the block of 3 that is being written, the whole block",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_model_that_goes_by_blocks_is_shown_with_its_mask(name: str, tmp_path: Path) -> None:
    """Its prompt of four tokens ends inside of a block."""
    base = tiny.edit_config(tiny.copied(tiny.PARITY / name, tmp_path / name), mask_token_id=30, block_length=3)
    weights = load_file(base / "model.safetensors").items()
    tiny.edit_weights(base, {key: 9 * value for key, value in weights if "_proj" in key})  # so that it matters who is seen
    tiny.tokenizer().save_pretrained(base)
    model = loading.load(base)
    folder = export.save_plain(model, tmp_path / "out")
    model_card.write(folder, model=model, method=METHODS["magnitude"], target=Target(0.0))
    text = " ".join(text_of(folder).split())
    assert BLOCKS[name] in text and "That mask must be given to the network at every pass" in text
    assert "sees all others" not in text and "both ways" not in text
    ids: Any = language_model.tokenizer_of(model)(PROMPT, return_tensors="pt")["input_ids"]
    unseeded = block_sampler.BlockRule(cut_last=True)
    wanted = block_sampler.generate(model, ids, new_tokens=8, rule=unseeded).ids[0].tolist()
    assert run_printed_code(folder) == [wanted, []]
    assert len(set(wanted[-8:])) > 1
    everywhere = replace(model, attention="full", block_length=None)
    assert sampler.sample(everywhere, ids, new_tokens=8, steps=8)[0].tolist() != wanted  # what the card showed before


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_printed_code_reads_the_words_that_were_calibrated_with(family: str, tmp_path: Path) -> None:
    """transformers' AutoTokenizer makes a Qwen2's pieces of the words in a folder of that type."""
    tiny.folder(tmp_path / "base", family=family)
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model = loading.load(tmp_path / "base")
    folder = export.save_plain(model, tmp_path / "out")
    model_card.write(folder, model=model, method=METHODS["magnitude"], target=Target(0.0))
    ids: Any = language_model.tokenizer_of(model)(PROMPT, return_tensors="pt")["input_ids"]
    assert run_printed_code(folder)[0] == by_hand(model, ids)


def test_equal_facts_give_equal_cards(dense: Path, cards: dict[str, tuple[LanguageModel, Path]], tmp_path: Path) -> None:
    model, method, target = pruned(dense / "llada")
    folder = export.save_plain(model, tmp_path / "llada")
    model_card.write(folder, model=model, method=method, target=target, reading=READ, license_id="mit")
    assert text_of(folder) == text_of(cards["llada"][1])


def test_a_pattern_and_numbers_are_shown(dense: Path, tmp_path: Path) -> None:
    model, method, target = pruned(dense / "dream", target=Target(0.5, "2:4"))
    folder = export.save_plain(model, tmp_path / "dream")
    settings = EvaluationSettings(draws=7, cfg_scale=0.5, gen_length=64, seed=5)
    result = TaskResult("piqa", "acc", (True, True, False, True), {"acc": (True, True, False, True)}, 0.5, 0, settings)
    before = replace(result, correct=(True, True, True, True))
    rows = model_card.measures({"piqa": result}, dense={"piqa": before})
    rows.append(Measure("NELBO", 3.25, settings="one draw"))
    model_card.write(folder, model=model, method=method, target=target, reading=READ, measured=rows)
    low, high = share_interval(3, 4)
    wanted = "7 draws, guidance 0.5, at most 64 new tokens, seed 5"
    assert f"| piqa (acc) | 0.75 | {low:.4g} to {high:.4g} | 4 | 1 | {wanted} |" in text_of(folder)
    assert "| NELBO | 3.25 |  |  |  | one draw |" in text_of(folder)
    assert facts(folder)["pattern"] == "2:4"


def test_a_smaller_model_has_another_card(dense: Path, tmp_path: Path) -> None:
    model = loading.load(dense / "llada")
    smaller = shrink.shrunk(model, *shrink.choose(model, sparsity=0.5, input_norms=None))
    folder = export.save_plain(smaller, tmp_path / "smaller")
    model_card.write(folder, model=smaller, method=METHODS["magnitude"], target=Target(0.5), cut=0.4321)
    found, text = facts(folder), text_of(folder)
    assert "43.21%" in text and "a smaller dense network" in text and "setting weights to zero" not in text
    assert found["asked for"].startswith("50.0% of the key-value groups") and "sparsity asked for" not in found
    assert "fingerprint" in text and found["parameters, dtype"].startswith(f"{smaller.num_parameters:,}")


def test_without_numbers_the_card_says_so(cards: dict[str, tuple[LanguageModel, Path]]) -> None:
    assert "## What was measured\n\nNothing yet." in text_of(cards["llada"][1])


def test_a_method_without_calibration_has_none(dense: Path, tmp_path: Path) -> None:
    model = loading.load(dense / "llama")
    pruner.prune_(model, METHODS["magnitude"], Target(0.3))
    folder = export.save_plain(model, tmp_path / "out")
    model_card.write(folder, model=model, method=METHODS["magnitude"], target=Target(0.3))
    assert facts(folder)["calibration"] == "none"
    with pytest.raises(InputError, match="magnitude pruning must come without a calibration, got Reading"):
        model_card.write(folder, model=model, method=METHODS["magnitude"], target=Target(0.3), reading=READ)
    with pytest.raises(InputError, match="wanda pruning must come with a calibration, got None"):
        model_card.write(folder, model=model, method=METHODS["Wanda"], target=Target(0.3))


def test_a_card_needs_its_checkpoint(dense: Path, tmp_path: Path) -> None:
    model = loading.load(dense / "llama")
    with pytest.raises(InputError, match=r"a checkpoint must be a folder with config\.json"):
        model_card.write(tmp_path, model=model, method=METHODS["magnitude"], target=Target(0.3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", tiny.NOISES)
def test_the_printed_code_writes_from_the_models_own_noise(kind: str, tmp_path: Path) -> None:
    """Token for token what the library's sampler draws from the same stream."""
    model = replace(tiny.of_noise(tmp_path / "dense", kind), tokenizer=tiny.tokenizer())
    method = METHODS["magnitude"]
    folder = export.save_plain(model, tmp_path / "made")
    model_card.write(folder, model=model, method=method, target=Target(0.5), reading=None, license_id="mit")
    text = text_of(folder)
    assert f"{kind}-diffusion" in front_matter(folder)["tags"]
    assert "Text begins as noise, and any token may be replaced" in text and "masked diffusion" not in text
    code = text.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(folder)!r}")
    found: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code, found)
    ids: Any = language_model.tokenizer_of(model)("Water boils at", return_tensors="pt")["input_ids"]
    wanted = sampler.sample(model, ids, new_tokens=8, steps=8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found["ids"], wanted)
