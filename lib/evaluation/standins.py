"""Official benchmarks on rows from a folder: lm_eval's own installed YAML, without its index, the network or a cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lm_eval
from lm_eval.tasks._yaml_loader import load_yaml

from lib.core.errors import require
from lib.evaluation.tasks import OFFICIAL, Benchmark, Family, LoadedTask, local_task
from lib.texts.articles import read_rows

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
YAMLS: Mapping[str, str] = MappingProxyType({
    "mmlu": "mmlu/default/mmlu_{subject}.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "gpqa_main_n_shot": "gpqa/n_shot/gpqa_main_n_shot.yaml",
    "race": "race/race.yaml",
})  # fmt: skip


def load(name: str, folder: Path | str, *, family: Family) -> LoadedTask:
    """Load an official benchmark with the rows in `FOLDER/NAME/SPLIT.jsonl` instead of its data set.

    Args:
        name: as in `tasks.OFFICIAL[family]`.
        folder: holds one folder a benchmark; rows have the columns of the official data set (of MMLU: `subject` too).
        family: whose number of few-shot examples.

    Returns:
        What `tasks.load_tasks` returns for the benchmark: true templates, examples, filters and metrics.

    Raises:
        InputError: an unknown name, no rows, a split that the YAML reads is missing, or too few rows for the examples.
    """
    require(name in OFFICIAL[family], f"a benchmark must be one of {', '.join(OFFICIAL[family])}", name, "use one of these")
    files = sorted((Path(folder) / name).glob("*.jsonl"))
    remedy = "write them with python -m recipes.rehearsal FOLDER"
    require(bool(files), f"rows of {name} must lie in {Path(folder) / name} as SPLIT.jsonl", "no such file", remedy)
    return merged(name, {file.stem: read_rows(file.stem, folder=file.parent) for file in files}, family=family)


def merged(name: str, rows: Rows, *, family: Family) -> LoadedTask:
    """Put rows at hand into the installed YAML of a benchmark.

    Args:
        name: as in `tasks.OFFICIAL[family]`.
        rows: by split.
        family: whose number of few-shot examples.

    Returns:
        The benchmark; for MMLU one part a subject, in the order of their names.

    Raises:
        InputError: a split that the YAML reads is missing, or too few rows for the examples.
    """
    benchmark = OFFICIAL[family][name]
    parts = {}
    for subject, own in by_subject(rows).items() if name == "mmlu" else [("", rows)]:
        config = load_yaml(yaml_path(name, subject), resolve_func=True)
        _check_rows(config, own, benchmark)
        part = local_task(config, own)
        part.set_config("num_fewshot", benchmark.few_shot)
        parts[config["task"]] = part
    return LoadedTask(name, parts, benchmark.metric, benchmark.chance)


def yaml_path(name: str, subject: str = "") -> Path:
    """Return where lm_eval keeps the YAML of a benchmark (of one subject of MMLU).

    Raises:
        InputError: a subject that MMLU does not have.
    """
    path = Path(lm_eval.__file__).parent / "tasks" / YAMLS[name].format(subject=subject)
    require(path.exists(), f"{name} must have its YAML in the installed lm_eval", f"none for {subject or name}", "name another")
    return path


def by_subject(rows: Rows) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Sort MMLU's rows by their `subject`, names in alphabetical order; every subject gets every split.

    >>> by_subject({"dev": [{"subject": "b", "n": 1}, {"subject": "a", "n": 2}]})["a"]
    {'dev': [{'subject': 'a', 'n': 2}]}
    """
    subjects = sorted({str(row["subject"]) for part in rows.values() for row in part})
    return {
        subject: {split: [row for row in part if row["subject"] == subject] for split, part in rows.items()}
        for subject in subjects
    }


def _check_rows(config: Mapping[str, Any], rows: Rows, benchmark: Benchmark) -> None:
    """Refuse rows that lm_eval could not make its prompts from."""
    task, remedy = config["task"], "add rows"
    there = [split for split, part in rows.items() if part]
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        split = config.get(key)
        require(split is None or split in there, f"rows of {task} must have a split {split}", ", ".join(there), remedy)
    asked = str(config.get("test_split") or config.get("validation_split"))
    source = str(config.get("fewshot_split") or config.get("training_split") or asked)
    if "samples" in config.get("fewshot_config", {}):  # the YAML brings its own examples
        return
    needed = benchmark.few_shot + (source == asked)
    rule = f"rows of {task} in {source} must be at least {needed} for {benchmark.few_shot} examples"
    require(len(rows[source]) >= needed, rule, str(len(rows[source])), remedy)


def dataset(name: str) -> str:
    """Name the data set on the hub that a benchmark's YAML reads.

    >>> dataset("piqa"), dataset("mmlu")
    ('baber/piqa', 'cais/mmlu')
    """
    return str(load_yaml(yaml_path(name, "anatomy"), resolve_func=False)["dataset_path"])
