"""The settings of the experiment grid and of its core, with their ranges."""

from typing import Annotated, Literal

from pydantic import StrictBool, StrictFloat, StrictInt
from pydantic.dataclasses import dataclass

from lib.core.errors import require
from lib.core.sections import ModelSource, Section, between


@dataclass(frozen=True)
class CalibrationText(Section):
    """Where the calibration windows of the grid come from, how many there are, and how many tokens each has."""

    corpus: Literal["wikitext2", "c4", "articles"]
    windows: Annotated[StrictInt, between(1, 65536)]
    positions: Annotated[StrictInt, between(8, 32768)]


@dataclass(frozen=True, kw_only=True)
class Core(Section):
    """The part of a grid that answers the paper's main table first: one model at one sparsity, in rounds of tasks."""

    model: str
    sparsity: Annotated[StrictFloat, between(0.01, 0.99)]
    methods: tuple[str, ...]
    rounds: tuple[tuple[str, ...], ...]
    documents: dict[str, Annotated[StrictInt, between(1, 1000000)]]
    discordant: Annotated[StrictFloat, between(0.001, 1.0)]
    draws: dict[str, Annotated[StrictInt, between(1, 4096)]]
    first_draws: Annotated[StrictInt, between(2, 4096)]
    margin: Annotated[StrictFloat, between(0.1, 100.0)]
    audit: Annotated[StrictInt, between(1, 1000000)]
    drawn: Annotated[StrictFloat, between(0.01, 1.0)]
    gen_length: Annotated[StrictInt, between(1, 8192)]
    block_length: Annotated[StrictInt, between(1, 8192)]
    cache: Literal["none", "prefix", "dual"]
    keep_weights: StrictBool

    def __post_init__(self) -> None:
        rule, fits = f"block_length must divide the {self.gen_length} of gen_length", self.gen_length % self.block_length == 0
        require(fits, rule, str(self.block_length), "choose a divisor")


@dataclass(frozen=True, kw_only=True)
class Grid(Section):
    """The experiment grid of `./run_all.sh paper`, with models of its own: notebooks hold theirs in memory at the same time."""

    models: dict[str, ModelSource]
    references: dict[str, ModelSource]
    families: dict[str, str]
    calibrations: dict[str, CalibrationText]
    methods: tuple[str, ...]
    sparsities: tuple[Annotated[StrictFloat, between(0.01, 0.99)], ...]
    patterns: tuple[str, ...]
    structured_methods: tuple[str, ...]
    structured_sparsities: tuple[Annotated[StrictFloat, between(0.01, 0.99)], ...]
    other_methods: tuple[str, ...]
    other_sparsity: Annotated[StrictFloat, between(0.01, 0.99)]
    seeds: Annotated[StrictInt, between(1, 64)]
    task_names: tuple[str, ...]
    rows: str | None
    limit: Annotated[StrictInt, between(1, 1000000)] | None
    draws: Annotated[StrictInt, between(1, 4096)] | None
    gen_length: Annotated[StrictInt, between(1, 8192)] | None
    loss_windows: Annotated[StrictInt, between(0, 65536)]
    loss_positions: Annotated[StrictInt, between(8, 32768)]
    loss_draws: Annotated[StrictInt, between(1, 4096)]
    batch_size: Annotated[StrictInt, between(1, 4096)]
    weights: Literal["memory", "spread", "streamed"]
    states: Literal["device", "cpu", "disk"]
    keep_weights: StrictBool
    teraflops: Annotated[StrictFloat, between(1e-6, 1e6)] | None
    scope: Literal["core", "all"] = "all"
    core: Core | None = None
