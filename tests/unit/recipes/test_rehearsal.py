"""The rehearsal of the paper profile: how it is written, and every benchmark on every family, dense and pruned."""

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.checkpoints import lookup
from lib.core import config
from lib.core.config import ROOT, ModelSource
from lib.core.errors import InputError
from lib.evaluation import standins, tasks
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.tasks import OFFICIAL, Family, LoadedTask, TaskResult, published_settings
from lib.models import loading
from lib.models.language_model import LanguageModel, tokenizer_of
from lib.pruning import pruner
from lib.pruning.methods import METHODS, Target, without_noise
from lib.texts import articles, corpora
from lib.texts.articles import encode_documents, format_article
from recipes import rehearsal, rehearsal_models, rehearsal_rows

# An autoregressive model takes no guidance, which LLaDA's settings have.
FAMILY: Mapping[str, Family] = {
    "llada": "llada",
    "llada-1.5": "llada",
    "mmada": "llada",
    "dream": "dream",
    "llama": "dream",
    "qwen2": "dream",
}
LIMIT = 4
SHORT = {"gen_length": 16, "steps": 16, "block_length": 16}  # published: 1024 (LLaDA) and 256 (Dream), one token a step too


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rehearsal.write(tmp_path_factory.mktemp("rehearsal") / "made")


@pytest.fixture(scope="module")
def benchmarks(made: Path) -> Mapping[Family, dict[str, LoadedTask]]:
    """All nine of each family, from the folder."""
    families: tuple[Family, ...] = ("llada", "dream")
    return {family: {name: standins.load(name, made / "rows", family=family) for name in OFFICIAL[family]} for family in families}


# How it is written


def test_equal_seeds_give_equal_bytes_and_others_other_weights(made: Path, tmp_path: Path) -> None:
    first = hashes(made)
    assert hashes(rehearsal.write(tmp_path / "same")) == first
    other = hashes(rehearsal.write(tmp_path / "other", seed=1))
    assert other.keys() == first.keys()
    changed = {name for name in first if other[name] != first[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}
    weights = [value for name, value in first.items() if name.endswith(".safetensors")]
    assert len(set(weights)) == len(weights)  # no two models have the same weights


def test_everything_is_there_and_nothing_else(made: Path) -> None:
    assert {path.name for path in (made / "models").iterdir()} == set(rehearsal_models.checkpoints()) == set(FAMILY)
    tasks_and_corpora = {*OFFICIAL["llada"], *OFFICIAL["dream"], *corpora.SOURCES}
    assert {path.name for path in (made / "rows").iterdir()} == tasks_and_corpora
    assert not [path for path in made.parent.iterdir() if path != made], "a hidden folder was left behind"
    assert sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) < 3_000_000
    for name in FAMILY:
        lookup.check(ModelSource(str(made / "models" / name)))


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    folder = rehearsal.write(tmp_path / "made")
    (folder / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    rehearsal.write(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("damage", ["change", "remove", "another seed"])
def test_another_folder_is_left_alone(tmp_path: Path, damage: str) -> None:
    folder = rehearsal.write(tmp_path / "made", seed=int(damage == "another seed"))
    file = folder / "rows" / "piqa" / "train.jsonl"
    if damage == "change":
        file.write_text("{}\n")
    if damage == "remove":
        file.unlink()
    before = hashes(folder)
    with pytest.raises(InputError, match=r"must go to a new folder or to its own of the same seed, got .*differs: name another"):
        rehearsal.write(folder)
    assert hashes(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_broken_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rehearsal_rows, "rows", broken)
    with pytest.raises(KeyboardInterrupt):
        rehearsal.write(tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_it(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.rehearsal", str(tmp_path / "made"), "--seed", "0"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert hashes(tmp_path / "made") == hashes(made)


# Every benchmark on every family


def windows(model: LanguageModel) -> Tensor:
    """Four calibration windows of real text."""
    text = " ".join(row["extract"] for row in articles.read_rows("articles_evaluation")[:8])
    ids = tokenizer_of(model)(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    return ids[0, :256].view(4, 64)  # type: ignore[index]


def settings(family: Family) -> dict[str, EvaluationSettings]:
    """The published settings of each benchmark, with fewer draws and a shorter generation."""
    made = {}
    for name in OFFICIAL[family]:
        published = published_settings(name, EvaluationSettings(batch_size=64), family=family)
        made[name] = dataclasses.replace(published, draws=min(published.draws, 2), **SHORT)
    return made


def evaluated(model: LanguageModel, loaded: dict[str, LoadedTask]) -> dict[str, TaskResult]:
    return tasks.evaluate(model, loaded, settings=settings(FAMILY[model.name]), limit=LIMIT)


@pytest.mark.parametrize("name", list(FAMILY))
def test_every_benchmark_runs_before_and_after_pruning(
    made: Path, benchmarks: Mapping[Family, dict[str, LoadedTask]], name: str
) -> None:
    """Published settings but for: 2 draws instead of 128, 16 new tokens instead of 1024 or 256, 4 documents a part."""
    family, model = FAMILY[name], loading.load(made / "models" / name)
    loaded = benchmarks[family]
    dense = evaluated(model, loaded)
    assert list(dense) == list(OFFICIAL[family])
    for task, result in dense.items():
        known = OFFICIAL[family][task]
        assert len(result.correct) == LIMIT * len(loaded[task].parts)
        assert (result.metric, result.settings.cfg_scale) == (known.metric, known.cfg_scale)
        assert result.settings.max_length == tasks.LONGEST[family]
        assert result.correct == result.scores[known.metric]
        assert result.truncated == 0
    assert len(dense["mmlu"].correct) == 3 * LIMIT
    for pruning in ("Wanda", "sink-aware (Wanda)"):
        method = without_noise(METHODS[pruning]) if model.is_causal else METHODS[pruning]
        with pruner.restored(model):
            pruner.prune_(model, method, Target(0.5), windows=windows(model))
            assert pruner.measured_sparsity(model) == 0.5
            after = evaluated(model, loaded)
        assert {task: len(result.correct) for task, result in after.items()} == {
            task: len(result.correct) for task, result in dense.items()
        }
        assert any(after[task].scores != dense[task].scores for task in after), "pruning must reach what is evaluated"
    assert evaluated(model, {"race": loaded["race"]})["race"].scores == dense["race"].scores


def test_predictions_differ_between_the_two_prunings(made: Path) -> None:
    """On the same windows, so that the sinks are what differs."""
    model = loading.load(made / "models" / "dream")
    left = []
    for pruning in ("Wanda", "sink-aware (Wanda)"):
        with pruner.restored(model):
            pruner.prune_(model, METHODS[pruning], Target(0.5), windows=windows(model))
            left.append(torch.cat([(layer.module.weight != 0).flatten() for layer in model.layers]))
    assert 0.5 < float((left[0] == left[1]).float().mean()) < 1.0


def test_the_notebooks_settings_fit_the_tiny_networks(made: Path) -> None:
    loaded = config.load("rehearsal")
    for name in loaded.joint_quantization.models:
        model = loading.load(made / "models" / Path(loaded.models[name].source).name)
        widths = {layer.module.in_features for layer in model.layers}
        groups = [size for size in loaded.joint_quantization.group_sizes if size]
        assert loaded.joint_quantization.group_size in groups
        assert all(width % size == 0 for width in widths for size in groups)
    for name, source in loaded.models.items():
        tokenizer = tokenizer_of(loading.load(made / "models" / Path(source.source).name))
        article = {"title": "Owl", "description": "Bird", "topic": "", "extract": "Owls hunt at night."}
        (ids,) = encode_documents(tokenizer, [format_article(article, description_last=False)])
        assert ids[-1] == tokenizer.eos_token_id
        assert (ids[0] == tokenizer.bos_token_id) is (name != "qwen_7b")  # Qwen2.5's has none
