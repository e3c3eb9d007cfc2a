"""Benchmarks through lm_eval: the local `tiny_*` tasks, the paper's official ones, and results per document."""

import functools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import datasets
import yaml
from lm_eval.api import task as lm_eval_task
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from lib.core.errors import InputError, require
from lib.core.hub import first_line
from lib.core.wheels import UnavailableError
from lib.evaluation.harness import HarnessModel
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.sums import share_interval
from lib.models.language_model import LanguageModel
from lib.texts.articles import DATA, read_rows

FOLDER = DATA / "tasks"
FEWSHOT_SEED = 1234  # lm_eval's own default
SCORES = ("acc", "acc_norm", "exact_match")
Family = Literal["llada", "dream"]


@dataclass(frozen=True)
class Benchmark:
    """Published settings of one official task.

    Attributes:
        few_shot: examples before the question.
        cfg_scale: classifier-free guidance.
        draws: masks per continuation (`mc_num`); None for generation.
        gen_length: tokens to generate, in as many steps and one block; None for likelihoods.
        metric: the score that is reported first; the other ones of the task are kept too.
        chance: what guessing gets.
        assumed: the authors publish no settings for this task; taken from the next of kin.
    """

    few_shot: int
    cfg_scale: float = 0.0
    draws: int | None = 128
    gen_length: int | None = None
    metric: str = "acc"
    chance: float = 0.25
    assumed: bool = False


# The structured table needs arc_easy too. Papers do not say whether acc or acc_norm: both are kept.
OFFICIAL: Mapping[Family, Mapping[str, Benchmark]] = MappingProxyType({
    # EVAL.md and the evaluation scripts of ML-GSAI/LLaDA. They name no RACE and no ARC-Easy.
    "llada": MappingProxyType({
        "mmlu": Benchmark(5, draws=1),
        "arc_challenge": Benchmark(0, cfg_scale=0.5),
        "piqa": Benchmark(0, cfg_scale=0.5, chance=0.5),
        "winogrande": Benchmark(5, chance=0.5),
        "gsm8k": Benchmark(5, draws=None, gen_length=1024, metric="exact_match,strict-match", chance=0.0),
        "hellaswag": Benchmark(0, cfg_scale=0.5),
        "gpqa_main_n_shot": Benchmark(5, cfg_scale=0.5),
        "race": Benchmark(0, assumed=True),
        "arc_easy": Benchmark(0, cfg_scale=0.5, assumed=True),
    }),
    # eval/eval.py and scripts of DreamLM/Dream. Its likelihood masks each token with probability t and its sampler goes by
    # entropy: ours is LLaDA's for both, with Dream's counts of examples and draws.
    "dream": MappingProxyType({
        "mmlu": Benchmark(5),
        "arc_challenge": Benchmark(0),
        "piqa": Benchmark(0, chance=0.5),
        "winogrande": Benchmark(5, chance=0.5),
        "gsm8k_cot": Benchmark(8, draws=None, gen_length=256, metric="exact_match,strict-match", chance=0.0),
        "hellaswag": Benchmark(0),
        "gpqa_main_n_shot": Benchmark(5),
        "race": Benchmark(0),
        "arc_easy": Benchmark(0),
    }),
})  # fmt: skip
LONGEST: Mapping[Family, int] = MappingProxyType({"llada": 4096, "dream": 2048})


@dataclass(frozen=True)
class LoadedTask:
    """A task ready to run: lm_eval's task objects by name (57 of them for MMLU), which score counts, and what guessing gets."""

    name: str
    parts: Mapping[str, ConfigurableTask]
    metric: str
    chance: float


@dataclass(frozen=True)
class TaskResult:
    """Right or wrong, document by document, so that two models can be compared in pairs.

    Attributes:
        task: its name.
        metric: the score that `correct` holds.
        correct: per document, in the order of the task's documents.
        scores: every 0/1 score of the task, `correct` among them.
        chance: what guessing gets.
        truncated: requests that lost the beginning of their context.
        settings: how requests were answered.
        merged: continuations that were scored with a token which holds the end of their context, too; the tokenizer decides.
    """

    task: str
    metric: str
    correct: tuple[bool, ...]
    scores: Mapping[str, tuple[bool, ...]]
    chance: float
    truncated: int
    settings: EvaluationSettings
    merged: int = 0

    @property
    def accuracy(self) -> float:
        """Share of documents that are right."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return share_interval(sum(self.correct), len(self.correct))


def local_names(folder: Path = FOLDER) -> tuple[str, ...]:
    """Return the names of the local tasks.

    >>> local_names()[:4]
    ('tiny_add', 'tiny_description', 'tiny_facts', 'tiny_recall')
    """
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def load_tasks(names: Sequence[str], *, family: Family = "llada") -> dict[str, LoadedTask]:
    """Load tasks once, to evaluate many models on them.

    Args:
        names: of local tasks, or of official ones as in `OFFICIAL[family]`. Only the latter need the network, and lm_eval's index
            (12 to 21 seconds, once a process).
        family: whose number of few-shot examples.

    Raises:
        InputError: an unknown name.
        UnavailableError: a data set cannot be fetched (no network; GPQA wants its terms accepted).
    """
    known = (*local_names(), *OFFICIAL[family])
    for name in names:
        require(name in known, f"a task must be one of {', '.join(known)}", name, "use one of these")
    with quiet():
        return {name: _load_local(name) if name not in OFFICIAL[family] else _load_official(name, family) for name in names}


def published_settings(name: str, base: EvaluationSettings, *, family: Family = "llada") -> EvaluationSettings:
    """Return the settings published for an official task, with seed and batch size of `base`; `base` for a local task.

    Source: paper.md sections 4.2 (LLaDA) and 4.3 (Dream); see `OFFICIAL` for what is assumed.

    >>> published_settings("piqa", EvaluationSettings(batch_size=8)).draws
    128
    """
    if name not in OFFICIAL[family]:
        return base
    task = OFFICIAL[family][name]
    draws, length = task.draws or base.draws, task.gen_length or base.gen_length
    generation = {"gen_length": length, "steps": length, "block_length": length}
    return replace(base, draws=draws, cfg_scale=task.cfg_scale, max_length=LONGEST[family], **generation)


def evaluate(
    model: LanguageModel,
    names: Sequence[str] | Mapping[str, LoadedTask],
    *,
    settings: EvaluationSettings | Mapping[str, EvaluationSettings],
    limit: int | None = None,
    adapter: Callable[..., HarnessModel] = HarnessModel,
    chat_template: bool = False,
    documents: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, TaskResult]:
    """Evaluate a model on tasks.

    Args:
        model: diffusion or autoregressive.
        names: task names, or what `load_tasks` returned for them.
        settings: for all tasks, or one for each by name.
        limit: only the first documents of a task (of each part: of every subject of MMLU).
        adapter: called with model and settings, makes what answers lm_eval, such as `harness.BatchedHarness`.
        chat_template: write prompts as a chat, each example as a turn of its own; for generation only.
        documents: by part, the numbers of those that are asked, rising; instead of a limit.

    Returns:
        Results by task name.

    Raises:
        InputError: unknown names, a limit below 1, a task without its metric, or a chat for likelihoods or without a template.
        UnavailableError: a data set cannot be fetched.
    """
    require(limit is None or limit >= 1, "limit must be a number of documents from 1", str(limit), "raise it or leave it out")
    loaded = names if isinstance(names, Mapping) else load_tasks(names)
    asking = {"limit": limit, "samples": documents, "apply_chat_template": chat_template, "fewshot_as_multiturn": chat_template}
    if chat_template:
        _check_generated(loaded)
    return {
        name: _evaluate(adapter(model, settings=settings[name] if isinstance(settings, Mapping) else settings), task, asking)
        for name, task in loaded.items()
    }


def local_task(config: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> ConfigurableTask:
    """Make a task of a configuration (a local one, or lm_eval's own YAML) and rows at hand, without index, network or cache.

    Args:
        config: as in the YAML; where it says the data lie is ignored.
        rows: by split.
    """
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list([dict(row) for row in part]) for name, part in rows.items()})
    kept = {key: value for key, value in config.items() if key not in ("tag", "group", "dataset_kwargs")}
    with quiet():
        return frozen(ConfigurableTask(config={**kept, "dataset_path": "json", "custom_dataset": lambda **_: splits}))


def frozen(task: ConfigurableTask) -> ConfigurableTask:
    """Apply a task's own processing of its documents once, and keep the outcome.

    lm_eval repeats it whenever it reads the documents, and GPQA's shuffles the options with a generator that goes on: prompt,
    answer key, examples and the next model's prompt would each come from another shuffle (and a question could be its own
    example). The generator is set back to the seed that GPQA's file gives it, so that every model and process is asked the same.
    """
    process = task.config.process_docs
    if process is None:
        return task
    shared = getattr(process, "__globals__", {}).get("rng")
    if isinstance(shared, random.Random):
        shared.seed(42)
    config = task.config
    used = dict.fromkeys([config.test_split or config.validation_split, task.fewshot_cfg.split or config.training_split])
    task.dataset = {name: process(task.dataset[name]) for name in used if name is not None}
    task.set_config("process_docs", None)
    task.fewshot_cfg.process_docs = None
    task.task_docs = task.eval_docs
    if hasattr(task, "sampler") and task.has_training_docs():
        task.sampler.replace_df(list(cast(Any, task.fewshot_docs())))
    return task


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm_eval's log lines and the bars of its tasks and of `datasets` off stderr, which notebooks compare."""
    logger, bar = logging.getLogger("lm_eval"), lm_eval_task.tqdm
    level, shown = logger.level, not datasets.utils.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval_task.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        lm_eval_task.tqdm = bar
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def _load_local(name: str, folder: Path = FOLDER) -> LoadedTask:
    """Load one task of `data/tasks/`; its data files lie beside the YAML."""
    config = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    files = {split: (folder / file).resolve() for split, file in config["dataset_kwargs"]["data_files"].items()}
    rows = {split: read_rows(file.stem, folder=file.parent) for split, file in files.items()}
    known = config["metadata"]
    return LoadedTask(name, {name: local_task(config, rows)}, known["metric"], known["chance"])


@functools.cache
def _index() -> TaskManager:
    return TaskManager()


def _load_official(name: str, family: Family) -> LoadedTask:
    """Load one of lm_eval's tasks with its data from the hub."""
    try:
        parts = cast(dict[str, ConfigurableTask], _index().load([name])["tasks"])
    except (OSError, ValueError) as error:
        remedy = "connect (for GPQA: accept its terms and log in), or leave the task out"
        raise UnavailableError(f"the data of {name} must be fetchable, got: {first_line(error)}: {remedy}") from error
    benchmark = OFFICIAL[family][name]
    for part in parts.values():
        frozen(part).set_config("num_fewshot", benchmark.few_shot)
    return LoadedTask(name, parts, benchmark.metric, benchmark.chance)


def _check_generated(loaded: Mapping[str, LoadedTask]) -> None:
    """Refuse a chat for likelihoods: the published numbers that a task is compared with have none."""
    rule = "a chat template must go with a task that is generated"
    for name, part in ((name, part) for task in loaded.values() for name, part in task.parts.items()):
        kind = str(part.OUTPUT_TYPE)
        require(kind == "generate_until", rule, f"{name}, which is {kind}", "leave chat_template out")


def _evaluate(adapter: HarnessModel, task: LoadedTask, asking: Mapping[str, Any]) -> TaskResult:
    """Let an adapter answer one task."""
    for part in task.parts.values():
        # The sampler of examples goes on where the last model left it; every model must be shown the same ones.
        part.set_fewshot_seed(FEWSHOT_SEED)
    with quiet():
        logged: Any = run_harness(adapter, {"tasks": dict(task.parts)}, bootstrap_iters=0, log_samples=True, **asking)
    scores = _document_scores(task, logged["samples"])
    if task.metric not in scores:
        raise InputError(f"the score of {task.name} must be one of {', '.join(scores)}, got {task.metric}: change its metric")
    found = (scores[task.metric], MappingProxyType(scores), task.chance, adapter.truncated, adapter.settings, adapter.merged)
    return TaskResult(task.name, task.metric, *found)


def _document_scores(task: LoadedTask, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, tuple[bool, ...]]:
    """Collect the 0/1 scores of documents by name; a task with several answer filters names them after a comma."""
    collected: dict[str, list[bool]] = {}
    for row in (row for name in task.parts for row in sorted(samples[name], key=lambda row: row["doc_id"])):
        for metric in (name for name in row["metrics"] if name in SCORES):
            name = metric if row["filter"] == "none" else f"{metric},{row['filter']}"
            collected.setdefault(name, []).append(float(row[metric]) == 1.0)
    return {name: tuple(values) for name, values in collected.items()}
