"""What each number in the pages is computed from, by name."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import yaml
from scipy.stats import norm

from lib.core import config
from lib.core.config import ROOT, Config
from lib.core.settings.grid import Core, Grid
from lib.evaluation import recovered
from lib.evaluation.paired import ALPHA
from lib.grid import cells, costs, plan
from lib.grid.core import expansion, listing, prices
from lib.grid.core.listing import Priced
from lib.grid.core.racing import Race
from recipes.pages import times

TOKENS = ROOT / "recipes" / "family" / "tokens.json"  # distinct training tokens by source, which `recipes.family.train` counts
GIGABYTE = plan.GIGABYTE


def value(name: str) -> str:
    """Return a number as the pages print it.

    Args:
        name: such as `core.hours`: what it is about, and which number of that.

    Raises:
        KeyError: there is none of this name.

    >>> value("rules.level")
    '95 %'
    """
    subject, _, rest = name.partition(".")
    return SUBJECTS[subject]()[rest]


@functools.cache
def rules() -> Mapping[str, str]:
    """What verdicts go by."""
    return {
        "level": percent(1 - ALPHA),
        "wanda_share": percent(recovered.paper_share("sink-aware (Wanda)"), 1),
    }


@functools.cache
def core_prices() -> Mapping[str, str]:
    """The core of the grid at the speed of the GPU that a plan assumes: prices, resolution and races."""
    loaded, grid, own = _paper()
    priced, names = _priced(loaded, grid, own), prices.benchmarks(own)
    peak, disk = listing.bytes_taken(priced)
    fine, draws = prices.resolution(own, grid, names), _most_draws(loaded)
    rarer, race = replace(own, discordant=0.02), Race(own.first_draws, own.margin, own.audit)
    asked, whole = prices.asked("hellaswag", own, grid)
    most_choices = max(size.texts for size in costs.QUESTIONS.values())
    return {
        "hours": f"{_hours(priced):.1f}",
        "hours_at_sixty_percent": f"{_hours(priced, drawn=0.6):.1f}",
        "hours_without_races": f"{_hours(priced, drawn=1.0):.1f}",
        "teraflops": f"{plan.GPU_TERAFLOPS:.0f}",
        "gpu_gigabytes": f"{peak / GIGABYTE:.0f}",
        "disk_gigabytes": f"{disk / GIGABYTE:.0f}",
        "sparsity": percent(own.sparsity),
        "documents": f"{sum(prices.asked(task, own, grid)[1] for task in names):,}",
        "discordant": percent(own.discordant),
        "anew": f"{fine.anew_at_best:.2f}",
        "rarer": percent(rarer.discordant),
        "anew_if_rarer": f"{prices.resolution(rarer, grid, names).anew_at_best:.2f}",
        "here": f"{fine.here:.3f}",
        "hellaswag": f"{asked:,} of {whole:,}",
        "drawn": percent(own.drawn),
        "draws": f"{draws}",
        "looks": _listed(map(str, accumulate(race.batches(draws)))),
        "margin": f"{own.margin:g}",
        "audit": f"{own.audit}",
        "race_bound": percent((len(race.batches(draws)) - 1) * (most_choices - 1) * float(norm.sf(own.margin)), 1),
        "race_draws": f"{own.draws['race']}",
        "written": f"{own.gen_length}",
        "block": f"{own.block_length}",
        **_rounds(priced),
    }


def _rounds(priced: Priced) -> dict[str, str]:
    """Name the table of the rounds, cell by cell."""
    keys = {"hours": "hours", "first pair after": "first", "all after": "all"}
    rows = listing.by_round(priced).to_dict("records")
    return {f"round{row['round']}.{short}": str(row[long]) for row in rows for long, short in keys.items()}


@functools.cache
def whole_grid() -> Mapping[str, str]:
    """All that the paper profile can run, at the same speed."""
    loaded, own, _ = _paper()
    made = plan.make(loaded, code="", finished=(), grid=own)
    variants = [variant for variant in cells.groups(cells.expand(loaded)) if variant.model == "llada-8b"]
    shape = costs.SHAPES[own.models["llada-8b"].source]

    def dearest(**settings: Any) -> str:
        table = plan.by_memory(made, replace(own, **settings), itemsize=plan.RELEASED_ITEMSIZE, gpus=1).set_index("model")
        return f"{float(str(table.loc['llada-8b', 'GB on the device'])):.0f}"

    kept = max(costs.kept_bytes(one, shape, itemsize=plan.RELEASED_ITEMSIZE) for one in variants if one.options is not None)
    return {
        "cells": f"{len(made.cells):,}",
        "hours": f"{plan.hours(made):,.0f}",
        "sparsities": _listed([percent(each) for each in own.sparsities]),
        "structured": _listed([percent(each) for each in own.structured_sparsities]),
        "patterns": _listed(own.patterns),
        "gigabytes_on_device": dearest(states="device"),
        "gigabytes_on_disk": dearest(states="disk"),
        "gigabytes_kept": f"{kept / GIGABYTE:.0f}",
    }


@functools.cache
def texts() -> Mapping[str, str]:
    """The committed texts and tasks: rows, questions, what guessing reaches, and the training texts' distinct tokens."""
    found = {f"{path.stem}.rows": f"{_rows(path.name):,}" for path in (ROOT / "data").glob("*.jsonl")}
    for path in (ROOT / "data" / "tasks").glob("*.yaml"):
        found[f"{path.stem}.chance"] = percent(yaml.safe_load(path.read_text(encoding="utf-8"))["metadata"]["chance"], 1)
    for path in (ROOT / "data" / "tasks").glob("*.jsonl"):
        found[f"{path.stem}.questions"] = f"{_rows(f'tasks/{path.name}'):,}"
    tokens = json.loads(TOKENS.read_text(encoding="utf-8"))
    found |= {f"{source.replace(' ', '_')}.tokens": f"{count / 1e6:.1f} M" for source, count in tokens.items()}
    return found | {"all.tokens": f"{sum(tokens.values()) / 1e6:.1f} M"}


def _paper() -> tuple[Config, Grid, Core]:
    """Return the paper profile, its grid and its core."""
    loaded = config.load("paper", overrides={"grid.teraflops": plan.GPU_TERAFLOPS})
    assert loaded.grid is not None and loaded.grid.core is not None
    return loaded, loaded.grid, loaded.grid.core


def _priced(loaded: Config, grid: Grid, own: Core) -> Priced:
    """Return the core with its price, nothing of it finished."""
    how: dict[str, Any] = {"teraflops": plan.GPU_TERAFLOPS, "itemsize": plan.RELEASED_ITEMSIZE, "finished": (), "code": ""}
    return Priced(expansion.turns(loaded), own, grid, costs.SHAPES[grid.models[own.model].source], **how)


def _hours(priced: Priced, *, drawn: float | None = None) -> float:
    return sum(priced.hours(turn, drawn=drawn) for turn in priced.turns)


def _most_draws(loaded: Config) -> int:
    """Return the most masks of an answer of any task of the core."""
    raced = [cell.settings["evaluation"] for cell in expansion.cells_of(loaded) if "race" in cell.settings.get("core", {})]
    return max(settings["draws"] for settings in raced)


def _rows(name: str) -> int:
    with (ROOT / "data" / name).open(encoding="utf-8") as file:
        return sum(1 for _ in file)


def _listed(words: Iterable[str]) -> str:
    """Join words as a sentence lists them."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def percent(share: float, digits: int = 0) -> str:
    """Write a share in per cent, without a decimal that is zero.

    >>> percent(0.25, 1), percent(0.0745, 1), percent(0.5)
    ('25 %', '7.5 %', '50 %')
    """
    return f"{100 * share:.{digits}f}".removesuffix(".0") + " %"


SUBJECTS: Mapping[str, Callable[[], Mapping[str, str]]] = {
    "rules": rules, "core": core_prices, "grid": whole_grid, "data": texts, "times": times.times,
}  # fmt: skip
