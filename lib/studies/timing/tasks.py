"""Right and wrong answers by decoder: a generation task of lm_eval, each document paired with the plain sampler's answer."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from lib.core.errors import require
from lib.diffusion import sampler
from lib.evaluation import generation_options, paired, tasks
from lib.evaluation.harness import HarnessModel, denoising_plan
from lib.evaluation.scoring import EvaluationSettings
from lib.evaluation.sums import matched_interval, share_interval
from lib.evaluation.tasks import LoadedTask
from lib.models.language_model import LanguageModel
from lib.studies.timing.runs import PLAIN, Plan, check_plain, run_decoder
from lib.texts.articles import read_rows

WRITTEN = "tiny_topic_written"
WRITTEN_CONFIG: Mapping[str, Any] = MappingProxyType({
    "task": WRITTEN,
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Title: {{title}}\nText: {{text}}\nDescription:",  # as articles stand in the training text
    "doc_to_target": "topic",
    "generation_kwargs": {"until": ["\nText:"], "max_gen_toks": 32, "do_sample": False},
    "filter_list": [
        {
            "name": "none",
            "filter": [{"function": "regex", "regex_pattern": r"Topic: *([^\n]*\S)"}, {"function": "take_first"}],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
})  # fmt: skip


def load(name: str) -> LoadedTask:
    """Load a task of generation: `"tiny_topic_written"`, or one that `tasks.load_tasks` knows.

    In the former the model is shown an article and writes a description, then the topic, which alone is scored. So the answer
    stands late in a text of several blocks and depends on all that was decoded before it, as after a chain of thought.

    Raises:
        InputError: an unknown name, or a task that generates nothing.
        UnavailableError: a data set cannot be fetched.

    >>> round(load("tiny_topic_written").chance, 3)
    0.173
    """
    if name != WRITTEN:
        task = tasks.load_tasks([name])[name]
        check_task(task)
        return task
    texts = {row["title"]: row["text"] for row in read_rows("tiny_description", folder=tasks.FOLDER)}
    topics = {row["title"]: row["topic"] for row in read_rows("tiny_topic", folder=tasks.FOLDER)}
    rows = [{"title": title, "text": texts[title], "topic": topic} for title, topic in topics.items() if title in texts]
    commonest = Counter(row["topic"] for row in rows).most_common(1)[0][1]
    part = tasks.local_task(WRITTEN_CONFIG, {"test": rows})
    return LoadedTask(WRITTEN, {WRITTEN: part}, "exact_match", commonest / len(rows))


def accuracies(
    model: LanguageModel,
    task: LoadedTask,
    plans: Mapping[str, Plan],
    *,
    settings: EvaluationSettings,
    limit: int | None = None,
) -> pd.DataFrame:
    """Answer a generation task with every decoder, each compared with the plain sampler document by document.

    Args:
        model: a diffusion model with its tokenizer.
        task: as `load` returns it; lm_eval asks and scores.
        plans: decoders by name, one of them `"plain sampler"`.
        settings: lengths and blocks; guidance and steps are the plain sampler's alone.
        limit: only the first documents.

    Returns:
        One row a decoder: `task`; the columns of `compared`; `chance`, what guessing gets; and `usable`, whether the interval of
        the plain sampler's accuracy lies above it: elsewhere there is nothing to lose.

    Raises:
        InputError: no plain sampler, guidance, a task without generation, or what a task or a decoder refuses.
    """
    check_plain(plans)
    sampler.check_masks(model)
    check_task(task)
    require(settings.cfg_scale == 0, "decoders must be compared without guidance", f"{settings.cfg_scale}", "set cfg_scale to 0")
    right = {name: answers(model, task, plan, settings=settings, limit=limit) for name, plan in plans.items()}
    plain = right[next(name for name, plan in plans.items() if plan == PLAIN)]
    usable = share_interval(sum(plain), len(plain))[0] > task.chance
    rows = [
        {"task": task.name, "decoder": name, **compared(marks, None if plans[name] == PLAIN else plain)}
        for name, marks in right.items()
    ]
    return pd.DataFrame(rows).assign(chance=task.chance, usable=usable)


def compared(right: Sequence[bool], plain: Sequence[bool] | None) -> dict[str, float]:
    """Compare right answers with those of the plain sampler to the same documents.

    Args:
        right: which documents are answered correctly.
        plain: which the plain sampler answers; None where `right` is the plain sampler's, which differs from itself by exactly 0.

    Returns:
        `accuracy` with its 95 % Wilson interval, `difference` with its own (`sums.matched_interval`), `p` of the exact McNemar
        test, how many documents only one of the two answers, and `documents`.

    >>> row = compared([True, False], [True, False])
    >>> row["difference"], round(row["difference high"], 2), compared([True, False], None)["difference high"]
    (0.0, 0.49, 0.0)
    """
    pair = paired.mcnemar(right, right if plain is None else plain, seed=0, draws=1)  # its bootstrap is not what we show
    low, high = share_interval(sum(right), len(right))
    ends = (0.0, 0.0) if plain is None else matched_interval(pair.only_first, pair.only_second, documents=pair.n)
    return {
        "accuracy": sum(right) / len(right), "accuracy low": low, "accuracy high": high,
        "difference": pair.difference, "difference low": ends[0], "difference high": ends[1],
        "p": pair.p_value, "only this": pair.only_first, "only plain": pair.only_second, "documents": len(right),
    }  # fmt: skip


def check_task(task: LoadedTask) -> None:
    """Refuse a task whose answers are not generated: a decoder would change nothing.

    Raises:
        InputError: see above.
    """
    kinds = sorted({str(part.OUTPUT_TYPE) for part in task.parts.values()} - {"generate_until"})
    require(not kinds, "a task of decoders must be one of generation", f"{task.name} ({', '.join(kinds)})", "choose another")


def answer_block(task: LoadedTask, settings: EvaluationSettings) -> int:
    """Return how many tokens the blocks of a task's longest answers have: fewer than asked for where an answer is shorter.

    >>> answer_block(load("tiny_topic_written"), EvaluationSettings(gen_length=128, block_length=64))
    32
    """
    wanted = [generation_options.read(part.config.generation_kwargs).new_tokens for part in task.parts.values()]
    longest = max(min(length or settings.gen_length, settings.gen_length) for length in wanted)
    return denoising_plan(longest, settings)[2]


def answers(
    model: LanguageModel,
    task: LoadedTask,
    plan: Plan,
    *,
    settings: EvaluationSettings,
    limit: int | None = None,
    tally: list[tuple[int, int]] | None = None,
) -> tuple[bool, ...]:
    """Return which documents of a generation task a decoder answers correctly.

    Args:
        model: a diffusion model with its tokenizer.
        task: as `load` returns it.
        plan: how answers are written.
        settings: lengths and blocks.
        limit: only the first documents.
        tally: takes the tokens of a text and the passes of each batch of answers; nothing of the plain sampler.
    """
    if plan == PLAIN:
        return tasks.evaluate(model, {task.name: task}, settings=settings, limit=limit)[task.name].correct
    decoded = functools.partial(_Decoder, plan=plan, tally=tally)
    return tasks.evaluate(model, {task.name: task}, settings=settings, limit=limit, adapter=decoded)[task.name].correct


class _Decoder(HarnessModel):
    """The lm_eval adapter with another generator."""

    def __init__(
        self, model: LanguageModel, *, settings: EvaluationSettings, plan: Plan, tally: list[tuple[int, int]] | None = None
    ) -> None:
        super().__init__(model, settings=settings)
        self.plan: Plan = plan
        self.tally = tally

    def _generate(self, prompts: Sequence[Sequence[int]], new: int) -> Int[Tensor, "batch new"]:
        length, _, block = denoising_plan(new, self.settings)
        sizes: dict[str, Any] = {"new_tokens": length, "block_length": block, "batch_size": len(prompts)}
        start = len(prompts[0])
        made = run_decoder(self.model, torch.tensor(prompts), self.plan, **sizes)
        if self.tally is not None:
            self.tally.append((length, made.forwards))
        return made.ids[:, start : start + new]
