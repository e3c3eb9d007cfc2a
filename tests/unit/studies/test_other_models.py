"""What the notebooks compute, on models of other kinds than the embedded pair: everything runs, or says in one line why not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from lib.checkpoints.facts import NoiseKind
from lib.core import config
from lib.core.errors import InputError
from lib.decoding import commit, late_steps
from lib.decoding import systems as published
from lib.diffusion import block_sampler, traces
from lib.evaluation import pseudo_perplexity
from lib.models import export, loading
from lib.models.language_model import LanguageModel
from lib.pruning import expert_removal, pruner
from lib.pruning.importances import UNSTRUCTURED
from lib.pruning.methods import METHODS, RELEASE, STRUCTURES, Method, Target
from lib.quantization.rounding import Grid
from lib.report import notebook
from lib.studies.damage import decisive, shares
from lib.studies.joint import configurations, measured_formats
from lib.studies.joint import runs as joint_runs
from lib.studies.joint import tables as joint_tables
from lib.studies.pruning import adaptive_runs, attribution, expert_tables, runs, where_it_acts
from lib.studies.pruning import tables as pruning_tables
from lib.studies.timing import fidelity, systems
from lib.studies.timing import runs as timing_runs
from lib.studies.timing import tables as timing_tables
from lib.studies.traces import tables as trace_tables
from lib.studies.variance import agreement_tables, sink_effect
from lib.studies.variance import tables as variance_tables
from lib.texts import rows as rows_of
from lib.timing import latency, linear_formats, roofline
from tests import tiny
from tests.unit.models import test_encoders

LENGTH = 12
PRUNE = runs.prune_
AWARE = replace(RELEASE["sink_wanda"], inputs=replace(RELEASE["sink_wanda"].inputs, levels=2))
SOME = {"threshold", "all, fixed", "dual", "dLLM-Cache", "FOCUS", "Elastic-Cache", "Sparse-dLLM", "DAPD", "FreeDave, 4 drafts"}
ROOT = Path(__file__).resolve().parents[3]
KINDS: dict[str, dict[str, Any]] = {
    "by blocks": {"attention": "block-causal", "block_length": 4, "block_origin": "start"},
    "mixture": {},
    "shifted": {"logit_shift": 1},
    "uniform": {"noise": NoiseKind("uniform", 1.0), "mask_token_id": None},
    "mixed": {"noise": NoiseKind("mixed", 0.1)},
}


def made(kind: str, *, mask_token_id: int = tiny.MASK, tokenizer: Any = None, **shape: Any) -> LanguageModel:
    """Make a small model whose weights matter."""
    if kind == "mixture":
        network = tiny.stacked("qwen3_moe", **{"num_hidden_layers": 2, "num_experts": 4, "mlp_only_layers": [], **shape})
    else:
        network = tiny.network(family="qwen2" if kind == "shifted" else "llama", causal=False, **shape)
    facts = {"mask_token_id": mask_token_id, **KINDS[kind]}
    return tiny.of_network(network.requires_grad_(False), tokenizer=tokenizer or tiny.tokenizer(), **facts)


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return made(request.param)


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
    conditions = {("dense", 0.0): None, ("Wanda", 0.5): METHODS["Wanda"]}

    def measure(pruned: LanguageModel) -> float:
        return pseudo_perplexity.pseudo_perplexity(pruned, bench.windows, answer_tokens=4, draws=2, seed=0).value

    if model.noise.is_masked:
        assert len(set(runs.while_pruned(bench, conditions, measure, seed=0).values())) == 2
    else:
        with pytest.raises(InputError, match="a pseudo-perplexity must use masked noise"):
            measure(model)
    structured = {"magnitude": METHODS["magnitude"], "aware": AWARE, **STRUCTURES}
    cut = runs.structured(bench, structured, [0.25, 0.5], seeds=[0])
    assert all(one.measured_sparsity > 0.05 for one in cut if one.sparsity == 0.5)
    left_out = runs.refusals(model, structured, [0.25, 0.5])
    everything = {(name, share) for name in structured for share in (0.25, 0.5)}
    assert {(one.method, one.sparsity) for one in cut} == everything - set(left_out)
    biased = {"FLAP", "FLAP, refit"} if model.network.config.model_type == "qwen2" else set()
    expected = {*structured} - {"Wanda-sp", "aware"} if model.has_experts else biased
    assert {name for name, share in left_out if share == 0.5} == expected
    why = {"qwen2": "a bias must go with a layout that has the flag attention_bias, got qwen2", "qwen3_moe": "one-shot Wanda"}
    assert all(why[model.network.config.model_type] in reason for reason in left_out.values())
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
    cells = decisive.measure(replace(bench, own_masks=True), sparsity=0.5, seeds=[0], noised=AWARE.inputs)
    answered = decisive.answers({model.name: cells}, seed=0)
    assert [question for question, _ in answered] == list(decisive.QUESTIONS) and len(shares.judge([g for _, g in answered])) == 5
    assert len(decisive.table({model.name: cells}, seed=0)) == 7
    assert len(attribution.effects(attribution.quality(cells), seed=0)) and len(attribution.cell_table(cells, seed=0)) == 16
    plain, found = replace(AWARE, weighting=None), runs.Calibrations(bench, 0)
    policies = ("uniform", "OWL", "sink variance")
    outcomes, by_block = adaptive_runs.allocation_outcomes(bench, plain, policies, sparsity=0.5, seeds=[0], spread=0.1, levels=2)
    assert len({one.measured_sparsity for one in outcomes}) == 1 and set(by_block) == set(policies)
    plans = [adaptive_runs.PhasePlan("2 phases", (0.5,), 0.1, "high_noise")]
    if model.goes_by_blocks or not model.noise.is_masked:
        with pytest.raises(InputError, match=r"phases must follow (one mask ratio of the whole text|the mask ratio of masked)"):
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


def test_passes_are_timed(model: LanguageModel) -> None:
    formats = [linear_formats.by_name(name) for name in ("dense", "masked 50 %", "structured 50 %")]
    table = latency.measure_models(linear_formats.convert_all(model, formats), batch=2, length=LENGTH, repeats=3)
    ran = table[table["not_run"] == ""]["model"].tolist()
    assert ran == ["dense", "masked 50 %", *([] if model.has_experts else ["structured 50 %"])]
    assert ("down, expert" in linear_formats.distinct_shapes(model)) == model.has_experts


def test_decoders_are_compared_where_masks_are_filled_in(model: LanguageModel) -> None:
    sizes: dict[str, Any] = {"new_tokens": 8, "block_length": 4}
    prompts, why_not = tiny.ids(2, 4), timing_runs.left_out(model)
    assert bool(why_not) == (model.goes_by_blocks or not model.noise.is_masked)
    if why_not:
        refusal = "drafts must go with attention that is not by blocks|must use masked noise"
        with pytest.raises(InputError, match=refusal):
            timing_runs.run_decoder(model, prompts, timing_runs.Speculation(2), **sizes, batch_size=2)
        return
    wanted = timing_runs.run_decoder(model, prompts, timing_runs.PLAIN, **sizes, batch_size=2).ids
    same = [published.fast_plan(steps_per_block=4), published.fast_plan("dual", refresh_every=1, steps_per_block=4)]
    for plan in (*same, published.fast_plan(threshold=1.0), published.fast_plan("adaptive", refresh_ratio=1.0, threshold=1.0)):
        assert torch.equal(timing_runs.run_decoder(model, prompts, plan, **sizes, batch_size=2).ids, wanted)
    listed = published.published(threshold=0.6, fixed=commit.Quota(2), logit_shift=model.logit_shift)
    assert ("WINO" in {each.name for each in listed}) == (model.logit_shift == 0)
    listed = [each for each in listed if each.name in SOME]
    assert len(listed) == len(SOME)
    table = systems.compare(model, prompts, listed, new_tokens=8, block=4, repeats=1, seed=0).set_index("system")
    measured = table.loc[table["not tested"] == ""]
    assert len(measured) >= len(SOME) - 1  # FOCUS may drop no mask of so short a block
    finite(measured, ["forwards", "rows", "seconds", "top1", "KL", "agreement"])
    exact = [each.name for each in listed if fidelity.is_exact(each.plan) and each.name in measured.index]
    assert bool((measured.loc[exact, "KL"] == 0).all()) and bool((measured["KL"] > -1e-9).all())
    assert table.loc["FreeDave, 4 drafts", "agreement"] == 1
    kept = [published.fast_plan("prefix", steps_per_block=4), published.fast_plan("dual", steps_per_block=4)]
    for plan in (*kept, published.fast_plan(steps_per_block=4, suffix_blocks=0)):
        assert float(fidelity.measure(model, prompts, plan, new_tokens=8, block=4).divergence.mean()) > 0


def test_the_control_and_late_steps_of_decoders(model: LanguageModel) -> None:
    if timing_runs.left_out(model):
        return
    prompts = tiny.ids(4, 4)
    settings: Any = ("as they fall", "sinks in", "sinks out")
    sizes_: dict[str, Any] = {"threshold": 0.5, "new_tokens": 4, "block": 4, "seed": 0}
    table = systems.control(model, prompts[:2], fixed=commit.Quota(2), settings=settings, **sizes_)
    tested = table["not tested"] == ""
    finite(table.loc[tested], ["value", "difference", "p"])
    assert bool(table.loc[~tested, ["value", "difference", "p"]].isna().to_numpy().all())
    assert bool(tested[table["control"] == table["usual"]].all())
    assert len(table) == 18 and set(table["usual"]) == {"as they fall", "sinks in"}
    sizes: dict[str, Any] = {"new_tokens": 8, "block_length": 4, "share": 0.5}
    examples = late_steps.collect(model, prompts, **sizes)
    held_out = late_steps.collect(model, prompts, **sizes, first_only=True)
    steps = {"without": None, "ridge": late_steps.fit(model, examples)}
    finite(timing_tables.late_table(model, held_out, steps, seed=0), ["agreement", "difference"])


def test_a_judge_reads_its_own_tokens_alone(model: LanguageModel) -> None:
    judge = tiny.of_network(tiny.network(), tokenizer=tiny.tokenizer(), is_causal=True, mask_token_id=None)
    assert timing_runs.same_tokens(model, judge) and not timing_runs.same_tokens(model, replace(judge, tokenizer=tiny.words()))


# --- the notebooks themselves ---------------------------------------------------------------------------------------------


SMALL = {
    "sink_traces": {"prompts": 2, "prompt_tokens": 4, "steps": 10, "gif_frames": 2},
    "variance_analysis": {"prompts": 2, "seeds": 1, "prompt_tokens": 4, "top_k": 2, "tokens_per_step": 2, "factor_prompts": 2,
                          "windows": 2, "draws": 2, "blocked_keys": "[1]", "sums": 2, "block_lengths": "[14]",
                          "other_tokens_per_step": "[4]", "other_prompt_tokens": "[8]", "digest_steps": 4,
                          "mask_ratios": "[0.9, 0.5]"},
    "pruning_baselines": {"calibration_windows": 1, "windows": 2, "draws": 1, "timing_repeats": 3, "stronger": "[ALPS]",
                          "decisive_models": "[dlm]", "decisive_windows": 3, "decisive_seeds": 2},
    "sink_aware_pruning": {"calibration_windows": 1, "windows": 2, "draws": 1, "levels": 2, "trajectory_states": 2, "swaps": 1,
                           "decisive_windows": 2, "decisive_seeds": 1, "sparsity": 0.3, "sparsities": "[0.3, 0.5]"},
    "joint_quantization": {"calibration_windows": 1, "windows": 2, "draws": 1, "group_size": 8, "group_sizes": "[8]",
                           "annealing": 1, "timed_rows": 16, "sparsities": "[0.3, 0.5]"},
    "timing": {"rows": "[1]", "batch": 1, "positions": 24, "repeats": 3, "prompts": 2, "prompt_tokens": 4, "new_tokens": 8,
               "block_length": 4, "decoding_batch": 2, "timed_prompts": 2, "coreset_prompts": 2, "retrieved_texts": 2,
               "system_tokens": 4, "system_blocks": "[4]", "answering_systems": "[]", "curve_rules": "[threshold]"},
}  # fmt: skip
SECTIONS: dict[str, str] = dict(zip(("01", "02", "03", "04", "05", "06"), SMALL, strict=True))
REWRITTEN = {"rewritten", "shifts_and_planes"}
DECODERS = {
    "decoders", "accuracy", "late_steps", "composition", "systems", "system_accuracy", "sink_control", "parallelism",
}  # fmt: skip


def checkpoint(kind: str, folder: Path, *, zeros: float = 0.0) -> Path:
    """Write a tiny checkpoint that speaks the embedded pair's tokens, so that their texts can be read; some weights may be 0."""
    reference = loading.load(ROOT / "models/reference/dlm")
    sizes = {"vocab_size": reference.network.config.vocab_size, "max_position_embeddings": 512}
    known: Any = reference.mask_token_id
    small = made(kind, mask_token_id=known, tokenizer=reference.tokenizer, **sizes)
    if zeros:
        pruner.prune_(small, METHODS["magnitude"], Target(zeros))
    return export.save_plain(small, folder)


@dataclass
class Seen:
    """What a notebook wrote, and what it removed."""

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def prune_(self, found: runs.Calibrations, method: Method, target: Target) -> tuple[str, ...]:
        """Take the place of `runs.prune_`."""
        self.targets.append(target)
        return PRUNE(found, method, target)

    def table(self, run: notebook.Run, name: str, frame: pd.DataFrame, caption: str, **_: Any) -> pd.DataFrame:
        """Take the place of `Run.table`."""
        self.tables[name] = frame
        return frame

    def figure(self, run: notebook.Run, name: str, fig: Any, data: pd.DataFrame, caption: str, **_: Any) -> None:
        """Take the place of `Run.figure`."""
        plt.close(fig)
        assert len(data), f"{name} is empty"
        self.figures.append(name)


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Where a notebook's tables and figures go; peaks of the machine are not measured, every task counts."""
    found = Seen()
    monkeypatch.setenv("SINKS_OUTPUT", str(tmp_path / "out"))
    monkeypatch.setattr(notebook.Run, "table", lambda *given, **options: found.table(*given, **options))
    monkeypatch.setattr(notebook.Run, "figure", lambda *given, **options: found.figure(*given, **options))
    monkeypatch.setattr(runs, "prune_", found.prune_)
    monkeypatch.setattr(roofline, "measure_peaks", lambda *_, **__: roofline.Peaks(1e10, 1e10))
    monkeypatch.setattr(latency, "integer_peaks", lambda peaks: peaks)
    monkeypatch.setattr(pruning_tables, "usable_tasks", lambda results: {(key[0], key[3]) for key in results})
    return found


def execute(number: str, overrides: dict[str, str]) -> None:
    """Run the code cells of a notebook in order, as they stand."""
    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    space: dict[str, Any] = {"display": lambda *_: None}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        given = f"\noverrides = {overrides!r}" if "parameters" in cell["metadata"].get("tags", []) else ""
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]) + given, path.name, "exec"), space)


@pytest.mark.parametrize(
    ("number", "kind", "empty", "words"),
    [
        (
            "03",
            "shifted",
            set(),
            "FLAP: left out: a bias must go with a layout that has the flag attention_bias, got qwen2",
        ),
        ("04", "uniform", {"phase_bytes"}, "masks by phase left out"),
        ("05", "mixture", REWRITTEN, "GPTQ, 3 bits, shifted: left out: two streams must pass the same matrices"),
        ("06", "mixed", DECODERS, "decoders are not: under mixed (uniform 0.1) noise no token is finished before the last step"),
        ("06", "shifted", set(), "equal to the plain sampler: no cache"),
    ],
)
def test_a_notebook_runs_to_its_end(
    number: str, kind: str, empty: set[str], words: str, seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = SECTIONS[number]
    small = {"task_documents": 2, "positions": 32, **({} if number == "06" else {"task_draws": 1}), **SMALL[section]}
    overrides = {f"{section}.{key}": str(value) for key, value in small.items()}
    folder = checkpoint(kind, tmp_path / "model", zeros=0.2 if number in ("03", "04") else 0.0)
    overrides |= {f"{section}.models": "[dlm]", "models.dlm.source": str(folder)}
    execute(number, overrides | ({"timing.judge": '""'} if number == "06" else {}))
    assert words in capsys.readouterr().out
    assert {name for name, frame in seen.tables.items() if not len(frame)} == empty
    assert len(seen.figures) >= 3
    if number == "03":
        gains = seen.tables["gains"].set_index("comparison")
        assert gains.loc["Wanda over magnitude per row", ["seeds", "windows"]].tolist() == [2, 3]
        # methods that compare inside rows and others lose as many weights, whatever is measured
        assert all(target.removed is not None or target.pattern != UNSTRUCTURED for target in seen.targets)
    if number == "04":  # its base loses exactly as many weights, whatever is a fraction of a row
        extensions = seen.tables["extensions"].set_index("variant")
        assert extensions.loc["uniform", "gain"] == 0 != extensions.loc["OWL", "gain"]


def encoder(folder: Path) -> Path:
    """Write a tiny encoder that was always shown [CLS] and [SEP], which are the embedded pair's BOS and EOS."""
    reference = loading.load(ROOT / "models/reference/dlm")
    tokenizer: Any = reference.tokenizer
    tokenizer.add_special_tokens({"cls_token": tokenizer.bos_token, "sep_token": tokenizer.eos_token})
    network: Any = test_encoders.network(vocab_size=reference.network.config.vocab_size, max_position_embeddings=512)
    network.config.mask_token_id = reference.mask_token_id
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tiny.edit_config(folder, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)


def twin(folder: Path) -> Path:
    """Write a tiny autoregressive model with the same tokens."""
    reference = loading.load(ROOT / "models/reference/ar")
    network = tiny.network(vocab_size=reference.network.config.vocab_size, max_position_embeddings=512)
    return export.save_plain(tiny.of_network(network, tokenizer=reference.tokenizer, is_causal=True, mask_token_id=None), folder)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("02", "dlm rows, steps, layers, heads, positions: [2, 14, 2, 4, 32]"),
        ("03", "dlm, structured 50%, Wanda-sp: left out: dlm is an encoder, whose class has one width for heads and states"),
        ("04", "dlm 16 combinations"),
        ("06", "decoders are not: it is an encoder, whose attention keeps no keys and values"),
    ],
)
def test_a_notebook_runs_on_an_encoder(
    number: str, words: str, seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside autoregressive models; its rows are framed, and its losses stand per character beside theirs."""
    section, sources = SECTIONS[number], {"dlm": encoder(tmp_path / "encoder")}
    model = loading.load(sources["dlm"])
    rows = rows_of.model_rows(model, [{"title": "a", "extract": "b c d e f g " * 9, "description": "", "topic": ""}], length=32)
    assert bool((rows.ids[:, 0] == model.seen_token_ids[0]).all() and (rows.ids[:, -1] == model.seen_token_ids[1]).all())
    small = {"positions": 32, **({"task_documents": 2, "task_draws": 1} if number in ("03", "04") else {}), **SMALL[section]}
    overrides = {f"{section}.{key}": str(value) for key, value in small.items()}
    names = [name for name in config.load("quick").models if name != "dlm"]
    overrides |= {f"models.{name}.source": str(source) for name, source in sources.items()}
    overrides |= {f"models.{name}.source": str(twin(tmp_path / name)) for name in names}
    execute(number, overrides)
    assert words in capsys.readouterr().out
    assert len(seen.figures) >= 3
    for name in {"02": ["blocking"], "03": ["loss"], "04": ["released", "repairs"]}.get(number, []):
        finite(seen.tables[name], ["loss", "loss per character"])
