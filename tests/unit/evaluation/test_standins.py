"""Benchmarks on local rows: the same tasks as lm_eval's own index makes, and what is refused."""

import json
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from lib.core.errors import InputError
from lib.evaluation import standins, tasks
from lib.evaluation.tasks import OFFICIAL, Family, LoadedTask
from recipes import rehearsal_rows
from recipes.make_tasks import write_rows

FAMILIES: tuple[Family, ...] = ("llada", "dream")
DATA_SETS = {
    "cais/mmlu": "mmlu",
    "baber/piqa": "piqa",
    "allenai/winogrande": "winogrande",
    "openai/gsm8k": "gsm8k",
    "Rowan/hellaswag": "hellaswag",
    "Idavidrein/gpqa": "gpqa_main_n_shot",
    "EleutherAI/race": "race",
    "allenai/ai2_arc": "arc_easy",
}
# Where lm_eval found its rows is the only difference there may be.
ORIGIN = ("dataset_path", "dataset_name", "custom_dataset", "dataset_kwargs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of a rehearsal."""
    made = tmp_path_factory.mktemp("rows")
    for name in rehearsal_rows.SPLITS:
        for split, rows in rehearsal_rows.rows(name).items():
            write_rows(made / name / f"{split}.jsonl", rows)
    return made


def from_index(folder: Path, name: str, family: Family, monkeypatch: pytest.MonkeyPatch) -> LoadedTask:
    """`tasks.load_tasks` with lm_eval's own index, whose data sets are read from the rows."""

    def load_dataset(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        own = DATA_SETS[path]
        made = {}
        for file in sorted((folder / own).glob("*.jsonl")):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            if own == "mmlu":  # subjects without rows get those of another, and are left out below
                subject = name if name in rehearsal_rows.SUBJECTS else rehearsal_rows.SUBJECTS[0]
                rows = [row for row in rows if row["subject"] == subject]
            made[file.stem] = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(made)

    below = Path(lm_eval.__file__).parent / "tasks" / Path(standins.YAMLS[name]).parent
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    index = TaskManager(include_defaults=False, include_path=below)
    monkeypatch.setattr(tasks, "_index", lambda: index)
    return tasks.load_tasks([name], family=family)[name]


def requests(task: LoadedTask) -> dict[str, list[Any]]:
    """What each part asks, with its examples."""
    made = {}
    for name, part in task.parts.items():
        part.set_fewshot_seed(tasks.FEWSHOT_SEED)
        with tasks.quiet():
            part.build_all_requests(limit=5, rank=0, world_size=1)
        made[name] = [(request.request_type, request.args, request.doc) for request in part.instances]
    return made


def settings(part: Any) -> dict[str, Any]:
    found = {key: value for key, value in part.dump_config().items() if key not in ORIGIN}
    return {**found, "metadata": found["metadata"]["version"]}  # the index adds where the YAML lies


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in OFFICIAL[family]])
def test_a_stand_in_asks_what_the_official_task_asks(
    folder: Path, name: str, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = standins.load(name, folder, family=family)
    official = from_index(folder, name, family, monkeypatch)
    assert (local.name, local.metric, local.chance) == (official.name, official.metric, official.chance)
    shared = [part for part in official.parts if part in local.parts]
    assert shared == list(local.parts)
    assert len(shared) == (3 if name == "mmlu" else 1)
    for part in shared:
        assert settings(local.parts[part]) == settings(official.parts[part])
        assert local.parts[part].config.num_fewshot == OFFICIAL[family][name].few_shot
    wanted = requests(LoadedTask(name, {part: official.parts[part] for part in shared}, "", 0.0))
    assert requests(local) == wanted
    assert all(len(asked) >= 5 for asked in wanted.values())


def test_every_benchmark_has_rows_and_an_installed_yaml() -> None:
    assert set(standins.YAMLS) == set(rehearsal_rows.SPLITS) == set(OFFICIAL["llada"]) | set(OFFICIAL["dream"])
    for name in standins.YAMLS:
        assert standins.yaml_path(name, rehearsal_rows.SUBJECTS[0]).exists()


def test_rows_are_enough_and_no_question_is_its_own_example() -> None:
    for name in rehearsal_rows.SPLITS:
        made = rehearsal_rows.rows(name)
        assert all(len(part) >= 24 for part in made.values())
        seen = [json.dumps(row) for part in made.values() for row in part]
        assert len(set(seen)) == len(seen)
    subjects = [row["subject"] for row in rehearsal_rows.rows("mmlu")["test"]]
    assert len(set(subjects)) == 3


# What is refused


def copied(folder: Path, name: str, to: Path, **changed: list[dict[str, Any]] | None) -> Path:
    """Copy the rows of a benchmark, with some splits changed or left out."""
    for split, rows in {**rehearsal_rows.rows(name), **changed}.items():
        if rows is not None:
            write_rows(to / name / f"{split}.jsonl", rows)
    return to


def test_another_familys_benchmark_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"a benchmark must be one of mmlu, .*, got gsm8k_cot: use one of these"):
        standins.load("gsm8k_cot", folder, family="llada")


def test_missing_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows of piqa must lie in .*piqa as SPLIT.jsonl, got no such file: write them with"):
        standins.load("piqa", tmp_path, family="llada")


def test_a_missing_split_is_named(folder: Path, tmp_path: Path) -> None:
    copied(folder, "winogrande", tmp_path, train=None)
    with pytest.raises(InputError, match="rows of winogrande must have a split train, got validation: add rows"):
        standins.load("winogrande", tmp_path, family="llada")


def test_too_few_examples_are_refused(folder: Path, tmp_path: Path) -> None:
    copied(folder, "winogrande", tmp_path, train=rehearsal_rows.rows("winogrande")["train"][:4])
    with pytest.raises(InputError, match=r"winogrande in train must be at least 5 for 5 examples, got 4: add rows"):
        standins.load("winogrande", tmp_path, family="llada")
    copied(folder, "gpqa_main_n_shot", tmp_path, train=rehearsal_rows.rows("gpqa_main_n_shot")["train"][:5])
    with pytest.raises(InputError, match="at least 6 for 5 examples, got 5"):  # a question is never its own example
        standins.load("gpqa_main_n_shot", tmp_path, family="dream")


def test_a_subject_that_mmlu_lacks_is_refused(folder: Path, tmp_path: Path) -> None:
    copied(folder, "mmlu", tmp_path, dev=[rehearsal_rows.mmlu(0, "knitting")], test=[rehearsal_rows.mmlu(1, "knitting")])
    with pytest.raises(InputError, match="mmlu must have its YAML in the installed lm_eval, got none for knitting"):
        standins.load("mmlu", tmp_path, family="llada")


def test_examples_of_the_yaml_itself_need_no_rows(folder: Path, tmp_path: Path) -> None:
    copied(folder, "gsm8k_cot", tmp_path, train=rehearsal_rows.rows("gsm8k_cot")["train"][:1])
    task = standins.load("gsm8k_cot", tmp_path, family="dream")
    asked = requests(task)["gsm8k_cot"]
    assert asked[0][1][0].count("The answer is") == 8
