"""Answer tasks with one or several models; several are compared on the same documents."""

import argparse
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lib.commands.words import MODEL, UsageError, add_common, whole

if TYPE_CHECKING:
    from lib.evaluation.tasks import TaskResult

EPILOG = """Tasks: tiny_description, tiny_topic, tiny_sums, tiny_topic_generated, tiny_word_problems ship with this project and
are no benchmarks; tiny_add, tiny_sort, tiny_sudoku, tiny_recall, tiny_facts are what recipes/family teaches; mmlu,
arc_challenge, piqa, winogrande, gsm8k, hellaswag, race, arc_easy, gpqa_main_n_shot are fetched from the hub and asked with the
published settings."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the words of this command."""
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL)
    parser.add_argument("--tasks", metavar="NAME,NAME", required=True, help="see below")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="only the first N documents of each task")
    parser.add_argument("--draws", type=whole(1), default=32, metavar="N", help="masks of a continuation (default 32)")
    parser.add_argument("--batch", type=whole(1), default=32, metavar="N", help="rows at one time (default 32)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the result as JSON too, for sinks compare")
    add_common(parser)


def run(chosen: argparse.Namespace) -> None:
    """Evaluate each model, then compare."""
    from lib.commands import session, terminal
    from lib.core.errors import require
    from lib.core.provenance import write_json
    from lib.evaluation import tasks
    from lib.evaluation.scoring import EvaluationSettings

    begun = time.monotonic()
    path = None if chosen.output is None else session.new_folder(chosen.output)
    names = [name.strip() for name in chosen.tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks must name a task, got none: write it like --tasks tiny_topic,tiny_sums")
    if len(chosen.models) > 1 and chosen.limit == 1:
        raise UsageError("--limit must be at least 2 where models are compared, got 1: one document tells nothing apart")
    known = dict.fromkeys((*tasks.local_names(), *(name for family in tasks.OFFICIAL.values() for name in family)))
    for name in names:  # before minutes of the first model
        require(name in known, f"a task must be one of {', '.join(known)}", name, "use one of these")
    sources = {text: session.source_of(text) for text in chosen.models}
    for source in sources.values():
        session.check(source)
    base = EvaluationSettings(draws=chosen.draws, seed=chosen.seed, batch_size=chosen.batch)
    results: dict[str, dict[str, TaskResult]] = {}
    facts: list[dict[str, Any]] = []
    loaded: dict[str, Any] = {}
    for number, text in enumerate(sources, 1):
        model = session.open_model(text, chosen)
        family: tasks.Family = "dream" if model.family == "dream" else "llada"
        loaded[family] = loaded.get(family) or tasks.load_tasks(names, family=family)
        settings = {name: tasks.published_settings(name, base, family=family) for name in names}
        name = model.name if model.name not in results else f"{model.name} ({number})"
        results[name] = tasks.evaluate(model, loaded[family], settings=settings, limit=chosen.limit)
        facts.append({**session.facts_of(model), "name": name})
        if not chosen.json:
            for line in _lines(name, results[name]):
                terminal.say(line)
        del model
    whole_result = {"models": facts, "limit": chosen.limit, "results": {name: _plain(found) for name, found in results.items()}}
    paired = compared(results, seed=chosen.seed)
    lines = [*paired_lines(paired), *([] if path is None else [f"wrote {path}"])]
    if path is not None:
        write_json(path, terminal.finite({"command": "evaluate", **whole_result, "pairs": paired}))
    session.finish(chosen, {**whole_result, "pairs": paired}, lines, begun=begun)


def compared(results: "Mapping[str, Mapping[str, TaskResult]]", *, seed: int) -> list[dict[str, Any]]:
    """Compare the first model with every other, task by task, by exact McNemar tests, Holm-adjusted over all rows."""
    first, *others = results
    marks = {(name, task): found.correct for name, of_model in results.items() for task, found in of_model.items()}
    pairs = [(other, task) for other in others for task in results[first] if task in results[other]]
    return mcnemar_rows(
        {(f"{first} - {other}", task): (marks[first, task], marks[other, task]) for other, task in pairs}, seed=seed
    )


def mcnemar_rows(pairs: Mapping[tuple[str, str], tuple[Any, Any]], *, seed: int) -> list[dict[str, Any]]:
    """Test each pair of marks; the differences are first minus second."""
    from lib.core.errors import require
    from lib.evaluation import paired

    rows = []
    for (models, task), (first, second) in pairs.items():
        got = f"{len(first)} and {len(second)} of {task}"
        require(len(first) == len(second), "two results must be of the same documents", got, "evaluate with the same --limit")
        found = paired.mcnemar(list(first), list(second), seed=seed)
        rows.append({
            "models": models, "task": task, "difference": found.difference, "low": found.interval[0], "high": found.interval[1],
            "only_first": found.only_first, "only_second": found.only_second, "p": found.p_value, "n": found.n,
        })  # fmt: skip
    adjusted = paired.holm({index: row["p"] for index, row in enumerate(rows)})
    return [{**row, "p_holm": adjusted[index]} for index, row in enumerate(rows)]


def paired_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Write the paired table, an empty one for no pairs."""
    lines = [
        f"{'paired, points':<36} {'task':<22} {'difference [95 %]':<26} {'only 1st':>8} {'only 2nd':>8} {'p (Holm)':>9} {'n':>5}"
    ]
    for row in rows:
        ends = f"{100 * row['difference']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        counts = f"{row['only_first']:>8} {row['only_second']:>8} {row['p_holm']:>9.3g} {row['n']:>5}"
        lines.append(f"{row['models']:<36} {row['task']:<22} {ends:<26} {counts}")
    return lines if rows else []


def _lines(name: str, results: "Mapping[str, TaskResult]") -> list[str]:
    lines = []
    for task, found in results.items():
        low, high = found.interval
        ends = f"{100 * found.accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        lines.append(
            f"{name:<20} {task:<22} {found.metric:<26} {ends:<24} n {len(found.correct)}, chance {100 * found.chance:.0f} %"
        )
    return lines


def _plain(results: "Mapping[str, TaskResult]") -> dict[str, Any]:
    """Return results as JSON takes them, document by document."""
    from dataclasses import asdict

    return {
        task: {
            "metric": found.metric, "accuracy": found.accuracy, "interval": list(found.interval), "chance": found.chance,
            "truncated": found.truncated, "correct": list(found.correct), "settings": asdict(found.settings),
        }
        for task, found in results.items()
    }  # fmt: skip
