"""Sparsity spread over blocks and over phases of denoising: equal totals, counted; policies and phases against slow loops."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lib.calibration import sets
from lib.calibration.sets import NOISED, Inputs
from lib.core.errors import InputError
from lib.models.language_model import LanguageModel
from lib.pruning import allocation, pruner
from lib.pruning.methods import Method, Target
from lib.studies.pruning import adaptive_runs, runs
from lib.studies.pruning.adaptive_runs import POLICIES, PhasePlan
from lib.studies.pruning.runs import Bench, Calibrations
from lib.studies.variance.sink_effect import text_loss
from lib.timing.effort import Effort
from tests import tiny
from tests.unit import slow_pruning as slow

LENGTH, BLOCKS, SPREAD = 16, 4, 0.1
PLAIN = Method("wanda", Inputs("noised", levels=2), sequential=False, aggregate="sum_of_norms")
MAGNITUDE = Method("magnitude")
HALF_WAY, THIRDS = (0.5,), (2 / 3, 1 / 3)
PLANS = [
    PhasePlan("one", HALF_WAY, 0.0, "high_noise"),
    PhasePlan("gentle at first", HALF_WAY, SPREAD, "high_noise"),
    PhasePlan("gentle at last", (0.75,), SPREAD, "low_noise"),
    PhasePlan("three", THIRDS, SPREAD, "high_noise"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Four blocks, so that a policy is more than an order of two."""
    return tiny.model(tmp_path_factory.mktemp("diffusion"), causal=False, num_hidden_layers=BLOCKS)


@pytest.fixture
def bench(model: LanguageModel) -> Iterator[Bench]:
    before = slow.state_of(model)
    yield Bench(model, tiny.ids(10, LENGTH, seed=3), tiny.ids(3, LENGTH, seed=4), 3, 2, 11)
    assert slow.same_state(model, before)


@pytest.fixture
def uneven(bench: Bench) -> Bench:
    """A model whose first blocks have fewer matrices to prune: 6, 6, 7 and 7 of them."""
    layers = tuple(layer for layer in bench.model.layers if layer.role != "up" or layer.block > 1)
    return replace(bench, model=replace(bench.model, layers=layers))


def block_sizes(model: LanguageModel) -> list[int]:
    sizes = [0] * BLOCKS
    for layer in model.layers:
        sizes[layer.block] += layer.module.weight.shape[0] * layer.module.weight.shape[1]
    return sizes


def zeros_of(model: LanguageModel) -> list[int]:
    """Weights that are gone, by block."""
    zeros = [0] * BLOCKS
    for layer in model.layers:
        zeros[layer.block] += int((layer.module.weight == 0).sum())
    return zeros


def shifted(offsets: list[float], sizes: list[int], sparsity: float) -> list[float]:
    """The offsets moved by one constant so that the mean by size is the sparsity."""
    mean = sum(offset * size for offset, size in zip(offsets, sizes, strict=True)) / sum(sizes)
    return [sparsity + offset - mean for offset in offsets]


def ranked(scores: list[float], spread: float) -> list[float]:
    """From +spread for the lowest score to -spread for the highest, in proportion."""
    low, high = min(scores), max(scores)
    return [spread - 2 * spread * (score - low) / (high - low) for score in scores]


# --- equal totals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.5, 0.37, 0.613])
def test_every_policy_removes_exactly_as_many_weights(uneven: Bench, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    own = runs.loss

    def counting(bench: Bench, variant: LanguageModel | None = None) -> Tensor:
        counted.append(zeros_of(bench.model))
        return own(bench, variant)

    monkeypatch.setattr(runs, "loss", counting)
    options: dict[str, Any] = {"sparsity": sparsity, "seeds": [0, 1], "spread": SPREAD}
    outcomes, shown = adaptive_runs.allocation_outcomes(uneven, MAGNITUDE, POLICIES, **options)
    assert [(one.seed, one.method) for one in outcomes] == [(seed, policy) for seed in (0, 1) for policy in POLICIES]
    size = sum(block_sizes(uneven.model))
    assert [sum(blocks) for blocks in counted] == [round(sparsity * size)] * len(outcomes)
    for one, blocks in zip(outcomes, counted, strict=True):
        assert one.measured_sparsity == sum(blocks) / size and one.sparsity == sparsity and one.pattern == "unstructured"
        if one.seed == 0:  # what is shown is what was done, but for rounding of at most one weight a matrix
            for share, gone, of_block in zip(shown[one.method].tolist(), blocks, block_sizes(uneven.model), strict=True):
                assert gone == pytest.approx(share * of_block, abs=7)
    assert list(shown) == list(POLICIES)
    assert len({tuple(blocks) for blocks in counted[: len(POLICIES)]}) == len(POLICIES)


def test_sparsities_of_blocks_become_whole_numbers_in_each_matrix(uneven: Bench) -> None:
    by_block = torch.tensor(shifted([0.1, -0.2, 0.0, 0.05], block_sizes(uneven.model), 0.4), dtype=torch.float64)
    target = adaptive_runs.exact_target(uneven.model, by_block, sparsity=0.4)
    assert target.sparsity == 0.4 and target.removed is not None
    sizes = {layer.name: layer.module.weight.numel() for layer in uneven.model.layers}
    assert sum(target.removed.values()) == round(0.4 * sum(sizes.values()))
    for layer in uneven.model.layers:
        assert target.removed[layer.name] == pytest.approx(float(by_block[layer.block]) * sizes[layer.name], abs=1)


@pytest.mark.parametrize(
    "method", [PLAIN, MAGNITUDE, replace(PLAIN, sequential=True)], ids=["one-shot", "magnitude", "sequential"]
)
def test_a_uniform_policy_and_phases_that_do_not_differ_are_plain_pruning(bench: Bench, method: Method) -> None:
    """Half of every row is a whole number, so that equal totals are equal rows."""
    wanted = runs.compare(bench, {"x": method}, [Target(0.5)], seeds=[5])[0]
    uniform, _ = adaptive_runs.allocation_outcomes(bench, method, ["uniform"], sparsity=0.5, seeds=[5], spread=SPREAD)
    still, _ = adaptive_runs.allocation_outcomes(bench, method, ["OWL"], sparsity=0.5, seeds=[5], spread=0.0)
    phased, _ = adaptive_runs.phase_outcomes(bench, method, PLANS[:1], sparsity=0.5, seeds=[5])
    for found in (*uniform, *still, *phased):
        assert found.measured_sparsity == wanted.measured_sparsity == 0.5 and found.seed == 5
        assert torch.allclose(found.loss, wanted.loss, atol=1e-5), found.method


# --- policies ------------------------------------------------------------------------------------------------------------


def policy(bench: Bench, name: str, **options: Any) -> list[float]:
    found = Calibrations(bench, seed=2)
    return adaptive_runs.block_sparsities(found, name, **{"sparsity": 0.45, "spread": SPREAD, **options}).tolist()


@pytest.mark.parametrize(
    ("name", "offsets"),
    [
        ("uniform", [0, 0, 0, 0]),
        ("early is sparser", [SPREAD, SPREAD / 3, -SPREAD / 3, -SPREAD]),
        ("late is sparser", [-SPREAD, -SPREAD / 3, SPREAD / 3, SPREAD]),
    ],
)
def test_lines_over_depth(uneven: Bench, name: str, offsets: list[float]) -> None:
    assert policy(uneven, name) == pytest.approx(shifted(offsets, block_sizes(uneven.model), 0.45))


def test_blocks_with_more_outliers_are_pruned_less(uneven: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_runs, "outlier_scores", lambda _: torch.tensor([0.1, 0.4, 0.0, 0.3], dtype=torch.float64))
    wanted = shifted(ranked([0.1, 0.4, 0.0, 0.3], SPREAD), block_sizes(uneven.model), 0.45)
    assert policy(uneven, "OWL") == pytest.approx(wanted)
    assert wanted.index(min(wanted)) == 1 and max(wanted) - min(wanted) == pytest.approx(2 * SPREAD)


def test_outliers_are_counted_over_whole_blocks_on_clean_text(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importances above so many times the mean of their block, not of their matrix; a factor that tiny matrices reach."""
    share = allocation.outlier_share
    monkeypatch.setattr(allocation, "outlier_share", lambda importance: share(importance, factor=2.5))
    found = Calibrations(bench, seed=2)
    inputs = slow.captured(bench.model, found.windows)
    by_block: list[list[float]] = [[] for _ in range(BLOCKS)]
    for layer in bench.model.layers:
        norm = slow.statistics(inputs[layer.name], products=False)["squares"].sqrt()
        by_block[layer.block] += (layer.module.weight.double().abs() * norm).flatten().tolist()
    wanted = [sum(v > 2.5 * sum(every) / len(every) for v in every) / len(every) for every in by_block]
    assert adaptive_runs.outlier_scores(found).tolist() == pytest.approx(wanted, abs=2e-4)
    assert max(wanted) - min(wanted) > 2e-3
    assert policy(bench, "OWL") == pytest.approx(shifted(ranked(wanted, SPREAD), block_sizes(bench.model), 0.45), abs=5e-3)


def slow_layer_variance(found: Calibrations, levels: int = 10) -> list[float]:
    """Variance over noise levels of each token's mass (mean over heads), averaged over tokens and windows, from eager maps."""
    noised = sets.read(found.bench.model, found.windows, Inputs("noised", levels=levels), seed=found.seed)
    by_window = [slow.masses(found.bench.model, window).mean(2) for window in noised]  # [layer, level, position]
    result = []
    for block in range(BLOCKS):
        values = []
        for mass in by_window:
            for position in range(LENGTH):
                over_levels = mass[block, :, position].tolist()
                mean = sum(over_levels) / len(over_levels)
                values.append(sum((value - mean) ** 2 for value in over_levels) / len(over_levels))
        result.append(sum(values) / len(values))
    return result


def test_blocks_with_stable_sinks_are_pruned_less_or_more(uneven: Bench) -> None:
    found = Calibrations(uneven, seed=2)
    variance = slow_layer_variance(found)
    assert len(found.windows) * NOISED.levels == 30  # read 16 at a time: the levels of a window lie in two parts
    assert adaptive_runs.layer_variance(found).tolist() == pytest.approx(variance, rel=1e-4)
    assert adaptive_runs.layer_variance(found, levels=3).tolist() == pytest.approx(slow_layer_variance(found, 3), rel=1e-4)
    stable = ranked([-value for value in variance], SPREAD)
    assert policy(uneven, "sink variance") == pytest.approx(shifted(stable, block_sizes(uneven.model), 0.45), abs=1e-4)
    few = ranked([-value for value in slow_layer_variance(found, 3)], SPREAD)
    assert policy(uneven, "sink variance", levels=3) == pytest.approx(shifted(few, block_sizes(uneven.model), 0.45), abs=1e-4)
    assert few != pytest.approx(stable, abs=1e-3)
    unstable = ranked(variance, SPREAD)
    assert policy(uneven, "sink variance, reversed") == pytest.approx(
        shifted(unstable, block_sizes(uneven.model), 0.45), abs=1e-4
    )
    assert stable.index(min(stable)) == variance.index(min(variance))  # the most stable block keeps most


def test_an_unknown_policy_is_refused(bench: Bench) -> None:
    message = "a policy must be one of uniform, early is sparser, .*, got 'EIS': choose one of them"
    with pytest.raises(InputError, match=message):
        adaptive_runs.allocation_outcomes(bench, PLAIN, ["EIS"], sparsity=0.5, seeds=[0], spread=0.1)


def test_a_spread_that_leaves_the_range_is_refused(bench: Bench) -> None:
    with pytest.raises(InputError, match=r"layer sparsities must lie in \[0, 1\), got -0.05 to 0.25: spread them less"):
        policy(bench, "early is sparser", sparsity=0.1, spread=0.15)


# --- phases --------------------------------------------------------------------------------------------------------------


def captured_phases(bench: Bench, plan: PhasePlan, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any, Any]:
    """The outcome, its cost, and the model whose loss was measured."""
    joined = []
    own = runs.loss
    monkeypatch.setattr(runs, "loss", lambda bench, variant: joined.append(variant) or own(bench, variant))
    outcomes, cost = adaptive_runs.phase_outcomes(bench, PLAIN, [plan], seeds=[5], **{"sparsity": 0.5, **options})
    return outcomes[0], cost[plan.name], joined[0]


def phase_zeros(joined: LanguageModel, phases: int) -> list[float]:
    """Share of zeros of each phase, from high noise to low."""
    zeros, size = [0] * phases, [0] * phases
    for layer in joined.layers:
        phase = int(layer.name.split("decoders.")[1].split(".")[0])
        zeros[phase] += int((layer.module.weight == 0).sum())
        size[phase] += layer.module.weight.numel()
    return [gone / of for gone, of in zip(zeros, size, strict=True)]


@pytest.mark.parametrize(
    ("plan", "wanted", "widths"),
    [
        (PLANS[0], [0.5, 0.5], [0.5, 0.5]),
        (PLANS[1], [0.4, 0.6], [0.5, 0.5]),
        (PLANS[2], [0.65, 0.45], [0.25, 0.75]),  # the narrow phase lies farther from the mean
        (PLANS[3], [0.4, 0.5, 0.6], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_phases_have_the_asked_sparsities_and_all_plans_the_same_mean(
    bench: Bench, plan: PhasePlan, wanted: list[float], widths: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, joined = captured_phases(bench, plan, monkeypatch)
    shares = phase_zeros(joined, len(wanted))
    size = sum(block_sizes(bench.model))
    assert shares == pytest.approx(wanted, abs=0.5 / size)
    mean = sum(width * share for width, share in zip(widths, shares, strict=True))
    assert one.measured_sparsity == pytest.approx(mean, abs=1e-9) and mean == pytest.approx(0.5, abs=0.5 / size)
    assert (one.method, one.sparsity, one.seed, one.pattern) == (plan.name, 0.5, 5, "unstructured")
    assert torch.equal(one.loss, runs.loss(bench, joined))


def logits(model: LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(Any, model.network)(input_ids=ids).logits


def test_noisy_rows_go_through_the_gently_pruned_weights(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, joined = captured_phases(bench, PLANS[1], monkeypatch)
    rows = tiny.ids(2, 10)
    rows[0, :6], rows[1, :4] = tiny.MASK, tiny.MASK  # 60 % and 40 % masks, around the border of 50 %
    for row, sparsity in ((0, 0.4), (1, 0.6)):
        alike = torch.full((BLOCKS,), sparsity, dtype=torch.float64)
        target = adaptive_runs.exact_target(bench.model, alike, sparsity=sparsity)
        with pruner.restored(bench.model) as pruned:
            runs.prune_(Calibrations(bench, 5), PLAIN, target)
            wanted = logits(pruned, rows)[row]
        hidden = cast(Any, joined.network.get_decoder())(input_ids=rows, use_cache=False).last_hidden_state
        found = cast(Any, joined.network.get_output_embeddings())(hidden)[row]
        assert torch.allclose(found, wanted, atol=1e-4)


def test_the_cost_is_that_of_the_first_seeds_masks_in_bfloat16(bench: Bench) -> None:
    """Behind pruned blocks, so that the masks of the phases are not nested and their union differs by seed."""
    method = replace(PLAIN, sequential=True)
    outcomes, cost = adaptive_runs.phase_outcomes(bench, method, PLANS[:2], sparsity=0.5, seeds=[5, 6])
    assert [(one.seed, one.method) for one in outcomes] == [(seed, plan.name) for seed in (5, 6) for plan in PLANS[:2]]
    union, masks, size = 0, 0, sum(block_sizes(bench.model))
    found = Calibrations(bench, 5)
    gentle = torch.full((BLOCKS,), 0.4, dtype=torch.float64)
    target = adaptive_runs.exact_target(bench.model, gentle, sparsity=0.4)
    other = adaptive_runs.exact_target(bench.model, gentle + 0.2, sparsity=0.6)
    first, second = (runs.pruned_copy(found, method, each) for each in (target, other))
    for one, two in zip(first.layers, second.layers, strict=True):
        union += int(((one.module.weight != 0) | (two.module.weight != 0)).sum())
        masks += 2 * one.module.weight.numel() // 8
    assert cost["gentle at first"].all_phases == 2 * union + masks and cost["gentle at first"].dense == 2 * size
    assert cost["gentle at first"].one_mask == pytest.approx(size + size / 8, abs=len(first.layers))
    assert list(cost) == ["one", "gentle at first"] and cost["one"].mean_sparsity == 0.5


def test_the_number_of_noise_levels_reaches_the_policy(bench: Bench) -> None:
    options: dict[str, Any] = {"sparsity": 0.45, "spread": SPREAD}
    for levels in (2, 3):
        _, shown = adaptive_runs.allocation_outcomes(bench, MAGNITUDE, ["sink variance"], seeds=[2], levels=levels, **options)
        assert shown["sink variance"].tolist() == policy(bench, "sink variance", levels=levels)
    assert policy(bench, "sink variance", levels=2) != pytest.approx(policy(bench, "sink variance", levels=3), abs=1e-3)


def test_sparsegpt_is_refused_before_any_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_runs, "Calibrations", lambda *_: pytest.fail("must not calibrate"))
    with pytest.raises(InputError, match="phases must share the dense values, got sparsegpt with repair none"):
        adaptive_runs.phase_outcomes(bench, Method("sparsegpt"), PLANS, sparsity=0.5, seeds=[0])


# --- comparators ---------------------------------------------------------------------------------------------------------

ONE_SHOT = Method("wanda", sequential=False)


def test_dsa_goes_by_the_variance_of_logarithms_both_ways(bench: Bench) -> None:
    found = Calibrations(bench, 1)
    scores = adaptive_runs.block_scores(found, allocation.log_variance)
    got, back = (adaptive_runs.block_sparsities(found, policy, sparsity=0.5, spread=0.1) for policy in ("DSA", "DSA, reversed"))
    assert int(got.argmin()) == int(scores.argmax()) and torch.allclose(got + back, torch.ones(4).double())


@pytest.mark.parametrize("method", [ONE_SHOT, Method("sparsegpt", sequential=False), Method("magnitude"), Method("random")])
def test_blocks_put_together_are_the_pruned_model(bench: Bench, method: Method) -> None:
    found = Calibrations(bench, 1)
    database = adaptive_runs.BlockDatabase(found, method)
    by_block = torch.tensor([0.3, 0.5, 0.7, 0.4]).double()
    target = adaptive_runs.exact_target(bench.model, by_block, sparsity=0.475)
    with pruner.restored(bench.model) as model:
        database.write_(target)
        got = [layer.module.weight.clone() for layer in model.layers]
        database.write_(target)  # the model is not dense now, and what is asked for is there
        assert all(torch.equal(layer.module.weight, each) for layer, each in zip(model.layers, got, strict=True))
    counts = {layer.name: int((each == 0).sum()) for layer, each in zip(bench.model.layers, got, strict=True)}
    assert counts == target.removed
    with pruner.restored(bench.model) as model:
        if method.needs_calibration:
            pruner.prune_with_(model, method, target, database.found.statistics_for(method) or [])
        else:
            pruner.prune_(model, method, target, seed=1)
        assert all(torch.equal(layer.module.weight, each) for layer, each in zip(model.layers, got, strict=True))


def test_searches_never_do_worse_on_their_own_windows_than_uniform(bench: Bench) -> None:
    found = Calibrations(bench, 1)

    def loss(by_block: Tensor) -> float:
        with pruner.restored(bench.model) as model:
            target = adaptive_runs.exact_target(model, by_block, sparsity=0.5)
            adaptive_runs.BlockDatabase(found, ONE_SHOT).write_(target)
            return float(text_loss(model, found.windows, draws=bench.draws, seed=1).mean())

    uniform = loss(torch.full((4,), 0.5).double())
    for policy in ("ATP", "EvoPress"):
        got = adaptive_runs.searched(found, ONE_SHOT, policy, sparsity=0.5, spread=0.2, generations=3)
        assert float(got.mean()) == pytest.approx(0.5) and float((got - 0.5).abs().max()) <= 0.2 + 1e-9
        assert loss(got) <= uniform
        again = adaptive_runs.searched(found, ONE_SHOT, policy, sparsity=0.5, spread=0.2, generations=3)
        assert torch.equal(got, again)
    with pytest.raises(InputError, match="a search must prune with a one-shot method"):
        adaptive_runs.searched(found, Method("wanda"), "ATP", sparsity=0.5, spread=0.2, generations=1)


def test_comparators_are_measured_like_policies(bench: Bench) -> None:
    given = {"sparsity": 0.5, "seeds": [1], "spread": 0.1, "generations": 2}
    outcomes, shown = adaptive_runs.allocation_outcomes(bench, ONE_SHOT, ["uniform", *adaptive_runs.COMPARATORS], **given)
    assert [found.method for found in outcomes] == ["uniform", *adaptive_runs.COMPARATORS] == list(shown)
    assert len({round(found.measured_sparsity, 4) for found in outcomes}) == 1


@pytest.mark.parametrize("first", ["one larger block", "all blocks differ"])
def test_a_search_compares_equal_numbers_of_removed_weights(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks have unequal sizes a ramp, or a trade of levels, alone would remove other numbers."""
    few: Any = {"num_hidden_layers": 3, "num_experts": 4, "mlp_only_layers": [0]}  # a small dense block before two mixtures
    if first == "all blocks differ":
        few["num_hidden_layers"] = 2
    model = tiny.of_network(tiny.stacked("qwen3_moe", **few))
    sizes = adaptive_runs.block_sizes(model)
    assert len(set(sizes)) == 2 and sum(sizes) == sum(layer.module.weight.numel() for layer in model.layers)
    found = Calibrations(Bench(model, tiny.ids(6, 8), tiny.ids(2, 8, seed=1), 2, 1, 0), 1)
    totals: list[int] = []

    def noted(database: adaptive_runs.BlockDatabase, target: Target) -> None:
        """Write, and count the zeros that are there then."""
        write(database, target)
        totals.append(sum(int((layer.module.weight == 0).sum()) for layer in model.layers))

    write = adaptive_runs.BlockDatabase.write_
    monkeypatch.setattr(adaptive_runs.BlockDatabase, "write_", noted)
    for policy in ("ATP", "EvoPress"):
        got = adaptive_runs.searched(found, Method("magnitude"), policy, sparsity=0.5, spread=0.2, generations=1)
        assert float((got * torch.tensor(sizes)).sum()) == pytest.approx(0.5 * sum(sizes))
    assert len(totals) > 10 and set(totals) == {round(0.5 * sum(sizes))}


def test_a_policy_takes_the_time_of_its_search(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"searched": Effort(10.0, 5.0), "block_sparsities": Effort(1.0, 1.0), "prune_": Effort(0.5, 2.0)}

    def told(call: Any, *, device: torch.device) -> tuple[Any, Effort]:
        """Do the work, and say what was written down for it."""
        return call(), spent[call.func.__name__]

    for module in (adaptive_runs, runs):
        monkeypatch.setattr(module, "watched", told)
    given = {"sparsity": 0.5, "seeds": [1], "spread": 0.1, "generations": 1}
    outcomes, _ = adaptive_runs.allocation_outcomes(bench, MAGNITUDE, ["uniform", "ATP"], **given)
    assert [found.effort for found in outcomes] == [Effort(1.5, 2.0), Effort(10.5, 5.0)]
