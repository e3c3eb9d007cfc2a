"""Formats by layer for this machine: the best allocation for a budget, three others, and what each of them really does.

Predictions are sums over layers, of losses and times that `measured_formats` measured one at a time; measured are whole models.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lib.core.errors import InputError, require
from lib.core.runtime import generator, progress
from lib.evaluation import paired
from lib.evaluation.paired import PairedDifference
from lib.models.language_model import LanguageModel
from lib.studies.joint import configurations, search
from lib.studies.joint.configurations import DENSE, Prepared
from lib.studies.joint.measured_formats import loss_in
from lib.studies.joint.search import Allocation, Choice
from lib.studies.pruning import runs
from lib.studies.pruning.runs import TIMED_WINDOWS
from lib.timing import clock

Chosen = tuple[tuple[str, str], ...]  # (layer, format), sorted: what makes two allocations the same model
STRATEGIES = {"optimum": search.optimise, "uniform": search.uniform, "greedy": search.greedy}


@dataclass(frozen=True)
class Budget:
    """What an allocation may take of what the dense linear layers take, as shares in (0, 1]; None is no limit.

    >>> Budget(seconds=0.6, bytes=0.3).name
    'seconds <= 60 %, bytes <= 30 %'
    """

    seconds: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        require(bool(self.shares), "a budget must limit seconds or bytes", "neither", "give one")
        sound = all(0 < share <= 1 for share in self.shares.values())
        rule = "a budget must be shares of dense in (0, 1]"
        require(sound, rule, str(self.shares), "use fractions, not per cent: 0.5 for half")

    @property
    def shares(self) -> dict[str, float]:
        """Shares of what is limited."""
        return {name: share for name, share in (("seconds", self.seconds), ("bytes", self.bytes)) if share is not None}

    def limits(self, dense: Allocation) -> dict[str, float]:
        """Return the limits for `lib.studies.joint.search`: these shares of the dense totals, in seconds and whole bytes."""
        limits = {name: share * getattr(dense, name) for name, share in self.shares.items()}
        return {name: math.floor(limit) if name == "bytes" else limit for name, limit in limits.items()}

    @property
    def name(self) -> str:
        """For tables."""
        return ", ".join(f"{name} <= {share:.3g} %" for name, share in ((n, 100 * s) for n, s in self.shares.items()))


@dataclass(frozen=True)
class Tried:
    """One way to meet one budget: what was predicted, and what was measured.

    Attributes:
        model: its name.
        budget: what was allowed.
        strategy: how formats were chosen.
        allocation: what was chosen, with predicted totals, negative losses counted as 0; None if nothing fits.
        reason: why nothing fits.
        as_measured: predicted increase of the loss with negative losses as they are.
        increase: measured increase of the loss over the dense model, with its paired interval.
        forward: measured seconds of forward passes of the whole model; None where it was not timed.
        dense: predicted totals of the dense model.
        dense_forward: measured seconds of the dense model in the same rounds.
    """

    model: str
    budget: Budget
    strategy: str
    allocation: Allocation | None
    reason: str
    as_measured: float
    increase: PairedDifference | None
    forward: Float[Tensor, "repeat"] | None = field(repr=False)
    dense: Allocation = field(repr=False)
    dense_forward: Float[Tensor, "repeat"] | None = field(repr=False)


def compare_allocations(
    prepared: Prepared,
    options: Sequence[Choice],
    budgets: Sequence[Budget],
    *,
    draws: int,
    repeats: int,
    seed: int = 0,
    timed_draws: int = 1,
    input_ids: Int[Tensor, "sample position"] | None = None,
) -> list[Tried]:
    """Choose formats for each budget in four ways, put them into the model, and measure its loss and its time.

    Losses are those of the bench's windows and masks, which must not be those that the options come from (see
    `measured_formats.sensitivity`).

    Args:
        prepared: a model's layers in all formats.
        options: of `choices`; negative losses count as 0 in the searches.
        budgets: what is allowed.
        draws: random allocations for each budget, whose losses are all measured.
        repeats: timed rounds of forward passes, each with every allocation and the dense model; 0 times nothing.
        seed: of random allocations and intervals.
        timed_draws: random allocations for each budget that are timed.
        input_ids: what a timed pass reads; the bench's first windows by default.

    Returns:
        One record a budget and allocation; where nothing fits, it says why. Equal allocations are measured once.

    Raises:
        InputError: options that cannot be used, or none of them dense.
    """
    search.optimise(options)  # options that cannot be used are an error; budgets that cannot be met are results
    floored = search.floor_at_zero(options)
    dense = _dense(floored)
    raw = {(choice.layers, choice.format): choice.loss for choice in options}
    rows: list[tuple[Budget, str, Allocation | None, str]] = []
    for index, budget in enumerate(budgets):
        limits = budget.limits(dense)
        stream = generator(seed, "random allocations", index)
        rows += [(budget, *found) for found in _searched(floored, limits, draws=draws, stream=stream)]
    fitting = {changed(found): found for _, _, found, _ in rows if found}
    listed = progress(fitting.items(), desc=f"{prepared.model.name}, allocations")
    losses = {key: loss_in(prepared, found.formats) for key, found in listed}
    untimed = {f"random {draw + 1}" for draw in range(timed_draws, draws)}
    timed = {changed(found): found for _, name, found, _ in rows if found and name not in untimed}
    ids = prepared.found.bench.windows[:TIMED_WINDOWS] if input_ids is None else input_ids
    passes = forward_seconds(prepared, list(timed.values()), ids, repeats=repeats) if repeats else {}
    base, results = runs.loss(prepared.found.bench), []
    for budget, name, found, reason in rows:
        total, increase, forward = math.nan, None, None
        if found is not None:
            total = math.fsum(raw[each.layers, each.format] for each in found.chosen)
            increase = paired.paired_difference(losses[changed(found)], base, seed=seed)
            forward = None if name in untimed else passes.get(changed(found))
        results.append(Tried(prepared.model.name, budget, name, found, reason, total, increase, forward, dense, passes.get(())))
    return results


def forward_seconds(
    prepared: Prepared, allocations: Sequence[Allocation], input_ids: Int[Tensor, "sample position"], *, repeats: int
) -> dict[Chosen, Float[Tensor, "repeat"]]:
    """Time forward passes, logits included, of models in some formats in turn with the dense one.

    Args:
        prepared: a model's layers in all formats.
        allocations: the formats.
        input_ids: what a pass reads.
        repeats: timed rounds.

    Returns:
        Seconds by sorted (layer, format); dense under ().
    """
    models: dict[Chosen, LanguageModel] = {(): prepared.model}
    models |= {changed(found): configurations.variant(prepared, found.formats) for found in allocations}
    ids = input_ids.to(prepared.model.device)
    calls = {str(key): partial(model.network, input_ids=ids, use_cache=False) for key, model in models.items()}
    seconds = clock.interleaved(calls, repeats=repeats, device=prepared.model.device)
    return {key: seconds[str(key)] for key in models}


def _dense(options: Sequence[Choice]) -> Allocation:
    try:
        return search.uniform([choice for choice in options if choice.format == DENSE])
    except InputError as error:
        raise InputError("budgets must be shares of dense, got options without it: offer every layer dense") from error


def _searched(
    options: Sequence[Choice], limits: Mapping[str, float], *, draws: int, stream: torch.Generator
) -> Iterator[tuple[str, Allocation | None, str]]:
    """Yield the name of every strategy and its allocation, or none and why."""
    for name, method in STRATEGIES.items():
        try:
            yield name, method(options, **limits), ""
        except InputError as error:
            yield name, None, str(error)
    if draws:
        try:
            found = search.random(options, draws=draws, generator=stream, **limits)
            yield from ((f"random {index + 1}", each, "") for index, each in enumerate(found))
        except InputError as error:
            yield "random", None, str(error)


def changed(found: Allocation) -> Chosen:
    """Return the layers that are not dense, with their formats: what makes two allocations the same model."""
    return tuple(sorted((layer, form) for layer, form in found.formats.items() if form != DENSE))
