"""What the notebooks compute, on a model that goes by blocks and on a mixture of experts: everything runs, or says why not."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch

from lib.core.errors import InputError
from lib.diffusion import block_sampler, traces
from lib.evaluation import pseudo_perplexity
from lib.models.language_model import LanguageModel
from lib.pruning import expert_removal
from lib.pruning.methods import METHODS, RELEASE, Method, Target
from lib.quantization.rounding import Grid
from lib.studies.joint import configurations, measured_formats
from lib.studies.joint import runs as joint_runs
from lib.studies.joint import tables as joint_tables
from lib.studies.pruning import adaptive_runs, attribution, expert_tables, runs, where_it_acts
from lib.studies.pruning import tables as pruning_tables
from lib.studies.timing import runs as timing_runs
from lib.studies.traces import tables as trace_tables
from lib.studies.variance import agreement_tables, sink_effect
from lib.studies.variance import tables as variance_tables
from lib.timing import latency, linear_formats
from tests import tiny

LENGTH = 12
AWARE = replace(RELEASE["sink_wanda"], inputs=replace(RELEASE["sink_wanda"].inputs, levels=2))
KINDS = ("by blocks", "mixture")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """Small models whose weights matter, with a tokenizer."""
    blocks: Any = {"attention": "block-causal", "block_length": 4, "block_origin": "start"}
    if request.param == "by blocks":
        return tiny.of_network(tiny.network(causal=False), tokenizer=tiny.tokenizer(), **blocks)
    few: Any = {"num_hidden_layers": 2, "num_experts": 4, "mlp_only_layers": []}
    return tiny.of_network(tiny.stacked("qwen3_moe", **few), tokenizer=tiny.tokenizer())


@pytest.fixture(scope="module")
def bench(model: LanguageModel) -> runs.Bench:
    pool, windows = tiny.ids(6, LENGTH), tiny.ids(3, LENGTH, seed=1)
    return runs.Bench(model, pool, windows, calibration_windows=2, draws=2, seed=0)


def finite(table: pd.DataFrame, columns: Sequence[str]) -> None:
    assert len(table) and bool(table[list(columns)].notna().to_numpy().all())


def test_sinks_are_traced_and_their_variances_tabulated(model: LanguageModel) -> None:
    steps = 8
    trace = traces.trace(model, tiny.ids(2, 3), positions=LENGTH, steps=steps, heads=True)
    assert torch.allclose(trace.mass.sum(-1), trace.keys.float().expand(trace.mass.shape[:2]), rtol=1e-4)
    notes = trace_tables.block_notes([trace])
    assert len(notes) == model.goes_by_blocks and all("keys of finished blocks cannot move" in note for note in notes)
    tokenizer: Any = model.tokenizer
    assert len(trace_tables.top_sinks_table([trace], {model.name: tokenizer}, k=2, seed=0))
    assert len(trace_tables.token_kinds(trace, tokenizer, k=2, mask_token_id=model.mask_token_id))
    assert len(trace_tables.rates_table([trace], k=2, seed=0)) and len(trace_tables.mass_by_state(trace))
    for quantities in (variance_tables.PAPER_QUANTITIES, variance_tables.digest_quantities(2), variance_tables.head_quantities()):
        assert len(variance_tables.quantities_table([trace], quantities, prompts=2, seed=0))
    found = {(model.name, "aggregate"): agreement_tables.overlaps(trace, level="aggregate", prompts=2, seed=0)}
    assert len(agreement_tables.overlap_table(found, distances=agreement_tables.step_distances(steps), seed=0))
    assert len(variance_tables.places_table(trace, k=2)) and len(variance_tables.factors_table({("a", "b"): trace}, seed=0))


def test_blocked_sinks_and_too_few_steps(model: LanguageModel, bench: runs.Bench) -> None:
    effects = sink_effect.window_effects(model, bench.windows, counts=[1], draws=2, seed=0)
    finite(variance_tables.effects_table(effects, seed=0), ["loss"])
    assert len({float(effect.loss.mean()) for effect in effects}) > 2
    if model.goes_by_blocks:
        least = block_sampler.least_steps(model, start=3, end=LENGTH)
        assert least == 3  # the prompt ends inside of the first block
        traces.trace(model, tiny.ids(2, 3), positions=LENGTH, steps=least)
        with pytest.raises(
            InputError,
            match="steps must be at least 3 for the blocks of 4 tokens of tiny, got 2: raise them, or lower the tokens per step",
        ):
            traces.trace(model, tiny.ids(2, 3), positions=LENGTH, steps=least - 1)
        with pytest.raises(InputError, match="attention"):
            sink_effect.digest_effects(model, bench.windows, thresholds=[0.5], top_k=1, steps=2, draws=2, seed=0)


def test_models_are_pruned_compared_and_timed(model: LanguageModel, bench: runs.Bench) -> None:
    chosen = {name: METHODS[name] for name in ("magnitude", "Wanda", "SparseGPT", "AR sink-preserve")} | {"aware": AWARE}
    outcomes = [runs.dense(bench), *runs.compare(bench, chosen, [Target(0.5), Target(0.5, "2:4")], seeds=[0])]
    table = pruning_tables.loss_table(outcomes, seed=0)
    finite(table, ["loss"])
    assert len(table) == 11 and len({round(value, 6) for value in table["loss"]}) > 6
    perplexity = runs.while_pruned(
        bench, {("dense", 0.0): None, ("Wanda", 0.5): METHODS["Wanda"]},
        lambda pruned: pseudo_perplexity.pseudo_perplexity(pruned, bench.windows, answer_tokens=4, draws=2, seed=0), seed=0,
    )  # fmt: skip
    assert perplexity["dense", 0.0].value != perplexity["Wanda", 0.5].value
    structured = {"magnitude": METHODS["magnitude"], "Wanda": Method("wanda", sequential=False), "aware": AWARE}
    cut = runs.structured(bench, structured, [0.25, 0.5], seeds=[0])
    allowed = {
        (name, share)
        for name, method in structured.items()
        for share in (0.25, 0.5)
        if expert_removal.refusal(model, method, sparsity=share) is None
    }
    assert {(one.method, one.sparsity) for one in cut} == allowed
    assert all(one.measured_sparsity > 0.05 for one in cut if one.sparsity == 0.5)
    expected = {"Wanda", "aware"} if model.has_experts else {"magnitude", "Wanda", "aware"}
    assert {name for name, share in allowed if share == 0.5} == expected
    speeds = runs.speed_ups(runs.Calibrations(bench, 0), AWARE, sparsities=(0.5,), repeats=3)
    assert set(speeds) == {("unstructured", 0.5), ("structured", 0.5)}
    more = runs.speed_ups(runs.Calibrations(bench, 0), METHODS["magnitude"], sparsities=(0.5,), repeats=3)
    assert (("structured", 0.5) in more) != model.has_experts


def test_what_removes_experts_says_why_it_cannot() -> None:
    mixture, grouped = tiny.mixture("qwen3_moe"), tiny.mixture("glm4_moe")
    assert "one-shot Wanda" in str(expert_removal.refusal(mixture, METHODS["magnitude"], sparsity=0.25))
    assert expert_removal.refusal(mixture, AWARE, sparsity=0.5) is None
    assert "in the 2 of 4 groups it may use, got 1 left in each" in str(expert_removal.refusal(grouped, AWARE, sparsity=0.5))
    assert expert_removal.refusal(tiny.of_network(tiny.network(causal=False)), METHODS["magnitude"], sparsity=0.5) is None


def test_the_gain_is_taken_apart_and_extended(model: LanguageModel, bench: runs.Bench) -> None:
    cells = attribution.measure(bench, sparsity=0.5, seeds=[0], noised=AWARE.inputs)
    assert len(attribution.effects(attribution.quality(cells), seed=0)) and len(attribution.cell_table(cells, seed=0)) == 16
    plain, found = replace(AWARE, weighting=None), runs.Calibrations(bench, 0)
    policies = ("uniform", "OWL", "sink variance")
    outcomes, by_block = adaptive_runs.allocation_outcomes(bench, plain, policies, sparsity=0.5, seeds=[0], spread=0.1, levels=2)
    assert len({one.measured_sparsity for one in outcomes}) == 1 and set(by_block) == set(policies)
    plans = [adaptive_runs.PhasePlan("2 phases", (0.5,), 0.1, "high_noise")]
    if model.goes_by_blocks:
        with pytest.raises(InputError, match="phases must follow one mask ratio of the whole text"):
            adaptive_runs.phase_outcomes(bench, plain, plans, sparsity=0.5, seeds=[0])
        assert adaptive_runs.phase_outcomes(bench, plain, [], sparsity=0.5, seeds=[0]) == ([], {})
    else:
        assert len(adaptive_runs.phase_outcomes(bench, plain, plans, sparsity=0.5, seeds=[0])[0]) == 1
    masks = [where_it_acts.keep_masks(found, method, Target(0.5)) for method in (plain, AWARE)]
    assert len(where_it_acts.overlap_table(found, *masks)) and len(where_it_acts.channel_table(found, AWARE, Target(0.5)))
    if model.has_experts:
        finite(expert_tables.expert_table(found, AWARE), ["tokens"])
        assert len(expert_tables.sink_routing_table(found, AWARE, seed=0, permutations=19))


def test_models_are_rounded_and_formats_chosen(model: LanguageModel, bench: runs.Bench) -> None:
    found, grid = runs.Calibrations(bench, 0), Grid(4, 8, "search")
    half = Target(0.5)
    recipes = [
        ("rounded", joint_runs.Recipe(grid, Target(0.0), METHODS["SparseGPT"], "joint")),
        ("both", joint_runs.Recipe(grid, half, METHODS["SparseGPT"], "joint")),
        ("then", joint_runs.Recipe(grid, half, METHODS["SparseGPT"], "prune, quantize")),
    ]
    measured = [joint_runs.measured(found, joint_tables.DENSE, joint_runs.Recipe()), *joint_runs.compare([found], recipes)]
    finite(joint_tables.loss_table(measured, seed=0), ["loss"])
    assert torch.stack(list(joint_runs.loss_by_noise(model, bench.windows, ratios=[0.5], seed=0))).isfinite().all()
    prepared = configurations.prepare(found, configurations.named(["int4", "structured 50 %"]))
    assert ("structured 50 %" in prepared.missing) == model.has_experts
    assert len(measured_formats.sensitivity(prepared, bench.windows, seed=1, draws=2)) and measured_formats.sizes(prepared)


def test_passes_are_timed_and_decoders_where_there_are_any(model: LanguageModel) -> None:
    formats = [linear_formats.by_name(name) for name in ("dense", "masked 50 %", "structured 50 %")]
    table = latency.measure_models(linear_formats.convert_all(model, formats), batch=2, length=LENGTH, repeats=3)
    ran = table[table["not_run"] == ""]["model"].tolist()
    assert ran == ["dense", "masked 50 %", *([] if model.has_experts else ["structured 50 %"])]
    sizes: dict[str, Any] = {"new_tokens": 8, "block_length": 8, "batch_size": 2}
    if model.goes_by_blocks:
        with pytest.raises(InputError, match="block_length must be that of"):
            timing_runs.run_decoder(model, tiny.ids(2, 4), timing_runs.PLAIN, **sizes)
    else:
        assert timing_runs.run_decoder(model, tiny.ids(2, 4), timing_runs.PLAIN, **sizes).ids.shape == (2, 12)
