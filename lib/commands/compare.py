"""Compare two results: of evaluate, of prune or quantize, or of one notebook in two runs."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from lib.commands.words import UsageError, add_json, whole

EPILOG = """RESULT is a file of sinks evaluate -o, what sinks prune or quantize print with --json, or a notebook's result in
results/PROFILE/. Differences are first minus second, on the same documents or windows."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the words of this command."""
    parser.add_argument("first", metavar="RESULT", help="a JSON file, see below")
    parser.add_argument("second", metavar="RESULT", help="another of the same kind")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the bootstrap (default 0)")
    add_json(parser)


def run(chosen: argparse.Namespace) -> None:
    """Read both, and say how they differ."""
    from lib.commands import session

    begun = time.monotonic()
    first, second = (_read(session.typed(text)) for text in (chosen.first, chosen.second))
    kinds = {_kind(first, chosen.first), _kind(second, chosen.second)}
    if len(kinds) > 1:
        raise UsageError(f"two results must be of one kind, got {' and '.join(sorted(kinds))}: give two of one command")
    kind = kinds.pop()
    ways = {"evaluate": _tasks, "losses": _losses, "notebook": _claims}
    rows, lines = ways[kind](first, second, seed=chosen.seed)
    other = _differing(_settings_of(first), _settings_of(second)) if kind == "notebook" else []
    lines += [f"settings differ: {', '.join(other)}"] if other else []
    session.finish(chosen, {"kind": kind, "rows": rows, "settings_that_differ": other}, lines, begun=begun)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"a result must be a JSON file, got {path}, {error}: check the path") from error
    if not isinstance(found, dict):
        raise UsageError(f"a result must be one JSON object, got {type(found).__name__} in {path}: check the path")
    return found


def _kind(found: dict[str, Any], name: str) -> str:
    """Tell what wrote a result."""
    if "claims" in found:
        return "notebook"
    if "losses_after" in found:
        return "losses"
    if "results" in found and "models" in found:
        return "evaluate"
    raise UsageError(f"a result must be of sinks evaluate, prune or quantize, or of a notebook, got {name!r}: check the path")


def _settings_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a notebook's run was told, without the sections of other notebooks."""
    own = str(result["notebook"])[3:]
    said = {key: value for key, value in result["config"].items() if not isinstance(value, dict) or key in (own, "models")}
    return {**said, "profile": result["profile"], "seed": result["seed"]}


def _differing(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """List the settings that two results do not share, each with both values."""
    found: list[str] = []
    for key in sorted({*first, *second}):
        one, other = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += _differing(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(f"{prefix}{key} {one} and {other}")
    return found


def _require_equal(first: dict[str, Any], second: dict[str, Any], *, what: str) -> None:
    """Refuse to pair what was measured in two ways.

    Raises:
        UsageError: it names the settings that differ.
    """
    differing = _differing(first, second)
    if differing:
        got = ", ".join(differing)
        raise UsageError(f"{what} must be measured with equal settings to be paired, got {got}: measure both in the same way")


def _tasks(first: dict[str, Any], second: dict[str, Any], *, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Pair models of the same name, or the only one of each, task by task."""
    from lib.commands.evaluate import mcnemar_rows, paired_lines

    names = (list(first["results"]), list(second["results"]))
    shared = [(name, name) for name in names[0] if name in names[1]]
    matched = shared or ([(names[0][0], names[1][0])] if len(names[0]) == len(names[1]) == 1 else [])
    pairs = {}
    for own, other in matched:
        for task in first["results"][own]:
            if task in second["results"][other]:
                found = (first["results"][own][task], second["results"][other][task])
                told = [
                    {**one["settings"], "batch_size": None, "metric": one["metric"]} for one in found
                ]  # rows at one time: equal numbers
                told = [{**one, "limit": result.get("limit")} for one, result in zip(told, (first, second), strict=True)]
                _require_equal(*told, what=f"results of {task}")
                pairs[f"{own} - {other}", task] = (found[0]["correct"], found[1]["correct"])
    if not pairs:
        raise UsageError(
            f"two results must share a model (or have one each) and a task, got {names[0]} and {names[1]}: evaluate both"
        )
    rows = mcnemar_rows(pairs, seed=seed)
    return rows, paired_lines(rows)


def _losses(first: dict[str, Any], second: dict[str, Any], *, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Pair the losses of two compressed models by window; both must have begun from one dense model on the same windows."""
    import torch

    from lib.evaluation import paired

    _require_equal(first.get("loss_settings", {}), second.get("loss_settings", {}), what="two losses")
    if len(first["losses_before"]) != len(second["losses_before"]) or not torch.allclose(
        torch.tensor(first["losses_before"]), torch.tensor(second["losses_before"]), rtol=1e-3
    ):
        got = f"{first['loss_before']:.4f} and {second['loss_before']:.4f} before"
        raise UsageError(
            f"two losses must be of one dense model on the same windows, got {got}: use the same --seed and --loss-text"
        )
    found = paired.paired_difference(torch.tensor(first["losses_after"]), torch.tensor(second["losses_after"]), seed=seed)
    row = {
        "first": first["loss_after"], "second": second["loss_after"], "dense": first["loss_before"],
        "difference": found.estimate, "low": found.interval[0], "high": found.interval[1], "p": found.p_value, "n": found.n,
    }  # fmt: skip
    ends = f"{found.estimate:+.4f} [{found.interval[0]:+.4f}, {found.interval[1]:+.4f}]"
    both = f"loss {row['first']:.4f} and {row['second']:.4f} (dense {row['dense']:.4f}) nats per token"
    return [row], [f"{both}: {ends}, p {found.p_value:.3g}, {found.n} windows"]


def _claims(first: dict[str, Any], second: dict[str, Any], *, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Put the claims of two runs of a notebook side by side; their numbers are not paired."""
    from lib.report.results import interval_text

    if first.get("notebook") != second.get("notebook"):
        got = f"{first.get('notebook')} and {second.get('notebook')}"
        raise UsageError(f"two results must be of one notebook, got {got}: name the same file of two profiles or runs")
    others = {(claim["key"], claim["model"]): claim for claim in second["claims"]}
    rows, lines = [], []
    for claim in first["claims"]:
        other = others.get((claim["key"], claim["model"]))
        rows.append(
            {"key": claim["key"], "model": claim["model"], "first": claim["verdict"], "second": other and other["verdict"]}
        )
        said = [f"{interval_text(each['estimate'], each['interval'])} {each['verdict']}" for each in (claim, other) if each]
        lines.append(
            f"{claim['key']:<40} {claim['model']:<14} {'   |   '.join(said)}{'' if other else '   |   only in the first'}"
        )
    return rows, lines
